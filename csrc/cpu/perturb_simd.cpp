// Plain loops over a chunk of noise in cache, which the compiler turns into vectors of any width: all of them work
// value by value, so every width gives the same bits.
//
// No product may be fused with a sum: setup.py compiles this file with -ffp-contract=off.
#include "cpu/perturb_tasks.h"
#include "cpu/simd.h"

#pragma STDC FP_CONTRACT OFF

namespace lct {
namespace LCT_SIMD_LEVEL {
namespace {

constexpr int64_t kChunk = kNoiseChunk, kCounters = kChunk / 4;

LCT_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
LCT_INLINE int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Philox4x32-10 of counters [first, first + kCounters): the words of one counter side by side.
LCT_INLINE void draw(uint64_t seed, uint64_t first, uint32_t* __restrict words) {
  for (int64_t i = 0; i < kCounters; ++i) {
    const uint64_t counter = first + static_cast<uint64_t>(i);
    uint32_t a = static_cast<uint32_t>(counter), b = static_cast<uint32_t>(counter >> 32), c = 0, d = 0;
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t p = uint64_t{0xd2511f53u} * a, q = uint64_t{0xcd9e8d57u} * c;
      a = static_cast<uint32_t>(q >> 32) ^ b ^ low;
      b = static_cast<uint32_t>(q);
      c = static_cast<uint32_t>(p >> 32) ^ d ^ high;
      d = static_cast<uint32_t>(p);
      low += 0x9e3779b9u;
      high += 0xbb67ae85u;
    }
    words[4 * i] = a;
    words[4 * i + 1] = b;
    words[4 * i + 2] = c;
    words[4 * i + 3] = d;
  }
}

// The normal of a word. Both branches are computed, so that the loop becomes vectors.
LCT_INLINE float normal(uint32_t word) {
  const float u = (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5f) * 0x1p-23f;
  const float q = u - 0.5f;

  const float r = 0.180625f - q * q;
  const float middle =
      q * (((59.109374720f * r + 159.29113202f) * r + 50.434271938f) * r + 3.3871327179f) /
      (((67.187563600f * r + 78.757757664f) * r + 17.895169469f) * r + 1.0f);

  // -log(p) of the nearer tail, p = 2^e * m with m in [sqrt(1/2), sqrt(2)).
  const float p = 0.5f - float_of(static_cast<uint32_t>(bits_of(q)) & 0x7fffffffu);
  const int32_t bits = bits_of(p);
  const int32_t e = (bits - 0x3f3504f3) >> 23;
  const float m = float_of(static_cast<uint32_t>(bits) - (static_cast<uint32_t>(e) << 23));
  const float s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  const float series = (((0.11111111f * s2 + 0.14285715f) * s2 + 0.2f) * s2 + 0.33333334f) * s2 + 1.0f;
  const float w = static_cast<float>(-e) * 0.69314718f - (s + s) * series;
  const float t = __builtin_sqrtf(w) - 1.6f;
  const float tail = (((0.17023821103f * t + 1.3067284816f) * t + 2.7568153900f) * t + 1.4234372777f) /
                     ((0.12021132975f * t + 0.73700164250f) * t + 1.0f);

  const uint32_t sign = static_cast<uint32_t>(bits_of(q)) & 0x80000000u;
  const uint32_t far = static_cast<uint32_t>(bits_of(tail)) | sign;
  const uint32_t near = 0u - static_cast<uint32_t>(p > 0.075f);
  return float_of((static_cast<uint32_t>(bits_of(middle)) & near) | (far & ~near));
}

// Where a value of out stands: counted up from a first one, without a division a value.
struct Position {
  int64_t row, channel, at;

  static Position of(const NoiseShape& shape, int64_t i) {
    const int64_t features = shape.channels * shape.inner, rest = i % features;
    return {i / features, rest / shape.inner, rest % shape.inner};
  }
};

// sigma (and loss) of `count` values from out[first] on: runs of `inner` share one.
LCT_INLINE void spread(const NoiseShape& shape, const float* sigma, int64_t sigmas, const float* loss,
                       int64_t first, int64_t count, float* __restrict sigma_of, float* __restrict loss_of) {
  Position p = Position::of(shape, first);
  for (int64_t k = 0; k < count;) {
    const int64_t left = shape.inner - p.at, run = left < count - k ? left : count - k;
    const float s = sigma[sigmas == 1 ? 0 : p.channel];
    for (int64_t i = 0; i < run; ++i) sigma_of[k + i] = s;
    if (loss) {
      for (int64_t i = 0; i < run; ++i) loss_of[k + i] = loss[p.row];
    }
    k += run;
    p.at = 0;
    if (++p.channel == shape.channels) {
      p.channel = 0;
      ++p.row;
    }
  }
}

template <class T>
LCT_INLINE void widen(const T* from, int64_t count, float* to) {
  for (int64_t k = 0; k < count; k += kLanes) {
    const int64_t rest = count - k;
    store(to + k, rest >= kLanes ? load(from + k) : load_first(from + k, static_cast<int>(rest)));
  }
}

template <class T>
LCT_INLINE void narrow_to(T* to, int64_t count, const float* from) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store(to + k, load(from + k));
  if (k < count) store_first(to + k, load(from + k), static_cast<int>(count - k));
}

// out[first, first + count) of a perturbation; eps has one sign for all of them.
template <class T>
LCT_INLINE void add(const Perturb& args, int64_t first, int64_t count, const float* eps) {
  const int64_t size = args.shape.rows / args.copies * args.shape.channels * args.shape.inner;
  float z[kChunk + kLanes], sigma[kChunk], y[kChunk + kLanes] = {};
  for (int64_t k = 0; k < count;) {
    const int64_t from = (first + k) % size, left = size - from;
    const int64_t run = left < count - k ? left : count - k;
    widen(static_cast<const T*>(args.z) + from, run, z);
    spread(args.shape, args.sigma, args.sigmas, nullptr, first + k, run, sigma, nullptr);
    for (int64_t i = 0; i < run; ++i) y[i] = z[i] + sigma[i] * eps[k + i];
    narrow_to(static_cast<T*>(args.out) + first + k, run, y);
    k += run;
  }
}

template <class T>
LCT_INLINE void add(const Score& args, int64_t first, int64_t count, const float* eps) {
  const float total = static_cast<float>(args.total);
  float loss[kChunk], sigma[kChunk], y[kChunk + kLanes] = {};
  spread(args.shape, args.sigma, args.sigmas, args.loss, first, count, sigma, loss);
  for (int64_t i = 0; i < count; ++i) y[i] = loss[i] / (total * sigma[i]) * eps[i];
  narrow_to(static_cast<T*>(args.out) + first, count, y);
}

template <class T, class Args>
void run_as(const Args& args, int64_t first, int64_t count) {
  const NoiseShape& shape = args.shape;
  const int64_t half = shape.rows * shape.channels * shape.inner / 2;
  uint32_t words[kChunk];
  float made[kChunk], eps[kChunk];
  for (int64_t done = 0; done < count;) {
    const uint64_t word = args.noise.offset + static_cast<uint64_t>(first + done);
    const int64_t skip = static_cast<int64_t>(word % 4);
    const int64_t n = count - done < kChunk - skip ? count - done : kChunk - skip;
    draw(args.noise.seed, word / 4, words);
    for (int64_t i = 0; i < kChunk; ++i) made[i] = normal(words[i]);
    for (int64_t i = 0; i < n; ++i) eps[i] = made[skip + i];
    add<T>(args, first + done, n, eps);
    if (args.noise.antithetic) {
      for (int64_t i = 0; i < n; ++i) eps[i] = -eps[i];
      add<T>(args, half + first + done, n, eps);
    }
    done += n;
  }
}

template <class Args>
void run(const Args& args, int64_t first, int64_t count) {
  switch (args.dtype) {
    case DType::f32: return run_as<float>(args, first, count);
    case DType::f16: return run_as<Half>(args, first, count);
    case DType::bf16: return run_as<Bfloat16>(args, first, count);
  }
}

}  // namespace

extern const PerturbTasks perturb_tasks = {run<Perturb>, run<Score>};

}  // namespace LCT_SIMD_LEVEL
}  // namespace lct
