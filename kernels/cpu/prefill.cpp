// Causal attention of a prompt on a CPU with AMX, bfloat16 in and out, scores and softmax in float32.
//
// As flash attention: a running maximum and sum for each query, never a row of scores in memory. Symbols: B batch,
// T columns, H query heads, K KV heads, G = H / K, D and Dv head dimensions (multiples of 32); a strip is 32 queries of
// one head, a block 32 keys, a tile a register of 16 rows of 64 bytes.
//
// Scores lie as [key, query]: a vector holds one key's scores for 16 queries, so that maxima and sums need no reduction
// across lanes, and the products are S = K Q^T and O^T = V^T P^T. K and V are brought into tiles once for each KV head.
// One item of work is G heads times R queries of a KV head; threads take items by turns, those with most keys first.
//
// The maximum that weights are relative to follows only where a score passes it by more than SLACK powers of two:
// weights stay finite, and most blocks rescale nothing. Weights are cut to bfloat16, and outputs divided by the sum of
// the cut weights, so that cutting has no bias; the log-sum-exp is of the uncut ones.

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

namespace {

using bf16 = uint16_t;
constexpr int64_t STRIP = 32, TILE = 512, MANY = 8;  // queries or keys; bfloat16 of a tile; blocks before P V
constexpr float SLACK = 8.f, LEAST = -1e30f, LOG2E = 1.44269504f, LN2 = 0.69314718f;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Call {
  const bf16 *query, *key, *value;  // [B, H, T, D], [B, K, T, D], [B, K, T, Dv], strides below, rows contiguous
  bf16 *out;                        // [B, T, H, Dv]
  float *lse;                       // [B, H, T]
  bf16 *keys, *values;              // room for K and V in tiles: B * K * columns * D, and * Dv
  int64_t B, H, K, T, D, Dv, query_strides[3], key_strides[3], value_strides[3];  // strides of B, heads, T
  float scale;                      // above 0
  int64_t window;                   // a query reads that many positions, its own included; 0: all
  int64_t G, R, columns;            // R queries an item; columns: T in whole blocks
};

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

// A block of K -> [D / 32][2][16 keys][32]; rows behind `count` are 0.
void pack_key(const bf16 *key, int64_t stride, int64_t count, int64_t D, bf16 *tiles) {
  for (int64_t d = 0; d < D; d += 32)
    for (int64_t row = 0; row < STRIP; row++, tiles += 32)
      _mm512_storeu_si512(tiles, row < count ? _mm512_loadu_si512(key + row * stride + d) : _mm512_setzero_si512());
}

// A block of V -> [Dv / 16][16][32 keys].
void pack_value(const bf16 *value, int64_t stride, int64_t count, int64_t Dv, bf16 *tiles) {
  for (int64_t d = 0; d < Dv; d++)
    for (int64_t row = 0; row < STRIP; row++) *tiles++ = row < count ? value[row * stride + d] : 0;
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

// out [Dv / 16][2 halves of the queries][16][16 queries] += V^T P^T, for blocks first .. end - 1;
// weights [block][2 halves of the queries][16 pairs of keys][16 queries][2].
void add_values(const bf16 *values, const bf16 *weights, int64_t first, int64_t end, int64_t Dv, float *out) {
  if (first == end) return;
  for (int64_t d = 0; d < Dv; d += 32, out += 1024) {
    load_sums(out);
    for (int64_t i = first; i < end; i++) multiply(values + i * STRIP * Dv + d * STRIP, weights + i * 2 * TILE);
    store_sums(out);
  }
}

// Scores of keys that a query does not read become -inf. `ahead`: the block's first key less the strip's first query.
void hide(float *scores, int64_t ahead, int64_t window) {
  const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const auto below = [](int64_t lane) { return (1u << std::clamp<int64_t>(lane, 0, 16)) - 1; };
  for (int64_t key = 0; key < STRIP; key++)
    for (int64_t half = 0; half < 2; half++) {
      const int64_t own = ahead + key - half * 16;  // the lane whose position is the key's
      const __mmask16 seen = (window ? below(own + window) : 0xffff) & ~below(own);
      float *at = scores + (key / 16 * 2 + half) * 256 + key % 16 * 16;
      _mm512_store_ps(at, _mm512_mask_mov_ps(none, seen, _mm512_load_ps(at)));
    }
}

// The largest score of each query of a half.
inline __m512 largest(const float *scores) {
  __m512 found[4];
  for (int64_t i = 0; i < 4; i++) found[i] = _mm512_load_ps(scores + i * 16);
  for (int64_t half = 0; half < 2; half++, scores += 512)
    for (int64_t i = 0; i < 16; i++) found[i % 4] = _mm512_max_ps(found[i % 4], _mm512_load_ps(scores + i * 16));
  return _mm512_max_ps(_mm512_max_ps(found[0], found[1]), _mm512_max_ps(found[2], found[3]));
}

// Of 16 queries, relative to 2^top: the sum of all weights, and of their bfloat16 parts.
struct Sums { __m512 top, all, cut; };

// scores of a half -> weights [16 pairs of keys][16 queries][2], and their sums.
inline void weigh(const float *scores, __m512 scale, bf16 *weights, Sums &sums) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  __m512 even = _mm512_setzero_ps(), odd = even, cut = even;
  for (int64_t half = 0; half < 2; half++, scores += 512)
    for (int64_t i = 0; i < 16; i += 2, weights += 32) {
      const __m512 low = power(_mm512_fmsub_ps(_mm512_load_ps(scores + i * 16), scale, sums.top));
      const __m512 high = power(_mm512_fmsub_ps(_mm512_load_ps(scores + i * 16 + 16), scale, sums.top));
      const __m512i down = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
      const __m512i both = _mm512_mask_blend_epi16(0xAAAAAAAA, down, _mm512_castps_si512(high));
      even = _mm512_add_ps(even, low), odd = _mm512_add_ps(odd, high);
      cut = _mm512_dpbf16_ps(cut, (__m512bh)both, ones);
      _mm512_store_si512(weights, both);
    }
  sums.all = _mm512_add_ps(sums.all, _mm512_add_ps(even, odd));
  sums.cut = _mm512_add_ps(sums.cut, cut);
}

// Sums and outputs of a half become relative to a larger maximum.
void raise(__m512 top, Sums &sums, float *out, int64_t Dv) {
  const __m512 by = power(_mm512_sub_ps(sums.top, top));
  sums = {top, _mm512_mul_ps(sums.all, by), _mm512_mul_ps(sums.cut, by)};
  for (int64_t d = 0; d < Dv / 16; d++)
    for (int64_t i = 0; i < 16; i++) {
      float *at = out + d * 512 + i * 16;
      _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), by));
    }
}

// What a thread holds of its item: queries, outputs, sums, and the scores and weights of one strip.
class Worker {
 public:
  explicit Worker(const Call &call)
      : c(call), scale(_mm512_set1_ps(call.scale * LOG2E)), queries(room<bf16>(c.G * c.R * c.D)),
        out(room<float>(c.G * c.R * c.Dv)), sums(room<Sums>(c.G * c.R / 16)), scores(room<float>(2 * 1024)),
        weights(room<bf16>(MANY * 2 * TILE)) {}

  // Queries first .. first + R - 1 of the G heads of a KV head.
  void item(int64_t b, int64_t head, int64_t first) {
    const int64_t count = std::min(c.R, c.T - first), end = first + (count + 31) / 32 * 32;
    const Sums none = {_mm512_set1_ps(LEAST), _mm512_setzero_ps(), _mm512_setzero_ps()};
    std::fill_n(sums.get(), c.G * c.R / 16, none);
    std::memset(out.get(), 0, c.G * c.R * c.Dv * sizeof(float));
    for (int64_t g = 0; g < c.G; g++)
      for (int64_t row = first; row < end; row += STRIP)
        pack_query(c.query + b * c.query_strides[0] + (head * c.G + g) * c.query_strides[1] + row * c.query_strides[2],
                   c.query_strides[2], c.T - row, c.D, queries.get() + (g * c.R + row - first) * c.D);
    const int64_t read = c.window ? std::max<int64_t>(0, first - c.window + 1) / STRIP * STRIP : 0;
    for (int64_t column = read; column < end; column += MANY * STRIP)
      for (int64_t g = 0; g < c.G; g++)
        for (int64_t row = first; row < end; row += STRIP)
          strip(row, column, (b * c.K + head) * c.columns + column, g * c.R + row - first);
    for (int64_t g = 0; g < c.G; g++)
      for (int64_t row = 0; row < count; row++) write(b, head * c.G + g, first + row, g * c.R + row);
  }

 private:
  // A strip over MANY blocks from `column` on, whose tiles begin at `packed`. The next block's scores are asked for
  // before this one's are weighed.
  void strip(int64_t row, int64_t column, int64_t packed, int64_t slot) {
    const int64_t end = row < column ? 0 : std::min(MANY, (row - column) / STRIP + 1);
    const int64_t begin = c.window ? std::max<int64_t>(0, row - c.window + 1 - column) / STRIP : 0;
    if (begin >= end) return;
    const bf16 *key = c.keys + packed * c.D, *value = c.values + packed * c.Dv, *query = queries.get() + slot * c.D;
    float *sum = out.get() + slot * c.Dv;
    const auto at = [this](int64_t block) { return scores.get() + (block & 1) * 1024; };
    int64_t added = begin;
    score(key + begin * STRIP * c.D, query, c.D, at(begin));
    for (int64_t block = begin; block < end; block++) {
      if (block + 1 < end) score(key + (block + 1) * STRIP * c.D, query, c.D, at(block + 1));
      const int64_t ahead = column + block * STRIP - row;
      if (ahead > -STRIP || (c.window && ahead < STRIP - c.window)) hide(at(block), ahead, c.window);
      for (int64_t half = 0; half < 2; half++) {
        Sums &own = sums[slot / 16 + half];
        const __m512 top = _mm512_mul_ps(largest(at(block) + half * 256), scale);
        if (_mm512_cmp_ps_mask(top, _mm512_add_ps(own.top, _mm512_set1_ps(SLACK)), _CMP_GT_OQ)) {
          add_values(value, weights.get(), added, block, c.Dv, sum);  // relative to the old maximum
          added = block;
          raise(_mm512_max_ps(top, own.top), own, sum + half * 256, c.Dv);
        }
        weigh(at(block) + half * 256, scale, weights.get() + (block * 2 + half) * TILE, own);
      }
    }
    add_values(value, weights.get(), added, end, c.Dv, sum);
  }

  void write(int64_t b, int64_t head, int64_t row, int64_t slot) {
    const auto lane = [&](const __m512 Sums::*which) {
      return reinterpret_cast<const float *>(&(sums[slot / 16].*which))[slot % 16];
    };
    const __m512 by = _mm512_set1_ps(1 / lane(&Sums::cut));
    const __m512i apart = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 4);
    const float *from = out.get() + slot / 32 * 32 * c.Dv + slot % 32 / 16 * 256 + slot % 16;
    bf16 *to = c.out + ((b * c.T + row) * c.H + head) * c.Dv;
    for (int64_t d = 0; d < c.Dv; d += 32, from += 1024) {
      const __m512 low = _mm512_mul_ps(_mm512_i32gather_ps(apart, from, 4), by);
      const __m512 high = _mm512_mul_ps(_mm512_i32gather_ps(apart, from + 512, 4), by);
      _mm512_storeu_si512(to + d, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    c.lse[(b * c.H + head) * c.T + row] = lane(&Sums::top) * LN2 + std::log(lane(&Sums::all));
  }

  const Call &c;
  const __m512 scale;
  Room<bf16> queries;
  Room<float> out;
  Room<Sums> sums;
  Room<float> scores;
  Room<bf16> weights;
};

// Queries an item: enough to read K and V seldom, few enough for a second-level cache and for all threads.
int64_t queries_of_an_item(const Call &c) {
  int64_t R = std::clamp<int64_t>(98304 / (c.G * std::max(c.D, c.Dv)), 32, 256) / 32 * 32;
  while (R > 32 && c.B * c.K * ((c.T + R - 1) / R) < 4 * omp_get_max_threads()) R = std::max<int64_t>(R / 64 * 32, 32);
  return R;
}

}  // namespace

// Ask the system for tiles, for all threads of the process. Returns 0 where it gives them.
extern "C" int allow() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */); }

extern "C" void prefill(const Call *given) {
  Call c = *given;
  c.G = c.H / c.K, c.R = queries_of_an_item(c), c.columns = (c.T + 31) / 32 * 32;
  const int64_t heads = c.B * c.K, blocks = c.columns / STRIP, items = (c.T + c.R - 1) / c.R;
  std::atomic<int64_t> next{0};
#pragma omp parallel
  {
#pragma omp for
    for (int64_t i = 0; i < heads * blocks; i++) {
      const int64_t b = i / blocks / c.K, head = i / blocks % c.K, row = i % blocks * STRIP;
      const int64_t at = i / blocks * c.columns + row, *k = c.key_strides, *v = c.value_strides;
      pack_key(c.key + b * k[0] + head * k[1] + row * k[2], k[2], c.T - row, c.D, c.keys + at * c.D);
      pack_value(c.value + b * v[0] + head * v[1] + row * v[2], v[2], c.T - row, c.Dv, c.values + at * c.Dv);
    }
    const TileConfig config;
    _tile_loadconfig(&config);
    Worker worker(c);
    for (int64_t i; (i = next++) < heads * items;)
      worker.item(i % heads / c.K, i % heads % c.K, (items - 1 - i / heads) * c.R);
    _tile_release();
  }
}
