// Causal attention on the tiles of AMX: products of bfloat16, summed in float32.
#include "attention.h"

#ifdef HAS_FORMS
#include <immintrin.h>
#include <utility>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#include "tiles.h"

namespace {

const int BLOCK = 32;    // queries and keys at a time
static_assert(ROUND % BLOCK == 0, "blocks of keys are whole");

inline __mmask16 first_lanes(int n) { return n >= 16 ? 0xFFFF : n > 0 ? (__mmask16)((1u << n) - 1) : 0; }

inline void round_row(const float* x, int d, int wide, u16* out) {   // to bfloat16, with zeros behind up to `wide`
  for (int i = 0; i < wide; i += 16)
    _mm256_mask_storeu_epi16(out + i, first_lanes(wide - i), (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first_lanes(d - i), x + i)));
}

void append(const Call& c, int b, int g) {
  append_with(c, b, g, [&](const float* x, u16* out) { round_row(x, c.d, c.d, out); });
}

// All keys of one row and group, with zeros behind; and its values with positions side by side
void pack(const Call& c, int b, int g) {
  const i64 at = c.cache(b, g);
  const int total = c.past(b) + c.length;
  u16 *keys = (u16*)c.packed_keys + c.packed(b, g), *values = (u16*)c.packed_values + c.packed(b, g);
  alignas(64) u16 rows[BLOCK*MOST_CHANNELS];
  memset(rows, 0, sizeof rows);
  for (int t0 = 0; t0 < c.longest; t0 += BLOCK) {
    const int there = std::max(0, std::min(BLOCK, total - t0));
    if (there < BLOCK || c.wide > c.d) memset(keys + (i64)t0*c.wide, 0, (size_t)BLOCK*c.wide*sizeof(u16));
    if (there < BLOCK) memset(rows, 0, sizeof rows);
    for (int t = 0; t < there; t++) {
      const i64 from = at + (i64)(t0 + t)*c.d;
      memcpy(keys + (i64)(t0 + t)*c.wide, c.keys + from, c.d*sizeof(u16));
      memcpy(rows + t*c.wide, c.values + from, c.d*sizeof(u16));
    }
    for (int i = 0; i < c.wide; i += 32) transpose(rows + i, c.wide, BLOCK, values + (i64)i*c.longest + t0, c.longest);
  }
}

struct Room {   // of a thread
  Kept<float> scores;
  Kept<u32> pairs;
};
thread_local Room ROOM;

// Scores (keys × 32 queries) → exponentials, in pairs of keys; 1 over the sum of each query's. `first`: the position of the first query
void soften(const float* scores, u32* pairs, int keys, int first, float to_bits, __m512 inverse[2]) {
  for (int half = 0; half < 2; half++) {
    const float* s = scores + 16*half;
    const int whole = std::min(keys, first + 16*half + 1);   // keys that all 16 queries see
    auto seen = [=](int j) { const int ahead = j - first - 16*half; return ahead <= 0 ? 0xFFFF : ahead > 15 ? 0 : (0xFFFF << ahead) & 0xFFFF; };
    __m512 m = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int j = 0; j < whole; j++) m = _mm512_max_ps(m, _mm512_load_ps(s + j*BLOCK));
    for (int j = whole; j < keys; j++) m = _mm512_mask_max_ps(m, (__mmask16)seen(j), m, _mm512_load_ps(s + j*BLOCK));
    const __m512 c = _mm512_set1_ps(to_bits), top = _mm512_mul_ps(m, c);
    for (int j = 0; j < keys; j += 2) {
      __m512 p = exp2v(_mm512_fmsub_ps(_mm512_load_ps(s + j*BLOCK), c, top)), n = exp2v(_mm512_fmsub_ps(_mm512_load_ps(s + (j + 1)*BLOCK), c, top));
      if (j + 1 >= whole) p = _mm512_maskz_mov_ps((__mmask16)seen(j), p), n = _mm512_maskz_mov_ps((__mmask16)seen(j + 1), n);
      sum = _mm512_add_ps(sum, _mm512_add_ps(p, n));
      _mm512_store_si512(pairs + (j/2)*BLOCK + 16*half, interleave(p, n));
    }
    inverse[half] = _mm512_div_ps(_mm512_set1_ps(1.f), sum);
  }
}

bool compute_block(const Call& c, int b, int h, int q0) {
  const int past = c.past(b), queries = std::min(BLOCK, c.length - q0), first = past + q0;
  const int keys = (first + queries + BLOCK - 1)/BLOCK*BLOCK;
  const i64 at = c.packed(b, c.group(h));
  const u16 *packed_keys = (const u16*)c.packed_keys + at, *packed_values = (const u16*)c.packed_values + at;
  alignas(64) u16 rows[BLOCK*MOST_CHANNELS];
  alignas(64) u32 q[BLOCK*MOST_CHANNELS/2];
  alignas(64) float turned[MOST_CHANNELS], square[BLOCK*BLOCK];
  for (int t = 0; t < BLOCK; t++) {
    const float* x = c.q + ((i64)b*c.length + q0 + t)*c.ldq + (i64)h*c.d;
    if (t < queries && c.turned) turn(c, x, first + t, turned), x = turned;
    round_row(x, t < queries ? c.d : 0, c.wide, rows + t*c.wide);
  }
  for (int i = 0; i < c.wide; i += 32) pack_channels(rows + i, c.wide, BLOCK, q + i*16);
  float* scores = ROOM.scores.of((i64)c.longest*BLOCK);
  u32* pairs = ROOM.pairs.of((i64)c.longest*BLOCK/2);
  if (!scores || !pairs) return false;
  for (int j = 0; j < keys; j += BLOCK) {   // K·Qᵀ, so that a register holds 16 queries
    zero_square();
    for (int i = 0; i < c.wide; i += 32) add_product(packed_keys + (i64)j*c.wide + i, c.wide, q + i*16, 16, 256);
    store_square(scores + (i64)j*BLOCK, BLOCK);
  }
  __m512 inverse[2];
  soften(scores, pairs, keys, first, c.scale*LOG2E, inverse);
  float* out = c.out + (((i64)b*c.length + q0)*c.heads + h)*c.d;
  for (int i = 0; i < c.wide; i += 32) {    // Vᵀ·P
    zero_square();
    for (int j = 0; j < keys; j += BLOCK) add_product(packed_values + (i64)i*c.longest + j, c.longest, pairs + (j/2)*BLOCK, BLOCK);
    store_square(square, BLOCK);
    for (int q1 = 0; q1 < queries; q1 += 16)
      for (int r = 0; r < 32 && i + r < c.d; r += 16) {   // 16 channels of 16 queries
        __m512i x[16];
        for (int n = 0; n < 16; n++) x[n] = (__m512i)_mm512_mul_ps(_mm512_load_ps(square + (r + n)*BLOCK + q1), inverse[q1/16]);
        transpose(x);
        const __mmask16 there = first_lanes(c.d - i - r);
        for (int n = 0; n < 16 && q1 + n < queries; n++) _mm512_mask_storeu_ps(out + (i64)(q1 + n)*c.heads*c.d + i + r, there, (__m512)x[n]);
      }
  }
  return true;
}

// parts: registers of 32 channels
template <int parts> bool compute_query(const Call& c, int b, int h, int t) {
  const int keys = c.past(b) + t + 1, d = c.d;
  const i64 at = c.cache(b, c.group(h));
  const float* q = c.q + ((i64)b*c.length + t)*c.ldq + (i64)h*d;
  const __mmask32 rest = 0xFFFFFFFF >> (32*parts - d);   // channels in the last register
  auto part = [=](const u16* x, int i) { return i < parts - 1 ? _mm512_loadu_si512(x + 32*i) : _mm512_maskz_loadu_epi16(rest, x + 32*i); };
  alignas(64) float turned[MOST_CHANNELS];
  alignas(64) u16 rounded[32*parts];
  if (c.turned) turn(c, q, keys - 1, turned), q = turned;
  round_row(q, d, 32*parts, rounded);
  __m512i x[parts];
  for (int i = 0; i < parts; i++) x[i] = _mm512_load_si512(rounded + 32*i);
  float* scores = ROOM.scores.of((i64)c.longest*BLOCK);
  if (!scores) return false;
  __m512 top = _mm512_set1_ps(-INFINITY);
  for (int j = 0; j < keys; j += 16) {       // 16 sums of products, whose lanes are then added together
    __m512i sums[16];
    for (int n = 0; n < 16; n++) {
      const u16* k = c.keys + at + (i64)std::min(j + n, keys - 1)*d;
      __m512 s = _mm512_setzero_ps();
      for (int i = 0; i < parts; i++) s = _mm512_dpbf16_ps(s, (__m512bh)x[i], (__m512bh)part(k, i));
      sums[n] = (__m512i)s;
    }
    transpose(sums);
    for (int n = 8; n; n /= 2)
      for (int i = 0; i < n; i++) sums[i] = (__m512i)_mm512_add_ps((__m512)sums[i], (__m512)sums[i + n]);
    _mm512_store_ps(scores + j, (__m512)sums[0]);
    top = _mm512_max_ps(top, (__m512)sums[0]);
  }
  const __m512 bits = _mm512_set1_ps(c.scale*LOG2E), shift = _mm512_set1_ps(_mm512_reduce_max_ps(top));
  __m512 sum = _mm512_setzero_ps();
  for (int j = 0; j < keys; j += 16) {
    const __m512 p = _mm512_maskz_mov_ps(first_lanes(keys - j), exp2v(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(scores + j), shift), bits)));
    _mm512_store_ps(scores + j, p);
    sum = _mm512_add_ps(sum, p);
  }
  __m512 even[2][parts], odd[2][parts];      // channels; of even and odd keys, since one sum would wait for itself
  for (int i = 0; i < parts; i++) even[0][i] = even[1][i] = odd[0][i] = odd[1][i] = _mm512_setzero_ps();
  for (int j = 0; j < keys; j += 2)
    for (int o = 0; o < 2 && j + o < keys; o++) {
      const __m512 p = _mm512_set1_ps(scores[j + o]);
      for (int i = 0; i < parts; i++) {
        const __m512i v = part(c.values + at + (i64)(j + o)*d, i);
        even[o][i] = _mm512_fmadd_ps(p, (__m512)_mm512_slli_epi32(v, 16), even[o][i]);
        odd[o][i] = _mm512_fmadd_ps(p, (__m512)_mm512_and_si512(v, _mm512_set1_epi32(0xFFFF0000)), odd[o][i]);
      }
    }
  const __m512 inverse = _mm512_set1_ps(1.f/_mm512_reduce_add_ps(sum));
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  float* out = c.out + (((i64)b*c.length + t)*c.heads + h)*d;
  for (int i = 0; i < parts; i++) {
    const __m512 e = _mm512_mul_ps(_mm512_add_ps(even[0][i], even[1][i]), inverse), o = _mm512_mul_ps(_mm512_add_ps(odd[0][i], odd[1][i]), inverse);
    _mm512_mask_storeu_ps(out + 32*i, first_lanes(d - 32*i), _mm512_permutex2var_ps(e, first, o));
    _mm512_mask_storeu_ps(out + 32*i + 16, first_lanes(d - 32*i - 16), _mm512_permutex2var_ps(e, second, o));
  }
  return true;
}

typedef bool ComputeQuery(const Call&, int b, int h, int t);
template <int... n> ComputeQuery* for_parts(int parts, std::integer_sequence<int, n...>) {
  ComputeQuery* const made[] = {compute_query<n + 1>...};
  return made[parts - 1];
}

bool attend_block(const Call& c, int b, int h, int q0) {
  configure_tiles();
  const bool done = compute_block(c, b, h, q0);
  _tile_release();
  return done;
}
bool attend_query(const Call& c, int b, int h, int t) {
  return for_parts((c.d + 31)/32, std::make_integer_sequence<int, MOST_CHANNELS/32>())(c, b, h, t);
}

}  // namespace

const Form TILES = {BLOCK, sizeof(u16), append, pack, attend_block, attend_query};
#pragma GCC pop_options
#endif
