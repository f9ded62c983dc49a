// Runs CUDA kernels without tensor-core instructions on the host, so that their indices, masks and barriers
// are tested where there is no GPU. The .cu file compiles unchanged: tests/cuda/include stands in for the
// toolkit's headers.
//
// A block's threads are fibers. One runs until it meets a barrier or a warp operation; which goes on next is
// drawn from a seeded generator. Code that lacks a barrier therefore gives different results for different
// seeds. Blocks run one after another, in an order that is drawn too. Dynamic shared memory is a heap block
// of exactly the size asked for, filled with NaN: under AddressSanitizer an access past it stops the program,
// as does one past any buffer that the test has allocated at its exact size.
//
// Stops the program too: a barrier or warp operation that some threads never reach, lanes of one warp at
// different operations, more shared memory than the kernel has been allowed, and a block that is too large.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define LCT_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(host_cuda::dynamic_shared)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename T>
void __stwb(T* to, T value) {
  *to = value;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

using std::max;
using std::min;

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float __bfloat162float(__nv_bfloat16 x) { return float_of(uint32_t{x.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = bits_of(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float sign = x.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(1.0f * fraction, -24));
}

inline __half __float2half_rn(float x) {
  const auto sign = static_cast<uint16_t>(bits_of(x) >> 31 << 15);
  if (std::isnan(x)) return {0x7fff};
  const float size = std::fabs(x);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size == 0.0f) return {sign};
  // The spacing of halves around x; nearbyint rounds ties to even.
  int exponent = 0;
  std::frexp(size, &exponent);
  const int spacing = std::max(exponent - 11, -24);
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -spacing)));
  // Steps of 2^-24 are their own encoding; above, each power of two adds 1024 to it.
  return {static_cast<uint16_t>(sign | (steps + (static_cast<uint32_t>(spacing + 24) << 10)))};
}

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorUnknown = 999,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

namespace host_cuda {

// What a test sets.
inline unsigned seed = 0;
inline int fail_at_call = -1;  // the runtime call (from 0) that fails, if any
inline int device_count = 2;

// What a test reads.
inline int device = 0;
inline int calls = 0;
inline cudaStream_t last_stream = nullptr;
inline int last_device = -1;

// What a kernel reads through LCT_DYNAMIC_SHARED.
inline void* dynamic_shared = nullptr;

constexpr unsigned kWarpSize = 32;
constexpr size_t kDefaultShared = 48 * 1024;
constexpr size_t kMostShared = 99 * 1024;  // the least of any device from compute capability 8.0 on

// Runs body(of) on as many fibers as the block has threads; `draw` decides who goes on.
void run_block(unsigned threads, std::mt19937& draw, void (*body)(const void*), const void* of);

// Of the calling thread: waits for the block.
void barrier();

// Of the calling lane: waits for the lanes of `mask`, and returns what each of them gave. `operation` tells
// kinds of call apart.
const uint64_t* exchange(unsigned mask, uint64_t value, int operation);

[[noreturn]] void stop(const char* what);

inline std::map<const void*, size_t>& allowed_shared() {
  static std::map<const void*, size_t> bytes;
  return bytes;
}

inline bool fails() { return calls++ == fail_at_call; }

template <typename T>
T shuffle(unsigned mask, T value, unsigned source_lane, int operation) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t given = 0;
  std::memcpy(&given, &value, sizeof value);
  const unsigned lane = threadIdx.x % kWarpSize;
  const uint64_t* all = exchange(mask, given, operation);
  // A source beyond the warp gives the lane its own value, as in CUDA.
  const unsigned source = source_lane < kWarpSize ? source_lane : lane;
  if (!(mask >> source & 1)) stop("shuffles from a lane that the mask leaves out");
  std::memcpy(&value, &all[source], sizeof value);
  return value;
}

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { host_cuda::exchange(mask, 0, 1); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return host_cuda::shuffle(mask, value, static_cast<unsigned>(lane) % host_cuda::kWarpSize, 2);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return host_cuda::shuffle(mask, value, threadIdx.x % host_cuda::kWarpSize + delta, 3);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return host_cuda::shuffle(mask, value, threadIdx.x % host_cuda::kWarpSize ^ static_cast<unsigned>(bits), 4);
}


inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* all = host_cuda::exchange(mask, predicate != 0, 5);
  unsigned ballot = 0;
  for (unsigned i = 0; i < host_cuda::kWarpSize; ++i) {
    if (mask >> i & 1 && all[i]) ballot |= 1u << i;
  }
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// The lanes of `mask` that give the same value.
inline unsigned __match_any_sync(unsigned mask, int value) {
  const auto mine = static_cast<uint64_t>(static_cast<unsigned>(value));
  const uint64_t* all = host_cuda::exchange(mask, mine, 6);
  unsigned peers = 0;
  for (unsigned i = 0; i < host_cuda::kWarpSize; ++i) {
    if (mask >> i & 1 && all[i] == mine) peers |= 1u << i;
  }
  return peers;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

// No thread runs between a fiber's reading and its writing.
inline unsigned atomicMax(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at = std::max(before, value);
  return before;
}
inline unsigned atomicMin(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at = std::min(before, value);
  return before;
}

inline cudaError_t cudaGetDevice(int* device) {
  if (host_cuda::fails()) return cudaErrorUnknown;
  *device = host_cuda::device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (host_cuda::fails()) return cudaErrorUnknown;
  if (device < 0 || device >= host_cuda::device_count) return cudaErrorInvalidDevice;
  host_cuda::device = device;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t count, cudaStream_t stream) {
  if (host_cuda::fails()) return cudaErrorUnknown;
  host_cuda::last_stream = stream;
  std::memset(to, value, count);
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (host_cuda::fails()) return cudaErrorUnknown;
  if (static_cast<size_t>(bytes) > host_cuda::kMostShared) return cudaErrorInvalidValue;
  host_cuda::allowed_shared()[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... args) {
  using namespace host_cuda;
  if (fails()) return cudaErrorUnknown;
  const auto allowed = allowed_shared().find(reinterpret_cast<const void*>(kernel));
  const size_t most = allowed == allowed_shared().end() ? kDefaultShared : allowed->second;
  const unsigned threads = config->blockDim.x;
  if (config->dynamicSmemBytes > most || threads < 1 || threads > 1024 || config->gridDim.x < 1 ||
      config->gridDim.x > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  last_stream = config->stream;
  last_device = device;
  gridDim = config->gridDim;
  blockDim = config->blockDim;

  std::mt19937 draw(seed);
  std::vector<unsigned> order(gridDim.x);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), draw);
  for (const unsigned index : order) {
    blockIdx = dim3(index, 0, 0);
    // As malloc aligns it: on 16 bytes. Shared memory of no bytes still has an address.
    const std::unique_ptr<char, decltype(&std::free)> shared(
        static_cast<char*>(std::malloc(std::max<size_t>(config->dynamicSmemBytes, 1))), &std::free);
    std::memset(shared.get(), 0xff, config->dynamicSmemBytes);
    dynamic_shared = shared.get();
    const auto body = [&] { kernel(args...); };
    run_block(threads, draw, [](const void* of) { (*static_cast<const decltype(body)*>(of))(); }, &body);
  }
  return cudaSuccess;
}
