// What the programs of this folder share: numbers drawn, half formats by arithmetic, memory that faults beside it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "lct/types.h"

namespace {

using lct::DType;

uint64_t state = 1;
double uniform() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 11) / 9007199254740992.0;
}
double normal() {
  return std::sqrt(-2 * std::log(uniform() + 1e-300)) * std::cos(6.283185307179586 * uniform());
}

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Conversions by arithmetic, so that a mistake in the kernels' bit patterns is not made twice.
double widen(uint16_t bits, DType dtype) {
  const int mantissa_bits = dtype == DType::f16 ? 10 : 7, exponent_bits = 15 - mantissa_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
  const int exponent = (bits >> mantissa_bits) & top, mantissa = bits & ((1 << mantissa_bits) - 1);
  double value;
  if (exponent == top) {
    value = mantissa ? NAN : INFINITY;
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  } else {
    value = std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  }
  return bits >> 15 ? -value : value;
}
// The nearest value of the format, found by bisection over its positive bit patterns.
uint16_t narrow(double x, DType dtype) {
  const int infinity = dtype == DType::f16 ? 0x7c00 : 0x7f80;
  int low = 0, high = infinity - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (widen(static_cast<uint16_t>(middle), dtype) <= std::fabs(x)) low = middle;
    else high = middle - 1;
  }
  const double below = std::fabs(x) - widen(static_cast<uint16_t>(low), dtype);
  const double above = widen(static_cast<uint16_t>(low + 1), dtype) - std::fabs(x);
  if (above < below || (above == below && low % 2)) ++low;
  return static_cast<uint16_t>(low | (std::signbit(x) ? 0x8000 : 0));
}

// Memory whose last byte (or first) lies beside a page that must not be touched, filled with ones: NaN.
class Guarded {
 public:
  Guarded(int64_t bytes, bool at_end) : bytes_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t inner = (bytes + page - 1) / page * page + (bytes == 0 ? page : 0);
    size_ = inner + 2 * page;
    base_ = static_cast<char*>(
        mmap(nullptr, static_cast<size_t>(size_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_, static_cast<size_t>(page), PROT_NONE) ||
        mprotect(base_ + page + inner, static_cast<size_t>(page), PROT_NONE)) {
      std::perror("guard pages");
      std::exit(2);
    }
    data_ = at_end ? base_ + page + inner - bytes : base_ + page;
    std::memset(data_, 0xff, static_cast<size_t>(bytes));
  }
  ~Guarded() { munmap(base_, static_cast<size_t>(size_)); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  void* data() { return data_; }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }
  std::vector<char> bytes() const { return {data_, data_ + bytes_}; }

 private:
  int64_t bytes_, size_;
  char *base_, *data_;
};

struct Tensor {
  Tensor(int64_t count, DType dtype, bool at_end)
      : count(count), dtype(dtype), memory(count * size_of(dtype), at_end) {}
  double get(int64_t i) {
    return dtype == DType::f32 ? static_cast<double>(memory.as<float>()[i]) : widen(memory.as<uint16_t>()[i], dtype);
  }
  void set(int64_t i, double x) {
    if (dtype == DType::f32) memory.as<float>()[i] = static_cast<float>(x);
    else memory.as<uint16_t>()[i] = narrow(x, dtype);
  }
  void set_nan(int64_t i) {
    if (dtype == DType::f32) memory.as<float>()[i] = NAN;
    else memory.as<uint16_t>()[i] = 0x7fff;
  }
  int64_t count;
  DType dtype;
  Guarded memory;
};

double precision(DType dtype) { return dtype == DType::f32 ? 6e-8 : dtype == DType::f16 ? 4.9e-4 : 3.9e-3; }

}  // namespace
