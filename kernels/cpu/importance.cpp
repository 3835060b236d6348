// The attention that each column of a prompt gets from the rows that score, on a CPU.
//
// query [B, H, R, D] and key [B, K, T, D] in bfloat16, the rest in float32. Symbols: B batch, H query heads, K KV heads,
// G = H / K, R rows, T columns, D head dimension, a multiple of 32; S strips (see tiles.h) hold a head's R rows.
// A row's log-sum-exp is found in a pass of its own where nobody gives it. One item of work is a strip in that pass,
// then a block of keys against all rows of its KV head.

#include "tiles.h"

namespace {

struct Call {
  const bf16 *query, *key;
  const int64_t *rows;   // [B, R] positions, -1: left out
  const float *weights;  // [R] of the rows, or null
  const float *lse;      // [B, H, R] natural, or null
  float *scores;         // [B, K, T]
  int64_t B, H, K, R, T, D, query_strides[3], key_strides[3];  // strides of B, heads, rows
  float scale;           // above 0
  int64_t sum;           // over rows; else the maximum
};

class Rows {
 public:
  explicit Rows(const Call &call)
      : c(call), S((c.R + 31) / 32), scale(_mm512_set1_ps(c.scale * LOG2E)),
        queries(room<bf16>(c.B * c.H * S * 32 * c.D)), position(room<int32_t>(c.B * S * 32)),
        less(room<float>(c.B * c.H * S * 32)) {
    for (int64_t b = 0; b < c.B; b++)
      for (int64_t r = 0; r < S * 32; r++) position[b * S * 32 + r] = r < c.R ? c.rows[b * c.R + r] : -1;
  }

  // A strip's queries in tiles, and what is taken from their scores, as powers of two: log-sum-exp less log weight.
  void prepare(int64_t strip) {
    const int64_t head = strip / S, b = head / c.H, first = strip % S * 32, *q = c.query_strides;
    pack_query(c.query + b * q[0] + head % c.H * q[1] + first * q[2], q[2], c.R - first, c.D,
               queries.get() + strip * 32 * c.D);
    if (!c.lse) find_sums(b, head % c.H, strip);
    for (int64_t r = first; r < first + 32; r++) {
      float &own = less[strip * 32 + r - first];
      if (position[b * S * 32 + r] < 0) {
        own = std::numeric_limits<float>::infinity();  // a weight of 0
        continue;
      }
      if (c.lse) own = c.lse[head * c.R + r] * LOG2E;
      if (c.weights) own -= std::log2(c.weights[r]);
    }
  }

  // Scores of the block of keys from `column` on.
  void score_block(int64_t kv, int64_t column) {
    const int64_t b = kv / c.K, G = c.H / c.K, count = std::min<int64_t>(32, c.T - column);
    alignas(64) float found[1024], kept[32][16];
    const __m512 none = _mm512_set1_ps(c.sum ? 0.f : -std::numeric_limits<float>::infinity());
    for (auto &each : kept) _mm512_store_ps(each, none);
    const Room<bf16> key = block(kv, column);
    for (int64_t strip = (b * c.H + kv % c.K * G) * S, end = strip + G * S; strip < end; strip++) {
      score(key.get(), queries.get() + strip * 32 * c.D, c.D, found);
      hide(found, b, strip % S, column);
      for (int64_t half = 0; half < 2; half++) {
        const __m512 norm = _mm512_load_ps(less.get() + strip * 32 + half * 16);
        for (int64_t j = 0; j < 32; j++) {
          const __m512 y = _mm512_fmsub_ps(_mm512_load_ps(at(found, j, half)), scale, norm);
          const __m512 before = _mm512_load_ps(kept[j]);
          _mm512_store_ps(kept[j], c.sum ? _mm512_add_ps(before, power(y)) : _mm512_max_ps(before, y));
        }
      }
    }
    for (int64_t j = 0; j < count; j++) {
      const __m512 own = _mm512_load_ps(kept[j]);
      c.scores[kv * c.T + column + j] = c.sum ? _mm512_reduce_add_ps(own) : std::exp2(_mm512_reduce_max_ps(own));
    }
  }

  const Call &c;
  const int64_t S;

 private:
  static float *at(float *scores, int64_t key, int64_t half) {
    return scores + (key / 16 * 2 + half) * 256 + key % 16 * 16;
  }

  Room<bf16> block(int64_t kv, int64_t column) const {
    Room<bf16> tiles = room<bf16>(32 * c.D);
    const int64_t *k = c.key_strides;
    const bf16 *from = c.key + kv / c.K * k[0] + kv % c.K * k[1];
    pack_key([&](int64_t j) { return column + j < c.T ? from + (column + j) * k[2] : nullptr; }, c.D, tiles.get());
    return tiles;
  }

  // Scores of keys behind a row become -inf.
  void hide(float *scores, int64_t b, int64_t strip, int64_t column) const {
    const int32_t *rows = position.get() + (b * S + strip) * 32;
    for (int64_t half = 0; half < 2; half++) {
      const __m512i own = _mm512_load_si512(rows + half * 16);
      if (!_mm512_cmplt_epi32_mask(own, _mm512_set1_epi32(column + 31))) continue;
      for (int64_t j = 0; j < 32; j++) {
        const __mmask16 behind = _mm512_cmplt_epi32_mask(own, _mm512_set1_epi32(column + j));
        const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        _mm512_store_ps(at(scores, j, half), _mm512_mask_mov_ps(_mm512_load_ps(at(scores, j, half)), behind, none));
      }
    }
  }

  void find_sums(int64_t b, int64_t head, int64_t strip) {
    alignas(64) float found[1024];
    __m512 top[2] = {_mm512_set1_ps(LEAST), _mm512_set1_ps(LEAST)}, sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const int32_t *rows = position.get() + (b * S + strip % S) * 32;
    const int64_t last = *std::max_element(rows, rows + 32);
    for (int64_t column = 0; column <= last; column += 32) {
      const Room<bf16> key = block(b * c.K + head / (c.H / c.K), column);
      score(key.get(), queries.get() + strip * 32 * c.D, c.D, found);
      hide(found, b, strip % S, column);
      for (int64_t half = 0; half < 2; half++) {
        __m512 more = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        for (int64_t j = 0; j < 32; j++) more = _mm512_max_ps(more, _mm512_load_ps(at(found, j, half)));
        more = _mm512_max_ps(top[half], _mm512_mul_ps(more, scale));
        sum[half] = _mm512_mul_ps(sum[half], power(_mm512_sub_ps(top[half], more)));
        top[half] = more;
        for (int64_t j = 0; j < 32; j++)
          sum[half] = _mm512_add_ps(sum[half], power(_mm512_fmsub_ps(_mm512_load_ps(at(found, j, half)), scale, more)));
      }
    }
    for (int64_t half = 0; half < 2; half++) {
      float *own = less.get() + strip * 32 + half * 16;
      _mm512_store_ps(own, sum[half]);
      for (int64_t lane = 0; lane < 16; lane++) own[lane] = std::log2(own[lane]);
      _mm512_store_ps(own, _mm512_add_ps(_mm512_load_ps(own), top[half]));
    }
  }

  const __m512 scale;
  Room<bf16> queries;       // [B, H, S] strips in tiles
  Room<int32_t> position;   // [B, S, 32]
  Room<float> less;         // [B, H, S, 32]
};

}  // namespace

extern "C" void importance(const Call *call) {
  Rows rows(*call);
  const int64_t strips = call->B * call->H * rows.S, blocks = (call->T + 31) / 32;
#pragma omp parallel
  {
    const Tiles tiles;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < strips; i++) rows.prepare(i);
#pragma omp for schedule(dynamic, 8)
    for (int64_t i = 0; i < call->B * call->K * blocks; i++) rows.score_block(i / blocks, i % blocks * 32);
  }
}
