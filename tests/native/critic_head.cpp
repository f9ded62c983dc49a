// Drives the CPU kernels of critic_head over odd shapes against plain double-precision loops, with every tensor
// flush against a page that faults. Built by tests/test_native.py, also under the sanitizers.
//
// Prints one line a failure and exits 1 if there was one; "ok N" otherwise.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "guarded.h"
#include "lct/critic_head.h"

namespace {

using lct::Activation;
using lct::DType;

int failures = 0;
int checks = 0;

double largest_of(Tensor& x) {
  double largest = 0;
  for (int64_t i = 0; i < x.count; ++i) largest = std::fmax(largest, std::fabs(x.get(i)));
  return largest;
}

// The largest error allowed is a few roundings of the result and a sum's worth of fp32 roundings of numbers as
// large as `operand`, which a difference may have cancelled.
void compare(const std::string& name, Tensor& got, const std::vector<double>& want, double terms,
             double operand) {
  ++checks;
  double largest = operand;
  for (double x : want) largest = std::isfinite(x) ? std::fmax(largest, std::fabs(x)) : largest;
  const double allowed = largest * (precision(got.dtype) + 6e-8 * (8 + 2 * std::sqrt(terms)));
  for (int64_t i = 0; i < got.count; ++i) {
    const double value = got.get(i), exact = want[static_cast<size_t>(i)];
    const bool same = std::isnan(exact) ? std::isnan(value) : std::fabs(value - exact) <= allowed;
    if (same) continue;
    std::printf("%s[%lld]: %.9g, expected %.9g +- %.2g\n", name.c_str(), static_cast<long long>(i), value, exact,
                allowed);
    ++failures;
    return;
  }
}

struct Shape {
  int64_t rows, depth, classes;
};

void run(Shape shape, DType h_dtype, DType weight_dtype, Activation activation, bool at_end, bool with_bias,
         bool with_wgrad, lct::SimdLevel level) {
  const int64_t N = shape.rows, D = shape.depth, V = shape.classes, ignore = -7;
  const bool relu = activation == Activation::relu;
  Tensor h(N * D, h_dtype, at_end), weight(V * D, weight_dtype, at_end), bias(V, weight_dtype, at_end);
  Tensor row_scale(N, DType::f32, at_end), scale(1, DType::f32, at_end);
  Guarded target(N * 8, at_end);
  for (int64_t i = 0; i < N * D; ++i) h.set(i, normal());
  for (int64_t i = 0; i < V * D; ++i) weight.set(i, normal() / std::sqrt(static_cast<double>(D)));
  for (int64_t i = 0; i < V; ++i) bias.set(i, normal());
  scale.set(0, 0.375);
  const int64_t bad[] = {-1, V, int64_t{1} << 40, std::numeric_limits<int64_t>::min(),
                         std::numeric_limits<int64_t>::max()};
  for (int64_t n = 0; n < N; ++n) {
    row_scale.set(n, n % 5 == 3 ? 0.0 : normal());
    int64_t label = static_cast<int64_t>(uniform() * static_cast<double>(V));
    if (n % 6 == 4) label = ignore;
    if (n % 11 == 7) label = bad[n % 5];
    target.as<int64_t>()[n] = label;
  }
  // Rows that don't count may hold anything.
  for (int64_t n = 4; n < N; n += 12) h.set(n * D, NAN);
  // One row that counts and is not finite, where there is no weight gradient to spoil.
  const int64_t spoilt = !with_wgrad && N > 12 ? 12 : -1;
  if (spoilt >= 0) h.set(spoilt * D + D / 2, NAN);

  std::vector<double> loss(static_cast<size_t>(N)), dlogits(static_cast<size_t>(N * V)),
      dh(static_cast<size_t>(N * D)), dweight(static_cast<size_t>(V * D)), dbias(static_cast<size_t>(V));
  for (int64_t n = 0; n < N; ++n) {
    const int64_t label = target.as<int64_t>()[n];
    if (label == ignore) continue;
    if (label < 0 || label >= V) {
      loss[static_cast<size_t>(n)] = NAN;
      continue;
    }
    std::vector<double> a(static_cast<size_t>(D)), p(static_cast<size_t>(V));
    for (int64_t d = 0; d < D; ++d) {
      const double x = h.get(n * D + d);
      a[static_cast<size_t>(d)] = relu && x < 0 ? 0 : x;
    }
    double top = -INFINITY, total = 0;
    for (int64_t v = 0; v < V; ++v) {
      double x = with_bias ? bias.get(v) : 0;
      for (int64_t d = 0; d < D; ++d) x += a[static_cast<size_t>(d)] * weight.get(v * D + d);
      p[static_cast<size_t>(v)] = x;
      top = std::isnan(x) ? x : std::fmax(top, x);
    }
    for (double x : p) total += std::exp(x - top);
    loss[static_cast<size_t>(n)] = std::log(total) + top - p[static_cast<size_t>(label)];
    for (int64_t v = 0; v < V; ++v) {
      const double g = std::exp(p[static_cast<size_t>(v)] - top) / total - (v == label);
      dlogits[static_cast<size_t>(n * V + v)] = g;
      const double scaled = g * row_scale.get(n);
      dbias[static_cast<size_t>(v)] += scaled;
      for (int64_t d = 0; d < D; ++d) {
        const bool through = !relu || h.get(n * D + d) > 0;
        if (through) dh[static_cast<size_t>(n * D + d)] += scale.get(0) * g * weight.get(v * D + d);
        dweight[static_cast<size_t>(v * D + d)] += scaled * a[static_cast<size_t>(d)];
      }
    }
  }

  char name[160];
  std::snprintf(name, sizeof name, "%s (%lld, %lld, %lld) dtypes %d %d %s%s%s%s", lct::name_of(level),
                static_cast<long long>(N), static_cast<long long>(D), static_cast<long long>(V),
                static_cast<int>(h_dtype), static_cast<int>(weight_dtype), relu ? "relu " : "",
                with_bias ? "bias " : "", with_wgrad ? "wgrad " : "", at_end ? "end" : "start");
  std::vector<char> first[5];
  for (int threads : {1, 3}) {
    Tensor out_loss(N, DType::f32, at_end), out_dlogits(N * V, h_dtype, at_end), out_dh(N * D, h_dtype, at_end);
    Tensor out_dweight(V * D, weight_dtype, at_end), out_dbias(V, weight_dtype, at_end);
    Guarded workspace(static_cast<int64_t>(lct::critic_head_cpu_workspace(N, D, V, h_dtype, weight_dtype,
                                                                          with_wgrad, threads)),
                      at_end);
    lct::CriticHead args{h.memory.data(),
                         weight.memory.data(),
                         with_bias ? bias.memory.data() : nullptr,
                         target.as<int64_t>(),
                         scale.memory.as<float>(),
                         with_wgrad ? row_scale.memory.as<float>() : nullptr,
                         out_loss.memory.as<float>(),
                         out_dlogits.memory.data(),
                         out_dh.memory.data(),
                         with_wgrad ? out_dweight.memory.data() : nullptr,
                         with_wgrad ? out_dbias.memory.data() : nullptr,
                         workspace.data(),
                         N,
                         D,
                         V,
                         h_dtype,
                         weight_dtype,
                         activation,
                         ignore};
    lct::critic_head_cpu(args, threads);
    const std::string at = std::string(name) + ": ";
    compare(at + "loss", out_loss, loss, static_cast<double>(D), 1);
    compare(at + "dlogits", out_dlogits, dlogits, static_cast<double>(D), 1);
    compare(at + "dh", out_dh, dh, static_cast<double>(D + V), scale.get(0) * largest_of(weight));
    if (with_wgrad) {
      compare(at + "dweight", out_dweight, dweight, static_cast<double>(D + N), largest_of(row_scale) * largest_of(h));
      compare(at + "dbias", out_dbias, dbias, static_cast<double>(D + N), largest_of(row_scale));
    }
    Tensor* outputs[5] = {&out_loss, &out_dlogits, &out_dh, &out_dweight, &out_dbias};
    for (int i = 0; i < 5; ++i) {
      if (threads == 1) first[i] = outputs[i]->memory.bytes();
      else if (first[i] != outputs[i]->memory.bytes()) {
        std::printf("%soutput %d differs in its bits between 1 and %d threads\n", at.c_str(), i, threads);
        ++failures;
      }
    }
    if (!with_wgrad) continue;

    // The weight gradient alone sees dlogits as rounded; rows that don't count hold zeros there, so h must be
    // finite for the result to be.
    for (int64_t n = 4; n < N; n += 12) h.set(n * D, 1.0);
    Tensor alone_dweight(V * D, weight_dtype, at_end), alone_dbias(V, weight_dtype, at_end);
    Guarded alone_workspace(static_cast<int64_t>(lct::critic_head_wgrad_cpu_workspace(
                                N, D, V, h_dtype, weight_dtype, threads)),
                            at_end);
    lct::critic_head_wgrad_cpu({h.memory.data(), out_dlogits.memory.data(), row_scale.memory.as<float>(),
                                alone_dweight.memory.data(), alone_dbias.memory.data(), alone_workspace.data(), N,
                                D, V, h_dtype, weight_dtype, activation},
                               threads);
    std::vector<double> rounded(static_cast<size_t>(V * D));
    for (int64_t n = 0; n < N; ++n)
      for (int64_t v = 0; v < V; ++v)
        for (int64_t d = 0; d < D; ++d) {
          const double x = h.get(n * D + d);
          rounded[static_cast<size_t>(v * D + d)] +=
              row_scale.get(n) * out_dlogits.get(n * V + v) * (relu && x < 0 ? 0 : x);
        }
    compare(at + "dweight alone", alone_dweight, rounded, static_cast<double>(D + N),
            largest_of(row_scale) * largest_of(h));
    for (int64_t n = 4; n < N; n += 12) h.set(n * D, NAN);
  }
}

}  // namespace

int main() {
  const Shape shapes[] = {
      {0, 3, 2},      // nothing
      {1, 1, 1},      // the smallest
      {1, 65, 17},    // one past a panel both ways
      {3, 5, 2},      // less than a vector
      {67, 130, 10},  // a block and three rows, two panels and two columns
      {70, 33, 49},   // four class panels, the last of one class
      {13, 64, 130},  // beyond one group of classes
      {1100, 7, 3},   // sums a chunk
      {40, 2100, 2},  // a short block
  };
  const DType types[][2] = {{DType::f32, DType::f32},
                            {DType::f16, DType::f16},
                            {DType::bf16, DType::f32},
                            {DType::f32, DType::bf16}};
  for (int level = 0; level <= static_cast<int>(lct::best_simd_level()); ++level) {
    lct::set_simd_level(static_cast<lct::SimdLevel>(level));
    int turn = 0;
    for (const Shape& shape : shapes)
      for (const auto& type : types)
        for (bool with_wgrad : {false, true}) {
          ++turn;
          run(shape, type[0], type[1], turn % 3 ? Activation::relu : Activation::none, turn / 2 % 2, turn % 5 != 0,
              with_wgrad, static_cast<lct::SimdLevel>(level));
        }
  }
  if (failures) {
    std::printf("%d of %d comparisons failed\n", failures, checks);
    return 1;
  }
  std::printf("ok %d\n", checks);
  return 0;
}
