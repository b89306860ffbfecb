// The part of ONNX Runtime's C interface that a custom operator needs. The interface is a table of functions to which versions
// only append (onnxruntime_c_api.h, "OrtApi"), so a function is known by its place in it. What is used here came by version 1.17.
#pragma once
#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtTensorTypeAndShapeInfo;

struct OrtApi { void* functions[275]; };
struct OrtApiBase { const OrtApi* (*GetApi)(uint32_t version); };

const uint32_t ORT_VERSION = 17;
enum { ORT_FLOAT = 1, ORT_INT32 = 6 };                 // ONNXTensorElementDataType
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };           // OrtCustomOpInputOutputCharacteristic
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };       // OrtErrorCode

// Name, place, type
template <int place, typename Function> struct Entry {
  static Function* of(const OrtApi* api) { return (Function*)api->functions[place]; }
};
#define CALL(api, name) name::of(api)
typedef Entry<0, OrtStatus*(int code, const char* message)> CreateStatus;
typedef Entry<26, OrtStatus*(const char* name, OrtCustomOpDomain**)> CreateCustomOpDomain;
typedef Entry<27, OrtStatus*(OrtCustomOpDomain*, const struct OrtCustomOp*)> CustomOpDomain_Add;
typedef Entry<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)> AddCustomOpDomain;
typedef Entry<51, OrtStatus*(OrtValue*, void** data)> GetTensorMutableData;
typedef Entry<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t* axes)> GetDimensionsCount;
typedef Entry<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t* shape, size_t axes)> GetDimensions;
typedef Entry<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)> GetTensorTypeAndShape;
typedef Entry<85, OrtStatus*(const OrtKernelInfo*, const char* name, float*)> KernelInfoGetAttribute_float;
typedef Entry<86, OrtStatus*(const OrtKernelInfo*, const char* name, int64_t*)> KernelInfoGetAttribute_int64;
typedef Entry<88, OrtStatus*(const OrtKernelContext*, size_t*)> KernelContext_GetInputCount;
typedef Entry<90, OrtStatus*(const OrtKernelContext*, size_t index, const OrtValue**)> KernelContext_GetInput;
typedef Entry<91, OrtStatus*(OrtKernelContext*, size_t index, const int64_t* shape, size_t axes, OrtValue**)> KernelContext_GetOutput;
typedef Entry<93, void(OrtStatus*)> ReleaseStatus;
typedef Entry<99, void(OrtTensorTypeAndShapeInfo*)> ReleaseTensorTypeAndShapeInfo;
typedef Entry<274, OrtStatus*(const OrtKernelContext*, void (*part)(void*, size_t), size_t parts, size_t batches, void*)> KernelContext_ParallelFor;

struct OrtCustomOp {   // as of version 17
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, void*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
};
