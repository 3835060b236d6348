// A step's attention on a CPU, without its arithmetic: new tokens are written into their slots, and their queries read
// the slots in use, each those up to its own.
//
// Symbols: B batch, H query heads, K KV heads, G = H / K, q new tokens, P slots of a KV head, D and Dv head dimensions.
// Where KV heads have budgets of their own, P are the slots of a row's heads together. A KV head with its R = G q
// queries is one item of work, or several splits of its slots where threads would idle; results of splits are combined
// by their shares of the softmax.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

using bf16 = uint16_t;
constexpr int64_t SPLIT = 512;          // least slots of a split
constexpr int64_t PARALLEL = 1 << 18;   // numbers of K and V from which threads are woken
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f, LEAST = -1e30f;
constexpr float OUTSIDE = -std::numeric_limits<float>::infinity();  // score of a slot that a query does not read

template <class T> struct Call {
  T *keys, *values;                  // [B, K, P, D], [B, K, P, Dv]; or [B, P, D], [B, P, Dv]
  int64_t *lengths;                  // [B, K], without the new tokens; advanced
  const int64_t *offsets;            // [B, K] first slot of each head in its row, null where each has P of its own
  const T *query, *key, *value;      // [B, H, q, D], [B, K, q, D], [B, K, q, Dv]
  T *out;                            // [B, H, q, Dv]
  float *lse;                        // [B, H, q], natural
  const float *sinks;                // [H] natural logits that belong to no key, or null
  int64_t B, H, K, q, P, D, Dv;
  int64_t query_strides[3], key_strides[3], value_strides[3];  // of batch, head and token
  float scale, softcap;              // logits are softcap * tanh(logits / softcap), 0 for none
  int64_t sliding, chunk;            // slots that are read: the last ones, or those of the same chunk; 0 for all

  int64_t rows() const { return H / K * q; }
  int64_t head(int64_t k, int64_t r) const { return k * (H / K) + r % (H / K); }
  int64_t token(int64_t r) const { return r / (H / K); }
  int64_t start(int64_t head) const { return offsets ? head / K * P + offsets[head] : head * P; }
  bool is_full(int64_t head) const { return (offsets ? offsets[head] : 0) + lengths[head] + q > P; }
  // Of a query that reads the slots below `used`: the first of them.
  int64_t first(int64_t used) const {
    return sliding ? std::max<int64_t>(0, used - sliding) : chunk ? (used - 1) / chunk * chunk : 0;
  }
  int64_t used(int64_t head, int64_t token) const { return lengths[head] - (q - 1 - token); }
};

// One result of a KV head's splits, in the place of the first.
template <class Worker> void combine(Worker *splits, int64_t count, int64_t R, int64_t Dv) {
  Worker &into = splits[0];
  for (int64_t r = 0; r < R; r++)
    for (int64_t s = 1; s < count; s++) {
      const Worker &from = splits[s];
      const float peak = std::max(into.best[r], from.best[r]);
      const float own = std::exp2(into.best[r] - peak), its = std::exp2(from.best[r] - peak);
      for (int64_t d = 0; d < Dv; d++) into.sums[r * Dv + d] = own * into.sums[r * Dv + d] + its * from.sums[r * Dv + d];
      into.total[r] = own * into.total[r] + its * from.total[r];
      into.best[r] = peak;
    }
}

template <class T, class Worker> void finish(const Call<T> &call, int64_t b, int64_t k, const Worker &found) {
  for (int64_t r = 0; r < call.rows(); r++) {
    const int64_t head = call.head(k, r), row = (b * call.H + head) * call.q + call.token(r);
    const float sink = call.sinks ? call.sinks[head] * LOG2E : LEAST, peak = std::max(found.best[r], sink);
    const float shrink = std::exp2(found.best[r] - peak), total = found.total[r] * shrink + std::exp2(sink - peak);
    Worker::write(call.out + row * call.Dv, &found.sums[r * call.Dv], shrink / total, call.Dv);
    call.lse[row] = (peak + std::log2(total)) * LN2;
  }
}

// 0, or 1 where a KV head has no q free slots: nothing is written then.
//
// Worker(call) attends to slots [begin, end) of a KV head by attend(b, k, begin, end), and has then sums [R, Dv] of
// values whose weights are relative to best [R], in powers of two, and total [R], their sum.
template <class T, class Worker> int append_attend(const Call<T> &call) {
  const int64_t heads = call.B * call.K;
  for (int64_t head = 0; head < heads; head++) if (call.is_full(head)) return 1;
  int64_t numbers = 0, most = 1;
  for (int64_t head = 0; head < heads; head++) {
    const int64_t b = head / call.K, k = head % call.K, slot = call.lengths[head], *from = call.key_strides;
    const int64_t *of = call.value_strides;
    for (int64_t i = 0; i < call.q; i++) {
      std::copy_n(call.key + b * from[0] + k * from[1] + i * from[2], call.D,
                  call.keys + (call.start(head) + slot + i) * call.D);
      std::copy_n(call.value + b * of[0] + k * of[1] + i * of[2], call.Dv,
                  call.values + (call.start(head) + slot + i) * call.Dv);
    }
    call.lengths[head] += call.q;
    const int64_t read = slot + call.q - call.first(slot + 1);
    numbers += read * (call.D + call.Dv) * call.q;
    most = std::max(most, read);
  }
  const int64_t threads = numbers < PARALLEL ? 1 : omp_get_max_threads();
  const int64_t splits = std::max<int64_t>(1, std::min((threads + heads - 1) / heads, most / SPLIT));
  std::vector<Worker> workers(heads * splits, Worker(call));
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < heads * splits; item++) {
    const int64_t head = item / splits, split = item % splits;
    const int64_t first = call.first(call.used(head, 0)), read = call.lengths[head] - first;
    workers[item].attend(head / call.K, head % call.K, first + read * split / splits, first + read * (split + 1) / splits);
  }
  for (int64_t head = 0; head < heads; head++) {
    Worker &own = workers[head * splits];
    combine(&own, splits, call.rows(), call.Dv);
    finish(call, head / call.K, head % call.K, own);
  }
  return 0;
}

}  // namespace
