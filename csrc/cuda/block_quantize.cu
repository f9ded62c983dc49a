// block_quantize: memory goes by once, each thread works on 8 values and reads them 16 bytes at a time.
//
// A block of 32, 64, 128 or 256 values belongs to 4, 8, 16 or 32 neighbouring lanes of one warp. They find the
// largest value by shuffles, each makes the scale from it, and 8 codes are 8, 4 or 2 bytes of the payload. Back,
// a thread needs nothing of its neighbours.
//
// Bits are those of every other backend: see lct/block_quantize.h. __fmul_rn is never fused with a sum.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "cuda/launch.h"
#include "lct/block_quantize.h"

namespace lct {
namespace {

constexpr int kThreads = 256;
constexpr int kValues = 8;  // a thread
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr float kRound = 12582912.0f;  // a float below 2^22 plus this has the whole number in its low bits
constexpr float kRoundFp8 = 16384.0f;  // the same for multiples of 2^-9
constexpr uint32_t kRoundFp8Bits = 0x46800000u;
constexpr uint32_t kInfinity = 0x7f800000u, kMinusZero = 0x80000000u, kNan = 0x7fc00000u;
constexpr uint32_t kNanScale = 0x7fc0u, kScaleExponent = 0x7f80u, kScaleSign = 0x8000u;
constexpr float kSmallestScale = 0x1p-100f, kLargestScale = 0x1p126f;

__device__ __forceinline__ uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
__device__ __forceinline__ float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

template <typename T>
struct Format;
template <>
struct Format<float> {
  static constexpr float kLargest = 0x1.fffffep127f;
  static constexpr uint32_t kNanBits = kNan;
  using Bits = uint32_t;
  __device__ static float widen(float x) { return x; }
  __device__ static float narrow(float x) { return x; }
};
template <>
struct Format<__half> {
  static constexpr float kLargest = 65504.0f;
  static constexpr uint32_t kNanBits = 0x7e00u;
  using Bits = uint16_t;
  __device__ static float widen(__half x) { return __half2float(x); }
  __device__ static __half narrow(float x) { return __float2half_rn(x); }
};
template <>
struct Format<__nv_bfloat16> {
  static constexpr float kLargest = 0x1.fep127f;
  static constexpr uint32_t kNanBits = 0x7fc0u;
  using Bits = uint16_t;
  __device__ static float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  __device__ static __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
};

// 16 bytes, one access to memory.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / sizeof(T);
  T at[kCount];
};

__device__ __forceinline__ int bits_of(BlockKind kind) {
  return kind == BlockKind::int4 ? 4 : kind == BlockKind::int2 ? 2 : 8;
}

// Values [0, count) of 8, zeros behind them.
template <typename T, bool kAligned>
__device__ __forceinline__ void load_values(const T* from, int count, float (&x)[kValues]) {
  if (kAligned && count == kValues) {
#pragma unroll
    for (int k = 0; k < kValues; k += Pack<T>::kCount) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + k);
#pragma unroll
      for (int i = 0; i < Pack<T>::kCount; ++i) x[k + i] = Format<T>::widen(pack.at[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) x[i] = i < count ? Format<T>::widen(from[i]) : 0.0f;
}

template <typename T, bool kAligned>
__device__ __forceinline__ void store_values(T* to, int count, const T (&x)[kValues]) {
  if (kAligned && count == kValues) {
#pragma unroll
    for (int k = 0; k < kValues; k += Pack<T>::kCount) {
      uint4 bits;
      memcpy(&bits, x + k, sizeof bits);
      __stwb(reinterpret_cast<uint4*>(to + k), bits);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (i < count) to[i] = x[i];
  }
}

// Eight codes of `bits` bits, the first one lowest: low holds the first 32 bits, high the rest of 64.
struct Codes {
  uint32_t low, high;
};

template <bool kAligned>
__device__ __forceinline__ void store_codes(uint8_t* to, int count, int bits, Codes codes) {
  if (kAligned && count == kValues) {
    if (bits == 8)
      __stwb(reinterpret_cast<uint2*>(to), uint2{codes.low, codes.high});
    else if (bits == 4)
      *reinterpret_cast<uint32_t*>(to) = codes.low;
    else
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(codes.low);
    return;
  }
  const int bytes = (count * bits + 7) / 8;
  for (int i = 0; i < bytes; ++i) {
    to[i] = static_cast<uint8_t>((i < 4 ? codes.low : codes.high) >> 8 * (i % 4));
  }
}

template <bool kAligned>
__device__ __forceinline__ Codes load_codes(const uint8_t* from, int count, int bits) {
  if (kAligned && count == kValues) {
    if (bits == 8) {
      const uint2 both = *reinterpret_cast<const uint2*>(from);
      return {both.x, both.y};
    }
    if (bits == 4) return {*reinterpret_cast<const uint32_t*>(from), 0};
    return {*reinterpret_cast<const uint16_t*>(from), 0};
  }
  Codes codes{0, 0};
  const int bytes = (count * bits + 7) / 8;
  for (int i = 0; i < bytes; ++i) {
    const uint32_t byte = static_cast<uint32_t>(from[i]) << 8 * (i % 4);
    if (i < 4)
      codes.low |= byte;
    else
      codes.high |= byte;
  }
  return codes;
}

__device__ __forceinline__ float limited(float x, float limit) {
  const uint32_t bits = to_bits(x), size = bits & ~kMinusZero, most = to_bits(limit);
  return from_bits((bits & kMinusZero) | min(size, most));
}

__device__ __forceinline__ uint32_t encode_fp8(float y) {
  const uint32_t bits = to_bits(y), size = bits & ~kMinusZero;
  const uint32_t normal = ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3);
  const uint32_t subnormal = to_bits(from_bits(size) + kRoundFp8) - kRoundFp8Bits;
  return (bits >> 24 & 0x80u) | (size < 0x3c800000u ? subnormal : normal);
}

__device__ __forceinline__ float decode_fp8(uint32_t code) {
  const uint32_t size = code & 0x7fu;
  const uint32_t normal = (size << 20) + (120u << 23);
  const uint32_t subnormal = to_bits(__fmul_rn(static_cast<float>(static_cast<int>(size)), 0x1p-9f));
  return from_bits((code << 24 & kMinusZero) | (size < 8u ? subnormal : normal));
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const BlockQuantize args, const int block_log2) {
  const int64_t thread = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t first = thread * kValues, rest = args.size - first;
  const int count = rest >= kValues ? kValues : rest > 0 ? static_cast<int>(rest) : 0;
  const int lanes = (1 << block_log2) / kValues, bits = bits_of(args.kind);

  float x[kValues];
  load_values<T, kAligned>(static_cast<const T*>(args.x) + first, count, x);
  uint32_t top = 0, most_signed = 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    top = max(top, to_bits(x[i]) & ~kMinusZero);
    most_signed = max(most_signed, to_bits(x[i]));
  }
  // Every lane of the warp takes part, those behind the end with zeros.
  for (int apart = lanes / 2; apart > 0; apart /= 2) {
    top = max(top, __shfl_xor_sync(kAllLanes, top, apart));
    most_signed = max(most_signed, __shfl_xor_sync(kAllLanes, most_signed, apart));
  }
  if (count == 0) return;

  const bool is_unsigned = bits < 8 && most_signed <= kMinusZero;
  const int most_code = (1 << (is_unsigned ? bits : bits - 1)) - 1;
  const float most = args.kind == BlockKind::fp8 ? 448.0f : static_cast<float>(most_code);
  const uint32_t exact = to_bits(from_bits(top) / most);
  const float rounded = from_bits((exact + 0x7fffu + (exact >> 16 & 1u)) & 0xffff0000u);
  const bool finite = top < kInfinity, coded = finite && rounded >= kSmallestScale;
  const float scale = rounded > kLargestScale ? kLargestScale : rounded;

  Codes codes{0, 0};
  if (coded) {
    const float inverse = 1.0f / scale;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const float y = limited(__fmul_rn(x[i], inverse), most);
      const uint32_t code = args.kind == BlockKind::fp8 ? encode_fp8(y) : to_bits(y + kRound);
      // Behind the end there are zeros, whose code is 0.
      const uint32_t kept = code & ((1u << bits) - 1);
      if (i * bits < 32)
        codes.low |= kept << i * bits;
      else
        codes.high |= kept << (i * bits - 32);
    }
  }
  store_codes<kAligned>(args.payload + thread * bits, count, bits, codes);
  if ((threadIdx.x & (lanes - 1)) == 0) {
    const uint32_t sign = is_unsigned ? kScaleSign : 0u;
    args.scales[first >> block_log2] =
        static_cast<uint16_t>(coded ? to_bits(scale) >> 16 | sign : finite ? 0u : kNanScale);
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const BlockDequantize args, const int block_log2) {
  const int64_t thread = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t first = thread * kValues, rest = args.size - first;
  if (rest <= 0) return;
  const int count = rest >= kValues ? kValues : static_cast<int>(rest);
  const int bits = bits_of(args.kind);

  const Codes codes = load_codes<kAligned>(args.payload + thread * bits, count, bits);
  const uint32_t given = args.scales[first >> block_log2];
  const bool is_unsigned = bits < 8 && (given & kScaleSign);
  const bool finite = (given & kScaleExponent) != kScaleExponent;
  const float scale = from_bits((is_unsigned ? given ^ kScaleSign : given) << 16);
  const int half = is_unsigned ? 0 : 1 << (bits - 1);

  T x[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const uint32_t word = i * bits < 32 ? codes.low >> i * bits : codes.high >> (i * bits - 32);
    const uint32_t code = word & ((1u << bits) - 1);
    const bool is_fp8 = args.kind == BlockKind::fp8;
    const int whole = (static_cast<int>(code) ^ half) - half;
    const float value = is_fp8 ? decode_fp8(code) : static_cast<float>(whole);
    x[i] = Format<T>::narrow(limited(__fmul_rn(value, scale), Format<T>::kLargest));
    if (!finite || (is_fp8 && (code & 0x7fu) == 0x7fu)) {
      const auto nan = static_cast<typename Format<T>::Bits>(Format<T>::kNanBits);
      memcpy(&x[i], &nan, sizeof nan);
    }
  }
  store_values<T, kAligned>(static_cast<T*>(args.x) + first, count, x);
}

bool aligned(const void* x, const void* payload) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && reinterpret_cast<uintptr_t>(payload) % 8 == 0;
}

template <typename T>
cudaError_t launch_as(const BlockQuantize& args, int block_log2, int64_t blocks, cudaStream_t stream) {
  const bool whole = aligned(args.x, args.payload);
  const auto kernel = whole ? quantize_kernel<T, true> : quantize_kernel<T, false>;
  return launch(kernel, blocks, kThreads, 0, stream, args, block_log2);
}

template <typename T>
cudaError_t launch_as(const BlockDequantize& args, int block_log2, int64_t blocks, cudaStream_t stream) {
  const bool whole = aligned(args.x, args.payload);
  const auto kernel = whole ? dequantize_kernel<T, true> : dequantize_kernel<T, false>;
  return launch(kernel, blocks, kThreads, 0, stream, args, block_log2);
}

template <typename Args>
cudaError_t run(const Args& args, int device, cudaStream_t stream) {
  int block_log2 = 0;
  while (block_log2 < 8 && int64_t{1} << block_log2 < args.block) ++block_log2;
  if (args.size < 0 || args.block < kLeastQuantizeBlock || args.block != int64_t{1} << block_log2)
    return cudaErrorInvalidValue;
  if (args.size == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  const int64_t each = int64_t{kThreads} * kValues;
  const int64_t blocks = args.size / each + (args.size % each != 0);
  if (args.dtype == DType::f32) return launch_as<float>(args, block_log2, blocks, stream);
  if (args.dtype == DType::f16) return launch_as<__half>(args, block_log2, blocks, stream);
  return launch_as<__nv_bfloat16>(args, block_log2, blocks, stream);
}

}  // namespace

cudaError_t block_quantize_cuda(const BlockQuantize& args, int device, cudaStream_t stream) {
  return run(args, device, stream);
}

cudaError_t block_dequantize_cuda(const BlockDequantize& args, int device, cudaStream_t stream) {
  return run(args, device, stream);
}

}  // namespace lct
