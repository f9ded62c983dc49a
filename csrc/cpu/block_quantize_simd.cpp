// Plain loops over a chunk of blocks in cache, which the compiler turns into vectors of any width: all of them
// work value by value but for two maxima of integers, so every width gives the same bits.
//
// No product may be fused with a sum. Here every product goes through integers, to be limited, before anything
// is added to it. (Limits on floats are branches to a compiler that minds exceptions: they don't become vectors.)
#include "cpu/block_quantize_tasks.h"
#include "cpu/simd.h"

#pragma STDC FP_CONTRACT OFF

namespace lct {
namespace LCT_SIMD_LEVEL {
namespace {

// Added to a float below 2^22 it leaves the whole number, half to even, in the low bits of the sum.
constexpr float kRound = 12582912.0f;
// The same with steps of 2^-9, those of fp8 below 2^-6.
constexpr float kRoundFp8 = 16384.0f;
constexpr uint32_t kRoundFp8Bits = 0x46800000u;
constexpr uint32_t kInfinity = 0x7f800000u, kMinusZero = 0x80000000u, kNan = 0x7fc00000u;
constexpr uint16_t kNanScale = 0x7fc0u, kScaleExponent = 0x7f80u, kScaleSign = 0x8000u;
constexpr float kSmallestScale = 0x1p-100f, kLargestScale = 0x1p126f;

LCT_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
LCT_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

constexpr int bits_of_kind(BlockKind kind) {
  return kind == BlockKind::int4 ? 4 : kind == BlockKind::int2 ? 2 : 8;
}

// x, not NaN, within [-limit, limit]: the bits of floats rise with their size.
LCT_INLINE float limited(float x, float limit) {
  const uint32_t bits = bits_of(x), size = bits & 0x7fffffffu, most = bits_of(limit);
  return float_of((bits & kMinusZero) | (size < most ? size : most));
}

// Both are computed, always: a branch around floating-point arithmetic would keep it from becoming vectors.
LCT_INLINE uint32_t choose(bool first, uint32_t a, uint32_t b) {
  const uint32_t mask = 0u - static_cast<uint32_t>(first);
  return (a & mask) | (b & ~mask);
}

// Values worked on at once: blocks of any size fill it.
constexpr int64_t kChunk = kMostQuantizeBlock;

// Whole vectors, so that the compiler leaves no loop for the rest.
LCT_INLINE int64_t whole(int64_t block) { return block / kLeastQuantizeBlock * kLeastQuantizeBlock; }

// Values of a chunk as floats, zeros behind the last.
template <class T>
LCT_INLINE void widen(const T* from, int64_t count, float* to) {
  for (int64_t k = 0; k < kChunk; k += kLanes) {
    const int64_t rest = count - k;
    store(to + k, rest >= kLanes ? load(from + k)
                  : rest > 0     ? load_first(from + k, static_cast<int>(rest))
                                 : broadcast(0.0f));
  }
}

template <class T>
LCT_INLINE void narrow_to(T* to, int64_t count, const float* from) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store(to + k, load(from + k));
  if (k < count) store_first(to + k, load(from + k), static_cast<int>(count - k));
}

// The low byte of each code.
template <BlockKind Kind>
LCT_INLINE void encode(const float* __restrict x, int64_t n, float inverse, float most,
                       uint8_t* __restrict codes) {
  for (int64_t i = 0; i < n; ++i) {
    const float y = limited(x[i] * inverse, most);
    if (Kind == BlockKind::fp8) {
      const uint32_t bits = bits_of(y), size = bits & 0x7fffffffu;
      const uint32_t normal = ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3);
      const uint32_t subnormal = bits_of(float_of(size) + kRoundFp8) - kRoundFp8Bits;
      codes[i] = static_cast<uint8_t>((bits >> 24 & 0x80u) | choose(size < 0x3c800000u, subnormal, normal));
    } else {
      codes[i] = static_cast<uint8_t>(bits_of(y + kRound));
    }
  }
}

// Codes of a chunk, a byte each, to codes of `Bits` each.
template <int Bits>
LCT_INLINE void pack(const uint8_t* __restrict codes, uint8_t* __restrict to) {
  constexpr int64_t n = kChunk;
  if (Bits == 8) memcpy(to, codes, n);
  if (Bits == 4) {
    for (int64_t i = 0; i < n / 2; ++i) {
      uint16_t two;
      memcpy(&two, codes + 2 * i, sizeof two);
      two = static_cast<uint16_t>(two & 0x0f0fu);
      to[i] = static_cast<uint8_t>(two | two >> 4);
    }
  }
  if (Bits == 2) {
    for (int64_t i = 0; i < n / 4; ++i) {
      uint32_t four;
      memcpy(&four, codes + 4 * i, sizeof four);
      four &= 0x03030303u;
      four |= four >> 6;
      to[i] = static_cast<uint8_t>(four | four >> 12);
    }
  }
}

template <int Bits>
LCT_INLINE void unpack(const uint8_t* __restrict from, uint8_t* __restrict codes) {
  constexpr int64_t n = kChunk;
  if (Bits == 8) memcpy(codes, from, n);
  if (Bits == 4) {
    for (int64_t i = 0; i < n / 2; ++i) {
      const uint32_t two = (from[i] | static_cast<uint32_t>(from[i]) << 4) & 0x0f0fu;
      const uint16_t bytes = static_cast<uint16_t>(two);
      memcpy(codes + 2 * i, &bytes, sizeof bytes);
    }
  }
  if (Bits == 2) {
    for (int64_t i = 0; i < n / 4; ++i) {
      uint32_t four = (from[i] | static_cast<uint32_t>(from[i]) << 12) & 0x000f000fu;
      four = (four | four << 6) & 0x03030303u;
      memcpy(codes + 4 * i, &four, sizeof four);
    }
  }
}

// Codes of one block, a byte each, and its scale.
template <BlockKind Kind>
LCT_INLINE uint16_t quantize_block(const float* x, int64_t n, uint8_t* codes) {
  constexpr int kBits = bits_of_kind(Kind);
  uint32_t top = 0, most_signed = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(x[i]), size = bits & 0x7fffffffu;
    top = top > size ? top : size;
    most_signed = most_signed > bits ? most_signed : bits;
  }
  const bool is_unsigned = kBits < 8 && most_signed <= kMinusZero;
  const float most = Kind == BlockKind::fp8 ? 448.0f
                     : is_unsigned          ? static_cast<float>((1 << kBits) - 1)
                                            : static_cast<float>((1 << (kBits - 1)) - 1);
  const uint32_t exact = bits_of(float_of(top) / most);
  const float rounded = float_of((exact + 0x7fffu + (exact >> 16 & 1u)) & 0xffff0000u);
  const bool finite = top < kInfinity;
  if (!finite || rounded < kSmallestScale) {
    memset(codes, 0, static_cast<size_t>(n));
    return finite ? 0 : kNanScale;
  }
  const float scale = rounded > kLargestScale ? kLargestScale : rounded;
  encode<Kind>(x, n, 1.0f / scale, most, codes);
  return static_cast<uint16_t>(bits_of(scale) >> 16 | (is_unsigned ? kScaleSign : 0u));
}

template <BlockKind Kind, class T>
void quantize_as(const BlockQuantize& args, int64_t first, int64_t count) {
  constexpr int kBits = bits_of_kind(Kind);
  const int64_t n = whole(args.block), last = (first + count) * n;
  const int64_t end = last < args.size ? last : args.size;
  float x[kChunk];
  uint8_t codes[kChunk] = {}, packed[kChunk];
  for (int64_t start = first * n; start < end; start += kChunk) {
    const int64_t values = end - start < kChunk ? end - start : kChunk;
    widen(static_cast<const T*>(args.x) + start, values, x);
    for (int64_t k = 0; k < values; k += n) {
      args.scales[(start + k) / n] = quantize_block<Kind>(x + k, n, codes + k);
    }
    pack<kBits>(codes, packed);
    memcpy(args.payload + start / 8 * kBits, packed, static_cast<size_t>((values * kBits + 7) / 8));
  }
}

template <class T>
struct Largest;
template <>
struct Largest<float> {
  static constexpr float value = 0x1.fffffep127f;
};
template <>
struct Largest<Half> {
  static constexpr float value = 65504.0f;
};
template <>
struct Largest<Bfloat16> {
  static constexpr float value = 0x1.fep127f;
};

template <BlockKind Kind>
LCT_INLINE void decode(const uint8_t* __restrict codes, int64_t n, float scale, bool is_unsigned,
                       float largest, float* __restrict x) {
  constexpr int kBits = bits_of_kind(Kind);
  const int32_t half = is_unsigned ? 0 : 1 << (kBits - 1);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t code = codes[i];
    float value;
    if (Kind == BlockKind::fp8) {
      const uint32_t size = code & 0x7fu, sign = code << 24 & kMinusZero;
      const uint32_t normal = (size << 20) + (120u << 23);
      const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(size)) * 0x1p-9f);
      value = float_of(sign | choose(size < 8u, subnormal, normal));
    } else {
      value = static_cast<float>((static_cast<int32_t>(code) ^ half) - half);
    }
    const float y = limited(value * scale, largest);
    x[i] = Kind == BlockKind::fp8 ? float_of(choose((code & 0x7fu) == 0x7fu, kNan, bits_of(y))) : y;
  }
}

// Values of one block from its codes and scale.
template <BlockKind Kind>
LCT_INLINE void dequantize_block(const uint8_t* codes, int64_t n, uint16_t scale, float largest, float* x) {
  if ((scale & kScaleExponent) == kScaleExponent) {
    for (int64_t i = 0; i < n; ++i) x[i] = float_of(kNan);
    return;
  }
  const bool is_unsigned = bits_of_kind(Kind) < 8 && (scale & kScaleSign) != 0;
  const uint32_t bits = static_cast<uint32_t>(is_unsigned ? scale ^ kScaleSign : scale) << 16;
  decode<Kind>(codes, n, float_of(bits), is_unsigned, largest, x);
}

template <BlockKind Kind, class T>
void dequantize_as(const BlockDequantize& args, int64_t first, int64_t count) {
  constexpr int kBits = bits_of_kind(Kind);
  const int64_t n = whole(args.block), last = (first + count) * n;
  const int64_t end = last < args.size ? last : args.size;
  float x[kChunk];
  uint8_t packed[kChunk] = {}, codes[kChunk];
  for (int64_t start = first * n; start < end; start += kChunk) {
    const int64_t values = end - start < kChunk ? end - start : kChunk;
    memcpy(packed, args.payload + start / 8 * kBits, static_cast<size_t>((values * kBits + 7) / 8));
    unpack<kBits>(packed, codes);
    for (int64_t k = 0; k < values; k += n) {
      dequantize_block<Kind>(codes + k, n, args.scales[(start + k) / n], Largest<T>::value, x + k);
    }
    narrow_to(static_cast<T*>(args.x) + start, values, x);
  }
}

template <BlockKind Kind>
void quantize_kind(const BlockQuantize& args, int64_t first, int64_t count) {
  switch (args.dtype) {
    case DType::f32: return quantize_as<Kind, float>(args, first, count);
    case DType::f16: return quantize_as<Kind, Half>(args, first, count);
    case DType::bf16: return quantize_as<Kind, Bfloat16>(args, first, count);
  }
}

template <BlockKind Kind>
void dequantize_kind(const BlockDequantize& args, int64_t first, int64_t count) {
  switch (args.dtype) {
    case DType::f32: return dequantize_as<Kind, float>(args, first, count);
    case DType::f16: return dequantize_as<Kind, Half>(args, first, count);
    case DType::bf16: return dequantize_as<Kind, Bfloat16>(args, first, count);
  }
}

void quantize(const BlockQuantize& args, int64_t first, int64_t count) {
  switch (args.kind) {
    case BlockKind::int8: return quantize_kind<BlockKind::int8>(args, first, count);
    case BlockKind::int4: return quantize_kind<BlockKind::int4>(args, first, count);
    case BlockKind::int2: return quantize_kind<BlockKind::int2>(args, first, count);
    case BlockKind::fp8: return quantize_kind<BlockKind::fp8>(args, first, count);
  }
}

void dequantize(const BlockDequantize& args, int64_t first, int64_t count) {
  switch (args.kind) {
    case BlockKind::int8: return dequantize_kind<BlockKind::int8>(args, first, count);
    case BlockKind::int4: return dequantize_kind<BlockKind::int4>(args, first, count);
    case BlockKind::int2: return dequantize_kind<BlockKind::int2>(args, first, count);
    case BlockKind::fp8: return dequantize_kind<BlockKind::fp8>(args, first, count);
  }
}

}  // namespace

extern const BlockQuantizeTasks block_quantize_tasks = {quantize, dequantize};

}  // namespace LCT_SIMD_LEVEL
}  // namespace lct
