// How kernels are launched and what a launcher must leave as it found it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <limits>

// Declares `name`, the block's dynamic shared memory. (tests/cuda/host_cuda.h has its own.)
#ifndef LCT_DYNAMIC_SHARED
#define LCT_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char lct_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(lct_dynamic_shared)
#endif

namespace lct {

// Makes `device` current and puts the previous one back. `error` says whether that worked.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&previous_);
    if (error != cudaSuccess || previous_ == device) return;
    error = cudaSetDevice(device);
    changed_ = error == cudaSuccess;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error = cudaSuccess;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Enqueues kernel(args...) on a one-dimensional grid. Neither synchronizes nor allocates, so it can be
// captured into a graph.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... args) {
  if (blocks < 1 || blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  // A block gets more than 48 KiB only where the kernel has been allowed it on the current device.
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace lct
