// What linear.cpp, linear8.cpp and linear32.cpp share: the matrices of one call, how their rows are dealt to threads.
//
// Blocks of 16 rows of W are dealt. Lines of W are asked for AHEAD bytes before they are read, the next block's where a
// row ends: the hardware does not look over the end of a row, and is behind most of the time.

#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t BLOCK = 16, AHEAD = 512;

template <class Number, class Value = uint16_t> struct Part {
  const Number *weight;   // [N, K]
  int64_t stride;         // numbers from one row of it to the next
  const float *scale;     // [N]: what a row is multiplied by, or null
  const Value *bias;      // [N], or null
  Value *out;             // [M, N]
  int64_t n;

  int64_t blocks() const { return (n + BLOCK - 1) / BLOCK; }
  // The last block is whole: it begins early, and what was done before is done again, and not written.
  int64_t first(int64_t block) const { return std::min(block * BLOCK, n - BLOCK); }

#ifdef __AVX512BF16__
  // sums of the block's 16 rows, of row m of x -> out, rounded to nearest even.
  void write(int64_t block, int64_t m, __m512 sums) const {
    const int64_t from = first(block);
    if (scale) sums = _mm512_mul_ps(sums, _mm512_loadu_ps(scale + from));
    if (bias) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(bias + from)));
      sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
    }
    const __mmask16 fresh = (__mmask16)(0xffffu << (block * BLOCK - from));
    _mm256_mask_storeu_epi16(out + m * n + from, fresh, (__m256i)_mm512_cvtneps_pbh(sums));
  }
#endif
};

inline void ask(const void *line) { _mm_prefetch((const char *)line, _MM_HINT_T0); }

// work(part, block, rows of the block behind it, their stride) for all blocks of all parts, by a Worker of each thread.
// Threads are woken from `least` numbers of W on.
template <class Number, class Value, class Make>
void deal(const Part<Number, Value> *parts, int64_t count, int64_t inner, int64_t least, const Make &make) {
  int64_t total = 0, numbers = 0;
  for (int64_t i = 0; i < count; i++) total += parts[i].blocks(), numbers += parts[i].n * inner;
#pragma omp parallel if (numbers >= least)
  {
    const int64_t threads = omp_get_num_threads(), own = omp_get_thread_num();
    int64_t block = total * own / threads, left = total * (own + 1) / threads - block;
    const Part<Number, Value> *part = parts;
    while (left && block >= part->blocks()) block -= part->blocks(), part++;
    if (left) {
      auto work = make();
      for (; left; left--) {
        const Part<Number, Value> *then = part;
        int64_t next = block + 1;
        if (next == part->blocks() && left > 1) next = 0, then++;
        const Number *rows = then->weight + then->first(next) * then->stride;
        work(*part, block, rows, then->stride);
        part = then, block = next;
      }
    }
  }
}

}  // namespace
