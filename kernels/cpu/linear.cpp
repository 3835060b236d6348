// out = x W^T + bias for few rows of x, all in bfloat16, summed in float32: W is read once, as it lies, at the rate of
// memory. Several matrices that multiply the same x are one call: waking threads costs as much as a small matrix.
//
// With AMX, 16 x 32 numbers of W are a tile just as they lie; x is turned once, so that two numbers of each of its rows
// lie side by side (M = 1: it already is). Otherwise dot products of AVX-512.
//
// M rows of x, K columns (a multiple of 32), N rows of W (16 at least).

#include "linear.h"

#include <vector>

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t DEPTH = 32, MAX_ROWS = 32;
using Weights = Part<uint16_t>;

#ifdef __AMX_BF16__

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row of each tile
  uint8_t rows[16] = {};
};

// Tiles 0, 1: sums of even and odd steps for the first 16 rows of x; 2, 3: for those behind; 4, 5: W; 6, 7: x.
class Worker {
  const int64_t rows, inner, low, high;  // low + high = rows
  const uint16_t *const turned;
  Config before;  // another library's, which may count on it

 public:
  Worker(const uint16_t *turned, int64_t rows, int64_t inner)
    : rows(rows), inner(inner), low(std::min(rows, BLOCK)), high(rows - low), turned(turned) {
    _tile_storeconfig(&before);
    Config config;
    for (int tile = 0; tile < 8; tile++) {
      const bool behind = tile == 2 || tile == 3 || tile == 7;
      if (behind && !high) continue;
      config.rows[tile] = BLOCK;
      config.bytes[tile] = tile == 4 || tile == 5 ? 64 : 4 * (behind ? high : low);
    }
    _tile_loadconfig(&config);
  }
  ~Worker() {
    if (before.palette) _tile_loadconfig(&before);
    else _tile_release();
  }

  template <bool TWO> void multiply(const Weights &part, int64_t block, const uint16_t *next, int64_t next_stride) {
    const uint16_t *weight = part.weight + part.first(block) * part.stride;
    const int64_t step = part.stride * 2, wide = low * 4, wide_high = high * 4;
    const uint16_t *behind = turned + low * inner;
    _tile_zero(0);
    _tile_zero(1);
    if (TWO) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < inner; k += 2 * DEPTH) {
      const int64_t ahead = k + AHEAD / 2;
      const bool over = ahead >= inner;
      const uint16_t *line = over ? next + ahead - inner : weight + ahead;
      const int64_t stride = over ? next_stride : part.stride;
      for (int64_t row = 0; row < BLOCK; row++) ask(line + row * stride), ask(line + row * stride + DEPTH);
      _tile_loadd(6, turned + k * low, wide);
      _tile_loadd(4, weight + k, step);
      _tile_dpbf16ps(0, 4, 6);
      if (TWO) {
        _tile_loadd(7, behind + k * high, wide_high);
        _tile_dpbf16ps(2, 4, 7);
      }
      if (k + DEPTH == inner) break;
      _tile_loadd(6, turned + (k + DEPTH) * low, wide);
      _tile_loadd(5, weight + k + DEPTH, step);
      _tile_dpbf16ps(1, 5, 6);
      if (TWO) {
        _tile_loadd(7, behind + (k + DEPTH) * high, wide_high);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    alignas(64) float sums[2][BLOCK * BLOCK];  // [row of W, row of x]
    _tile_stored(0, sums[0], wide);
    _tile_stored(1, sums[1], wide);
    finish(part, block, sums, 0, low);
    if (!TWO) return;
    _tile_stored(2, sums[0], wide_high);
    _tile_stored(3, sums[1], wide_high);
    finish(part, block, sums, low, high);
  }

  void operator()(const Weights &part, int64_t block, const uint16_t *next, int64_t next_stride) {
    if (high) multiply<true>(part, block, next, next_stride);
    else multiply<false>(part, block, next, next_stride);
  }

 private:
  static void finish(const Weights &part, int64_t block, float (*sums)[BLOCK * BLOCK], int64_t first, int64_t count) {
    const __m512i across = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32((int)count));
    for (int64_t m = 0; m < count; m++) {
      const __m512 even = _mm512_i32gather_ps(across, sums[0] + m, 4);
      part.write(block, first + m, _mm512_add_ps(even, _mm512_i32gather_ps(across, sums[1] + m, 4)));
    }
  }
};

// [rows, K] -> [K / 32][16 pairs][rows][2], for the first 16 rows and then for those behind.
const uint16_t *turn(const uint16_t *x, int64_t rows, int64_t inner) {
  if (rows == 1) return x;
  thread_local std::vector<uint16_t> room;
  room.resize(rows * inner);
  const __m512i pairs = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t first = 0; first < rows; first += BLOCK) {
    const int64_t count = std::min(BLOCK, rows - first);
    const __m512i places = _mm512_mullo_epi32(pairs, _mm512_set1_epi32((int)count));
    uint16_t *to = room.data() + first * inner;
    for (int64_t k = 0; k < inner; k += DEPTH)
      for (int64_t m = 0; m < count; m++)
        _mm512_i32scatter_epi32(
          to + k * count + 2 * m, places, _mm512_loadu_si512(x + (first + m) * inner + k), 4);
  }
  return room.data();
}

#else

class Worker {
  const int64_t rows, inner;
  const uint16_t *const x;

 public:
  Worker(const uint16_t *x, int64_t rows, int64_t inner) : rows(rows), inner(inner), x(x) {}

  void operator()(const Weights &part, int64_t block, const uint16_t *next, int64_t next_stride) {
    for (int64_t m = 0; m < rows; m += 4) switch (std::min<int64_t>(4, rows - m)) {
      case 1: multiply<1>(part, block, next, next_stride, m); break;
      case 2: multiply<2>(part, block, next, next_stride, m); break;
      case 3: multiply<3>(part, block, next, next_stride, m); break;
      default: multiply<4>(part, block, next, next_stride, m);
    }
  }

 private:
  // COUNT rows of x from `m` on; 4 rows of W at a time. Behind the first rows of x the block lies in a cache.
  template <int COUNT>
  void multiply(const Weights &part, int64_t block, const uint16_t *next, int64_t next_stride, int64_t m) {
    alignas(64) float found[COUNT][BLOCK];
    const uint16_t *weight = part.weight + part.first(block) * part.stride;
    for (int64_t r = 0; r < BLOCK; r += 4) {
      const uint16_t *row = weight + r * part.stride;
      const uint16_t *after = r + 4 < BLOCK ? row + 4 * part.stride : next;
      const int64_t after_stride = r + 4 < BLOCK ? part.stride : next_stride;
      __m512 sums[COUNT][4];
      for (auto &of_row : sums) for (auto &sum : of_row) sum = _mm512_setzero_ps();
      for (int64_t k = 0; k < inner; k += DEPTH) {
        const int64_t ahead = k + AHEAD / 2;
        const bool over = ahead >= inner;
        const uint16_t *line = over ? after + ahead - inner : row + ahead;
        const int64_t stride = over ? after_stride : part.stride;
        __m512bh own[4];
        for (int i = 0; i < 4; i++) {
          if (m == 0) ask(line + i * stride);
          own[i] = (__m512bh)_mm512_loadu_si512(row + i * part.stride + k);
        }
        for (int c = 0; c < COUNT; c++) {
          const __m512bh with = (__m512bh)_mm512_loadu_si512(x + (m + c) * inner + k);
          for (int i = 0; i < 4; i++) sums[c][i] = _mm512_dpbf16_ps(sums[c][i], own[i], with);
        }
      }
      for (int c = 0; c < COUNT; c++) for (int i = 0; i < 4; i++) found[c][r + i] = _mm512_reduce_add_ps(sums[c][i]);
    }
    for (int c = 0; c < COUNT; c++) part.write(block, m + c, _mm512_load_ps(found[c]));
  }
};

const uint16_t *turn(const uint16_t *x, int64_t, int64_t) { return x; }

#endif

}  // namespace

// 0 where this process may use what the library was compiled for.
extern "C" int linear_prepare() {
#ifdef __AMX_BF16__
  return (int)syscall(SYS_arch_prctl, 0x1023, 18);  // ARCH_REQ_XCOMP_PERM of tile data
#else
  return 0;
#endif
}

// `parts` multiply the same x [rows, inner]; rows from 1 to MAX_ROWS.
extern "C" void linear_rows(const Weights *parts, int64_t count, const uint16_t *x, int64_t rows, int64_t inner) {
  const uint16_t *turned = turn(x, rows, inner);
  deal(parts, count, inner, 1 << 17, [&] { return Worker(turned, rows, inner); });
}
