// Causal attention for ONNX Runtime on the tiles of AMX: it takes the place of `GroupQueryAttention` of com.microsoft, as far as
// nbs/engines/52_onnx_export.ipynb writes it. Products are of bfloat16 and summed in float32. The cache is declared as
// float32 by the graph and holds bfloat16: two positions in the room of one, so that it is half as large and read in half the time.
// nbs/engines/53_attention.ipynb has the formulas and the figures. Elsewhere `RegisterCustomOps` registers nothing.
#include "onnxruntime_abi.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#include "tiles.h"
#include <algorithm>
#include <utility>

extern "C" int ready();

namespace {

const int BLOCK = 32;    // queries and keys at a time
const int MOST_CHANNELS = 256;   // per head
const int PROMPT = 16;   // new positions from which on tiles are the faster way

// Memory that grows and is kept
template <typename T> struct Kept {
  T* x = nullptr;
  i64 size = 0;
  T* of(i64 n) {
    if (n > size) free(x), x = buffer<T>(n), size = n;
    return x;
  }
  ~Kept() { free(x); }
};

struct Call {   // one layer, one call
  int batch, length, heads, groups, d, capacity, turned;   // turned: channels of a half that turn; groups: heads of keys and values
  float scale;
  const float *q, *k, *v, *cosines, *sines;   // (batch, length, …); (context, turned)
  i64 ldq, ldk;                               // from one position to the next
  const int32_t* last;                        // (batch,) last position of each row
  u16 *keys, *values;                         // (batch, groups, capacity, d)
  float* out;                                 // (batch, length, heads·d)
  int wide, longest;                          // d and the most positions of a row, rounded up to `BLOCK`
  u16 *packed_keys, *packed_values;           // (batch·groups, longest, wide) and (batch·groups, wide, longest)

  int past(int b) const { return last[b] + 1 - length; }
  i64 cache(int b, int g) const { return ((i64)b*groups + g)*capacity*d; }
};

// A head at a position, with its two halves turned
inline void turn(const Call& c, const float* x, int position, float* out) {
  const float *co = c.cosines + (i64)position*c.turned, *si = c.sines + (i64)position*c.turned;
  const int n = c.turned;
  for (int i = 0; i < n; i++) {
    const float a = x[i], b = x[i + n];
    out[i] = a*co[i] - b*si[i], out[i + n] = b*co[i] + a*si[i];
  }
  for (int i = 2*n; i < c.d; i++) out[i] = x[i];
}

inline __mmask16 first_lanes(int n) { return n >= 16 ? 0xFFFF : n > 0 ? (__mmask16)((1u << n) - 1) : 0; }

inline void round_row(const float* x, int d, int wide, u16* out) {   // to bfloat16, with zeros behind up to `wide`
  for (int i = 0; i < wide; i += 16)
    _mm256_mask_storeu_epi16(out + i, first_lanes(wide - i), (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first_lanes(d - i), x + i)));
}

// Append the new keys and values of one row and group to its cache
void append(const Call& c, int b, int g) {
  const int past = c.past(b);
  const i64 at = c.cache(b, g);
  float turned[MOST_CHANNELS];
  for (int t = 0; t < c.length; t++) {
    const i64 from = ((i64)b*c.length + t)*c.ldk + (i64)g*c.d, to = at + (i64)(past + t)*c.d;
    const float* k = c.k + from;
    if (c.turned) turn(c, k, past + t, turned), k = turned;
    round_row(k, c.d, c.d, c.keys + to);
    round_row(c.v + from, c.d, c.d, c.values + to);
  }
}

// All keys of one row and group, with zeros behind; and its values with positions side by side
void pack(const Call& c, int b, int g) {
  const i64 unit = (i64)b*c.groups + g, at = c.cache(b, g);
  const int total = c.past(b) + c.length;
  u16 *keys = c.packed_keys + unit*c.longest*c.wide, *values = c.packed_values + unit*c.longest*c.wide;
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

// 32 queries from q0 on, of one row and head
void attend_block(const Call& c, int b, int h, int q0) {
  const int past = c.past(b), queries = std::min(BLOCK, c.length - q0), first = past + q0;
  const int keys = (first + queries + BLOCK - 1)/BLOCK*BLOCK;
  const i64 unit = (i64)b*c.groups + h/(c.heads/c.groups);
  const u16 *packed_keys = c.packed_keys + unit*c.longest*c.wide, *packed_values = c.packed_values + unit*c.longest*c.wide;
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
}

// One query of one head. parts: registers of 32 channels
template <int parts> void attend_query(const Call& c, int b, int h, int t) {
  const int keys = c.past(b) + t + 1, d = c.d;
  const i64 at = c.cache(b, h/(c.heads/c.groups));
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
}

typedef void AttendQuery(const Call&, int b, int h, int t);
template <int... n> AttendQuery* for_parts(int parts, std::integer_sequence<int, n...>) {
  AttendQuery* const made[] = {attend_query<n + 1>...};
  return made[parts - 1];
}

// Called by the runtime's threads, once for each part
void prepare(void* call, size_t i) {
  const Call& c = *(const Call*)call;
  const int b = (int)i/c.groups, g = (int)i % c.groups;
  append(c, b, g);
  if (c.length >= PROMPT) pack(c, b, g);
}
void attend(void* call, size_t i) {
  const Call& c = *(const Call*)call;
  if (c.length >= PROMPT) {
    const int blocks = (c.length + BLOCK - 1)/BLOCK, unit = (int)i/blocks;
    configure_tiles();
    attend_block(c, unit/c.heads, unit % c.heads, (int)i % blocks*BLOCK);
    _tile_release();
  } else {
    const int b = (int)i/c.heads, h = (int)i % c.heads;
    AttendQuery* one = for_parts((c.d + 31)/32, std::make_integer_sequence<int, MOST_CHANNELS/32>());
    for (int t = 0; t < c.length; t++) one(c, b, h, t);
  }
}

struct Kernel {
  const OrtApi* api;
  i64 heads, groups, turns;
  float scale;
};

OrtStatus* create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** made) {
  auto k = new Kernel{api, 0, 0, 0, 0.f};
  OrtStatus* wrong = nullptr;
  auto whole = [&](const char* name, i64* value) { if (!wrong) wrong = CALL(api, KernelInfoGetAttribute_int64)(info, name, value); };
  whole("num_heads", &k->heads), whole("kv_num_heads", &k->groups);
  if (!wrong) wrong = CALL(api, KernelInfoGetAttribute_float)(info, "scale", &k->scale);
  *made = k;
  return wrong;
}
void destroy(void* kernel) { delete (Kernel*)kernel; }

struct Tensor {
  void* x = nullptr;
  i64 shape[4] = {0, 0, 0, 0};
};

OrtStatus* read(const OrtApi* api, const OrtValue* value, Tensor& t) {
  OrtTensorTypeAndShapeInfo* info;
  if (OrtStatus* wrong = CALL(api, GetTensorTypeAndShape)(value, &info)) return wrong;
  size_t axes = 0;
  OrtStatus* wrong = CALL(api, GetDimensionsCount)(info, &axes);
  if (!wrong) wrong = CALL(api, GetDimensions)(info, t.shape, std::min<size_t>(axes, 4));
  CALL(api, ReleaseTensorTypeAndShapeInfo)(info);
  return wrong ? wrong : CALL(api, GetTensorMutableData)((OrtValue*)value, &t.x);
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const Kernel& k = *(Kernel*)kernel;
  const OrtApi* api = k.api;
  Tensor in[9], out[3];
  size_t inputs = 0;
  if (OrtStatus* wrong = CALL(api, KernelContext_GetInputCount)(context, &inputs)) return wrong;
  for (size_t i = 0; i < std::min<size_t>(inputs, 9); i++) {
    const OrtValue* value = nullptr;
    if (OrtStatus* wrong = CALL(api, KernelContext_GetInput)(context, i, &value)) return wrong;
    if (value) if (OrtStatus* wrong = read(api, value, in[i])) return wrong;
  }
  Call c;
  c.batch = (int)in[0].shape[0], c.length = (int)in[0].shape[1], c.heads = (int)k.heads, c.groups = (int)k.groups;
  c.capacity = 2*(int)in[3].shape[2], c.d = (int)in[3].shape[3], c.scale = k.scale;
  if (c.d > MOST_CHANNELS) return CALL(api, CreateStatus)(ORT_INVALID_ARGUMENT, "CausalAttention takes heads of at most 256 channels");
  const i64 shape[3] = {c.batch, c.length, (i64)c.heads*c.d};
  for (int i = 0; i < 3; i++) {
    OrtValue* value = nullptr;
    if (OrtStatus* wrong = CALL(api, KernelContext_GetOutput)(context, i, i ? in[3].shape : shape, i ? 4 : 3, &value)) return wrong;
    if (OrtStatus* wrong = read(api, value, out[i])) return wrong;
    if (i && out[i].x != in[2 + i].x) memcpy(out[i].x, in[2 + i].x, (size_t)c.batch*c.groups*c.capacity*c.d*sizeof(u16));
  }
  c.q = (const float*)in[0].x, c.ldq = in[0].shape[2];
  const bool packed = !in[1].x;   // queries, keys and values side by side
  c.k = packed ? c.q + (i64)c.heads*c.d : (const float*)in[1].x, c.v = packed ? c.k + (i64)c.groups*c.d : (const float*)in[2].x;
  c.ldk = packed ? c.ldq : in[1].shape[2];
  c.last = (const int32_t*)in[5].x;
  c.cosines = (const float*)in[7].x, c.sines = (const float*)in[8].x, c.turned = c.cosines ? (int)in[7].shape[1] : 0;
  c.out = (float*)out[0].x, c.keys = (u16*)out[1].x, c.values = (u16*)out[2].x;
  const int most = *std::max_element(c.last, c.last + c.batch) + 1;
  for (int b = 0; b < c.batch; b++)
    if (c.past(b) < 0 || most > c.capacity) return CALL(api, CreateStatus)(ORT_INVALID_ARGUMENT, "CausalAttention: positions beyond the cache");
  c.wide = (c.d + 31)/32*32, c.longest = (most + BLOCK - 1)/BLOCK*BLOCK;
  static thread_local Kept<u16> rounded;
  const i64 size = (i64)c.batch*c.groups*c.longest*c.wide;
  const bool prompt = c.length >= PROMPT;
  if (prompt) c.packed_keys = rounded.of(2*size), c.packed_values = c.packed_keys + size;
  const size_t units = (size_t)c.batch*c.groups, parts = (size_t)c.batch*c.heads*(prompt ? (c.length + BLOCK - 1)/BLOCK : 1);
  if (!prompt) for (size_t i = 0; i < units; i++) prepare(&c, i);   // less work than waking a thread
  else if (OrtStatus* wrong = CALL(api, KernelContext_ParallelFor)(context, prepare, units, 0, &c)) return wrong;
  return CALL(api, KernelContext_ParallelFor)(context, attend, parts, prompt ? parts : 0, &c);
}

const char* name(const OrtCustomOp*) { return "GroupQueryAttention"; }
const char* provider(const OrtCustomOp*) { return nullptr; }   // the processor
int input_type(const OrtCustomOp*, size_t i) { return i == 5 || i == 6 ? ORT_INT32 : ORT_FLOAT; }
size_t input_count(const OrtCustomOp*) { return 9; }
int output_type(const OrtCustomOp*, size_t) { return ORT_FLOAT; }
size_t output_count(const OrtCustomOp*) { return 3; }
int input_needed(const OrtCustomOp*, size_t i) { return i == 1 || i == 2 || i > 6 ? ORT_OPTIONAL : ORT_REQUIRED; }
int output_needed(const OrtCustomOp*, size_t) { return ORT_REQUIRED; }
int memory_type(const OrtCustomOp*, size_t) { return 0; }
int one(const OrtCustomOp*) { return 1; }
int any_version(const OrtCustomOp*) { return INT32_MAX; }

const OrtCustomOp OPERATOR = {ORT_VERSION, nullptr, name, provider, input_type, input_count, output_type, output_count, nullptr, destroy,
                              input_needed, output_needed, memory_type, one, one, one, one, create, compute, nullptr, one, any_version};

}  // namespace

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_VERSION);
  if (!api || ready()) return nullptr;
  static OrtCustomOpDomain* domain = nullptr;
  OrtStatus* wrong = nullptr;
  if (!domain) {
    wrong = CALL(api, CreateCustomOpDomain)("com.microsoft", &domain);
    if (!wrong) wrong = CALL(api, CustomOpDomain_Add)(domain, &OPERATOR);
  }
  return wrong ? wrong : CALL(api, AddCustomOpDomain)(options, domain);
}

#else
extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions*, const OrtApiBase*) { return nullptr; }
#endif
