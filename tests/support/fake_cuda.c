// A CUDA driver and runtime for tests of the host's work: every call succeeds and does nothing, except that launches
// and tensor maps are counted. Triton's launcher and the CUDA module's binding run on it as they do on a GPU.
#include <string.h>

#include "cuda.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT long fake_cuda_launches = 0;
EXPORT long fake_cuda_maps = 0;

static int anything;  // target of all handles

// The functions of the driver that Triton's launcher calls
EXPORT CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "the driver of tests/support/fake_cuda.c";
  return CUDA_SUCCESS;
}
EXPORT CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE              ? 32
           : attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132
                                                                   : 227 * 1024;  // shared memory
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)&anything;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return cuCtxGetCurrent(context); }
EXPORT CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)&anything;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)&anything;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
EXPORT CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* config) {
  *clusters = 66;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)data = pointer;  // every address belongs to the device
  return CUDA_SUCCESS;
}
EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                       CUtensorMapFloatOOBfill fill) {
  memset(map, 0, sizeof *map);
  fake_cuda_maps++;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
  fake_cuda_launches++;
  return CUDA_SUCCESS;
}

#ifdef FAKE_RUNTIME
// The runtime to which the CUDA module is linked in place of NVIDIA's. Errors and structures are passed as integers and
// pointers, so that the runtime's headers are not needed
EXPORT int cudaLaunchKernelExC(const void* config, const void* function, void** arguments) {
  fake_cuda_launches++;
  return 0;
}
EXPORT int __cudaLaunchKernel(void* kernel, ...) {
  fake_cuda_launches++;
  return 0;
}
EXPORT int cudaLaunchKernel(const void* function, ...) {
  fake_cuda_launches++;
  return 0;
}
EXPORT int cudaMemsetAsync(void* address, int value, size_t bytes, void* stream) {
  fake_cuda_launches++;
  return 0;
}
EXPORT int cudaFuncSetAttribute(const void* function, int attribute, int value) { return 0; }
EXPORT int cudaSetDevice(int device) { return 0; }
EXPORT int cudaGetLastError(void) { return 0; }
EXPORT int cudaPeekAtLastError(void) { return 0; }
EXPORT int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
EXPORT const char* cudaGetErrorName(int error) { return "cudaSuccess"; }
EXPORT int cudaDriverGetVersion(int* version) { return cuDriverGetVersion(version); }
EXPORT int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                            unsigned long long flags, int* found) {
  const int encode = strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = encode ? (void*)cuTensorMapEncodeTiled : 0;
  *found = encode ? 0 : 1;  // cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound
  return 0;
}
EXPORT void** __cudaRegisterFatBinary(void* binary) {
  static void* handle = &anything;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void** handle) {}
EXPORT void __cudaUnregisterFatBinary(void** handle) {}
EXPORT void __cudaRegisterFunction(void** handle, const void* function, ...) {}
EXPORT void __cudaRegisterVar(void** handle, ...) {}
EXPORT int __cudaGetKernel(void** kernel, const void* function) {
  *kernel = &anything;
  return 0;
}
EXPORT unsigned __cudaPushCallConfiguration(void) { return 0; }
EXPORT int __cudaPopCallConfiguration(void) { return 0; }
#endif
