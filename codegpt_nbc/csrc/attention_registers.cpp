// Causal attention on the registers of AVX2: six rows of sixteen sums at a time, in float32 on a cache of bfloat16.
#include "attention.h"

#ifdef HAS_FORMS
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace {

const int LANES = 8, ROWS = 6, COLUMNS = 2*LANES;   // 12 registers of sums, 2 of a right operand, 1 of a left one
const int QUERIES = 4*ROWS;

inline __m256 load(const u16* x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16));
}
inline float one(const u16* x) {
  const u32 bits = (u32)*x << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

void round_row(const float* x, int n, u16* out) {   // to bfloat16, a half to even
  for (int i = 0; i < n; i++) {
    u32 bits;
    memcpy(&bits, x + i, 4);
    out[i] = x[i] == x[i] ? (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) : 0x7FC0;   // the sum could make a NaN a number
  }
}

// 2^t, relative error 2e-7; below t = -126 it stays 2^-126, and NaN stays NaN: of two operands, `max` takes the second one then
inline __m256 exp2v(__m256 t) {
  t = _mm256_max_ps(_mm256_set1_ps(-126.f), t);
  const __m256 n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm256_sub_ps(t, n);
  __m256 p = _mm256_set1_ps(0.00132765f);   // as in tiles.h
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.00967554f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.05550713f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.24022120f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.69314697f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.f));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

inline void transpose(__m256 x[8]) {
  __m256 y[8];
  for (int i = 0; i < 8; i += 2) y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]), y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      x[i + 2*j] = _mm256_shuffle_ps(y[i + j], y[i + 2 + j], 0x44);
      x[i + 2*j + 1] = _mm256_shuffle_ps(y[i + j], y[i + 2 + j], 0xEE);
    }
  for (int i = 0; i < 4; i++) {
    y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
    y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) x[i] = y[i];
}

inline float sum_of(__m256 x) {
  const __m128 h = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)), q = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline float largest_of(__m256 x) {
  const __m128 h = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)), q = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

// a (6 rows of n, `lda` apart) × b (n, 16)
inline void multiply(const float* a, i64 lda, const float* b, int n, float* out, i64 ld) {
  __m256 sums[ROWS][2];
  for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
  for (int i = 0; i < n; i++) {
    const __m256 left = _mm256_loadu_ps(b + i*COLUMNS), right = _mm256_loadu_ps(b + i*COLUMNS + LANES);
    for (int r = 0; r < ROWS; r++) {
      const __m256 x = _mm256_broadcast_ss(a + r*lda + i);
      sums[r][0] = _mm256_fmadd_ps(x, left, sums[r][0]), sums[r][1] = _mm256_fmadd_ps(x, right, sums[r][1]);
    }
  }
  for (int r = 0; r < ROWS; r++) _mm256_storeu_ps(out + r*ld, sums[r][0]), _mm256_storeu_ps(out + r*ld + LANES, sums[r][1]);
}

void append(const Call& c, int b, int g) {
  append_with(c, b, g, [&](const float* x, u16* out) { round_row(x, c.d, out); });
}

// Panels of 16 columns: keys as (longest/16, wide, 16), values as (wide/16, longest, 16). What is not there is zero
void pack(const Call& c, int b, int g) {
  const int total = c.past(b) + c.length, d = c.d;
  const u16 *k = c.keys + c.cache(b, g), *v = c.values + c.cache(b, g);
  float *keys = (float*)c.packed_keys + c.packed(b, g), *values = (float*)c.packed_values + c.packed(b, g);
  const int end = (total + COLUMNS - 1)/COLUMNS*COLUMNS;
  alignas(32) u16 rows[LANES*MOST_CHANNELS];
  for (int t = 0; t < end; t += LANES) {
    const int there = std::max(0, std::min(LANES, total - t));
    auto take = [&](const u16* x) {   // 8 positions
      if (there < LANES || c.wide > d) memset(rows, 0, (size_t)LANES*c.wide*sizeof(u16));
      for (int n = 0; n < there; n++) memcpy(rows + n*c.wide, x + (i64)(t + n)*d, d*sizeof(u16));
    };
    take(v);
    for (int n = 0; n < LANES; n++)
      for (int i = 0; i < c.wide; i += LANES)
        _mm256_storeu_ps(values + (i64)(i/COLUMNS)*c.longest*COLUMNS + (t + n)*COLUMNS + i % COLUMNS, load(rows + n*c.wide + i));
    take(k);
    float* panel = keys + (i64)(t/COLUMNS)*COLUMNS*c.wide + t % COLUMNS;
    for (int i = 0; i < c.wide; i += LANES) {
      __m256 x[LANES];
      for (int n = 0; n < LANES; n++) x[n] = load(rows + n*c.wide + i);
      transpose(x);
      for (int n = 0; n < LANES; n++) _mm256_storeu_ps(panel + (i + n)*COLUMNS, x[n]);
    }
  }
}

struct Room {   // of a thread
  Kept<float> scores;
};
thread_local Room ROOM;

// Scores in powers of two → exponentials of the first `seen`, 2^-126 from there to `end`, a multiple of 8; 1 over the sum of all,
// which is at least 1, so that those behind do not count
inline float soften(float* s, int seen, int end) {
  for (int j = seen; j < end; j++) s[j] = -INFINITY;
  __m256 top = _mm256_loadu_ps(s), sum = _mm256_setzero_ps();
  for (int j = LANES; j < end; j += LANES) top = _mm256_max_ps(top, _mm256_loadu_ps(s + j));
  const __m256 most = _mm256_set1_ps(largest_of(top));
  for (int j = 0; j < end; j += LANES) {
    const __m256 p = exp2v(_mm256_sub_ps(_mm256_loadu_ps(s + j), most));
    _mm256_storeu_ps(s + j, p);
    sum = _mm256_add_ps(sum, p);
  }
  return 1.f/sum_of(sum);
}

// A query, turned, in powers of two
inline void prepare_query(const Call& c, const float* x, int position, float* out) {
  float turned[MOST_CHANNELS];
  if (c.turned) turn(c, x, position, turned), x = turned;
  for (int i = 0; i < c.d; i++) out[i] = x[i]*c.scale*LOG2E;
}

bool attend_block(const Call& c, int b, int h, int q0) {
  const int queries = std::min(QUERIES, c.length - q0), first = c.past(b) + q0, d = c.d;
  const float *keys = (const float*)c.packed_keys + c.packed(b, c.group(h)), *values = (const float*)c.packed_values + c.packed(b, c.group(h));
  const i64 ld = c.longest + COLUMNS;   // not a power of two, whose rows would meet in the cache
  float* scores = ROOM.scores.of(ld*QUERIES);
  if (!scores) return false;
  alignas(32) float q[QUERIES*MOST_CHANNELS], product[ROWS*COLUMNS], inverse[QUERIES];
  for (int t = 0; t < QUERIES; t++)
    if (t < queries) prepare_query(c, c.q + ((i64)b*c.length + q0 + t)*c.ldq + (i64)h*d, first + t, q + t*d);
    else memset(q + t*d, 0, d*sizeof(float));
  for (int j = 0; j < first + queries; j += COLUMNS)
    for (int r = 0; r < queries; r += ROWS)
      if (j < first + r + ROWS) multiply(q + r*d, d, keys + (i64)j*c.wide, d, scores + r*ld + j, ld);
  for (int r = 0; r < queries; r += ROWS) {
    const int there = std::min(ROWS, queries - r), seen = first + r + there;   // by the last of these rows
    for (int t = 0; t < ROWS; t++)
      if (t < there) inverse[t] = soften(scores + (r + t)*ld, first + r + t + 1, (seen + LANES - 1)/LANES*LANES);
    for (int i = 0; i < d; i += COLUMNS) {
      multiply(scores + r*ld, ld, values + (i64)i*c.longest, seen, product, COLUMNS);
      for (int t = 0; t < there; t++) {
        float* out = c.out + (((i64)b*c.length + q0 + r + t)*c.heads + h)*d + i;
        for (int n = 0; n < std::min(COLUMNS, d - i); n++) out[n] = product[t*COLUMNS + n]*inverse[t];
      }
    }
  }
  return true;
}

// 16 channels as two registers, of the even and of the odd ones: a word is the upper half of its float
inline __m256 even(__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
inline __m256 odd(__m256i x) { return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xFFFF0000))); }
inline __m256i words(const u16* x) { return _mm256_loadu_si256((const __m256i*)x); }

// Sums of the values of 16·parts channels, rows of which lie d apart, each times its weight
template <int parts> inline void add_values(const float* weights, const u16* x, int n, int d, float scale, float* out) {
  __m256 sums[2][parts][2];   // of positions by turns, since one sum would wait for itself
  for (int i = 0; i < parts; i++)
    for (int t = 0; t < 2; t++) sums[t][i][0] = sums[t][i][1] = _mm256_setzero_ps();
  for (int j = 0; j < n; j += 2)   // the weight behind the last is 0
    for (int t = 0; t < 2; t++) {
      const __m256 p = _mm256_broadcast_ss(weights + j + t);
      const u16* row = x + (i64)std::min(j + t, n - 1)*d;
      for (int i = 0; i < parts; i++) {
        const __m256i v = words(row + 16*i);
        sums[t][i][0] = _mm256_fmadd_ps(p, even(v), sums[t][i][0]), sums[t][i][1] = _mm256_fmadd_ps(p, odd(v), sums[t][i][1]);
      }
    }
  for (int i = 0; i < parts; i++) {
    const __m256 by = _mm256_set1_ps(scale);
    const __m256 e = _mm256_mul_ps(by, _mm256_add_ps(sums[0][i][0], sums[1][i][0])), o = _mm256_mul_ps(by, _mm256_add_ps(sums[0][i][1], sums[1][i][1]));
    const __m256 low = _mm256_unpacklo_ps(e, o), high = _mm256_unpackhi_ps(e, o);
    _mm256_storeu_ps(out + 16*i, _mm256_permute2f128_ps(low, high, 0x20)), _mm256_storeu_ps(out + 16*i + 8, _mm256_permute2f128_ps(low, high, 0x31));
  }
}

bool attend_query(const Call& c, int b, int h, int t) {
  const int n = c.past(b) + t + 1, d = c.d, whole = d/COLUMNS*COLUMNS;
  const u16 *k = c.keys + c.cache(b, c.group(h)), *v = c.values + c.cache(b, c.group(h));
  alignas(32) float q[MOST_CHANNELS], by_turns[MOST_CHANNELS];   // as `even` and `odd` have them
  prepare_query(c, c.q + ((i64)b*c.length + t)*c.ldq + (i64)h*d, n - 1, q);
  for (int i = 0; i < whole; i++) by_turns[i/COLUMNS*COLUMNS + i % 2*LANES + i % COLUMNS/2] = q[i];
  float* scores = ROOM.scores.of(c.longest + COLUMNS);
  if (!scores) return false;
  for (int j = 0; j < n; j += LANES) {
    __m256 sums[LANES];
    const u16* rows[LANES];
    for (int m = 0; m < LANES; m++) sums[m] = _mm256_setzero_ps(), rows[m] = k + (i64)std::min(j + m, n - 1)*d;
    for (int i = 0; i < whole; i += COLUMNS) {
      const __m256 x = _mm256_load_ps(by_turns + i), y = _mm256_load_ps(by_turns + i + LANES);
      for (int m = 0; m < LANES; m++) {
        const __m256i w = words(rows[m] + i);
        sums[m] = _mm256_fmadd_ps(y, odd(w), _mm256_fmadd_ps(x, even(w), sums[m]));
      }
    }
    transpose(sums);
    for (int m = 4; m; m /= 2)
      for (int i = 0; i < m; i++) sums[i] = _mm256_add_ps(sums[i], sums[i + m]);
    _mm256_storeu_ps(scores + j, sums[0]);
    for (int i = whole; i < d; i++)
      for (int m = 0; m < LANES; m++) scores[j + m] += q[i]*one(rows[m] + i);
  }
  const float inverse = soften(scores, n, (n + LANES - 1)/LANES*LANES);
  scores[n] = 0.f;
  float* out = c.out + (((i64)b*c.length + t)*c.heads + h)*d;
  int i = 0;
  for (; i + 32 <= d; i += 32) add_values<2>(scores, v + i, n, d, inverse, out + i);
  for (; i + 16 <= d; i += 16) add_values<1>(scores, v + i, n, d, inverse, out + i);
  for (; i < d; i++) {
    float sum = 0.f;
    for (int j = 0; j < n; j++) sum += scores[j]*one(v + (i64)j*d + i);
    out[i] = sum*inverse;
  }
  return true;
}

}  // namespace

const Form REGISTERS = {QUERIES, sizeof(float), append, pack, attend_block, attend_query};
#pragma GCC pop_options
bool has_registers() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
