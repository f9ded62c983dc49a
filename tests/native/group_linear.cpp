// Drives the CPU kernels of group_linear over odd shapes against plain double-precision loops, with every tensor
// flush against a page that faults. Built by tests/test_native.py, also under the sanitizers.
//
// Prints one line a failure and exits 1 if there was one; "ok N" otherwise.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "guarded.h"
#include "lct/group_linear.h"

namespace {

using lct::Activation;
using lct::DType;
using lct::GroupLinearShape;

int failures = 0;
int checks = 0;

void fill(Tensor& to, double size) {
  for (int64_t i = 0; i < to.count; ++i) to.set(i, size * normal());
}
// Numbers that bf16 holds: some processors' kernels round weight to it.
void fill_bf16(Tensor& to, double size) {
  for (int64_t i = 0; i < to.count; ++i) to.set(i, widen(narrow(size * normal(), DType::bf16), DType::bf16));
}

// Within a few roundings of the result and a sum's worth of fp32 roundings of numbers of order 1.
void compare(const std::string& name, Tensor& got, const std::vector<double>& want, int64_t terms) {
  ++checks;
  double largest = 1;
  for (double x : want) largest = std::isfinite(x) ? std::fmax(largest, std::fabs(x)) : largest;
  const double allowed = largest * (precision(got.dtype) + 6e-8 * (8 + 2 * std::sqrt(static_cast<double>(terms))));
  for (int64_t i = 0; i < got.count; ++i) {
    const double value = got.get(i), exact = want[static_cast<size_t>(i)];
    if (std::isnan(exact) ? std::isnan(value) : std::fabs(value - exact) <= allowed) continue;
    std::printf("%s[%lld]: %.9g, expected %.9g +- %.2g\n", name.c_str(), static_cast<long long>(i), value, exact,
                allowed);
    ++failures;
    return;
  }
}

void same_bits(const std::string& name, const std::vector<char>& a, const std::vector<char>& b) {
  ++checks;
  if (a == b) return;
  std::printf("%s: bits differ between thread counts\n", name.c_str());
  ++failures;
}

struct Types {
  DType x, weight, critic;
};

void run(GroupLinearShape s, Types types, Activation activation, bool with_bias, int gradients, bool at_end) {
  const int64_t N = s.rows, I = s.inputs, O = s.outputs, V = s.classes;
  const bool gelu = activation == Activation::gelu, relu = activation == Activation::relu;
  const bool with_dh = gradients != 1 || V == 0, with_dlogits = gradients != 0 && V > 0;
  Tensor x(N * I, types.x, at_end), weight(O * I, types.weight, at_end), bias(O, types.weight, at_end);
  Tensor critic(V * O, types.critic, at_end), shift(V, types.critic, at_end);
  Tensor dh(N * O, types.x, at_end), dlogits(N * V, types.x, at_end);
  fill(x, 1);
  fill_bf16(weight, 1 / std::sqrt(static_cast<double>(I)));
  fill(bias, 1);
  fill(critic, 1 / std::sqrt(static_cast<double>(O)));
  fill(shift, 1);
  fill(dh, 1);
  fill(dlogits, 1);
  // A row that is not finite stays alone.
  const int64_t spoilt = N > 7 ? 7 : -1;
  if (spoilt >= 0) x.set_nan(spoilt * I);

  char name[160];
  std::snprintf(name, sizeof name, "%s (%lld, %lld, %lld, %lld) dtypes %d %d %d activation %d%s gradients %d %s: ",
                lct::name_of(lct::simd_level()), static_cast<long long>(N), static_cast<long long>(I),
                static_cast<long long>(O), static_cast<long long>(V), static_cast<int>(types.x),
                static_cast<int>(types.weight), static_cast<int>(types.critic), static_cast<int>(activation),
                with_bias ? " bias" : "", gradients, at_end ? "end" : "start");
  std::vector<char> first[5];
  for (int threads : {1, 3}) {
    Tensor h(N * O, types.x, at_end), logits(N * V, types.x, at_end), slope(gelu ? N * O : 0, types.x, at_end);
    Tensor dpre(N * O, types.x, at_end), dbias(O, DType::f32, at_end);
    Guarded workspace(static_cast<int64_t>(lct::group_linear_cpu_workspace(s, types.x, threads)), at_end);
    lct::GroupLinear forward{s,
                             x.memory.data(),
                             weight.memory.data(),
                             with_bias ? bias.memory.data() : nullptr,
                             V ? critic.memory.data() : nullptr,
                             V && with_bias ? shift.memory.data() : nullptr,
                             h.memory.data(),
                             logits.memory.data(),
                             gelu ? slope.memory.data() : nullptr,
                             workspace.data(),
                             types.x,
                             types.weight,
                             types.critic,
                             activation};
    lct::group_linear_cpu(forward, threads);
    GroupLinearShape back_shape = s;
    back_shape.classes = with_dlogits ? V : 0;
    Guarded space(static_cast<int64_t>(lct::group_linear_backward_cpu_workspace(back_shape, threads)), at_end);
    lct::GroupLinearBackward backward{back_shape,
                                      with_dh ? dh.memory.data() : nullptr,
                                      with_dlogits ? dlogits.memory.data() : nullptr,
                                      with_dlogits ? critic.memory.data() : nullptr,
                                      gelu ? slope.memory.data() : h.memory.data(),
                                      dpre.memory.data(),
                                      dbias.memory.as<float>(),
                                      space.data(),
                                      types.x,
                                      types.critic,
                                      activation};
    lct::group_linear_backward_cpu(backward, threads);

    Tensor* outputs[] = {&h, &logits, &slope, &dpre, &dbias};
    if (threads == 1) {
      for (int i = 0; i < 5; ++i) first[i] = outputs[i]->memory.bytes();
    } else {
      for (int i = 0; i < 5; ++i) same_bits(name + std::to_string(i), first[i], outputs[i]->memory.bytes());
      continue;
    }

    // Logits and gradients are of what the kernel stored, so that its roundings are not counted twice.
    std::vector<double> want_h, want_slope, want_logits, want_dpre, want_dbias(static_cast<size_t>(O));
    for (int64_t n = 0; n < N; ++n)
      for (int64_t o = 0; o < O; ++o) {
        double pre = with_bias ? bias.get(o) : 0;
        for (int64_t i = 0; i < I; ++i) pre += x.get(n * I + i) * weight.get(o * I + i);
        const double phi = 0.5 * std::erfc(-pre * std::sqrt(0.5));
        want_h.push_back(relu ? (pre <= 0 ? 0 : pre) : gelu ? pre * phi : pre);
        if (gelu) want_slope.push_back(phi + pre * std::exp(-0.5 * pre * pre) / std::sqrt(6.283185307179586));
        double g = with_dh ? dh.get(n * O + o) : 0;
        for (int64_t v = 0; with_dlogits && v < V; ++v) g += dlogits.get(n * V + v) * critic.get(v * O + o);
        if (relu && h.get(n * O + o) <= 0) g = 0;
        if (gelu) g *= slope.get(n * O + o);
        want_dpre.push_back(g);
        want_dbias[static_cast<size_t>(o)] += g;
      }
    for (int64_t n = 0; n < N; ++n)
      for (int64_t v = 0; v < V; ++v) {
        double sum = with_bias ? shift.get(v) : 0;
        for (int64_t o = 0; o < O; ++o) sum += h.get(n * O + o) * critic.get(v * O + o);
        want_logits.push_back(sum);
      }
    compare(std::string(name) + "h", h, want_h, I);
    compare(std::string(name) + "slope", slope, want_slope, I);
    compare(std::string(name) + "logits", logits, want_logits, O);
    compare(std::string(name) + "dpre", dpre, want_dpre, V);
    compare(std::string(name) + "dbias", dbias, want_dbias, N);
  }
}

}  // namespace

int main() {
  const GroupLinearShape shapes[] = {
      {1, 1, 1, 1},        // the smallest
      {3, 5, 7, 2},        // less than a vector
      {13, 270, 33, 63},   // inputs past a run of 256, one output past two panels, the most classes
      {101, 17, 530, 17},  // two blocks of rows, three of outputs: split among three threads
      {97, 16, 16, 0},     // one row past a block, no critic
      {5, 40, 600, 33},    // few rows: threads share the outputs
  };
  const Types types[] = {{DType::f32, DType::f32, DType::f32},
                         {DType::f16, DType::f16, DType::f16},
                         {DType::bf16, DType::f32, DType::bf16},
                         {DType::f32, DType::bf16, DType::f16}};
  for (int level = 0; level <= static_cast<int>(lct::best_simd_level()); ++level) {
    lct::set_simd_level(static_cast<lct::SimdLevel>(level));
    int turn = 0;
    for (const GroupLinearShape& shape : shapes)
      for (const Types& type : types)
        for (const Activation activation : {Activation::none, Activation::relu, Activation::gelu}) {
          ++turn;
          run(shape, type, activation, turn % 4 != 0, turn / 2 % 3, turn / 3 % 2 == 0);
        }
  }
  if (failures) {
    std::printf("%d of %d comparisons failed\n", failures, checks);
    return 1;
  }
  std::printf("ok %d\n", checks);
  return 0;
}
