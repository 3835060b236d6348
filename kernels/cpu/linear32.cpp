// out = x W^T + bias for few rows of x, float32 or bfloat16, with AVX2: products and sums in float32. W is read once, as
// it lies, at the rate of memory. Several matrices that multiply the same x are one call, as in linear.cpp.
//
// M rows of x, K columns (whole lines of 64 bytes), N rows of W (16 at least).

#include <cstdlib>
#include <vector>

#include "avx2.h"
#include "linear.h"

namespace {

constexpr int64_t SIDE = 4;  // rows of W that are read side by side

template <class T> class Worker {
  static constexpr int64_t LINE = 64 / sizeof(T);
  const int64_t rows, inner;
  const float *const x;

 public:
  Worker(const float *x, int64_t rows, int64_t inner) : rows(rows), inner(inner), x(x) {}

  void operator()(const Part<T, T> &part, int64_t block, const T *next, int64_t next_stride) {
    for (int64_t m = 0; m < rows; m += 2)
      if (rows - m == 1) multiply<1>(part, block, next, next_stride, m);
      else multiply<2>(part, block, next, next_stride, m);
  }

 private:
  // COUNT rows of x from `m` on. Behind the first rows of x the block lies in a cache.
  template <int64_t COUNT>
  void multiply(const Part<T, T> &part, int64_t block, const T *next, int64_t next_stride, int64_t m) {
    float found[COUNT][BLOCK];
    const T *weight = part.weight + part.first(block) * part.stride;
    for (int64_t r = 0; r < BLOCK; r += SIDE) {
      const T *row = weight + r * part.stride, *after = r + SIDE < BLOCK ? row + SIDE * part.stride : next;
      const int64_t after_stride = r + SIDE < BLOCK ? part.stride : next_stride;
      __m256 sums[COUNT][SIDE];
      for (auto &of_row : sums) for (auto &sum : of_row) sum = _mm256_setzero_ps();
      for (int64_t k = 0; k < inner; k += LINE) {
        const int64_t ahead = k + AHEAD / (int64_t)sizeof(T);
        const bool over = ahead >= inner;
        const T *line = over ? after + ahead - inner : row + ahead;
        const int64_t stride = over ? after_stride : part.stride;
        if (m == 0) for (int64_t i = 0; i < SIDE; i++) ask(line + i * stride);
        for (int64_t v = k; v < k + LINE; v += LANES)
          for (int64_t i = 0; i < SIDE; i++) {
            const __m256 own = widened(row + i * part.stride + v);
            for (int64_t c = 0; c < COUNT; c++)
              sums[c][i] = _mm256_fmadd_ps(own, _mm256_loadu_ps(x + (m + c) * inner + v), sums[c][i]);
          }
      }
      for (int64_t c = 0; c < COUNT; c++) for (int64_t i = 0; i < SIDE; i++) found[c][r + i] = sum_of(sums[c][i]);
    }
    for (int64_t c = 0; c < COUNT; c++) write(part, block, m + c, found[c]);
  }

  static void write(const Part<T, T> &part, int64_t block, int64_t m, const float *found) {
    const int64_t from = part.first(block);
    T values[BLOCK];
    for (int64_t i = 0; i < BLOCK; i += LANES) {
      __m256 sums = _mm256_loadu_ps(found + i);
      if (part.bias) sums = _mm256_add_ps(sums, widened(part.bias + from + i));
      narrowed(values + i, sums);
    }
    const int64_t done = block * BLOCK - from;  // rows of the block before
    std::copy(values + done, values + BLOCK, part.out + m * part.n + from + done);
  }
};

// x in float32, as it is or widened.
const float *wide(const float *x, int64_t) { return x; }
const float *wide(const bf16 *x, int64_t count) {
  thread_local std::vector<float> room;
  room.resize(count);
  for (int64_t i = 0; i < count; i += LANES) _mm256_storeu_ps(&room[i], widened(x + i));
  return room.data();
}

// Numbers of W from which threads are woken: where they sleep between calls, that takes as long as one reads megabytes.
int64_t least() {
  static const char *policy = std::getenv("OMP_WAIT_POLICY");
  return policy && (*policy == 'p' || *policy == 'P') ? 1 << 21 : 1 << 19;  // passive, or not
}

template <class T> void multiply(const Part<T, T> *parts, int64_t count, const T *x, int64_t rows, int64_t inner) {
  const float *given = wide(x, rows * inner);
  deal(parts, count, inner, least(), [&] { return Worker<T>(given, rows, inner); });
}

}  // namespace

extern "C" void linear_float32(const Part<float, float> *parts, int64_t count, const float *x, int64_t rows, int64_t inner) {
  multiply(parts, count, x, rows, inner);
}
extern "C" void linear_bfloat16(const Part<bf16, bf16> *parts, int64_t count, const bf16 *x, int64_t rows, int64_t inner) {
  multiply(parts, count, x, rows, inner);
}
