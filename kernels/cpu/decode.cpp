// A step's attention on a CPU: new tokens are written into their slots, and their queries read the slots in use, each
// those up to its own. bfloat16 in and out; scores, softmax and sums in float32.
//
// Symbols: B batch, H query heads, K KV heads, G = H / K, q new tokens, P slots of a KV head, D and Dv head dimensions
// (multiples of 32). Where KV heads have budgets of their own, P are the slots of a row's heads together. A KV head with
// its R = G q queries is one item of work, or several splits of its slots where threads would idle; results of splits are
// combined by their shares of the softmax. Products of 16 slots with one query end in one vector of 16 scores.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

using bf16 = uint16_t;
constexpr int64_t BLOCK = 16, CHUNK = 128, WIDE = 32;  // slots of a product, of a softmax; numbers of a vector
constexpr int64_t SPLIT = 512, MANY = 8;               // least slots of a split; queries whose sums are registers
constexpr int64_t PARALLEL = 1 << 18;                  // numbers of K and V from which threads are woken
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f, LEAST = -1e30f;

struct Call {
  bf16 *keys, *values;               // [B, K, P, D], [B, K, P, Dv]; or [B, P, D], [B, P, Dv]
  int64_t *lengths;                  // [B, K], without the new tokens; advanced
  const int64_t *offsets;            // [B, K] first slot of each head in its row, null where each has P of its own
  const bf16 *query, *key, *value;   // [B, H, q, D], [B, K, q, D], [B, K, q, Dv]
  bf16 *out;                         // [B, H, q, Dv]
  float *lse;                        // [B, H, q], natural
  int64_t B, H, K, q, P, D, Dv;
  int64_t query_strides[3], key_strides[3], value_strides[3];  // of batch, head and token
  float scale;
  int64_t sliding;  // last slots that are read, 0 for all

  int64_t rows() const { return H / K * q; }
  int64_t head(int64_t k, int64_t r) const { return k * (H / K) + r % (H / K); }
  int64_t token(int64_t r) const { return r / (H / K); }
  int64_t start(int64_t head) const { return offsets ? head / K * P + offsets[head] : head * P; }
  bool is_full(int64_t head) const { return (offsets ? offsets[head] : 0) + lengths[head] + q > P; }
  int64_t first(int64_t used) const { return sliding ? std::max<int64_t>(0, used - sliding) : 0; }
  int64_t used(int64_t head, int64_t token) const { return lengths[head] - (q - 1 - token); }
};

// Lane i of the result: all of v[i].
inline __m512 sums_of(const __m512 (&v)[16]) {
  __m512 pairs[8], fours[4], eights[2];
  for (int i = 0; i < 8; i++)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    const __m512d one = _mm512_castps_pd(pairs[2 * i]), other = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(one, other)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(one, other)));
  }
  for (int i = 0; i < 2; i++)
    eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x44),
                              _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88),
                       _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}

// 2^x to 1e-7 of itself, for x of at most 0.
inline __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.f), x);  // in this order NaN stays
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(1.5403530e-4f);
  for (float factor : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f})
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(sum, whole);
}

inline __m512 widened(const bf16 *from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

// One KV head's queries over some of its slots, a chunk at a time, relative to the highest score so far.
class Worker {
  const Call &call;
  const int64_t R;
  std::vector<float> scores;  // [R, CHUNK], then weights

 public:
  std::vector<float> sums, best, total;  // [R, Dv], [R] in powers of two, [R]

  explicit Worker(const Call &call)
      : call(call), R(call.rows()), scores(R * CHUNK), sums(R * call.Dv), best(R), total(R) {}

  void attend(int64_t b, int64_t k, int64_t begin, int64_t end) {
    const bf16 *keys = call.keys + call.start(b * call.K + k) * call.D;
    const bf16 *values = call.values + call.start(b * call.K + k) * call.Dv;
    std::fill(sums.begin(), sums.end(), 0.f);
    std::fill(best.begin(), best.end(), LEAST);
    std::fill(total.begin(), total.end(), 0.f);
    for (int64_t start = begin; start < end; start += CHUNK) {
      const int64_t count = std::min(CHUNK, end - start);
      for (int64_t n = 0; n < count; n += BLOCK) score(b, k, keys + (start + n) * call.D, start, n, count - n);
      for (int64_t r = 0; r < R; r++) weigh(r, count);
      for (int64_t r = 0; r < R; r += MANY) add_of(r, values + start * call.Dv, count);
    }
  }

 private:
  // Scores of BLOCK slots from start + n on, of which `left` are there: those that a query does not read are -infinity.
  void score(int64_t b, int64_t k, const bf16 *keys, int64_t start, int64_t n, int64_t left) {
    const __m512 scale = _mm512_set1_ps(call.scale * LOG2E);
    const auto below = [](int64_t count) { return (1u << std::clamp<int64_t>(count, 0, BLOCK)) - 1; };
    const bf16 *rows[BLOCK];
    for (int64_t i = 0; i < BLOCK; i++) rows[i] = keys + std::min(i, left - 1) * call.D;
    for (int64_t r = 0; r < R; r++) {
      const int64_t *strides = call.query_strides, used = call.used(b * call.K + k, call.token(r)) - start - n;
      const bf16 *query = call.query + b * strides[0] + call.head(k, r) * strides[1] + call.token(r) * strides[2];
      const __mmask16 there = below(std::min(left, used)) & ~below(call.sliding ? used - call.sliding : 0);
      __m512 products[BLOCK];
      for (auto &product : products) product = _mm512_setzero_ps();
      for (int64_t d = 0; d < call.D; d += WIDE) {
        const __m512bh own = (__m512bh)_mm512_loadu_si512(query + d);
        for (int64_t i = 0; i < BLOCK; i++)
          products[i] = _mm512_dpbf16_ps(products[i], (__m512bh)_mm512_loadu_si512(rows[i] + d), own);
      }
      const __m512 outside = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
      _mm512_storeu_ps(&scores[r * CHUNK + n], _mm512_mask_mul_ps(outside, there, sums_of(products), scale));
    }
  }

  // Scores of a query become weights; what is summed already shrinks where they bring a new maximum.
  void weigh(int64_t r, int64_t count) {
    float *own = &scores[r * CHUNK];
    __m512 highest = _mm512_set1_ps(best[r]), added = _mm512_setzero_ps();
    for (int64_t n = 0; n < count; n += BLOCK) highest = _mm512_max_ps(highest, _mm512_loadu_ps(own + n));
    const float peak = _mm512_reduce_max_ps(highest), shrink = std::exp2(best[r] - peak);
    for (int64_t n = 0; n < count; n += BLOCK) {
      const __m512 weights = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(own + n), _mm512_set1_ps(peak)));
      _mm512_storeu_ps(own + n, weights);
      added = _mm512_add_ps(added, weights);
    }
    if (shrink != 1.f) for (int64_t d = 0; d < call.Dv; d++) sums[r * call.Dv + d] *= shrink;
    total[r] = total[r] * shrink + _mm512_reduce_add_ps(added);
    best[r] = peak;
  }

  void add_of(int64_t r, const bf16 *values, int64_t count) {
    switch (std::min(MANY, R - r)) {
      case 1: return add<1>(r, values, count);
      case 2: return add<2>(r, values, count);
      case 3: return add<3>(r, values, count);
      case 4: return add<4>(r, values, count);
      case 5: return add<5>(r, values, count);
      case 6: return add<6>(r, values, count);
      case 7: return add<7>(r, values, count);
      default: return add<MANY>(r, values, count);
    }
  }

  // Values of `count` slots, weighted for COUNT queries from `r` on.
  template <int64_t COUNT> void add(int64_t r, const bf16 *values, int64_t count) {
    for (int64_t d = 0; d < call.Dv; d += WIDE) {
      __m512 low[COUNT], high[COUNT];
      for (int64_t i = 0; i < COUNT; i++) {
        low[i] = _mm512_loadu_ps(&sums[(r + i) * call.Dv + d]);
        high[i] = _mm512_loadu_ps(&sums[(r + i) * call.Dv + d + WIDE / 2]);
      }
      for (int64_t n = 0; n < count; n++) {
        const bf16 *value = values + n * call.Dv + d;
        const __m512 one = widened(value), other = widened(value + WIDE / 2);
        for (int64_t i = 0; i < COUNT; i++) {
          const __m512 weight = _mm512_set1_ps(scores[(r + i) * CHUNK + n]);
          low[i] = _mm512_fmadd_ps(weight, one, low[i]);
          high[i] = _mm512_fmadd_ps(weight, other, high[i]);
        }
      }
      for (int64_t i = 0; i < COUNT; i++) {
        _mm512_storeu_ps(&sums[(r + i) * call.Dv + d], low[i]);
        _mm512_storeu_ps(&sums[(r + i) * call.Dv + d + WIDE / 2], high[i]);
      }
    }
  }
};

void finish(const Call &call, int64_t b, int64_t k, const float *sums, const float *best, const float *total) {
  for (int64_t r = 0; r < call.rows(); r++) {
    const int64_t row = (b * call.H + call.head(k, r)) * call.q + call.token(r);
    const __m512 share = _mm512_set1_ps(1.f / total[r]);
    for (int64_t d = 0; d < call.Dv; d += BLOCK)
      _mm256_storeu_si256(
          (__m256i *)(call.out + row * call.Dv + d),
          (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(sums + r * call.Dv + d), share)));
    call.lse[row] = (best[r] + std::log2(total[r])) * LN2;
  }
}

// One result of a KV head's splits, in the place of the first.
void combine(Worker *splits, int64_t count, int64_t R, int64_t Dv) {
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

}  // namespace

// 0, or 1 where a KV head has no q free slots: nothing is written then.
extern "C" int append_attend(const Call *given) {
  const Call &call = *given;
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
    finish(call, head / call.K, head % call.K, own.sums.data(), own.best.data(), own.total.data());
  }
  return 0;
}
