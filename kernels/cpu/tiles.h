// What kernels for a CPU with AMX share: tiles of bfloat16, scores of 32 keys and 32 queries, exponentials.
//
// A strip is 32 queries of one head, a block 32 keys, a tile a register of 16 rows of 64 bytes. Scores lie as
// [key, query]: a vector holds one key's scores for 16 queries, so that maxima and sums over keys need no reduction
// across lanes, and the product is S = K Q^T.

#pragma once

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

namespace {

using bf16 = uint16_t;
constexpr int64_t STRIP = 32, TILE = 512;  // queries or keys; bfloat16 of a tile
constexpr float LEAST = -1e30f, LOG2E = 1.44269504f, LN2 = 0.69314718f;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void configure() {
  const TileConfig config;
  _tile_loadconfig(&config);
}

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

inline void load_sums(const float *at) {
  _tile_loadd(0, at, 64); _tile_loadd(1, at + 256, 64); _tile_loadd(2, at + 512, 64); _tile_loadd(3, at + 768, 64);
}
inline void store_sums(float *at) {
  _tile_stored(0, at, 64); _tile_stored(1, at + 256, 64); _tile_stored(2, at + 512, 64); _tile_stored(3, at + 768, 64);
}
// The sums [2][2] in tiles 0 to 3 += a[2] times b[2].
inline void multiply(const bf16 *a, const bf16 *b) {
  _tile_loadd(4, a, 64); _tile_loadd(6, b, 64); _tile_loadd(7, b + TILE, 64); _tile_loadd(5, a + TILE, 64);
  _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
}

// scores [2 halves of the keys][2 of the queries][16 keys][16 queries] of a block and a strip.
inline void score(const bf16 *keys, const bf16 *queries, int64_t D, float *scores) {
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int64_t d = 0; d < D; d += 32, keys += 2 * TILE, queries += 2 * TILE) multiply(keys, queries);
  store_sums(scores);
}

}  // namespace

// Ask the system for tiles, for all threads of the process. Returns 0 where it gives them.
extern "C" int allow() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */); }
