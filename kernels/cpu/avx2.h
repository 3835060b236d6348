// Eight numbers at a time with AVX2: float32 and bfloat16 in memory, float32 in registers.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

using bf16 = uint16_t;
constexpr int64_t LANES = 8;

inline __m256 widened(const float *from) { return _mm256_loadu_ps(from); }
inline __m256 widened(const bf16 *from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

inline void narrowed(float *to, __m256 v) { _mm256_storeu_ps(to, v); }
inline void narrowed(bf16 *to, __m256 v) {
  uint32_t words[LANES];
  std::memcpy(words, &v, sizeof words);
  for (int64_t i = 0; i < LANES; i++) {
    const bool is_nan = (words[i] & 0x7fffffff) > 0x7f800000;  // to the nearest, ties to even, and NaN stays
    to[i] = is_nan ? 0x7fc0 : (words[i] + 0x7fff + (words[i] >> 16 & 1)) >> 16;
  }
}

inline float sum_of(__m256 v) {
  float all[LANES], sum = 0;
  _mm256_storeu_ps(all, v);
  for (float one : all) sum += one;
  return sum;
}

}  // namespace
