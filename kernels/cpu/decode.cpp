// A step's attention on a CPU with AVX-512: see decode.h. bfloat16 in and out; scores, softmax and sums in float32.
// Products of 16 slots with one query end in one vector of 16 scores; D and Dv are multiples of 32.

#include <immintrin.h>

#include "decode.h"

namespace {

constexpr int64_t BLOCK = 16, CHUNK = 128, WIDE = 32;  // slots of a product, of a softmax; numbers of a vector
constexpr int64_t MANY = 8;                            // queries whose sums are registers

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
  const Call<bf16> &call;
  const int64_t R;
  std::vector<float> scores;  // [R, CHUNK], then weights

 public:
  std::vector<float> sums, best, total;  // [R, Dv], [R] in powers of two, [R]

  explicit Worker(const Call<bf16> &call)
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

  static void write(bf16 *out, const float *sums, float share, int64_t Dv) {
    const __m512 factor = _mm512_set1_ps(share);
    for (int64_t d = 0; d < Dv; d += BLOCK)
      _mm256_storeu_si256((__m256i *)(out + d), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(sums + d), factor)));
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
      const __m512 outside = _mm512_set1_ps(OUTSIDE);
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

}  // namespace

extern "C" int append_attend_bfloat16(const Call<bf16> *call) { return append_attend<bf16, Worker>(*call); }
