// Small kernels, right and wrong, that show what host_cuda.h notices. Named on the command line; prints
// numbers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>
#include <string>

#include "cuda/launch.h"

namespace {

constexpr int kThreads = 64;

// out[block] = the sum of its part of in, by halves in shared memory; a race with the first barrier alone.
__global__ void sum(const float* in, float* out, bool barriers) {
  LCT_DYNAMIC_SHARED(float, shared);
  const unsigned i = threadIdx.x;
  shared[i] = in[blockIdx.x * kThreads + i];
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (barriers || half == kThreads / 2) __syncthreads();
    if (i < half) shared[i] += shared[i + half];
  }
  if (i == 0) out[blockIdx.x] = shared[0];
}

__global__ void warp_sums(float* out) {
  const unsigned lane = threadIdx.x % 32;
  float down = static_cast<float>(threadIdx.x), both = down;
  for (int offset = 16; offset > 0; offset /= 2) {
    down += __shfl_down_sync(0xffffffffu, down, static_cast<unsigned>(offset));
    both += __shfl_xor_sync(0xffffffffu, both, offset);
  }
  const float first = __shfl_sync(0xffffffffu, down, 0);
  __syncwarp();
  if (lane == 31) out[threadIdx.x / 32] = first == both ? both : -1.0f;
}

// What a warp's lanes vote for, and which share a number; the largest and smallest that any thread brings.
__global__ void votes(unsigned* out) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const unsigned low = __ballot_sync(0xffffffffu, lane < 5), peers = __match_any_sync(0xffffffffu, lane % 3);
  const int any = __any_sync(0xffffffffu, lane == 31), all = __all_sync(0xffffffffu, lane < 31);
  if (thread == 4) {
    out[0] = low;
    out[1] = peers;
    out[2] = static_cast<unsigned>(any * 2 + all + __popc(low) * 16 + __ffs(8) * 256);
  }
  atomicMax(out + 3, static_cast<unsigned>(thread * 7 % 50));
  atomicMin(out + 4, static_cast<unsigned>(50 - thread * 7 % 50));
}

__global__ void past_the_end(float* out) {
  LCT_DYNAMIC_SHARED(float, shared);
  shared[threadIdx.x + 1] = 1.0f;
  if (threadIdx.x == 0) out[0] = shared[0];
}

__global__ void misses_barrier() {
  if (threadIdx.x != 5) __syncthreads();
}

__global__ void splits_warp() {
  if (threadIdx.x < 16)
    __syncwarp();
  else
    __shfl_xor_sync(0xffffffffu, 1, 1);
}

cudaError_t launch_sum(float* out, bool barriers) {
  float in[2 * kThreads];
  for (int i = 0; i < 2 * kThreads; ++i) in[i] = static_cast<float>(i);
  return lct::launch(sum, 2, kThreads, kThreads * sizeof(float), nullptr, in, out, barriers);
}

}  // namespace

int main(int count, char** words) {
  const std::string what = count > 1 ? words[1] : "";
  float out[2] = {};
  cudaError_t error = cudaSuccess;
  if (what == "sum" || what == "race") {
    for (host_cuda::seed = 0; host_cuda::seed < 5; ++host_cuda::seed) {
      error = launch_sum(out, what == "sum");
      std::printf("%g %g\n", out[0], out[1]);
    }
  } else if (what == "warp") {
    error = lct::launch(warp_sums, 1, kThreads, 0, nullptr, static_cast<float*>(out));
    std::printf("%g %g\n", out[0], out[1]);
  } else if (what == "votes") {
    unsigned found[5] = {0, 0, 0, 0, 1000};
    error = lct::launch(votes, 1, kThreads, 0, nullptr, static_cast<unsigned*>(found));
    for (const unsigned x : found) std::printf("%u\n", x);
  } else if (what == "past_the_end") {
    error =
        lct::launch(past_the_end, 1, kThreads, kThreads * sizeof(float), nullptr, static_cast<float*>(out));
  } else if (what == "misses_barrier") {
    error = lct::launch(misses_barrier, 1, kThreads, 0, nullptr);
  } else if (what == "splits_warp") {
    error = lct::launch(splits_warp, 1, kThreads, 0, nullptr);
  } else if (what == "too_much_shared") {
    error = lct::launch(misses_barrier, 1, kThreads, 100 * 1024, nullptr);
  } else if (what == "convert") {
    // Both formats of each number read, as bits, and back.
    for (float x; std::scanf("%g", &x) == 1;) {
      const __half half = __float2half_rn(x);
      const __nv_bfloat16 brain = __float2bfloat16_rn(x);
      std::printf("%d %.9g %d %.9g\n", half.bits, __half2float(half), brain.bits, __bfloat162float(brain));
    }
  } else {
    return 2;
  }
  if (error != cudaSuccess) std::printf("error %d\n", static_cast<int>(error));
  return 0;
}
