// Causal attention of a prompt on a CPU, bfloat16 in and out, scores and softmax in float32.
//
// As flash attention: a running maximum and sum for each query, never a row of scores in memory. Symbols: B batch,
// T columns, H query heads, K KV heads, G = H / K, D and Dv head dimensions (multiples of 32); strips, blocks and tiles
// are those of tiles.h.
//
// K and V are brought into tiles once for each KV head; the products are S = K Q^T and O^T = V^T P^T.
// One item of work is G heads times R queries of a KV head; threads take items by turns, those with most keys first.
//
// Sparse: a query reads the last `window` positions, and of those in front of them the ones chosen for its KV head,
// whose keys and values are brought into tiles a second time, in order. Queries in `exact` read all.
//
// The maximum that weights are relative to follows only where a score passes it by more than SLACK powers of two:
// weights stay finite, and most blocks rescale nothing. Weights are cut to bfloat16, and outputs divided by the sum of
// the cut weights, so that cutting has no bias; the log-sum-exp is of the uncut ones.

#include "tiles.h"

#include <atomic>
#include <vector>

namespace {

constexpr int64_t MANY = 8;    // blocks before P V
constexpr float SLACK = 8.f;  // powers of two

struct Call {
  const bf16 *query, *key, *value;  // [B, H, T, D], [B, K, T, D], [B, K, T, Dv], strides below, rows contiguous
  bf16 *out;                        // [B, T, H, Dv]
  float *lse;                       // [B, H, T]
  bf16 *keys, *values;              // room for K and V in tiles: B * K * columns * D, and * Dv
  int64_t B, H, K, T, D, Dv, query_strides[3], key_strides[3], value_strides[3];  // strides of B, heads, T
  float scale;                      // above 0
  int64_t window;                   // a query reads that many positions, its own included; 0: all
  const int64_t *chosen, *exact;    // sparse: [B, K, V] positions, ascending, -1 last; [B, 2] first exact query and end
  bf16 *chosen_keys, *chosen_values;  // room for those in tiles: B * K * V in whole blocks * D, and * Dv
  int64_t V;
  int64_t G, R, columns, far;       // R queries an item; columns, far: T and V in whole blocks
};

struct Item {
  int64_t b, head, first, end, window;  // queries first .. end - 1 of the G heads of a KV head
  bool sparse;
  int64_t cost(int64_t V) const {
    return (end - first) * (window ? std::min(end, window + (sparse ? V : 0)) : end);
  }
};

// A block of V -> [Dv / 16][16][32 keys].
template <class At> void pack_value(At at, int64_t Dv, bf16 *tiles) {
  for (int64_t row = 0; row < STRIP; row++) {
    const bf16 *from = at(row);
    for (int64_t d = 0; d < Dv; d++) tiles[d * 32 + row] = from ? from[d] : 0;
  }
}

// out [Dv / 16][2 halves of the queries][16][16 queries] += V^T P^T, for blocks first .. end - 1;
// weights [block][2 halves of the queries][16 pairs of keys][16 queries][2].
void add_values(const bf16 *values, const bf16 *weights, int64_t first, int64_t end, int64_t Dv, float *out) {
  if (first == end) return;
  for (int64_t d = 0; d < Dv; d += 32, out += 1024)
    multiply<false>(values + first * STRIP * Dv + d * STRIP, STRIP * Dv, weights + first * 2 * TILE, 2 * TILE,
                    end - first, out);
}

// Scores of keys that a query does not read become -inf. A key is read from the lane `from(key)` of its strip on, by
// `count` queries.
template <class From> void hide(float *scores, From from, int64_t count) {
  const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const auto below = [](int64_t lane) { return (1u << std::clamp<int64_t>(lane, 0, 16)) - 1; };
  for (int64_t key = 0; key < STRIP; key++)
    for (int64_t half = 0; half < 2; half++) {
      const int64_t first = from(key) - half * 16;
      const __mmask16 seen = below(first + count) & ~below(first);
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

  void item(const Item &i) {
    const Sums none = {_mm512_set1_ps(LEAST), _mm512_setzero_ps(), _mm512_setzero_ps()};
    std::fill_n(sums.get(), c.G * c.R / 16, none);
    std::memset(out.get(), 0, c.G * c.R * c.Dv * sizeof(float));
    const int64_t *q = c.query_strides;
    each_strip(i, [&](int64_t g, int64_t row, int64_t slot) {
      pack_query(c.query + i.b * q[0] + (i.head * c.G + g) * q[1] + row * q[2], q[2], c.T - row, c.D,
                 queries.get() + slot * c.D);
    });
    if (i.sparse) read_chosen(i);
    read_columns(i);
    for (int64_t g = 0; g < c.G; g++)
      for (int64_t row = i.first; row < i.end; row++) write(i.b, i.head * c.G + g, row, g * c.R + row - i.first);
  }

 private:
  template <class Do> void each_strip(const Item &i, Do act) {
    for (int64_t g = 0; g < c.G; g++)
      for (int64_t row = i.first; row < i.end; row += STRIP) act(g, row, g * c.R + row - i.first);
  }

  // The window's positions, or all up to a query's own.
  void read_columns(const Item &i) {
    const int64_t w = i.window, tiles = (i.b * c.K + i.head) * c.columns;
    const int64_t read = w ? std::max<int64_t>(0, i.first - w + 1) / STRIP * STRIP : 0;
    for (int64_t column = read; column < i.end; column += MANY * STRIP)
      each_strip(i, [&](int64_t, int64_t row, int64_t slot) {
        const int64_t end = std::min(row / STRIP * STRIP + (row % STRIP ? 2 : 1) * STRIP, c.columns) - column;
        const int64_t begin = w ? std::max<int64_t>(0, row - w + 1 - column) / STRIP : 0;
        add(slot, c.keys + (tiles + column) * c.D, c.values + (tiles + column) * c.Dv, begin,
            std::min(MANY, end / STRIP), [&](int64_t block, float *found) {
              const int64_t ahead = column + block * STRIP - row;
              if (ahead > -STRIP || (w && ahead < STRIP - w))
                hide(found, [ahead](int64_t key) { return ahead + key; }, w ? w : c.T);
            });
      });
  }

  // Chosen positions in front of the window.
  void read_chosen(const Item &i) {
    const int64_t tiles = (i.b * c.K + i.head) * c.far, *position = c.chosen + (i.b * c.K + i.head) * c.V;
    const auto at = [&](int64_t key) { return key < c.V && position[key] >= 0 ? position[key] : c.T; };
    for (int64_t block = 0; block < c.far / STRIP && at(block * STRIP) <= i.end - i.window; block += MANY)
      each_strip(i, [&](int64_t, int64_t row, int64_t slot) {
        const int64_t far = row - i.window;  // the strip's first query reads chosen positions up to this one
        int64_t end = 0;
        while (end < MANY && block + end < c.far / STRIP && at((block + end) * STRIP) < far + STRIP) end++;
        const int64_t first = tiles + block * STRIP;
        add(slot, c.chosen_keys + first * c.D, c.chosen_values + first * c.Dv, 0, end, [&](int64_t one, float *found) {
          const int64_t key = (block + one) * STRIP;
          if (at(key + STRIP - 1) > far) hide(found, [&](int64_t j) { return at(key + j) - far; }, c.T);
        });
      });
  }

  // A strip over the blocks begin .. end - 1 (of MANY) of a group. The next block's scores are asked for before this
  // one's are weighed. `mask(block, scores)` hides what is not read.
  template <class Mask>
  void add(int64_t slot, const bf16 *key, const bf16 *value, int64_t begin, int64_t end, Mask mask) {
    if (begin >= end) return;
    const bf16 *query = queries.get() + slot * c.D;
    float *sum = out.get() + slot * c.Dv;
    const auto at = [this](int64_t block) { return scores.get() + (block & 1) * 1024; };
    int64_t added = begin;
    score(key + begin * STRIP * c.D, query, c.D, at(begin));
    for (int64_t block = begin; block < end; block++) {
      if (block + 1 < end) score(key + (block + 1) * STRIP * c.D, query, c.D, at(block + 1));
      mask(block, at(block));
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

// All queries, in items; those that cost most first.
std::vector<Item> items_of(const Call &c) {
  std::vector<Item> items;
  for (int64_t b = 0; b < c.B; b++)
    for (int64_t head = 0; head < c.K; head++) {
      const auto cut = [&](int64_t first, int64_t end, int64_t window, bool sparse) {
        for (; first < end; first += c.R) items.push_back({b, head, first, std::min(first + c.R, end), window, sparse});
      };
      const int64_t begin = c.chosen ? c.exact[b * 2] : 0, end = c.chosen ? c.exact[b * 2 + 1] : c.T;
      cut(0, begin, c.window, true);
      cut(begin, end, c.chosen ? 0 : c.window, false);
      cut(end, c.T, c.window, true);
    }
  std::stable_sort(items.begin(), items.end(),
                   [&](const Item &one, const Item &other) { return one.cost(c.V) > other.cost(c.V); });
  return items;
}

// The block of keys and values from `row` on, for a KV head and its tiles at `to`; `position(row)` is -1 for none.
template <class Position>
void pack(const Call &c, int64_t head, int64_t to, bf16 *keys, bf16 *values, Position position) {
  const int64_t b = head / c.K, *k = c.key_strides, *v = c.value_strides;
  const auto in = [&](const bf16 *from, const int64_t *strides) {
    return [=](int64_t row) {
      const int64_t at = position(row);
      return at < 0 ? nullptr : from + b * strides[0] + head % c.K * strides[1] + at * strides[2];
    };
  };
  pack_key(in(c.key, k), c.D, keys + to * c.D);
  pack_value(in(c.value, v), c.Dv, values + to * c.Dv);
}

}  // namespace

extern "C" void prefill(const Call *given) {
  Call c = *given;
  c.G = c.H / c.K, c.R = queries_of_an_item(c);
  c.columns = (c.T + 31) / 32 * 32, c.far = (c.V + 31) / 32 * 32;
  const int64_t heads = c.B * c.K, blocks = c.columns / STRIP, far = c.far / STRIP;
  const std::vector<Item> items = items_of(c);
  std::atomic<size_t> next{0};
#pragma omp parallel
  {
#pragma omp for
    for (int64_t i = 0; i < heads * (blocks + far); i++) {
      const int64_t head = i / (blocks + far), block = i % (blocks + far), row = block * STRIP;
      const int64_t from = row - c.columns, *chosen = c.chosen + head * c.V;
      if (block < blocks)
        pack(c, head, head * c.columns + row, c.keys, c.values,
             [&](int64_t j) { return row + j < c.T ? row + j : -1; });
      else
        pack(c, head, head * c.far + from, c.chosen_keys, c.chosen_values,
             [&](int64_t j) { return from + j < c.V ? chosen[from + j] : -1; });
    }
    const Tiles tiles;
    Worker worker(c);
    for (size_t i; (i = next++) < items.size();) worker.item(items[i]);
  }
}
