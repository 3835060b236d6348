// out = x W^T scale + bias for few rows of x, W in 8 bits with a scale for each of its rows: half the bytes of
// linear.cpp's. x becomes whole numbers of 16 bits once, with a scale for each GROUP of columns, so that one large
// number costs its own group's precision alone. Sums of a group are exact: each of 16 lanes adds 16 products, and
// 16 * 127 * 32767 < 2^31.
//
// M rows of x, K columns (a multiple of 64), N rows of W (16 at least).

#include "linear.h"

#include <cmath>
#include <vector>

namespace {

constexpr int64_t LINE = 64, GROUP = 256, TOGETHER = 4;
using Weights = Part<int8_t>;

struct Whole {
  std::vector<int16_t> numbers;  // [M, K]
  std::vector<float> scales;     // [M, groups]
};

inline __m512 widen(const uint16_t *from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

// A group with an infinity or NaN has the scale NaN: what is multiplied by it is no number either.
void whole(const uint16_t *x, int64_t rows, int64_t inner, Whole &to) {
  const int64_t groups = (inner + GROUP - 1) / GROUP;
  to.numbers.resize(rows * inner);
  to.scales.resize(rows * groups);
  for (int64_t m = 0; m < rows; m++)
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = m * inner + g * GROUP, count = std::min(GROUP, inner - g * GROUP);
      __m512 most = _mm512_setzero_ps(), none = _mm512_setzero_ps();
      for (int64_t k = 0; k < count; k += 16) {
        const __m512 own = _mm512_abs_ps(widen(x + first + k));
        most = _mm512_max_ps(most, own);
        none = _mm512_fmadd_ps(own, _mm512_setzero_ps(), none);  // NaN where a number is none, or infinite
      }
      const float high = _mm512_reduce_max_ps(most) + _mm512_reduce_add_ps(none);
      to.scales[m * groups + g] = high / 32767;
      const __m512 by = _mm512_set1_ps(high > 0 ? 32767 / high : 0);
      for (int64_t k = 0; k < count; k += 16)
        _mm256_storeu_si256(
          (__m256i *)(to.numbers.data() + first + k),
          _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(widen(x + first + k), by))));
    }
}

class Worker {
  const Whole &x;
  const int64_t rows, inner;

 public:
  Worker(const Whole &x, int64_t rows, int64_t inner) : x(x), rows(rows), inner(inner) {}

  void operator()(const Weights &part, int64_t block, const int8_t *next, int64_t next_stride) {
    for (int64_t m = 0; m < rows; m += TOGETHER) switch (std::min(TOGETHER, rows - m)) {
      case 1: multiply<1>(part, block, next, next_stride, m); break;
      case 2: multiply<2>(part, block, next, next_stride, m); break;
      case 3: multiply<3>(part, block, next, next_stride, m); break;
      default: multiply<TOGETHER>(part, block, next, next_stride, m);
    }
  }

 private:
  // COUNT rows of x from `m` on; 4 rows of W at a time. Behind the first rows of x the block lies in a cache.
  template <int COUNT>
  void multiply(const Weights &part, int64_t block, const int8_t *next, int64_t next_stride, int64_t m) {
    const int64_t groups = (inner + GROUP - 1) / GROUP;
    alignas(64) float found[COUNT][BLOCK];
    const int8_t *weight = part.weight + part.first(block) * part.stride;
    for (int64_t r = 0; r < BLOCK; r += 4) {
      const int8_t *row = weight + r * part.stride;
      const int8_t *after = r + 4 < BLOCK ? row + 4 * part.stride : next;
      const int64_t after_stride = r + 4 < BLOCK ? part.stride : next_stride;
      __m512 sums[COUNT][4];
      for (auto &of_row : sums) for (auto &sum : of_row) sum = _mm512_setzero_ps();
      for (int64_t g = 0; g < groups; g++) {
        __m512i whole[COUNT][4];
        for (auto &of_row : whole) for (auto &sum : of_row) sum = _mm512_setzero_si512();
        for (int64_t k = g * GROUP; k < std::min(inner, (g + 1) * GROUP); k += LINE) {
          if (m == 0) {
            const int64_t ahead = k + AHEAD;
            const bool over = ahead >= inner;
            const int8_t *line = over ? after + ahead - inner : row + ahead;
            for (int i = 0; i < 4; i++) ask(line + i * (over ? after_stride : part.stride));
          }
          for (int64_t half = k; half < k + LINE; half += LINE / 2) {
            __m512i own[4];
            for (int i = 0; i < 4; i++)
              own[i] = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(row + i * part.stride + half)));
            for (int c = 0; c < COUNT; c++) {
              const __m512i with = _mm512_loadu_si512(x.numbers.data() + (m + c) * inner + half);
              for (int i = 0; i < 4; i++) whole[c][i] = _mm512_dpwssd_epi32(whole[c][i], own[i], with);
            }
          }
        }
        for (int c = 0; c < COUNT; c++) {
          const __m512 scale = _mm512_set1_ps(x.scales[(m + c) * groups + g]);
          for (int i = 0; i < 4; i++) sums[c][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[c][i]), scale, sums[c][i]);
        }
      }
      for (int c = 0; c < COUNT; c++) for (int i = 0; i < 4; i++) found[c][r + i] = _mm512_reduce_add_ps(sums[c][i]);
    }
    for (int c = 0; c < COUNT; c++) part.write(block, m + c, _mm512_load_ps(found[c]));
  }
};

}  // namespace

// `parts` multiply the same x [rows, inner].
extern "C" void linear_rows8(const Weights *parts, int64_t count, const uint16_t *x, int64_t rows, int64_t inner) {
  thread_local Whole numbers;
  whole(x, rows, inner, numbers);
  const Whole &shared = numbers;
  deal(parts, count, inner, 1 << 17, [&] { return Worker(shared, rows, inner); });
}
