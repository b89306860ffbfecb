// The gradient of causal attention on the tiles of AMX: bfloat16 in and out, float32 within.
// nbs/model/28_kernels.ipynb has the formulas and the figures. Elsewhere `ready` says no, and PyTorch computes.
#include "attention.h"

#ifdef HAS_FORMS
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#include "tiles.h"

namespace {

alignas(64) u16 LOW_PAIRS[32], HIGH_PAIRS[32];   // permutations, filled by `ready`

// (T, 32) rows → right operands of products over rows: [T/2][32 channels] of dwords, two rows each
void pack_rows(const u16* x, i64 ld, int T, u32* out) {
  __m512i low = _mm512_load_si512(LOW_PAIRS), high = _mm512_load_si512(HIGH_PAIRS);
  for (int t = 0; t < T; t += 2) {
    __m512i a = _mm512_loadu_si512(x + t*ld), b = _mm512_loadu_si512(x + (t + 1)*ld);
    _mm512_store_si512(out + t*16, _mm512_permutex2var_epi16(a, low, b));
    _mm512_store_si512(out + t*16 + 16, _mm512_permutex2var_epi16(a, high, b));
  }
}

// (32 channels, `ld` apart) × 32 columns of floats, times scale → 32 rows of 32 channels
void store_transposed(const float* x, int ld, float scale, u16* out, i64 ld_out) {
  __m512 s = _mm512_set1_ps(scale);
  __m512i pairs[16];
  for (int j = 0; j < 32; j += 16) {
    for (int r = 0; r < 16; r++)
      pairs[r] = interleave(_mm512_mul_ps(_mm512_loadu_ps(x + (i64)(2*r)*ld + j), s), _mm512_mul_ps(_mm512_loadu_ps(x + (i64)(2*r + 1)*ld + j), s));
    transpose(pairs);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (j + i)*ld_out, pairs[i]);
  }
}

void store_rows(const float* x, float scale, u16* out, i64 ld) {   // (32, 32)
  __m512 s = _mm512_set1_ps(scale);
  for (int i = 0; i < 32; i++) {
    store(out + i*ld, _mm512_mul_ps(s, _mm512_load_ps(x + i*32)));
    store(out + i*ld + 16, _mm512_mul_ps(s, _mm512_load_ps(x + i*32 + 16)));
  }
}

struct View {   // of a tensor (B, H, T, channels) whose channels lie together
  u16* x;
  i64 batch, head, row;
  u16* at(int b, int h) const { return x + b*batch + h*head; }
};

// Memory of one thread. C: blocks of 32 channels
template <int C> struct Work {
  i64 T;
  u32 *q_channels, *g_channels, *q_rows, *g_rows, *ds_pairs;
  u16 *k_transposed, *p, *ds;
  float *dq, *delta;
  alignas(64) float scores[32*16], dp[32*16], square[32*32];

  explicit Work(int T) : T(T) {
    q_channels = buffer<u32>(T*16*C), g_channels = buffer<u32>(T*16*C), q_rows = buffer<u32>(T*16*C), g_rows = buffer<u32>(T*16*C);
    k_transposed = buffer<u16>(T*32*C), p = buffer<u16>(T*32), ds = buffer<u16>(T*32), ds_pairs = buffer<u32>(T*16);
    dq = buffer<float>(T*32*C), delta = buffer<float>(T);
  }
  bool whole() const {   // did all of it fit into the memory?
    return q_channels && g_channels && q_rows && g_rows && ds_pairs && k_transposed && p && ds && dq && delta;
  }
  ~Work() {
    free(q_channels), free(g_channels), free(q_rows), free(g_rows), free(ds_pairs), free(k_transposed), free(p), free(ds), free(dq), free(delta);
  }
};

// delta = Σ dO·O over channels (Dao et al. 2022, algorithm 4)
template <int C> void row_products(const u16* g, i64 ldg, const u16* o, i64 ldo, int T, float* delta) {
  for (int t = 0; t < T; t++) {
    __m512 s = _mm512_setzero_ps();
    for (int c = 0; c < 32*C; c += 16) s = _mm512_fmadd_ps(load(g + t*ldg + c), load(o + t*ldo + c), s);
    delta[t] = _mm512_reduce_add_ps(s);
  }
}

// Probabilities and gradients of scores of 32 keys from k0 by 16 queries from q0, from the tiles in `scores` and `dp`
template <int C> void soften(Work<C>& w, const float* lse, int k0, int q0, float to_bits) {
  const i64 T = w.T;
  const __m512 c = _mm512_set1_ps(to_bits), delta = _mm512_loadu_ps(w.delta + q0);
  const __m512 l = _mm512_mul_ps(_mm512_loadu_ps(lse + q0), _mm512_set1_ps(LOG2E));
  for (int i = 0; i < 32; i += 2) {
    __m512 p[2], s[2];
    for (int j = 0; j < 2; j++) {
      p[j] = exp2v(_mm512_fmsub_ps(_mm512_load_ps(w.scores + (i + j)*16), c, l));
      const int ahead = k0 + i + j - q0;   // query q0 + n sees this key where n ≥ ahead
      if (ahead > 0) p[j] = _mm512_maskz_mov_ps(ahead > 15 ? 0 : (__mmask16)(0xFFFF << ahead), p[j]);
      s[j] = _mm512_mul_ps(p[j], _mm512_sub_ps(_mm512_load_ps(w.dp + (i + j)*16), delta));
      store(w.p + (i + j)*T + q0, p[j]);
      store(w.ds + (i + j)*T + q0, s[j]);
    }
    _mm512_storeu_si512(w.ds_pairs + (i/2)*T + q0, interleave(s[0], s[1]));
  }
}

template <int C> void one_head(Work<C>& w, const u16* q, i64 ldq, const u16* k, i64 ldk, const u16* v, i64 ldv, const u16* o, i64 ldo,
                               const u16* g, i64 ldg, const float* lse, u16* dq, u16* dk, u16* dv, i64 ld) {
  const int T = (int)w.T;
  const float scale = 1.f/sqrtf(32.f*C);
  for (int c = 0; c < C; c++) {
    pack_channels(q + 32*c, ldq, T, w.q_channels + c*T*16), pack_channels(g + 32*c, ldg, T, w.g_channels + c*T*16);
    pack_rows(q + 32*c, ldq, T, w.q_rows + c*T*16), pack_rows(g + 32*c, ldg, T, w.g_rows + c*T*16);
    transpose(k + 32*c, ldk, T, w.k_transposed + c*T*32, T);
  }
  row_products<C>(g, ldg, o, ldo, T, w.delta);
  memset(w.dq, 0, (size_t)T*32*C*4);
  for (int k0 = 0; k0 < T; k0 += 32) {
    for (int q0 = k0; q0 < T; q0 += 16) {
      for (int side = 0; side < 2; side++) {   // scores K·Qᵀ, then their gradient V·dOᵀ
        const u16* left = side ? v : k;
        const i64 ldl = side ? ldv : ldk;
        const u32* right = side ? w.g_channels : w.q_channels;
        float* out = side ? w.dp : w.scores;
        _tile_zero(5);
        _tile_zero(6);
        for (int c = 0; c < C; c++) {
          _tile_loadd(0, left + k0*ldl + 32*c, ldl*2);
          _tile_loadd(1, left + (k0 + 16)*ldl + 32*c, ldl*2);
          _tile_loadd(4, right + c*T*16 + q0*16, 64);
          _tile_dpbf16ps(5, 0, 4);
          _tile_dpbf16ps(6, 1, 4);
        }
        _tile_stored(5, out, 64);
        _tile_stored(6, out + 256, 64);
      }
      soften<C>(w, lse, k0, q0, scale*LOG2E);
    }
    for (int c = 0; c < C; c++) {
      for (int side = 0; side < 2; side++) {   // dV = Pᵀ·dO, then dK = dSᵀ·Q
        const u16* left = side ? w.ds : w.p;
        const u32* right = (side ? w.q_rows : w.g_rows) + c*T*16;
        zero_square();
        for (int q0 = k0; q0 < T; q0 += 32) add_product(left + q0, T, right + q0*16, 32);
        store_square(w.square, 32);
        store_rows(w.square, side ? scale : 1.f, (side ? dk : dv) + k0*ld + 32*c, ld);
      }
      for (int q0 = k0; q0 < T; q0 += 32) {    // dQᵀ += Kᵀ·dSᵀ
        float* sum = w.dq + (i64)c*32*T + q0;
        load_square(sum, T);
        add_product(w.k_transposed + c*T*32 + k0, T, w.ds_pairs + q0, T);
        store_square(sum, T);
      }
    }
  }
  for (int c = 0; c < C; c++)
    for (int q0 = 0; q0 < T; q0 += 32) store_transposed(w.dq + (i64)c*32*T + q0, T, scale, dq + q0*ld + 32*c, ld);
}

// 2: a thread found no memory
template <int C> int all_heads(const View* in, const float* lse, const View* out, int B, int H, int T, int threads) {
  int failed = 0;
  #pragma omp parallel num_threads(threads)
  {
    configure_tiles();
    Work<C> w(T);
    const bool whole = w.whole();
    if (!whole) {
      #pragma omp atomic write
      failed = 2;
    }
    #pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < B*H; i++) {
      if (!whole) continue;
      const int b = i/H, h = i%H;
      one_head<C>(w, in[0].at(b, h), in[0].row, in[1].at(b, h), in[1].row, in[2].at(b, h), in[2].row, in[3].at(b, h), in[3].row,
                  in[4].at(b, h), in[4].row, lse + (i64)i*T, out[0].at(b, h), out[1].at(b, h), out[2].at(b, h), out[0].row);
    }
    _tile_release();
  }
  return failed;
}

}  // namespace

// Gradients of causal attention. in: q, k, v, o, dO; out: dq, dk, dv, whose rows lie equally far apart; each (B, H, T, 32·blocks),
// T a multiple of 32. lse: (B, H, T), natural. 1: there is no kernel for so many channels; 2: no memory.
extern "C" int causal_gradients(const View* in, const float* lse, const View* out, int B, int H, int T, int blocks, int threads) {
  switch (blocks) {
    case 1: return all_heads<1>(in, lse, out, B, H, T, threads);
    case 2: return all_heads<2>(in, lse, out, B, H, T, threads);
    case 4: return all_heads<4>(in, lse, out, B, H, T, threads);
  }
  return 1;
}

#pragma GCC pop_options

// 0: the tiles can be used
extern "C" int ready() {
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512bw")) return 1;
  for (int i = 0; i < 16; i++) {
    LOW_PAIRS[2*i] = i, LOW_PAIRS[2*i + 1] = 32 + i;
    HIGH_PAIRS[2*i] = 16 + i, HIGH_PAIRS[2*i + 1] = 48 + i;
  }
  return (int)syscall(SYS_arch_prctl, 0x1023, 18);   // Linux grants AMX's registers on request
}

#else
extern "C" int ready() { return 1; }
extern "C" int causal_gradients(...) { return 1; }
#endif
