// perturb and score: a thread draws one Philox counter, makes four normals of it and puts them where they belong.
//
// Antithetic pairs share a draw: the thread writes both. Counters are those of the stream, whatever the offset, so
// the first and the last thread may have fewer than four values.
//
// Bits are those of every other backend: see lct/perturb.h. __fmul_rn and __fadd_rn are never fused, and without
// -use_fast_math quotients and roots are rounded to the nearest.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "cuda/launch.h"
#include "lct/perturb.h"

namespace lct {
namespace {

constexpr int kThreads = 256;
constexpr int kWords = 4;  // a thread

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
  __device__ static float widen(float x) { return x; }
  __device__ static float narrow(float x) { return x; }
};
template <>
struct Format<__half> {
  __device__ static float widen(__half x) { return __half2float(x); }
  __device__ static __half narrow(float x) { return __float2half_rn(x); }
};
template <>
struct Format<__nv_bfloat16> {
  __device__ static float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  __device__ static __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
};

// Four values, one access to memory.
template <typename T>
struct alignas(sizeof(T) * kWords) Pack {
  T at[kWords];
};

struct Words {
  uint32_t at[kWords];
};

__device__ __forceinline__ Words philox(uint64_t seed, uint64_t counter) {
  uint32_t a = static_cast<uint32_t>(counter), b = static_cast<uint32_t>(counter >> 32), c = 0, d = 0;
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = uint64_t{0xd2511f53u} * a, q = uint64_t{0xcd9e8d57u} * c;
    a = static_cast<uint32_t>(q >> 32) ^ b ^ low;
    b = static_cast<uint32_t>(q);
    c = static_cast<uint32_t>(p >> 32) ^ d ^ high;
    d = static_cast<uint32_t>(p);
    low += 0x9e3779b9u;
    high += 0xbb67ae85u;
  }
  return {{a, b, c, d}};
}

// a * x + b, rounded twice.
__device__ __forceinline__ float step(float a, float x, float b) { return __fadd_rn(__fmul_rn(a, x), b); }

__device__ __forceinline__ float normal(uint32_t word) {
  const float u = __fmul_rn(__fadd_rn(static_cast<float>(static_cast<int>(word >> 9)), 0.5f), 0x1p-23f);
  const float q = __fadd_rn(u, -0.5f);
  const float p = __fadd_rn(0.5f, -from_bits(to_bits(q) & 0x7fffffffu));
  if (p > 0.075f) {
    const float r = __fadd_rn(0.180625f, -__fmul_rn(q, q));
    const float above = step(step(step(59.109374720f, r, 159.29113202f), r, 50.434271938f), r, 3.3871327179f);
    const float below = step(step(step(67.187563600f, r, 78.757757664f), r, 17.895169469f), r, 1.0f);
    return __fmul_rn(q, above) / below;
  }
  // -log(p) of the nearer tail, p = 2^e * m with m in [sqrt(1/2), sqrt(2)).
  const int bits = static_cast<int>(to_bits(p));
  const int e = (bits - 0x3f3504f3) >> 23;
  const float m = from_bits(static_cast<uint32_t>(bits) - (static_cast<uint32_t>(e) << 23));
  const float s = __fadd_rn(m, -1.0f) / __fadd_rn(m, 1.0f), s2 = __fmul_rn(s, s);
  const float series =
      step(step(step(step(0.11111111f, s2, 0.14285715f), s2, 0.2f), s2, 0.33333334f), s2, 1.0f);
  const float whole = __fmul_rn(static_cast<float>(-e), 0.69314718f);
  const float w = __fadd_rn(whole, -__fmul_rn(__fadd_rn(s, s), series));
  const float t = __fadd_rn(sqrtf(w), -1.6f);
  const float above = step(step(step(0.17023821103f, t, 1.3067284816f), t, 2.7568153900f), t, 1.4234372777f);
  const float below = step(step(0.12021132975f, t, 0.73700164250f), t, 1.0f);
  return from_bits(to_bits(above / below) | (to_bits(q) & 0x80000000u));
}

// Where a value of out stands: counted up from a first one, without a division a value.
struct Position {
  int64_t row, channel, at;

  __device__ Position(const NoiseShape& shape, int64_t i) {
    const int64_t features = shape.channels * shape.inner, rest = i % features;
    row = i / features;
    channel = rest / shape.inner;
    at = rest % shape.inner;
  }
  __device__ void next(const NoiseShape& shape) {
    if (++at < shape.inner) return;
    at = 0;
    if (++channel < shape.channels) return;
    channel = 0;
    ++row;
  }
};

// out[first, first + count) from eps; count <= 4, and 4 where kAligned.
template <typename T, bool kAligned>
__device__ void put(const Perturb& args, int64_t first, int count, const float (&eps)[kWords]) {
  const NoiseShape& shape = args.shape;
  const int64_t size = shape.rows / args.copies * shape.channels * shape.inner;
  const T* const z = static_cast<const T*>(args.z);
  T* const out = static_cast<T*>(args.out) + first;
  Position position(shape, first);
  int64_t from = first % size;
  Pack<T> in{}, y{};
  if (kAligned) in = *reinterpret_cast<const Pack<T>*>(z + from);
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (i >= count) break;
    const float sigma = args.sigma[args.sigmas == 1 ? 0 : position.channel];
    const T value = kAligned ? in.at[i] : z[from];
    y.at[i] = Format<T>::narrow(__fadd_rn(Format<T>::widen(value), __fmul_rn(sigma, eps[i])));
    if (!kAligned) out[i] = y.at[i];
    position.next(shape);
    if (++from == size) from = 0;
  }
  if (kAligned) *reinterpret_cast<Pack<T>*>(out) = y;
}

template <typename T, bool kAligned>
__device__ void put(const Score& args, int64_t first, int count, const float (&eps)[kWords]) {
  const NoiseShape& shape = args.shape;
  const float total = static_cast<float>(args.total);
  T* const out = static_cast<T*>(args.out) + first;
  Position position(shape, first);
  Pack<T> y{};
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (i >= count) break;
    const float sigma = args.sigma[args.sigmas == 1 ? 0 : position.channel];
    y.at[i] = Format<T>::narrow(__fmul_rn(args.loss[position.row] / __fmul_rn(total, sigma), eps[i]));
    if (!kAligned) out[i] = y.at[i];
    position.next(shape);
  }
  if (kAligned) *reinterpret_cast<Pack<T>*>(out) = y;
}

template <typename T, bool kAligned, typename Args>
__global__ void __launch_bounds__(kThreads) noise_kernel(const Args args, const int64_t count) {
  // Values before the first word of the call: those of its counter that another call has.
  const int64_t skip = static_cast<int64_t>(args.noise.offset % kWords);
  const int64_t thread = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t begin = thread * kWords - skip, first = begin < 0 ? 0 : begin;
  const int64_t end = begin + kWords < count ? begin + kWords : count;
  if (first >= end) return;
  const Words words = philox(args.noise.seed, args.noise.offset / kWords + static_cast<uint64_t>(thread));
  const int from = static_cast<int>(first - begin), values = static_cast<int>(end - first);
  float eps[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    // Selected, not indexed: an index that is not known when compiling would put the words into memory.
    const int at = i + from;
    eps[i] = normal(at == 0 ? words.at[0] : at == 1 ? words.at[1] : at == 2 ? words.at[2] : words.at[3]);
  }
  put<T, kAligned>(args, first, values, eps);
  if (!args.noise.antithetic) return;
#pragma unroll
  for (int i = 0; i < kWords; ++i) eps[i] = -eps[i];
  put<T, kAligned>(args, count + first, values, eps);
}

bool packs(const void* x, size_t element) { return reinterpret_cast<uintptr_t>(x) % (element * kWords) == 0; }

// Whether all of z that a thread reads lies in one pack.
bool packs_input(const Perturb& args, size_t element) {
  const int64_t size = args.shape.rows / args.copies * args.shape.channels * args.shape.inner;
  return size % kWords == 0 && packs(args.z, element);
}
bool packs_input(const Score&, size_t) { return true; }

template <typename T, typename Args>
cudaError_t launch_as(const Args& args, int64_t count, int64_t blocks, cudaStream_t stream) {
  const bool whole = args.noise.offset % kWords == 0 && count % kWords == 0 && packs(args.out, sizeof(T)) &&
                     packs_input(args, sizeof(T));
  const auto kernel = whole ? noise_kernel<T, true, Args> : noise_kernel<T, false, Args>;
  return launch(kernel, blocks, kThreads, 0, stream, args, count);
}

bool fits(const Perturb& args) { return args.copies >= 1 && args.shape.rows % args.copies == 0; }
bool fits(const Score& args) { return args.total >= 1; }

template <typename Args>
cudaError_t run(const Args& args, int device, cudaStream_t stream) {
  const NoiseShape& shape = args.shape;
  if (shape.rows < 0 || shape.channels < 0 || shape.inner < 0 || !fits(args) ||
      (args.sigmas != 1 && args.sigmas != shape.channels) || (args.noise.antithetic && shape.rows % 2))
    return cudaErrorInvalidValue;
  const int64_t size = shape.rows * shape.channels * shape.inner;
  if (size == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  const int64_t count = args.noise.antithetic ? size / 2 : size;
  const int64_t words = count + static_cast<int64_t>(args.noise.offset % kWords);
  const int64_t each = int64_t{kThreads} * kWords;
  const int64_t blocks = words / each + (words % each != 0);
  if (args.dtype == DType::f32) return launch_as<float>(args, count, blocks, stream);
  if (args.dtype == DType::f16) return launch_as<__half>(args, count, blocks, stream);
  return launch_as<__nv_bfloat16>(args, count, blocks, stream);
}

}  // namespace

cudaError_t perturb_cuda(const Perturb& args, int device, cudaStream_t stream) {
  return run(args, device, stream);
}

cudaError_t score_cuda(const Score& args, int device, cudaStream_t stream) {
  return run(args, device, stream);
}

}  // namespace lct
