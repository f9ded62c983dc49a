// Drives the CPU kernels of perturb at every instruction set, with every tensor flush against a page that faults,
// against Philox and the normal written out value by value. Built by tests/test_native.py under the sanitizers.
//
// Prints one line a failure and exits 1 if there was one; "ok N" otherwise.
#include "lct/perturb.h"

#include <string>

#include "cpu/dispatch.h"
#include "guarded.h"

namespace {

int failures = 0;
int checks = 0;

void expect(bool right, const std::string& what, int64_t index) {
  ++checks;
  if (right) return;
  if (++failures < 20) std::printf("%s: wrong at %lld\n", what.c_str(), static_cast<long long>(index));
}

uint32_t word(uint64_t seed, uint64_t number) {
  const uint64_t at = number / 4;
  uint32_t x[4] = {static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = x[0] * uint64_t{0xd2511f53}, q = x[2] * uint64_t{0xcd9e8d57};
    const uint32_t next[4] = {static_cast<uint32_t>(q >> 32) ^ x[1] ^ key[0], static_cast<uint32_t>(q),
                              static_cast<uint32_t>(p >> 32) ^ x[3] ^ key[1], static_cast<uint32_t>(p)};
    std::memcpy(x, next, sizeof x);
    key[0] += 0x9e3779b9u;
    key[1] += 0xbb67ae85u;
  }
  return x[number % 4];
}

// The normal whose distribution function is u, by bisection in double.
double normal_of(uint32_t from) {
  const double u = ((from >> 9) + 0.5) / 8388608.0;
  double low = -6, high = 6;
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (std::erfc(-middle / std::sqrt(2.0)) / 2 < u ? low : high) = middle;
  }
  return low;
}

bool near(double got, double wanted, DType dtype, double size) {
  return std::fabs(got - wanted) <= (2e-6 + precision(dtype)) * (size + std::fabs(wanted)) + 6e-8;
}

struct Case {
  int64_t rows, channels, inner, copies, sigmas;
  uint64_t offset;
  bool antithetic;
};

void run(const Case& c, DType dtype, bool at_end, int threads) {
  const uint64_t seed = 0x9abcdef012345678u;
  const int64_t features = c.channels * c.inner, size = c.rows * features;
  Tensor z(size / c.copies, dtype, at_end), out(size, dtype, at_end), back(size, dtype, at_end);
  Tensor sigma(c.sigmas, DType::f32, at_end), loss(c.rows, DType::f32, at_end);
  for (int64_t i = 0; i < z.count; ++i) z.set(i, normal());
  for (int64_t i = 0; i < sigma.count; ++i) sigma.set(i, 0.1 + uniform());
  for (int64_t i = 0; i < loss.count; ++i) loss.set(i, normal());
  const lct::NoiseShape shape{c.rows, c.channels, c.inner};
  const lct::Noise noise{seed, c.offset, c.antithetic};
  lct::perturb_cpu({z.memory.data(), sigma.memory.as<float>(), out.memory.data(), shape, c.copies, c.sigmas,
                    noise, dtype},
                   threads);
  lct::score_cpu({loss.memory.as<float>(), sigma.memory.as<float>(), back.memory.data(), shape, 7, c.sigmas,
                  noise, dtype},
                 threads);
  for (int64_t i = 0; i < size; ++i) {
    const bool second = c.antithetic && i >= size / 2;
    const uint64_t number = c.offset + static_cast<uint64_t>(second ? i - size / 2 : i);
    const double eps = normal_of(word(seed, number)) * (second ? -1 : 1);
    const double s = sigma.get(c.sigmas == 1 ? 0 : i / c.inner % c.channels), from = z.get(i % z.count);
    const std::string name = std::string("perturb ") + lct::name_of(lct::simd_level());
    expect(near(out.get(i), from + s * eps, dtype, std::fabs(from) + std::fabs(s * eps)), name, i);
    expect(near(back.get(i), loss.get(i / features) / (7 * s) * eps, dtype, 0), "score", i);
  }
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, 1, 1, 1, 1, 0, false},      {2, 5, 1, 1, 5, 3, true},  {6, 4, 7, 3, 4, 2, true},
      {8, 3, 16, 4, 1, 1u << 31, false}, {3, 1, 131, 1, 1, 6, false}, {6, 33, 5, 2, 33, (1ull << 34) - 3, true},
      {0, 3, 2, 1, 3, 0, false},      {4, 0, 2, 1, 1, 0, true},  {128, 67, 2, 2, 67, 1, true},
  };
  for (int level = 0; level <= static_cast<int>(lct::best_simd_level()); ++level) {
    lct::set_simd_level(static_cast<lct::SimdLevel>(level));
    for (const Case& c : cases)
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
        for (const bool at_end : {true, false}) run(c, dtype, at_end, at_end ? 1 : 2);
  }
  if (failures) return 1;
  std::printf("ok %d\n", checks);
}
