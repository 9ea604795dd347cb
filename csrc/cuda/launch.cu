#include "launch.cuh"
#include "loss_kernels.h"

namespace fastclip {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Looks the function up at run time, so that the module does not link libcuda and loads without a driver.
EncodeTiled find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) {
    cudaGetLastError();  // clear the error: it is reported here and must not surface in the next caller's check
    return nullptr;
  }
  return found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(function) : nullptr;
}

bool good_rows(const void* data, int64_t row_stride, int64_t cols) {
  return data && reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride % 8 == 0 && row_stride >= cols;
}

// Tensor map of a row-major matrix (rows, cols) of two-byte elements, moved in boxes of box_rows x 64. Elements outside
// the matrix read as 0 and are not written.
int make_map(EncodeTiled encode, CUtensorMap* map, const void* data, int64_t rows, int64_t cols, int64_t row_stride,
             int box_rows, int dtype) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, step[2] = {1, 1};
  const CUtensorMapDataType type =
      dtype == FASTCLIP_FP16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(data), sizes, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? FASTCLIP_OK : FASTCLIP_INVALID_ARGUMENT;
}

}  // namespace

int prepare(const fastclip_cuda_block* block, Params* p, Maps* maps, void* weights, int64_t weights_row_stride) {
  constexpr int64_t kLargest = INT32_MAX - 256;  // row and column indices stay 32-bit, also in a tile past the edge
  if (!block || !block->constants) return FASTCLIP_INVALID_ARGUMENT;
  const fastclip_cuda_block& b = *block;
  if (b.M < 1 || b.N < 1 || b.D < 1 || b.M > kLargest || b.N > kLargest || b.D > kLargest)
    return FASTCLIP_INVALID_ARGUMENT;
  if (b.dtype != FASTCLIP_BF16 && b.dtype != FASTCLIP_FP16) return FASTCLIP_INVALID_ARGUMENT;
  if ((b.tile_n != FASTCLIP_CUDA_TILE_N && b.tile_n != FASTCLIP_CUDA_TILE_N_LABELS &&
       b.tile_n != FASTCLIP_CUDA_TILE_N_SMALL) ||
      b.processors < kCluster)
    return FASTCLIP_INVALID_ARGUMENT;
  if (!good_rows(b.image, b.image_row_stride, b.D) || !good_rows(b.text, b.text_row_stride, b.D))
    return FASTCLIP_INVALID_ARGUMENT;
  if (weights && !good_rows(weights, weights_row_stride, b.N)) return FASTCLIP_INVALID_ARGUMENT;
  p->constants = b.constants, p->offset = b.offset, p->exclude_self = b.exclude_self;
  p->M = static_cast<int>(b.M), p->N = static_cast<int>(b.N);
  p->k_blocks = static_cast<int>((b.D + kBlockK - 1) / kBlockK);
  p->tiles_m = (p->M + kBlockM - 1) / kBlockM, p->tiles_n = (p->N + b.tile_n - 1) / b.tile_n;
  if (p->parts_n == 0) p->parts_n = p->tiles_n;
  const int64_t pairs = static_cast<int64_t>((p->tiles_m + kCluster - 1) / kCluster) * p->tiles_n;
  if (pairs > INT32_MAX / kCluster / p->k_blocks) return FASTCLIP_INVALID_ARGUMENT;
  p->pairs = static_cast<int>(pairs);
  static const EncodeTiled encode = find_encode();
  if (!encode) return FASTCLIP_NO_DRIVER;
  int error = make_map(encode, &maps->image, b.image, b.M, b.D, b.image_row_stride, kBlockM, b.dtype);
  if (!error) error = make_map(encode, &maps->text, b.text, b.N, b.D, b.text_row_stride, b.tile_n / kCluster, b.dtype);
  if (!error && weights) error = make_map(encode, &maps->weights, weights, b.M, b.N, weights_row_stride, 16, b.dtype);
  if (!weights) maps->weights = maps->image;
  return error;
}

namespace {

int status_of(cudaError_t error) {
  if (error == cudaSuccess) return FASTCLIP_OK;
  cudaGetLastError();
  return error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice ? FASTCLIP_NO_DRIVER
                                                                            : FASTCLIP_CUDA_ERROR + error;
}

}  // namespace

int start(const void* kernel, int smem_bytes, std::atomic<uint64_t>& ready, const fastclip_cuda_block& block,
          Maps& maps, Params& p) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (error == cudaSuccess && !(ready.load(std::memory_order_relaxed) & bit)) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
    if (error == cudaSuccess) ready.fetch_or(bit, std::memory_order_relaxed);
  }
  if (error == cudaSuccess) {
    void* args[] = {&maps.image, &maps.text, &maps.weights, &p};
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kCluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    const int clusters = block.processors / kCluster < p.pairs ? block.processors / kCluster : p.pairs;
    config.gridDim = dim3(clusters * kCluster), config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = smem_bytes, config.stream = static_cast<cudaStream_t>(block.stream);
    config.attrs = &attribute, config.numAttrs = 1;
    error = cudaLaunchKernelExC(&config, kernel, args);
  }
  return status_of(error);
}

int start_loss(LossKernel kernel, int64_t blocks, int threads, int smem_bytes, const Loss& p, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes, config.stream = static_cast<cudaStream_t>(stream);
  void* args[] = {const_cast<Loss*>(&p)};
  return status_of(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), args));
}

}  // namespace fastclip

extern "C" int fastclip_cuda_driver(void) {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) cudaGetLastError();
  return version;
}

extern "C" int fastclip_cuda_runtime(void) { return CUDART_VERSION; }

extern "C" const char* fastclip_cuda_error_name(int status) {
  return status < FASTCLIP_CUDA_ERROR ? "not an error of CUDA"
                                      : cudaGetErrorName(static_cast<cudaError_t>(status - FASTCLIP_CUDA_ERROR));
}
