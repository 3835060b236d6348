// A step's attention on a CPU with AVX2: see decode.h. float32 or bfloat16 in and out, all arithmetic in float32.
// Products of 8 slots with one query end in one vector of 8 scores; D and Dv are multiples of 8.

#include "avx2.h"
#include "decode.h"

namespace {

constexpr int64_t BLOCK = LANES, CHUNK = 64;  // slots of a product, and of a softmax
constexpr int64_t MANY = 4;                   // queries whose sums are registers

// Lane i of the result: all of v[i].
inline __m256 sums_of(const __m256 (&v)[8]) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

// 2^x to 1e-7 of itself, for x of at most 0; 0 from -126.5 down.
inline __m256 power_of_two(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-127.f), x);  // in this order NaN stays
  const __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 rest = _mm256_sub_ps(x, whole);
  __m256 sum = _mm256_set1_ps(1.5403530e-4f);
  for (float factor : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f})
    sum = _mm256_fmadd_ps(sum, rest, _mm256_set1_ps(factor));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return _mm256_mul_ps(sum, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

// cap * tanh(x / cap) by 2^(-2 |x| / cap), which neither overflows nor is more than 1.
inline __m256 capped(__m256 x, float cap) {
  const __m256 sign = _mm256_and_ps(x, _mm256_set1_ps(-0.f)), size = _mm256_xor_ps(x, sign);
  const __m256 small = power_of_two(_mm256_mul_ps(size, _mm256_set1_ps(-2 * LOG2E / cap))), one = _mm256_set1_ps(1.f);
  const __m256 share = _mm256_div_ps(_mm256_sub_ps(one, small), _mm256_add_ps(one, small));
  return _mm256_or_ps(_mm256_mul_ps(share, _mm256_set1_ps(cap)), sign);
}

inline float highest_of(__m256 v) {
  float all[BLOCK];
  _mm256_storeu_ps(all, v);
  return *std::max_element(all, all + BLOCK);
}

// One KV head's queries over some of its slots, a chunk at a time, relative to the highest score so far.
template <class T> class Worker {
  const Call<T> &call;
  const int64_t R;
  std::vector<float> queries, scores;  // [R, D]; [R, CHUNK], then weights

 public:
  std::vector<float> sums, best, total;  // [R, Dv], [R] in powers of two, [R]

  explicit Worker(const Call<T> &call)
      : call(call), R(call.rows()), queries(R * call.D), scores(R * CHUNK), sums(R * call.Dv), best(R), total(R) {}

  void attend(int64_t b, int64_t k, int64_t begin, int64_t end) {
    const int64_t head = b * call.K + k;
    const T *keys = call.keys + call.start(head) * call.D, *values = call.values + call.start(head) * call.Dv;
    std::fill(sums.begin(), sums.end(), 0.f);
    std::fill(best.begin(), best.end(), LEAST);
    std::fill(total.begin(), total.end(), 0.f);
    for (int64_t r = 0; r < R; r++) {
      const T *from = call.query + b * call.query_strides[0] + call.head(k, r) * call.query_strides[1] +
                      call.token(r) * call.query_strides[2];
      for (int64_t d = 0; d < call.D; d += BLOCK) _mm256_storeu_ps(&queries[r * call.D + d], widened(from + d));
    }
    for (int64_t start = begin; start < end; start += CHUNK) {
      const int64_t count = std::min(CHUNK, end - start);
      for (int64_t n = 0; n < count; n += BLOCK) score(head, keys + (start + n) * call.D, start, n, count - n);
      for (int64_t r = 0; r < R; r++) weigh(r, count);
      for (int64_t r = 0; r < R; r += MANY) add_of(r, values + start * call.Dv, count);
    }
  }

  static void write(T *out, const float *sums, float share, int64_t Dv) {
    const __m256 factor = _mm256_set1_ps(share);
    for (int64_t d = 0; d < Dv; d += BLOCK) narrowed(out + d, _mm256_mul_ps(_mm256_loadu_ps(sums + d), factor));
  }

 private:
  // Scores of BLOCK slots from start + n on, of which `left` are there: those that a query does not read are -infinity.
  void score(int64_t head, const T *keys, int64_t start, int64_t n, int64_t left) {
    const __m256i slot = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const T *rows[BLOCK];
    for (int64_t i = 0; i < BLOCK; i++) rows[i] = keys + std::min(i, left - 1) * call.D;
    for (int64_t r = 0; r < R; r++) {
      const int64_t used = call.used(head, call.token(r)), first = call.first(used) - start - n;
      const int last = std::clamp<int64_t>(std::min(left, used - start - n), 0, BLOCK);
      const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(last), slot);
      const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(std::clamp<int64_t>(first, 0, BLOCK)), slot);
      __m256 products[BLOCK];
      for (auto &product : products) product = _mm256_setzero_ps();
      for (int64_t d = 0; d < call.D; d += BLOCK) {
        const __m256 own = _mm256_loadu_ps(&queries[r * call.D + d]);
        for (int64_t i = 0; i < BLOCK; i++) products[i] = _mm256_fmadd_ps(widened(rows[i] + d), own, products[i]);
      }
      __m256 logits = _mm256_mul_ps(sums_of(products), _mm256_set1_ps(call.scale));
      if (call.softcap) logits = capped(logits, call.softcap);
      const __m256 there = _mm256_castsi256_ps(_mm256_andnot_si256(before, below));
      const __m256 found = _mm256_mul_ps(logits, _mm256_set1_ps(LOG2E));
      _mm256_storeu_ps(&scores[r * CHUNK + n], _mm256_blendv_ps(_mm256_set1_ps(OUTSIDE), found, there));
    }
  }

  // Scores of a query become weights; what is summed already shrinks where they bring a new maximum.
  void weigh(int64_t r, int64_t count) {
    float *own = &scores[r * CHUNK];
    __m256 highest = _mm256_set1_ps(best[r]), added = _mm256_setzero_ps();
    for (int64_t n = 0; n < count; n += BLOCK) highest = _mm256_max_ps(highest, _mm256_loadu_ps(own + n));
    const float peak = highest_of(highest), shrink = std::exp2(best[r] - peak);
    for (int64_t n = 0; n < count; n += BLOCK) {
      const __m256 weights = power_of_two(_mm256_sub_ps(_mm256_loadu_ps(own + n), _mm256_set1_ps(peak)));
      _mm256_storeu_ps(own + n, weights);
      added = _mm256_add_ps(added, weights);
    }
    if (shrink != 1.f) for (int64_t d = 0; d < call.Dv; d++) sums[r * call.Dv + d] *= shrink;
    total[r] = total[r] * shrink + sum_of(added);
    best[r] = peak;
  }

  void add_of(int64_t r, const T *values, int64_t count) {
    switch (std::min(MANY, R - r)) {
      case 1: return add<1>(r, values, count);
      case 2: return add<2>(r, values, count);
      case 3: return add<3>(r, values, count);
      default: return add<MANY>(r, values, count);
    }
  }

  // Values of `count` slots, weighted for COUNT queries from `r` on.
  template <int64_t COUNT> void add(int64_t r, const T *values, int64_t count) {
    int64_t d = 0;
    for (; d + 2 * BLOCK <= call.Dv; d += 2 * BLOCK) add_at<COUNT, 2>(r, values + d, count, d);
    if (d < call.Dv) add_at<COUNT, 1>(r, values + d, count, d);
  }

  // In WIDE vectors from number d on.
  template <int64_t COUNT, int64_t WIDE> void add_at(int64_t r, const T *values, int64_t count, int64_t d) {
    __m256 found[COUNT][WIDE];
    for (int64_t i = 0; i < COUNT; i++)
      for (int64_t w = 0; w < WIDE; w++) found[i][w] = _mm256_loadu_ps(&sums[(r + i) * call.Dv + d + w * BLOCK]);
    for (int64_t n = 0; n < count; n++)
      for (int64_t w = 0; w < WIDE; w++) {
        const __m256 value = widened(values + n * call.Dv + w * BLOCK);
        for (int64_t i = 0; i < COUNT; i++)
          found[i][w] = _mm256_fmadd_ps(_mm256_set1_ps(scores[(r + i) * CHUNK + n]), value, found[i][w]);
      }
    for (int64_t i = 0; i < COUNT; i++)
      for (int64_t w = 0; w < WIDE; w++) _mm256_storeu_ps(&sums[(r + i) * call.Dv + d + w * BLOCK], found[i][w]);
  }
};

}  // namespace

extern "C" int append_attend_float32(const Call<float> *call) { return append_attend<float, Worker<float>>(*call); }
extern "C" int append_attend_bfloat16(const Call<bf16> *call) { return append_attend<bf16, Worker<bf16>>(*call); }
