// What a prompt's kernels for a CPU share: tiles of bfloat16, scores of 32 keys and 32 queries, exponentials.
//
// A strip is 32 queries of one head, a block 32 keys, a tile a register of 16 rows of 64 bytes. Scores lie as
// [key, query]: a vector holds one key's scores for 16 queries, so that maxima and sums over keys need no reduction
// across lanes, and the product is S = K Q^T. AMX multiplies tiles as they lie; without it AVX-512's dot products do.

#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using bf16 = uint16_t;
constexpr int64_t STRIP = 32, TILE = 512;  // queries or keys; bfloat16 of a tile
constexpr float LEAST = -1e30f, LOG2E = 1.44269504f, LN2 = 0.69314718f;

struct Free { void operator()(void *at) const { std::free(at); } };
template <class T> using Room = std::unique_ptr<T[], Free>;
template <class T> Room<T> room(int64_t count) {
  return Room<T>(static_cast<T *>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
}

// 2^y, relative error below 3e-6; y far below 0 gives 0. The polynomial is the minimax one of 2^r on [0, 1).
inline __m512 power(__m512 y) {
  const __m512 r = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(1.353416792e-2f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.201146061e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.414427569e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.930038345e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.000002593f));
  return _mm512_scalef_ps(p, y);  // p * 2^floor(y)
}

// A block of K -> [D / 32][2][16 keys][32]. `at(row)`: the address of a key, or null, which is a row of zeros.
template <class At> void pack_key(At at, int64_t D, bf16 *tiles) {
  for (int64_t row = 0; row < STRIP; row++) {
    const bf16 *from = at(row);
    for (int64_t d = 0; d < D; d += 32)
      _mm512_storeu_si512(tiles + (d + row) * 32, from ? _mm512_loadu_si512(from + d) : _mm512_setzero_si512());
  }
}

// A strip of Q -> [D / 32][2][16 pairs of d][16 queries][2].
void pack_query(const bf16 *query, int64_t stride, int64_t count, int64_t D, bf16 *tiles) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i at = _mm512_mullo_epi32(lane, _mm512_set1_epi32(stride * 2));
  for (int64_t d = 0; d < D; d += 32)
    for (int64_t half = 0; half < STRIP; half += 16) {
      const __mmask16 there = (1u << std::clamp<int64_t>(count - half, 0, 16)) - 1;
      for (int64_t pair = 0; pair < 32; pair += 2, tiles += 32)
        _mm512_storeu_si512(tiles, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, at,
                                                               query + half * stride + d + pair, 1));
    }
}

#ifdef __AMX_BF16__

// A thread's use of tiles.
class Tiles {
  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };

 public:
  Tiles() {
    const Config config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// sums [2 halves of a's rows][2 of b's columns][16][16] += the products of `count` pairs a [2][16 rows][32] and
// b [2][16 pairs][16 columns][2], each so many numbers behind the one before. FRESH: from 0.
template <bool FRESH>
void multiply(const bf16 *a, int64_t a_step, const bf16 *b, int64_t b_step, int64_t count, float *sums) {
  if (FRESH) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64); _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64); _tile_loadd(3, sums + 768, 64);
  }
  for (; count; count--, a += a_step, b += b_step) {
    _tile_loadd(4, a, 64); _tile_loadd(6, b, 64); _tile_loadd(7, b + TILE, 64); _tile_loadd(5, a + TILE, 64);
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64); _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64); _tile_stored(3, sums + 768, 64);
}

#else

struct Tiles {
  Tiles() {}
};

// The same; ROWS rows of `a` against all 32 columns stay in registers.
template <bool FRESH>
void multiply(const bf16 *a, int64_t a_step, const bf16 *b, int64_t b_step, int64_t count, float *sums) {
  constexpr int ROWS = 8;
  for (int64_t first = 0; first < STRIP; first += ROWS) {
    float *at = sums + first / 16 * 512 + first % 16 * 16;
    __m512 own[ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
      for (int half = 0; half < 2; half++)
        own[r][half] = FRESH ? _mm512_setzero_ps() : _mm512_load_ps(at + half * 256 + r * 16);
    for (int64_t i = 0; i < count; i++) {
      const bf16 *row = a + i * a_step + first * 32, *column = b + i * b_step;
      for (int64_t pair = 0; pair < 32; pair += 2, column += 32) {
        const __m512bh low = (__m512bh)_mm512_load_si512(column), high = (__m512bh)_mm512_load_si512(column + TILE);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          int32_t both;
          std::memcpy(&both, row + r * 32 + pair, 4);
          const __m512bh with = (__m512bh)_mm512_set1_epi32(both);
          own[r][0] = _mm512_dpbf16_ps(own[r][0], with, low);
          own[r][1] = _mm512_dpbf16_ps(own[r][1], with, high);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
      for (int half = 0; half < 2; half++) _mm512_store_ps(at + half * 256 + r * 16, own[r][half]);
  }
}

#endif

// scores [2 halves of the keys][2 of the queries][16 keys][16 queries] of a block and a strip.
inline void score(const bf16 *keys, const bf16 *queries, int64_t D, float *scores) {
  multiply<true>(keys, 2 * TILE, queries, 2 * TILE, D / 32, scores);
}

}  // namespace

// 0 where this process may multiply so; AMX: the system is asked for tiles, for all threads of the process.
extern "C" int allow() {
#ifdef __AMX_BF16__
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
#else
  return 0;
#endif
}
