// Drives the CPU kernels of block_quantize at every instruction set, with every tensor flush against a page that
// faults, against a search for the nearest code in double precision. Built by tests/test_native.py under the
// sanitizers.
//
// Prints one line a failure and exits 1 if there was one; "ok N" otherwise.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "lct/block_quantize.h"

namespace {

using lct::BlockKind;
using lct::DType;

int failures = 0;
int checks = 0;

uint64_t state = 1;
uint32_t draw() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}

void expect(bool right, const std::string& what, int64_t index) {
  ++checks;
  if (right) return;
  if (++failures < 20) std::printf("%s: wrong at %lld\n", what.c_str(), static_cast<long long>(index));
}

// Memory whose last byte (or first) lies beside a page that must not be touched, filled with ones.
class Guarded {
 public:
  Guarded(int64_t bytes, bool at_end) : bytes_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t inner = (bytes / page + 1) * page;
    size_ = static_cast<size_t>(inner + 2 * page);
    base_ = static_cast<char*>(
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_, static_cast<size_t>(page), PROT_NONE) ||
        mprotect(base_ + page + inner, static_cast<size_t>(page), PROT_NONE)) {
      std::perror("guard pages");
      std::exit(2);
    }
    data_ = at_end ? base_ + page + inner - bytes : base_ + page;
    std::memset(data_, 0xff, static_cast<size_t>(bytes));
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  std::string bytes() const { return {data_, static_cast<size_t>(bytes_)}; }

 private:
  int64_t bytes_;
  size_t size_;
  char *base_, *data_;
};

double as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// A value of x: bf16 and f32 from their bits; f16 by arithmetic.
double value_of(const void* x, int64_t i, DType dtype) {
  if (dtype == DType::f32) return static_cast<const float*>(x)[i];
  const uint32_t bits = static_cast<const uint16_t*>(x)[i];
  if (dtype == DType::bf16) return as_float(bits << 16);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                      : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                     : std::ldexp(fraction, -24);
  return bits >> 15 ? -size : size;
}

void put(void* x, int64_t i, DType dtype, uint32_t bits) {
  if (dtype == DType::f32) static_cast<uint32_t*>(x)[i] = bits;
  // The same sign, exponent and first bits in narrower formats, or nearly: any bits will do.
  else if (dtype == DType::bf16) static_cast<uint16_t*>(x)[i] = static_cast<uint16_t>(bits >> 16);
  else static_cast<uint16_t*>(x)[i] = static_cast<uint16_t>((bits >> 16 & 0xbfffu) | (bits >> 24 & 1u) << 14);
}

double level_of(BlockKind kind, uint32_t code, bool is_unsigned) {
  if (kind == BlockKind::fp8) {
    const int exponent = code >> 3 & 15, fraction = code & 7;
    if ((code & 127) == 127) return NAN;
    const double size = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
    return code >> 7 ? -size : size;
  }
  const int bits = kind == BlockKind::int8 ? 8 : kind == BlockKind::int4 ? 4 : 2, half = 1 << (bits - 1);
  const int whole = static_cast<int>(code);
  return is_unsigned ? whole : (whole ^ half) - half;
}

double bfloat16(double x) {
  int exponent;
  std::frexp(x, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(x, 8 - exponent)), exponent - 8);
}

void run(int64_t size, int64_t block, BlockKind kind, DType dtype, bool at_end, bool with_bad,
         lct::SimdLevel level) {
  const int bits = kind == BlockKind::int4 ? 4 : kind == BlockKind::int2 ? 2 : 8;
  const int64_t bytes = (size * bits + 7) / 8, blocks = (size + block - 1) / block;
  const int64_t element = dtype == DType::f32 ? 4 : 2;
  char name[120];
  std::snprintf(name, sizeof name, "%s size %lld block %lld kind %d dtype %d %s", lct::name_of(level),
                static_cast<long long>(size), static_cast<long long>(block), static_cast<int>(kind),
                static_cast<int>(dtype), at_end ? "end" : "start");
  const std::string at = name;
  Guarded x(size * element, at_end);
  for (int64_t i = 0; i < size; ++i) {
    // Exponents of a block lie within 16 powers of two; every third block has no sign.
    const uint32_t sign = i / block % 3 == 0 ? 0u : 0x80000000u;
    const uint32_t far = static_cast<uint32_t>(i / block % 7) << 23;
    put(x.as<void>(), i, dtype, (draw() & (0x07ffffffu | sign)) + (0x39000000u & 0x7f800000u) + far);
  }
  if (with_bad && size > 3 * block) put(x.as<void>(), 2 * block + 1, dtype, 0x7fffffffu);

  std::string first;
  for (const int threads : {1, 3}) {
    Guarded payload(bytes, at_end), scales(2 * blocks, at_end), back(size * element, at_end);
    lct::block_quantize_cpu(
        {x.as<void>(), payload.as<uint8_t>(), scales.as<uint16_t>(), size, block, kind, dtype}, threads);
    lct::block_dequantize_cpu(
        {payload.as<uint8_t>(), scales.as<uint16_t>(), back.as<void>(), size, block, kind, dtype}, threads);
    const std::string all = payload.bytes() + scales.bytes() + back.bytes();
    if (threads == 1) first = all;
    expect(all == first, at + ": bits of other thread counts", threads);
    if (threads != 1) continue;

    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = b * block, end = begin + block < size ? begin + block : size;
      double top = 0;
      bool finite = true, is_unsigned = bits < 8;
      for (int64_t i = begin; i < end; ++i) {
        const double v = value_of(x.as<void>(), i, dtype);
        finite = finite && std::isfinite(v);
        is_unsigned = is_unsigned && v >= 0;
        top = std::fmax(top, std::fabs(v));
      }
      const uint16_t given = scales.as<uint16_t>()[b];
      if (!finite) {
        expect(given == 0x7fc0, at + ": scale of NaN", b);
        for (int64_t i = begin; i < end; ++i)
          expect(std::isnan(value_of(back.as<void>(), i, dtype)), at + ": NaN", i);
        continue;
      }
      const double most = kind == BlockKind::fp8 ? 448 : (1 << (is_unsigned ? bits : bits - 1)) - 1;
      const double scale = bfloat16(static_cast<float>(top / most));
      expect(as_float(uint32_t{given} << 16) == (is_unsigned ? -scale : scale), at + ": scale", b);
      for (int64_t i = begin; i < end; ++i) {
        const double v = value_of(x.as<void>(), i, dtype) / scale;
        const uint32_t code = payload.as<uint8_t>()[i * bits / 8] >> i * bits % 8 & ((1u << bits) - 1);
        const double level = level_of(kind, code, is_unsigned);
        double nearest = INFINITY;
        for (uint32_t other = 0; other < 1u << bits; ++other) {
          const double distance = std::fabs(level_of(kind, other, is_unsigned) - v);
          // The scale's rounding may leave the largest value beyond the last code, never the int's lowest.
          const bool allowed = kind == BlockKind::fp8 || level_of(kind, other, is_unsigned) >= -most;
          if (allowed && distance < nearest) nearest = distance;
        }
        expect(std::fabs(level - v) <= nearest + 1e-5 * std::fabs(v), at + ": code", i);
        const double exact = level * scale, got = value_of(back.as<void>(), i, dtype);
        const double unit = dtype == DType::f32 ? 0 : dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
        const double largest = dtype == DType::f16 ? 65504 : 3.4e38;
        const double smallest = dtype == DType::f16 ? 0x1p-25 : 0;
        const bool near = std::fabs(got - exact) <= unit * std::fabs(exact) + smallest;
        expect(near || (std::fabs(exact) > largest && std::fabs(got) == largest), at + ": value", i);
      }
    }
  }
}

// Bytes that no quantizer wrote: nothing but the result's definedness is asked.
void run_any(BlockKind kind, DType dtype, bool at_end) {
  const int64_t size = 64 * 50 + 3;
  Guarded payload(size, at_end), scales(2 * 51, at_end), x(size * 4, at_end);
  for (int64_t i = 0; i < size; ++i) payload.as<uint8_t>()[i] = static_cast<uint8_t>(draw());
  for (int64_t i = 0; i < 51; ++i) scales.as<uint16_t>()[i] = static_cast<uint16_t>(draw());
  lct::block_dequantize_cpu(
      {payload.as<uint8_t>(), scales.as<uint16_t>(), x.as<void>(), size, 64, kind, dtype}, 1);
  for (int64_t i = 0; i < size; ++i)
    expect(!std::isinf(value_of(x.as<void>(), i, dtype)), "any bytes: infinite", i);
}

}  // namespace

int main() {
  const int64_t sizes[] = {0, 1, 31, 33, 255, 256, 515, 33000};
  for (int level = 0; level <= static_cast<int>(lct::best_simd_level()); ++level) {
    lct::set_simd_level(static_cast<lct::SimdLevel>(level));
    int turn = 0;
    for (const BlockKind kind : {BlockKind::int8, BlockKind::int4, BlockKind::int2, BlockKind::fp8}) {
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        for (const int64_t size : sizes) {
          ++turn;
          run(size, int64_t{32} << turn % 4, kind, dtype, turn % 2, turn % 3 == 0,
              static_cast<lct::SimdLevel>(level));
        }
        run_any(kind, dtype, turn % 2);
      }
    }
  }
  if (failures) {
    std::printf("%d of %d checks failed\n", failures, checks);
    return 1;
  }
  std::printf("ok %d\n", checks);
  return 0;
}
