// A decode step's attention on a CPU: the new token is written into its slot, and its query reads the slots in use.
// bfloat16 in and out; scores, softmax and sums in float32.
//
// Symbols: B batch, H query heads, K KV heads, G = H / K, P slots of a KV head, D and Dv head dimensions (multiples of
// 32). Where KV heads have budgets of their own, P are the slots of a row's heads together. A KV head is one item of
// work, or several splits of its slots where threads would idle; results of splits are combined by their shares of the
// softmax. Products of 16 slots with one query end in one vector of 16 scores.

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
  int64_t *lengths;                  // [B, K], without the new token; advanced
  const int64_t *offsets;            // [B, K] first slot of each head in its row, null where each has P of its own
  const bf16 *query, *key, *value;   // [B, H, D], [B, K, D], [B, K, Dv]
  bf16 *out;                         // [B, H, Dv]
  float *lse;                        // [B, H], natural
  int64_t B, H, K, P, D, Dv;
  int64_t query_strides[2], key_strides[2], value_strides[2];  // of batch and head
  float scale;
  int64_t sliding;  // last slots that are read, 0 for all

  int64_t group() const { return H / K; }
  int64_t start(int64_t head) const { return offsets ? head / K * P + offsets[head] : head * P; }
  bool is_full(int64_t head) const { return (offsets ? offsets[head] : 0) + lengths[head] >= P; }
  int64_t first(int64_t used) const { return sliding ? std::max<int64_t>(0, used - sliding) : 0; }
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
  const int64_t G;
  std::vector<float> scores;  // [G, CHUNK], then weights

 public:
  std::vector<float> sums, best, total;  // [G, Dv], [G] in powers of two, [G]

  explicit Worker(const Call &call)
      : call(call), G(call.group()), scores(G * CHUNK), sums(G * call.Dv), best(G), total(G) {}

  void attend(int64_t b, int64_t k, int64_t begin, int64_t end) {
    const bf16 *keys = call.keys + call.start(b * call.K + k) * call.D;
    const bf16 *values = call.values + call.start(b * call.K + k) * call.Dv;
    std::fill(sums.begin(), sums.end(), 0.f);
    std::fill(best.begin(), best.end(), LEAST);
    std::fill(total.begin(), total.end(), 0.f);
    for (int64_t start = begin; start < end; start += CHUNK) {
      const int64_t count = std::min(CHUNK, end - start);
      for (int64_t n = 0; n < count; n += BLOCK) score(b, k, keys + (start + n) * call.D, n, count - n);
      for (int64_t g = 0; g < G; g++) weigh(g, count);
      for (int64_t g = 0; g < G; g += MANY) add_of(g, values + start * call.Dv, count);
    }
  }

 private:
  // Scores of BLOCK slots, of which `left` are there: those behind are -infinity.
  void score(int64_t b, int64_t k, const bf16 *keys, int64_t n, int64_t left) {
    const __m512 scale = _mm512_set1_ps(call.scale * LOG2E);
    const __mmask16 there = left >= BLOCK ? 0xffff : (1 << left) - 1;
    const bf16 *rows[BLOCK];
    for (int64_t i = 0; i < BLOCK; i++) rows[i] = keys + std::min(i, left - 1) * call.D;
    for (int64_t g = 0; g < G; g++) {
      const bf16 *query = call.query + b * call.query_strides[0] + (k * G + g) * call.query_strides[1];
      __m512 products[BLOCK];
      for (auto &product : products) product = _mm512_setzero_ps();
      for (int64_t d = 0; d < call.D; d += WIDE) {
        const __m512bh own = (__m512bh)_mm512_loadu_si512(query + d);
        for (int64_t i = 0; i < BLOCK; i++)
          products[i] = _mm512_dpbf16_ps(products[i], (__m512bh)_mm512_loadu_si512(rows[i] + d), own);
      }
      const __m512 outside = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
      _mm512_storeu_ps(&scores[g * CHUNK + n], _mm512_mask_mul_ps(outside, there, sums_of(products), scale));
    }
  }

  // Scores of a query become weights; what is summed already shrinks where they bring a new maximum.
  void weigh(int64_t g, int64_t count) {
    float *own = &scores[g * CHUNK];
    __m512 highest = _mm512_set1_ps(best[g]), added = _mm512_setzero_ps();
    for (int64_t n = 0; n < count; n += BLOCK) highest = _mm512_max_ps(highest, _mm512_loadu_ps(own + n));
    const float peak = _mm512_reduce_max_ps(highest), shrink = std::exp2(best[g] - peak);
    for (int64_t n = 0; n < count; n += BLOCK) {
      const __m512 weights = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(own + n), _mm512_set1_ps(peak)));
      _mm512_storeu_ps(own + n, weights);
      added = _mm512_add_ps(added, weights);
    }
    if (shrink != 1.f) for (int64_t d = 0; d < call.Dv; d++) sums[g * call.Dv + d] *= shrink;
    total[g] = total[g] * shrink + _mm512_reduce_add_ps(added);
    best[g] = peak;
  }

  void add_of(int64_t g, const bf16 *values, int64_t count) {
    switch (std::min(MANY, G - g)) {
      case 1: return add<1>(g, values, count);
      case 2: return add<2>(g, values, count);
      case 3: return add<3>(g, values, count);
      case 4: return add<4>(g, values, count);
      case 5: return add<5>(g, values, count);
      case 6: return add<6>(g, values, count);
      case 7: return add<7>(g, values, count);
      default: return add<MANY>(g, values, count);
    }
  }

  // Values of `count` slots, weighted for COUNT queries from `g` on.
  template <int64_t COUNT> void add(int64_t g, const bf16 *values, int64_t count) {
    for (int64_t d = 0; d < call.Dv; d += WIDE) {
      __m512 low[COUNT], high[COUNT];
      for (int64_t i = 0; i < COUNT; i++) {
        low[i] = _mm512_loadu_ps(&sums[(g + i) * call.Dv + d]);
        high[i] = _mm512_loadu_ps(&sums[(g + i) * call.Dv + d + WIDE / 2]);
      }
      for (int64_t n = 0; n < count; n++) {
        const bf16 *value = values + n * call.Dv + d;
        const __m512 one = widened(value), other = widened(value + WIDE / 2);
        for (int64_t i = 0; i < COUNT; i++) {
          const __m512 weight = _mm512_set1_ps(scores[(g + i) * CHUNK + n]);
          low[i] = _mm512_fmadd_ps(weight, one, low[i]);
          high[i] = _mm512_fmadd_ps(weight, other, high[i]);
        }
      }
      for (int64_t i = 0; i < COUNT; i++) {
        _mm512_storeu_ps(&sums[(g + i) * call.Dv + d], low[i]);
        _mm512_storeu_ps(&sums[(g + i) * call.Dv + d + WIDE / 2], high[i]);
      }
    }
  }
};

void finish(const Call &call, int64_t b, int64_t k, const float *sums, const float *best, const float *total) {
  for (int64_t g = 0; g < call.group(); g++) {
    const int64_t head = b * call.H + k * call.group() + g;
    const __m512 share = _mm512_set1_ps(1.f / total[g]);
    for (int64_t d = 0; d < call.Dv; d += BLOCK)
      _mm256_storeu_si256(
          (__m256i *)(call.out + head * call.Dv + d),
          (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(sums + g * call.Dv + d), share)));
    call.lse[head] = (best[g] + std::log2(total[g])) * LN2;
  }
}

// One result of a KV head's splits, in the place of the first.
void combine(Worker *splits, int64_t count, int64_t G, int64_t Dv) {
  Worker &into = splits[0];
  for (int64_t g = 0; g < G; g++)
    for (int64_t s = 1; s < count; s++) {
      const Worker &from = splits[s];
      const float peak = std::max(into.best[g], from.best[g]);
      const float own = std::exp2(into.best[g] - peak), its = std::exp2(from.best[g] - peak);
      for (int64_t d = 0; d < Dv; d++) into.sums[g * Dv + d] = own * into.sums[g * Dv + d] + its * from.sums[g * Dv + d];
      into.total[g] = own * into.total[g] + its * from.total[g];
      into.best[g] = peak;
    }
}

}  // namespace

// 0, or 1 where a KV head has no free slot: nothing is written then.
extern "C" int append_attend(const Call *given) {
  const Call &call = *given;
  const int64_t heads = call.B * call.K;
  for (int64_t head = 0; head < heads; head++) if (call.is_full(head)) return 1;
  int64_t numbers = 0, most = 1;
  for (int64_t head = 0; head < heads; head++) {
    const int64_t b = head / call.K, k = head % call.K, slot = call.lengths[head]++;
    std::copy_n(call.key + b * call.key_strides[0] + k * call.key_strides[1], call.D,
                call.keys + (call.start(head) + slot) * call.D);
    std::copy_n(call.value + b * call.value_strides[0] + k * call.value_strides[1], call.Dv,
                call.values + (call.start(head) + slot) * call.Dv);
    const int64_t read = slot + 1 - call.first(slot + 1);
    numbers += read * (call.D + call.Dv);
    most = std::max(most, read);
  }
  const int64_t threads = numbers < PARALLEL ? 1 : omp_get_max_threads();
  const int64_t splits = std::max<int64_t>(1, std::min((threads + heads - 1) / heads, most / SPLIT));
  std::vector<Worker> workers(heads * splits, Worker(call));
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < heads * splits; item++) {
    const int64_t head = item / splits, split = item % splits;
    const int64_t used = call.lengths[head], first = call.first(used), read = used - first;
    workers[item].attend(head / call.K, head % call.K, first + read * split / splits, first + read * (split + 1) / splits);
  }
  for (int64_t head = 0; head < heads; head++) {
    Worker &own = workers[head * splits];
    combine(&own, splits, call.group(), call.Dv);
    finish(call, head / call.K, head % call.K, own.sums.data(), own.best.data(), own.total.data());
  }
  return 0;
}
