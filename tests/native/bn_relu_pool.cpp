// Drives the CPU kernels of bn_relu_pool over odd shapes against plain double-precision loops. Every tensor is an
// allocation of its own, so that the sanitizers see a stray access. Built by tests/test_native.py.
//
// Prints one line a failure and exits 1 if there was one; "ok N" otherwise.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "lct/bn_relu_pool.h"

namespace {

using lct::BnReluPoolShape;
using lct::DType;

int failures = 0;
int checks = 0;

uint64_t state = 1;
double uniform() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 11) / 9007199254740992.0;
}

// Exactly `bytes` on the heap, poisoned: NaN in every float format.
struct Memory {
  explicit Memory(size_t bytes) : data(new char[bytes ? bytes : 1]), size(bytes) { std::memset(data.get(), 255, bytes); }
  float* floats() { return reinterpret_cast<float*>(data.get()); }
  std::unique_ptr<char[]> data;
  size_t size;
};

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Values are multiples of 1/8 up to 4: exact in every format, and few enough bits to write down by hand.
void put(Memory& to, int64_t i, double x, DType dtype) {
  if (dtype == DType::f32) {
    to.floats()[i] = static_cast<float>(x);
    return;
  }
  const int mantissa_bits = dtype == DType::f16 ? 10 : 7, bias = dtype == DType::f16 ? 15 : 127;
  uint16_t bits = 0;
  if (x != 0) {
    int exponent;
    const double fraction = std::frexp(std::fabs(x), &exponent);
    bits = static_cast<uint16_t>(((exponent - 1 + bias) << mantissa_bits) +
                                 static_cast<int>((2 * fraction - 1) * (1 << mantissa_bits)));
    if (x < 0) bits |= 0x8000;
  }
  std::memcpy(to.data.get() + 2 * i, &bits, 2);
}
double get(const Memory& from, int64_t i, DType dtype) {
  if (dtype == DType::f32) return reinterpret_cast<const float*>(from.data.get())[i];
  uint16_t bits;
  std::memcpy(&bits, from.data.get() + 2 * i, 2);
  const int mantissa_bits = dtype == DType::f16 ? 10 : 7, bias = dtype == DType::f16 ? 15 : 127;
  const int top = (1 << (15 - mantissa_bits)) - 1;
  const int exponent = (bits >> mantissa_bits) & top, mantissa = bits & ((1 << mantissa_bits) - 1);
  double value = exponent == top ? (mantissa ? NAN : INFINITY)
                 : exponent      ? std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits)
                                 : std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return bits >> 15 ? -value : value;
}

void compare(const std::string& name, double got, double wanted, double tolerance) {
  ++checks;
  if (std::fabs(got - wanted) <= tolerance * (1 + std::fabs(wanted))) return;
  if (++failures <= 20) std::printf("%s: got %.9g, expected %.9g\n", name.c_str(), got, wanted);
}

void run(BnReluPoolShape s, bool batch, bool with_dy, int threads) {
  const int64_t map = s.height * s.width, all = s.samples * s.channels * map;
  const int64_t rows = s.height / s.pool, columns = s.width / s.pool, windows = s.pool * s.pool;
  const int64_t planes = s.samples * s.channels, count = s.samples * map;
  const double eps = 1e-3, coarse = s.dtype == DType::f32 ? 2e-4 : s.dtype == DType::f16 ? 4e-3 : 2e-2;
  const auto bytes = [&](int64_t n) { return static_cast<size_t>(n * size_of(s.dtype)); };
  Memory x(bytes(all)), y(bytes(all)), dy(bytes(all)), dx(bytes(all));
  Memory pooled(bytes(planes * windows)), dpooled(bytes(planes * windows));
  Memory gamma(s.channels * 4), beta(s.channels * 4), mean(s.channels * 4), var(s.channels * 4);
  Memory dgamma(s.channels * 4), dbeta(s.channels * 4), moments(2 * planes * windows * 4);
  for (int64_t i = 0; i < all; ++i) put(x, i, std::floor(uniform() * 64 - 32) / 8, s.dtype);
  for (int64_t i = 0; i < all; ++i) put(dy, i, std::floor(uniform() * 16 - 8) / 8, s.dtype);
  for (int64_t i = 0; i < planes * windows; ++i) put(dpooled, i, std::floor(uniform() * 16 - 8) / 8, s.dtype);
  for (int64_t c = 0; c < s.channels; ++c) {
    gamma.floats()[c] = static_cast<float>(uniform() * 2 - 1);
    // Far from a multiple of gamma / 8: no z near 0 may be rounded to the other side.
    beta.floats()[c] = static_cast<float>(uniform() - 0.5);
    mean.floats()[c] = static_cast<float>(uniform());
    var.floats()[c] = static_cast<float>(uniform() + 0.5);
  }
  const auto offset = [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    return s.channels_last ? ((n * s.height + h) * s.width + w) * s.channels + c
                           : ((n * s.channels + c) * s.height + h) * s.width + w;
  };

  Memory workspace(lct::bn_relu_pool_cpu_workspace(s, threads));
  lct::BnReluPool forward{s, x.data.get(), gamma.floats(), beta.floats(), y.data.get(), pooled.data.get(),
                          mean.floats(), var.floats(), moments.floats(), workspace.data.get(), batch, eps};
  lct::bn_relu_pool_cpu(forward, threads);
  Memory space(lct::bn_relu_pool_backward_cpu_workspace(s, with_dy, threads));
  lct::BnReluPoolBackward backward{s, with_dy ? dy.data.get() : nullptr, dpooled.data.get(), x.data.get(),
                                   gamma.floats(), beta.floats(), mean.floats(), var.floats(), moments.floats(),
                                   dx.data.get(), dgamma.floats(), dbeta.floats(), space.data.get(), batch, eps};
  lct::bn_relu_pool_backward_cpu(backward, threads);

  const std::string where = std::string(lct::name_of(lct::simd_level())) + " " + std::to_string(s.samples) + "x" +
                            std::to_string(s.channels) + "x" + std::to_string(s.height) + "x" +
                            std::to_string(s.width) + " pool " + std::to_string(s.pool) +
                            (s.channels_last ? " last" : " first") + (batch ? " batch" : " given") +
                            (with_dy ? " dy" : "") + " dtype " + std::to_string(static_cast<int>(s.dtype)) + " ";
  for (int64_t c = 0; c < s.channels; ++c) {
    double m = mean.floats()[c], v = var.floats()[c];
    if (batch) {
      double sum = 0, square = 0;
      for (int64_t n = 0; n < s.samples; ++n)
        for (int64_t i = 0; i < map; ++i) sum += get(x, offset(n, c, i / s.width, i % s.width), s.dtype);
      sum /= static_cast<double>(count);
      for (int64_t n = 0; n < s.samples; ++n)
        for (int64_t i = 0; i < map; ++i) {
          const double d = get(x, offset(n, c, i / s.width, i % s.width), s.dtype) - sum;
          square += d * d;
        }
      compare(where + "mean", m, sum, 1e-6);
      compare(where + "var", v, square / static_cast<double>(count), 1e-6);
    }
    const double rstd = 1 / std::sqrt(v + eps), g = gamma.floats()[c], b = beta.floats()[c];
    double total = 0, moment = 0;
    // The sign of z is the kernel's: y says which elements it took for active.
    const auto gradient = [&](int64_t n, int64_t h, int64_t w) {
      const int64_t window = ((n * s.channels + c) * s.pool + h / rows) * s.pool + w / columns;
      double d = get(dpooled, window, s.dtype) / static_cast<double>(rows * columns);
      if (with_dy) d += get(dy, offset(n, c, h, w), s.dtype);
      return get(y, offset(n, c, h, w), s.dtype) > 0 ? d : 0.0;
    };
    std::vector<double> means(static_cast<size_t>(s.samples * windows), 0.0);
    for (int64_t n = 0; n < s.samples; ++n)
      for (int64_t h = 0; h < s.height; ++h)
        for (int64_t w = 0; w < s.width; ++w) {
          const double xhat = (get(x, offset(n, c, h, w), s.dtype) - m) * rstd, z = xhat * g + b;
          compare(where + "y", get(y, offset(n, c, h, w), s.dtype), z > 0 ? z : 0, coarse);
          means[static_cast<size_t>(n * windows + h / rows * s.pool + w / columns)] +=
              (z > 0 ? z : 0) / static_cast<double>(rows * columns);
          total += gradient(n, h, w);
          moment += gradient(n, h, w) * xhat;
        }
    for (int64_t i = 0; i < s.samples * windows; ++i)
      compare(where + "pooled",
              get(pooled, (i / windows * s.channels + c) * windows + i % windows, s.dtype), means[static_cast<size_t>(i)],
              coarse);
    compare(where + "dbeta", dbeta.floats()[c], total, 1e-4);
    compare(where + "dgamma", dgamma.floats()[c], moment, 1e-4);
    for (int64_t n = 0; n < s.samples; ++n)
      for (int64_t h = 0; h < s.height; ++h)
        for (int64_t w = 0; w < s.width; ++w) {
          const double xhat = (get(x, offset(n, c, h, w), s.dtype) - m) * rstd;
          double wanted = gradient(n, h, w);
          if (batch) wanted -= (total + xhat * moment) / static_cast<double>(count);
          compare(where + "dx", get(dx, offset(n, c, h, w), s.dtype), g * rstd * wanted, coarse);
        }
  }
}

}  // namespace

int main() {
  // samples, channels, height, width, pool
  const int64_t shapes[][5] = {
      {2, 1, 1, 1, 1},     // the smallest
      {3, 19, 6, 10, 2},   // less than a vector both ways, channels past one
      {2, 33, 4, 4, 4},    // windows of one element
      {2, 2, 72, 70, 2},   // a plane of more than one chunk, a row of four vectors and a piece
      {70, 3, 8, 8, 1},    // more samples than a chunk has
  };
  for (int level = 0; level <= static_cast<int>(lct::best_simd_level()); ++level) {
    lct::set_simd_level(static_cast<lct::SimdLevel>(level));
    int turn = 0;
    for (const auto& n : shapes)
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
        for (const bool channels_last : {false, true})
          for (const bool with_dy : {false, true}) {
            ++turn;
            run({n[0], n[1], n[2], n[3], n[4], channels_last, dtype}, turn % 5 != 0, with_dy, 1 + turn % 3);
          }
  }
  if (failures) {
    std::printf("%d of %d comparisons failed\n", failures, checks);
    return 1;
  }
  std::printf("ok %d\n", checks);
  return 0;
}
