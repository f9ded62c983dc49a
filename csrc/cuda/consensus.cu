// consensus: memory goes by once. The adjoint has a block of threads a row, whose sums fold in a fixed order:
// each thread over every 256th value, then lanes of a warp, then warps. The update has a thread a value.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.h"
#include "lct/consensus.h"

namespace lct {
namespace {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

template <typename T>
__global__ void __launch_bounds__(kThreads) adjoint_kernel(const ConsensusAdjoint args) {
  LCT_DYNAMIC_SHARED(float, of_warp);
  const int64_t start = blockIdx.x * args.depth;
  const T* x = static_cast<const T*>(args.x) + start;
  T* p = static_cast<T*>(args.p) + start;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < args.depth; i += kThreads) {
    const float kappa = args.kappa ? args.kappa[start + i] : 0.0f;
    const float d = args.lambda[start + i] - widen(x[i]);
    sum += d * (0.5f * args.beta * d - kappa);
    narrow(kappa - args.beta * d, p[i]);
  }
  for (int apart = kWarp / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(kAllLanes, sum, apart);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == 0) of_warp[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (int i = 0; i < kWarps; ++i) total += of_warp[i];
  args.loss[blockIdx.x] = total;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) update_kernel(const ConsensusUpdate args) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= args.size) return;
  const float lambda = args.lambda[i], kappa = args.kappa ? args.kappa[i] : 0.0f;
  const float x_prev = widen(static_cast<const T*>(args.x_prev)[i]);
  const float p = widen(static_cast<const T*>(args.p)[i]);
  const float next = lambda - args.eta * (p + args.beta * (lambda - x_prev) - kappa);
  args.lambda_out[i] = next;
  if (args.kappa) args.kappa_out[i] = kappa - args.beta * (next - x_prev);
}

template <typename Args>
cudaError_t launch_on(const Args& args, void (*kernel)(Args), int64_t blocks, size_t shared, int device,
                      cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  return launch(kernel, blocks, kThreads, shared, stream, args);
}

}  // namespace

cudaError_t consensus_adjoint_cuda(const ConsensusAdjoint& args, int device, cudaStream_t stream) {
  if (args.rows < 0 || args.depth < 0) return cudaErrorInvalidValue;
  if (args.rows == 0) return cudaSuccess;
  const auto kernel = args.dtype == DType::f32   ? adjoint_kernel<float>
                      : args.dtype == DType::f16 ? adjoint_kernel<__half>
                                                 : adjoint_kernel<__nv_bfloat16>;
  return launch_on(args, kernel, args.rows, kWarps * sizeof(float), device, stream);
}

cudaError_t consensus_update_cuda(const ConsensusUpdate& args, int device, cudaStream_t stream) {
  if (args.size < 0) return cudaErrorInvalidValue;
  if (args.size == 0) return cudaSuccess;
  const auto kernel = args.dtype == DType::f32   ? update_kernel<float>
                      : args.dtype == DType::f16 ? update_kernel<__half>
                                                 : update_kernel<__nv_bfloat16>;
  const int64_t blocks = args.size / kThreads + (args.size % kThreads != 0);
  return launch_on(args, kernel, blocks, 0, device, stream);
}

}  // namespace lct
