// What the kernels share: the tiles of AMX, bfloat16, and layouts of the operands of a product.
// A tile holds 16 rows of 64 bytes. Left operands are 16 rows of 32 bfloat16; right ones 16 rows of 16 pairs, a pair being two
// successive values of the dimension that is summed over.
// To be included behind the pragma that allows them, and behind attention.h.
#pragma once

namespace {

// All eight tiles: 16 rows of 64 bytes.
void configure_tiles() {
  alignas(64) uint8_t c[64] = {0};
  c[0] = 1;
  for (int t = 0; t < 8; t++) {
    u16 bytes = 64;
    memcpy(c + 16 + 2*t, &bytes, 2);
    c[48 + t] = 16;
  }
  _tile_loadconfig(c);
}

// 2^t, relative error 2e-7
inline __m512 exp2v(__m512 t) {
  t = _mm512_max_ps(t, _mm512_set1_ps(-200.f));
  __m512 n = _mm512_roundscale_ps(t, 8), f = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(0.00132765f);   // the polynomial whose largest error between -½ and ½ is the least
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00967554f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05550713f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24022120f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69314697f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, n);
}

inline __m512 to_float(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
inline __m512 load(const u16* x) { return to_float(_mm256_loadu_si256((const __m256i*)x)); }
inline void store(u16* out, __m512 x) { _mm256_storeu_si256((__m256i*)out, (__m256i)_mm512_cvtneps_pbh(x)); }

// dword i: bf16(low[i]) | bf16(high[i]) << 16
inline __m512i interleave(__m512 low, __m512 high) {
  const __m512i sixteen = _mm512_set1_epi32(16 << 16), first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i evens_and_odds = _mm512_add_epi32(sixteen, _mm512_or_si512(first, _mm512_slli_epi32(first, 16)));   // i | (16 + i) << 16
  return _mm512_permutexvar_epi16(evens_and_odds, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// 16 × 16 dwords, a register a row → a register a column
inline void transpose(__m512i x[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]), y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++)
      x[i + 2*j] = _mm512_unpacklo_epi64(y[i + j], y[i + 2 + j]), x[i + 2*j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + 2 + j]);
  for (int i = 0; i < 4; i++)   // columns i, 4 + i, 8 + i and 12 + i, in quarters
    for (int j = 0; j < 2; j++) {
      y[4*i + j] = _mm512_shuffle_i32x4(x[8*j + i], x[8*j + 4 + i], 0x88);
      y[4*i + 2 + j] = _mm512_shuffle_i32x4(x[8*j + i], x[8*j + 4 + i], 0xDD);
    }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 2; j++) {
      x[i + 4*j] = _mm512_shuffle_i32x4(y[4*i + 2*j], y[4*i + 2*j + 1], 0x88);
      x[i + 8 + 4*j] = _mm512_shuffle_i32x4(y[4*i + 2*j], y[4*i + 2*j + 1], 0xDD);
    }
}

// 16 rows of 32 bf16 → 16 registers, each with a pair of channels of all rows
inline void load_channels(const u16* x, i64 ld, __m512i out[16]) {
  for (int i = 0; i < 16; i++) out[i] = _mm512_loadu_si512(x + i*ld);
  transpose(out);
}

// (T, 32) rows → right operands of products over channels: [T/16][16 pairs of channels][16 rows] of dwords
void pack_channels(const u16* x, i64 ld, int T, u32* out) {
  __m512i pairs[16];
  for (int t = 0; t < T; t += 16) {
    load_channels(x + t*ld, ld, pairs);
    for (int r = 0; r < 16; r++) _mm512_store_si512(out + t*16 + r*16, pairs[r]);
  }
}

// (T, 32) rows → left operand of products over rows: (32, T), whose rows lie `ld_out` apart
void transpose(const u16* x, i64 ld, int T, u16* out, i64 ld_out) {
  __m512i pairs[16];
  for (int t = 0; t < T; t += 16) {
    load_channels(x + t*ld, ld, pairs);
    for (int r = 0; r < 16; r++) {
      _mm256_storeu_si256((__m256i*)(out + (2*r)*ld_out + t), _mm512_cvtepi32_epi16(pairs[r]));
      _mm256_storeu_si256((__m256i*)(out + (2*r + 1)*ld_out + t), _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs[r], 16)));
    }
  }
}

// Tiles 0 to 3, which are 32 × 32 floats whose rows lie `ld` apart: from memory, and back
inline void load_square(const float* x, i64 ld) {
  _tile_loadd(0, x, ld*4);
  _tile_loadd(1, x + 16, ld*4);
  _tile_loadd(2, x + 16*ld, ld*4);
  _tile_loadd(3, x + 16*ld + 16, ld*4);
}
inline void store_square(float* x, i64 ld) {
  _tile_stored(0, x, ld*4);
  _tile_stored(1, x + 16, ld*4);
  _tile_stored(2, x + 16*ld, ld*4);
  _tile_stored(3, x + 16*ld + 16, ld*4);
}
inline void zero_square() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
// … += a (32 rows of 32 bf16, `lda` apart) × b (16 rows of 32 dwords, the second half `next` dwords after the first)
inline void add_product(const u16* a, i64 lda, const u32* b, i64 ldb, i64 next = 16) {
  _tile_loadd(4, a, lda*2);
  _tile_loadd(5, a + 16*lda, lda*2);
  _tile_loadd(6, b, ldb*4);
  _tile_loadd(7, b + next, ldb*4);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

}  // namespace
