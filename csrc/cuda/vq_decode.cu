// vq's decoder: bits to words. A thread makes 16 bytes of x, or one value where those would not be aligned, so
// that stores are contiguous whatever the depth; words come from the cache.
#include <cstring>

#include "cuda/vq_work.h"

namespace lct {
namespace {

using namespace vq;

constexpr int kThreads = 256;
constexpr int64_t kPieces = 4096;  // that a block makes, unless one vector has more

struct Plan {
  int bits;
  unsigned parts;    // pieces of a vector
  unsigned vectors;  // of a block
};

__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// The code that starts at this bit; no byte is read in which it has none.
__device__ __forceinline__ int64_t code_at(const uint8_t* stream, int64_t bit, int bits) {
  const uint8_t* from = stream + bit / 8;
  const int skipped = static_cast<int>(bit % 8);
  uint32_t held = 0;
  for (int at = 0; at < skipped + bits; at += 8) held |= uint32_t{*from++} << at;
  return held >> skipped & ((1u << bits) - 1);
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) decode_kernel(const VqDecode args, const Plan plan) {
  constexpr int kValues = kAligned ? 16 / sizeof(T) : 1;
  constexpr int kRead = kAligned ? 4 : 1;
  const int64_t first = blockIdx.x * int64_t{plan.vectors}, rest = args.rows * args.groups - first;
  const unsigned vectors = rest < plan.vectors ? static_cast<unsigned>(rest) : plan.vectors;
  const uint64_t first_group = first % args.groups;
  T* const to = static_cast<T*>(args.x) + first * args.depth;
  for (unsigned piece = threadIdx.x; piece < vectors * plan.parts; piece += kThreads) {
    const unsigned vector = piece / plan.parts, part = piece - vector * plan.parts;
    const unsigned group = (static_cast<unsigned>(first_group) + vector) % static_cast<unsigned>(args.groups);
    int64_t code = code_at(args.codes, (first + vector) * plan.bits, plan.bits);
    if (code >= args.codewords) {
      code = args.codewords - 1;
      // Whoever comes writes the same.
      *args.flag = 1;
    }
    const float* word = args.codebook + (group * args.codewords + code) * args.depth + part * kValues;
    Vector<T, kValues> values;
#pragma unroll
    for (int i = 0; i < kValues; i += kRead) {
      const auto read = *reinterpret_cast<const Vector<float, kRead>*>(word + i);
#pragma unroll
      for (int j = 0; j < kRead; ++j) narrow(read.at[j], values.at[i + j]);
    }
    if constexpr (kAligned) {
      uint4 bits;
      memcpy(&bits, &values, sizeof bits);
      __stwb(reinterpret_cast<uint4*>(to + int64_t{piece} * kValues), bits);
    } else {
      to[piece] = values.at[0];
    }
  }
}

template <typename T>
cudaError_t launch_as(const VqDecode& args, cudaStream_t stream) {
  constexpr int64_t kValues = 16 / sizeof(T);
  const bool whole = args.depth % kValues == 0 && aligned(args.x, 16) && aligned(args.codebook, 16);
  const int64_t parts = whole ? args.depth / kValues : args.depth;
  const int64_t vectors = parts < kPieces ? kPieces / parts : 1;
  const Plan plan{static_cast<int>(bits_of(args.codewords)), static_cast<unsigned>(parts),
                  static_cast<unsigned>(vectors)};
  return launch(whole ? decode_kernel<T, true> : decode_kernel<T, false>,
                divide_up(args.rows * args.groups, vectors), kThreads, 0, stream, args, plan);
}

bool fits(const VqDecode& args) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return args.rows >= 1 && args.groups >= 1 && args.groups <= kMost && args.codewords >= 2 &&
         args.codewords <= 65536 && args.depth >= 1 && args.depth <= kMost;
}

}  // namespace

cudaError_t vq_decode_cuda(const VqDecode& args, int device, cudaStream_t stream) {
  if (!fits(args)) return cudaErrorInvalidValue;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  const cudaError_t error = cudaMemsetAsync(args.flag, 0, 1, stream);
  if (error != cudaSuccess) return error;
  if (args.dtype == DType::f32) return launch_as<float>(args, stream);
  if (args.dtype == DType::f16) return launch_as<__half>(args, stream);
  return launch_as<__nv_bfloat16>(args, stream);
}

}  // namespace lct
