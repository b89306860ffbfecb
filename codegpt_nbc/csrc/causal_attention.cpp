// Causal attention for ONNX Runtime: an operator that takes the place of `GroupQueryAttention` of com.microsoft, as far as
// nbs/engines/52_onnx_export.ipynb writes it, computed in the form that suits the processor. Without one, nothing is registered,
// and the runtime is told so: its own operator would take the cache for float32.
#include <atomic>
#include "attention.h"
#include "onnxruntime_abi.h"

// 0: none; 1: the registers of AVX2; 2: the tiles of AMX
extern "C" int attention_form();
// To be called before `RegisterCustomOps`, whose operators have this form. 1: it cannot run here
extern "C" int choose_attention(int form);
// A digest of these sources, see setup.py
extern "C" const char* built_from() { return BUILT_FROM; }

namespace {
OrtStatus* nothing_registered(const OrtApiBase* base, const char* why) {
  const OrtApi* api = base->GetApi(1);   // every version of the runtime has that
  return api ? CALL(api, CreateStatus)(ORT_FAIL, why) : nullptr;
}
}  // namespace

#ifdef HAS_FORMS

namespace {

const int PROMPT = 16;   // new positions from which on blocks are the faster way

struct Work {   // what the runtime's threads share
  const Call& c;
  const Form& form;
  int blocks;   // of queries, each head
  bool prompt;
  std::atomic<bool>& failed;   // a thread found no memory
};
// Called by the runtime's threads, once for each part
void prepare(void* work, size_t i) {
  const Work& w = *(Work*)work;
  const int b = (int)i/w.c.groups, g = (int)i % w.c.groups;
  w.form.append(w.c, b, g);
  if (w.prompt) w.form.pack(w.c, b, g);
}
void attend(void* work, size_t i) {
  const Work& w = *(Work*)work;
  const int unit = (int)i/w.blocks, b = unit/w.c.heads, h = unit % w.c.heads;
  bool done = true;
  if (w.prompt) done = w.form.attend_block(w.c, b, h, (int)i % w.blocks*w.form.queries);
  else for (int t = 0; t < w.c.length && done; t++) done = w.form.attend_query(w.c, b, h, t);
  if (!done) w.failed = true;
}

struct Operator : OrtCustomOp {
  const Form* form;
};

struct Kernel {
  const OrtApi* api;
  const Form* form;
  i64 heads, groups, turns;   // turns: do rotary positions turn the heads?
  float scale;
};

OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** made) {
  Kernel k = {api, ((const Operator*)op)->form, 0, 0, 0, 0.f};
  for (auto& [name, value] : {std::pair{"num_heads", &k.heads}, {"kv_num_heads", &k.groups}})
    if (OrtStatus* wrong = CALL(api, KernelInfoGetAttribute_int64)(info, name, value)) return wrong;
  if (OrtStatus* wrong = CALL(api, KernelInfoGetAttribute_float)(info, "scale", &k.scale)) return wrong;
  auto optional = [&](OrtStatus* missing) { if (missing) CALL(api, ReleaseStatus)(missing); };   // its value stays the usual one
  i64 window = -1, interleaved = 0, smooth = 0;
  float softcap = 0.f;
  optional(CALL(api, KernelInfoGetAttribute_int64)(info, "do_rotary", &k.turns));
  optional(CALL(api, KernelInfoGetAttribute_int64)(info, "local_window_size", &window));
  optional(CALL(api, KernelInfoGetAttribute_int64)(info, "rotary_interleaved", &interleaved));
  optional(CALL(api, KernelInfoGetAttribute_int64)(info, "smooth_softmax", &smooth));
  optional(CALL(api, KernelInfoGetAttribute_float)(info, "softcap", &softcap));
  if (window != -1 || interleaved || smooth > 0 || softcap != 0.f)
    return CALL(api, CreateStatus)(ORT_INVALID_ARGUMENT,
                                   "CausalAttention has no local_window_size, softcap, rotary_interleaved or smooth_softmax");
  *made = new Kernel(k);
  return nullptr;
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

// Why the inputs do not belong together; nullptr: they do. The forms trust what has passed here
const char* misfit(const Call& c, const Tensor in[9]) {
  const Tensor &q = in[0], &k = in[1], &v = in[2], &cosines = in[7], &sines = in[8];
  const i64 own = (i64)c.heads*c.d, shared = (i64)c.groups*c.d;
  if (c.d > MOST_CHANNELS) return "CausalAttention takes heads of at most 256 channels";
  if (c.heads < 1 || c.groups < 1 || c.heads % c.groups) return "CausalAttention: the heads of keys do not divide the heads";
  if (q.shape[2] < own + (k.x ? 0 : 2*shared)) return "CausalAttention: the queries are narrower than their heads";
  for (const Tensor* t : {&k, &v})
    if (k.x && (!t->x || t->shape[0] != c.batch || t->shape[1] != c.length || t->shape[2] != shared))
      return "CausalAttention: keys and values have another shape than the queries";
  for (const Tensor* t : {&in[3], &in[4]})
    if (t->shape[0] != c.batch || t->shape[1] != c.groups || 2*t->shape[2] != c.capacity || t->shape[3] != c.d)
      return "CausalAttention: the cache has another shape than the queries";
  if (in[5].shape[0] != c.batch) return "CausalAttention: there must be one last position a row";
  if (c.turned && (2*c.turned > c.d || !sines.x || sines.shape[0] < cosines.shape[0] || sines.shape[1] != c.turned))
    return "CausalAttention: the tables of rotary positions do not fit the heads";
  for (int b = 0; b < c.batch; b++) {
    if (c.last[b] < c.length - 1 || c.last[b] >= c.capacity) return "CausalAttention: positions beyond the cache";
    if (c.turned && c.last[b] >= cosines.shape[0]) return "CausalAttention: positions beyond the context of the model";
  }
  return nullptr;
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
  c.last = (const int32_t*)in[5].x;
  c.cosines = (const float*)in[7].x, c.sines = (const float*)in[8].x, c.turned = c.cosines ? (int)in[7].shape[1] : 0;
  if (const char* why = misfit(c, in)) return CALL(api, CreateStatus)(ORT_INVALID_ARGUMENT, why);
  if (!c.cosines != !k.turns)
    return CALL(api, CreateStatus)(ORT_INVALID_ARGUMENT, "CausalAttention: do_rotary and the tables of rotary positions go together");
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
  c.out = (float*)out[0].x, c.keys = (u16*)out[1].x, c.values = (u16*)out[2].x;
  const int most = c.batch ? *std::max_element(c.last, c.last + c.batch) + 1 : 0;
  c.wide = (c.d + ROUND - 1)/ROUND*ROUND, c.longest = (most + ROUND - 1)/ROUND*ROUND;
  static thread_local Kept<char> kept;
  const i64 size = c.packed(c.batch, 0)*k.form->element;
  const bool prompt = c.length >= PROMPT;
  const char* no_memory = "CausalAttention finds no memory for its scores: end other programs, or read shorter prompts";
  if (prompt && size && !kept.of(2*size)) return CALL(api, CreateStatus)(ORT_FAIL, no_memory);
  if (prompt) c.packed_keys = kept.x, c.packed_values = kept.x + size;
  std::atomic<bool> failed(false);
  Work work = {c, *k.form, prompt ? (c.length + k.form->queries - 1)/k.form->queries : 1, prompt, failed};
  const size_t units = (size_t)c.batch*c.groups, parts = (size_t)c.batch*c.heads*work.blocks;
  if (!prompt) for (size_t i = 0; i < units; i++) prepare(&work, i);   // less work than waking a thread
  else if (OrtStatus* wrong = CALL(api, KernelContext_ParallelFor)(context, prepare, units, 0, &work)) return wrong;
  if (OrtStatus* wrong = CALL(api, KernelContext_ParallelFor)(context, attend, parts, prompt ? parts : 0, &work)) return wrong;
  return failed ? CALL(api, CreateStatus)(ORT_FAIL, no_memory) : nullptr;
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
const Operator OPERATORS[] = {{OPERATOR, &REGISTERS}, {OPERATOR, &TILES}};

bool runs(int form) { return form == 1 ? has_registers() : form == 2 && !ready(); }
int best() { return runs(2) ? 2 : runs(1) ? 1 : 0; }
int chosen = -1;   // by `choose_attention`

}  // namespace

extern "C" int attention_form() { return best(); }
extern "C" int choose_attention(int form) {
  if (!runs(form)) return 1;
  chosen = form;
  return 0;
}

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_VERSION);
  const int form = chosen < 0 ? best() : chosen;
  if (!api) return nothing_registered(base, "compiled attention needs ONNX Runtime 1.17 or a newer one");
  if (!form) return nothing_registered(base, "no form of compiled attention can run on this processor");
  static OrtCustomOpDomain* domains[3] = {nullptr, nullptr, nullptr};
  OrtStatus* wrong = nullptr;
  if (!domains[form]) {
    wrong = CALL(api, CreateCustomOpDomain)("com.microsoft", &domains[form]);
    if (!wrong) wrong = CALL(api, CustomOpDomain_Add)(domains[form], &OPERATORS[form - 1]);
  }
  return wrong ? wrong : CALL(api, AddCustomOpDomain)(options, domains[form]);
}

#else
extern "C" int attention_form() { return 0; }
extern "C" int choose_attention(int) { return 1; }
extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions*, const OrtApiBase* base) {
  return nothing_registered(base, "the compiler of this library has no form of compiled attention");
}
#endif
