// Drives the CPU kernels of consensus at every instruction set, with every tensor flush against a page that faults,
// against plain loops in double precision. Built by tests/test_native.py under the sanitizers.
//
// Prints one line a failure and exits 1 if there was one; "ok N" otherwise.
#include "lct/consensus.h"

#include <string>

#include "cpu/dispatch.h"
#include "guarded.h"

namespace {

int failures = 0, checks = 0;

void expect(bool right, const std::string& what, int64_t index) {
  ++checks;
  if (right) return;
  if (++failures < 20) std::printf("%s: wrong at %lld\n", what.c_str(), static_cast<long long>(index));
}

void fill(Tensor& t, double offset) {
  for (int64_t i = 0; i < t.count; ++i) t.set(i, normal() + offset);
}

void run(int64_t rows, int64_t depth, DType dtype, bool multipliers, bool at_end, const std::string& at) {
  const int64_t size = rows * depth;
  const double beta = 0.3f, eta = 0.7f, unit = precision(dtype);
  Tensor x(size, dtype, at_end), back(size, dtype, at_end), lambda(size, DType::f32, at_end);
  Tensor kappa(size, DType::f32, at_end);
  fill(x, 0);
  fill(back, 0);
  fill(lambda, 0.5);
  fill(kappa, 0);
  float* const given = multipliers ? kappa.memory.as<float>() : nullptr;
  std::vector<char> first;
  for (const int threads : {1, 3}) {
    Tensor loss(rows, DType::f32, at_end), p(size, dtype, at_end);
    Tensor next(size, DType::f32, at_end), after(size, DType::f32, at_end);
    lct::consensus_adjoint_cpu({x.memory.data(), lambda.memory.as<float>(), given, loss.memory.as<float>(),
                                p.memory.data(), rows, depth, static_cast<float>(beta), dtype},
                               threads);
    lct::consensus_update_cpu({lambda.memory.as<float>(), given, back.memory.data(), x.memory.data(),
                               next.memory.as<float>(), multipliers ? after.memory.as<float>() : nullptr, size,
                               static_cast<float>(beta), static_cast<float>(eta), dtype},
                              threads);
    std::vector<char> all = loss.memory.bytes();
    for (Tensor* t : {&p, &next, &after}) {
      const std::vector<char> bytes = t->memory.bytes();
      all.insert(all.end(), bytes.begin(), bytes.end());
    }
    if (threads == 1) first = all;
    expect(all == first, at + ": bits of other thread counts", threads);
    if (threads != 1) continue;

    for (int64_t n = 0; n < rows; ++n) {
      double sum = 0, terms = 0;
      for (int64_t i = n * depth; i < (n + 1) * depth; ++i) {
        const double d = lambda.get(i) - x.get(i), k = multipliers ? kappa.get(i) : 0;
        sum += d * (0.5 * beta * d - k);
        terms += 0.5 * beta * d * d + std::fabs(k * d);
        const double wanted = k - beta * d;
        expect(std::fabs(p.get(i) - wanted) <= (unit + 3e-7) * (std::fabs(k) + std::fabs(beta * d)) + 1e-7,
               at + ": p", i);
        const double value = lambda.get(i) - eta * (back.get(i) + beta * d - k);
        const double size_of_terms = std::fabs(lambda.get(i)) + std::fabs(back.get(i)) + std::fabs(d) + std::fabs(k);
        expect(std::fabs(next.get(i) - value) <= 1e-6 * size_of_terms, at + ": lambda", i);
        if (multipliers) {
          const double multiplier = k - beta * (value - x.get(i));
          expect(std::fabs(after.get(i) - multiplier) <= 1e-6 * (size_of_terms + std::fabs(x.get(i))),
                 at + ": kappa", i);
        } else {
          expect(std::isnan(after.get(i)), at + ": kappa is left alone", i);
        }
      }
      expect(std::fabs(loss.get(n) - sum) <= 1e-6 * terms, at + ": loss", n);
    }
  }
}

}  // namespace

int main() {
  const int64_t shapes[][2] = {{0, 7}, {3, 0}, {1, 1}, {2, 15}, {3, 16}, {1, 33}, {2, 512}, {4, 1027}, {1, 40001}};
  for (int level = 0; level <= static_cast<int>(lct::best_simd_level()); ++level) {
    lct::set_simd_level(static_cast<lct::SimdLevel>(level));
    int turn = 0;
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (const auto& shape : shapes) {
        for (const bool multipliers : {false, true}) {
          ++turn;
          const std::string at = std::string(lct::name_of(static_cast<lct::SimdLevel>(level))) + " " +
                                 std::to_string(shape[0]) + " x " + std::to_string(shape[1]) + " dtype " +
                                 std::to_string(static_cast<int>(dtype));
          run(shape[0], shape[1], dtype, multipliers, turn / 2 % 2 == 0, at);
        }
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
