// Runs csrc/cuda/critic_head.cu on the host and holds it against the formula in double.
//
//     critic_head_host case ROWS DEPTH CLASSES [COUNT]
//         COUNT (default all 6) pairs of types; alignment, activation, bad labels; several orders of threads
//     critic_head_host special
//         NaN and Inf in h, weights and bias
//     critic_head_host launch
//         devices, streams, failing calls, sizes that are refused, bounds of the workspace
//
// Exit status 1 and a line each for what is wrong. Built with AddressSanitizer, every buffer has its exact
// size, so that an access past one stops the program.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "host_cuda.h"
#include "lct/critic_head.h"

namespace {

using lct::Activation;
using lct::DType;

int failures = 0;

template <typename... Arguments>
void fail(const char* format, Arguments... args) {
  std::printf(format, args...);
  std::printf("\n");
  ++failures;
}

size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
const char* name_of(DType dtype) {
  return dtype == DType::f32 ? "f32" : dtype == DType::f16 ? "f16" : "bf16";
}
double epsilon(DType dtype) {
  return std::ldexp(1.0, dtype == DType::f32 ? -23 : dtype == DType::f16 ? -10 : -7);
}
// Half the distance between the smallest numbers.
double smallest(DType dtype) {
  return std::ldexp(1.0, dtype == DType::f32 ? -149 : dtype == DType::f16 ? -24 : -133);
}

// Memory of exactly this size, `offset` elements past malloc's alignment, full of NaN.
class Buffer {
 public:
  Buffer() = default;
  Buffer(int64_t count, DType dtype, int offset = 0) : dtype_(dtype), count_(count) {
    const size_t skip = offset * size_of(dtype), bytes = count * size_of(dtype);
    memory_.reset(static_cast<char*>(std::malloc(skip + bytes)));
    data_ = memory_.get() + skip;
    std::memset(memory_.get(), 0xff, skip + bytes);
  }

  void* data() const { return count_ ? data_ : nullptr; }
  int64_t size() const { return count_; }

  double get(int64_t i) const {
    if (dtype_ == DType::f32) return reinterpret_cast<const float*>(data_)[i];
    if (dtype_ == DType::f16) return __half2float(reinterpret_cast<const __half*>(data_)[i]);
    return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(data_)[i]);
  }
  void set(int64_t i, float x) const {
    if (dtype_ == DType::f32)
      reinterpret_cast<float*>(data_)[i] = x;
    else if (dtype_ == DType::f16)
      reinterpret_cast<__half*>(data_)[i] = __float2half_rn(x);
    else
      reinterpret_cast<__nv_bfloat16*>(data_)[i] = __float2bfloat16_rn(x);
  }
  std::string bytes() const { return std::string(data_, count_ * size_of(dtype_)); }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  char* data_ = nullptr;
  DType dtype_ = DType::f32;
  int64_t count_ = 0;
};

struct Shape {
  int64_t rows, depth, classes;
};

struct Options {
  DType h_dtype = DType::f32, weight_dtype = DType::f32;
  Activation activation = Activation::none;
  bool bias = true, wgrad = true, dbias = true;
  int offset = 0, dh_offset = 0;  // of h and weight, and of dh, in elements
  int64_t ignore_index = -100;
};

std::string describe(const Shape& s, const Options& o) {
  char text[200];
  std::snprintf(text, sizeof text, "%ld x %ld x %ld h %s weight %s%s%s%s offset %d", s.rows, s.depth,
                s.classes, name_of(o.h_dtype), name_of(o.weight_dtype),
                o.activation == Activation::relu ? " relu" : "", o.bias ? " bias" : "",
                o.wgrad ? " wgrad" : "", o.offset);
  return text;
}

struct Inputs {
  Shape shape;
  Options options;
  Buffer h, weight, bias, row_scale;
  std::vector<int64_t> target;
  std::unique_ptr<float> scale;

  Inputs(const Shape& s, const Options& o)
      : shape(s),
        options(o),
        h(s.rows * s.depth, o.h_dtype, o.offset),
        weight(s.classes * s.depth, o.weight_dtype, o.offset),
        bias(o.bias ? s.classes : 0, o.weight_dtype),
        row_scale(o.wgrad ? s.rows : 0, DType::f32),
        target(s.rows),
        scale(new float(0.37f)) {
    std::mt19937 draw(static_cast<unsigned>(s.rows * 7919 + s.depth * 31 + s.classes));
    std::normal_distribution<float> normal;
    // Zeros too, where the activation bends.
    for (int64_t i = 0; i < h.size(); ++i) h.set(i, i % 7 == 3 ? 0.0f : normal(draw));
    const float spread = 1.5f / std::sqrt(static_cast<float>(s.depth));
    for (int64_t i = 0; i < weight.size(); ++i) weight.set(i, spread * normal(draw));
    for (int64_t i = 0; i < bias.size(); ++i) bias.set(i, normal(draw));
    for (int64_t i = 0; i < row_scale.size(); ++i) row_scale.set(i, static_cast<float>(i % 3) - 0.9f);
    for (int64_t n = 0; n < s.rows; ++n) target[n] = draw() % s.classes;
    // Bad labels of every kind, the ends of the range next to them.
    const int64_t labels[] = {o.ignore_index, s.classes, -1, int64_t{1} << 40, INT64_MIN, 0, s.classes - 1};
    for (int64_t n = 2, i = 0; n < s.rows; n += 5, ++i) target[n] = labels[i % 7];
  }
};

struct Outputs {
  Buffer loss, dlogits, dh, dweight, dbias;

  explicit Outputs(const Inputs& in)
      : loss(in.shape.rows, DType::f32),
        dlogits(in.shape.rows * in.shape.classes, in.options.h_dtype),
        dh(in.shape.rows * in.shape.depth, in.options.h_dtype, in.options.dh_offset),
        dweight(in.options.wgrad ? in.shape.classes * in.shape.depth : 0, in.options.weight_dtype),
        dbias(in.options.wgrad && in.options.dbias ? in.shape.classes : 0, in.options.weight_dtype) {}

  std::string bytes() const {
    return loss.bytes() + dlogits.bytes() + dh.bytes() + dweight.bytes() + dbias.bytes();
  }
};

struct Workspace {
  Buffer memory;
  explicit Workspace(size_t bytes) : memory(static_cast<int64_t>(bytes / sizeof(float)), DType::f32) {}
};

lct::CriticHead arguments(const Inputs& in, const Outputs& out, const Workspace& workspace) {
  const Shape& s = in.shape;
  const Options& o = in.options;
  return {in.h.data(),
          in.weight.data(),
          in.bias.data(),
          in.target.data(),
          in.scale.get(),
          static_cast<const float*>(in.row_scale.data()),
          static_cast<float*>(out.loss.data()),
          out.dlogits.data(),
          out.dh.data(),
          out.dweight.data(),
          out.dbias.data(),
          workspace.memory.data(),
          s.rows,
          s.depth,
          s.classes,
          o.h_dtype,
          o.weight_dtype,
          o.activation,
          o.ignore_index};
}

size_t workspace_of(const Inputs& in) {
  const Shape& s = in.shape;
  const Options& o = in.options;
  return lct::critic_head_cuda_workspace(s.rows, s.depth, s.classes, o.h_dtype, o.weight_dtype, o.wgrad, 0);
}

Outputs run(const Inputs& in) {
  Outputs out(in);
  const Workspace workspace(workspace_of(in));
  const cudaError_t error = lct::critic_head_cuda(arguments(in, out, workspace), 0, nullptr);
  if (error != cudaSuccess) fail("critic_head_cuda returns %d", static_cast<int>(error));
  return out;
}

struct Wgrad {
  Buffer dweight, dbias;
  std::string bytes() const { return dweight.bytes() + dbias.bytes(); }
};

Wgrad run_wgrad(const Inputs& in, const Buffer& dlogits) {
  const Shape& s = in.shape;
  const Options& o = in.options;
  Wgrad out{Buffer(s.classes * s.depth, o.weight_dtype), Buffer(o.dbias ? s.classes : 0, o.weight_dtype)};
  const Workspace workspace(
      lct::critic_head_wgrad_cuda_workspace(s.rows, s.depth, s.classes, o.h_dtype, o.weight_dtype, 0));
  const cudaError_t error = lct::critic_head_wgrad_cuda(
      {in.h.data(), dlogits.data(), static_cast<const float*>(in.row_scale.data()), out.dweight.data(),
       out.dbias.data(), workspace.memory.data(), s.rows, s.depth, s.classes, o.h_dtype, o.weight_dtype,
       o.activation},
      0, nullptr);
  if (error != cudaSuccess) fail("critic_head_wgrad_cuda returns %d", static_cast<int>(error));
  return out;
}

// A result that must lie within `bound` of `value`; NaN and Inf must be met exactly.
struct Exact {
  std::vector<double> value, bound;
  explicit Exact(int64_t count) : value(count), bound(count) {}
};

void compare(const char* what, const Buffer& got, const Exact& exact, const std::string& where) {
  for (int64_t i = 0; i < got.size(); ++i) {
    const double x = got.get(i), y = exact.value[i];
    const bool good = std::isfinite(y) ? std::abs(x - y) <= exact.bound[i]
                      : std::isnan(y)  ? std::isnan(x)
                                       : x == y;
    if (!good) {
      fail("%s: %s[%ld] is %.9g, expected %.9g within %.3g", where.c_str(), what, i, x, y, exact.bound[i]);
      return;
    }
  }
}

struct Expected {
  Exact loss, dlogits, dh, dweight, dbias;
};

// The formula in double. Bounds are those of fp32 sums whose rounding errors add up like a random walk, four
// standard deviations wide, plus half a unit of the result's type (a whole one, to be on the safe side).
Expected expect(const Inputs& in, bool rounded_dlogits) {
  const Shape& s = in.shape;
  const Options& o = in.options;
  const double fine = epsilon(DType::f32), of_h = epsilon(o.h_dtype), of_weight = epsilon(o.weight_dtype);
  const double over_depth = 4 * fine * std::sqrt(s.depth + 8.0),
               over_classes = 4 * fine * std::sqrt(s.classes + 8.0);
  const double over_rows = 4 * fine * std::sqrt(s.rows + 8.0);
  Expected out{Exact(s.rows), Exact(s.rows * s.classes), Exact(s.rows * s.depth), Exact(s.classes * s.depth),
               Exact(s.classes)};
  std::vector<double> w(s.classes * s.depth), h(s.depth), a(s.depth), logits(s.classes), dh(s.depth),
      dh_size(s.depth), dh_off(s.depth);
  for (int64_t i = 0; i < s.classes * s.depth; ++i) w[i] = in.weight.get(i);

  for (int64_t n = 0; n < s.rows; ++n) {
    const int64_t target = in.target[n];
    const bool ignored = target == o.ignore_index, counted = !ignored && target >= 0 && target < s.classes;
    for (int64_t d = 0; d < s.depth; ++d) {
      h[d] = in.h.get(n * s.depth + d);
      a[d] = o.activation == Activation::relu && h[d] < 0 ? 0.0 : h[d];
    }
    double largest = -INFINITY, off = 0;
    for (int64_t v = 0; v < s.classes; ++v) {
      double sum = o.bias ? in.bias.get(v) : 0.0, size = std::abs(sum);
      for (int64_t d = 0; d < s.depth; ++d) {
        sum += a[d] * w[v * s.depth + d];
        size += std::abs(a[d] * w[v * s.depth + d]);
      }
      logits[v] = sum;
      largest = std::fmax(largest, sum);
      if (std::isfinite(size)) off = std::fmax(off, over_depth * size);
    }
    double sum = 0;
    for (int64_t v = 0; v < s.classes; ++v) sum += std::exp(logits[v] - largest);

    out.loss.value[n] = counted ? std::log(sum) + largest - logits[target] : ignored ? 0.0 : NAN;
    out.loss.bound[n] =
        ignored ? 0 : 2 * off + 8 * fine * (std::abs(largest) + std::abs(out.loss.value[n]) + 1);

    std::fill(dh.begin(), dh.end(), 0.0);
    std::fill(dh_size.begin(), dh_size.end(), 0.0);
    std::fill(dh_off.begin(), dh_off.end(), 0.0);
    const double factor = o.wgrad ? in.row_scale.get(n) : 0.0;
    for (int64_t v = 0; v < s.classes; ++v) {
      const double p = std::exp(logits[v] - largest) / sum;
      const double g = counted ? p - (v == target) : 0.0;
      const double g_off = counted ? (2 * off + 8 * fine + over_classes) * p + fine * (v == target) : 0.0;
      const double g_rounded = counted ? of_h * std::abs(g) + smallest(o.h_dtype) : 0.0;
      out.dlogits.value[n * s.classes + v] = g;
      out.dlogits.bound[n * s.classes + v] = g_off + g_rounded;
      const double g_kept = g_off + (rounded_dlogits ? g_rounded : 0.0);
      for (int64_t d = 0; d < s.depth; ++d) {
        const double term = g * w[v * s.depth + d];
        dh[d] += term;
        dh_size[d] += std::abs(term);
        dh_off[d] += g_off * std::abs(w[v * s.depth + d]);
        const int64_t i = v * s.depth + d;
        out.dweight.value[i] += factor * g * a[d];
        out.dweight.bound[i] += std::abs(factor * a[d]) * (g_kept + over_rows * std::abs(g));
      }
      out.dbias.value[v] += factor * g;
      out.dbias.bound[v] += std::abs(factor) * (g_kept + over_rows * std::abs(g));
    }
    for (int64_t d = 0; d < s.depth; ++d) {
      const bool passes = o.activation == Activation::none || h[d] > 0;
      const double value = passes ? *in.scale * dh[d] : 0.0;
      out.dh.value[n * s.depth + d] = value;
      out.dh.bound[n * s.depth + d] = passes ? *in.scale * (dh_off[d] + over_classes * dh_size[d]) +
                                                   of_h * std::abs(value) + smallest(o.h_dtype)
                                             : 0.0;
    }
  }
  for (Exact* gradient : {&out.dweight, &out.dbias}) {
    for (size_t i = 0; i < gradient->value.size(); ++i) {
      gradient->bound[i] += of_weight * std::abs(gradient->value[i]) + smallest(o.weight_dtype);
    }
  }
  return out;
}

void check(const Inputs& in, int seeds) {
  const std::string where = describe(in.shape, in.options);
  host_cuda::seed = 0;
  const Outputs out = run(in);
  const Expected exact = expect(in, false);
  compare("loss", out.loss, exact.loss, where);
  compare("dlogits", out.dlogits, exact.dlogits, where);
  compare("dh", out.dh, exact.dh, where);
  if (in.options.wgrad) {
    // Rounded dlogits: what a second kernel reads, and so does the pass for sizes that do not fit one.
    const Expected later = expect(in, true);
    compare("dweight", out.dweight, later.dweight, where);
    compare("dbias", out.dbias, later.dbias, where);
    const Wgrad alone = run_wgrad(in, out.dlogits);
    compare("wgrad's dweight", alone.dweight, later.dweight, where);
    compare("wgrad's dbias", alone.dbias, later.dbias, where);
    for (int seed = 1; seed < seeds; ++seed) {
      host_cuda::seed = seed;
      if (run_wgrad(in, out.dlogits).bytes() != alone.bytes()) fail("%s: wgrad's bits vary", where.c_str());
    }
  }
  for (int seed = 1; seed < seeds; ++seed) {
    host_cuda::seed = seed;
    if (run(in).bytes() != out.bytes()) fail("%s: bits vary with the order of threads", where.c_str());
  }
}

void check_case(const Shape& shape, int count) {
  const std::pair<DType, DType> dtypes[] = {{DType::f32, DType::f32},  {DType::bf16, DType::f32},
                                            {DType::f16, DType::f16},  {DType::bf16, DType::bf16},
                                            {DType::f32, DType::bf16}, {DType::f16, DType::f32}};
  const int start = static_cast<int>((shape.rows + shape.depth + shape.classes) % 6);
  for (int i = 0; i < count; ++i) {
    const int index = start + i;
    Options options;
    options.h_dtype = dtypes[index % 6].first;
    options.weight_dtype = dtypes[index % 6].second;
    options.activation = index / 2 % 2 ? Activation::relu : Activation::none;
    options.bias = index % 3 != 0;
    options.dbias = index % 5 != 0;
    options.offset = i % 2;
    options.dh_offset = i % 3 == 0;
    options.ignore_index = index % 4 == 0 ? 0 : -100;  // 0 is a class too, unless it is ignored
    check(Inputs(shape, options), 3);
    if (i == 0) {
      options.wgrad = false;
      options.offset = 1;
      check(Inputs(shape, options), 2);
    }
  }
}

// An infinite last row whose dlogits are finite, which no softmax gives: what stands in for the rows missing
// from its tile must not turn dweight into NaN.
void check_infinite_row() {
  for (const int64_t rows : {1, 2, 6}) {
    Options options;
    const Inputs in({rows, 5, 3}, options);
    in.h.set(rows * 5 - 1, INFINITY);
    const Buffer dlogits(rows * 3, options.h_dtype);
    for (int64_t i = 0; i < rows * 3; ++i) dlogits.set(i, 1.0f);
    in.row_scale.set(rows - 1, 1.0f);
    const Wgrad out = run_wgrad(in, dlogits);
    for (int64_t v = 0; v < 3; ++v) {
      if (out.dweight.get(v * 5 + 4) != INFINITY) fail("%ld rows: dweight of an infinite row is not", rows);
    }
  }
}

// NaN and Inf stay in their row, and reach dweight through it alone.
void check_special() {
  for (const Activation activation : {Activation::none, Activation::relu}) {
    for (const Shape shape : {Shape{13, 6, 3}, Shape{70, 132, 10}, Shape{6, 5, 140}}) {
      Options options;
      options.activation = activation;
      Inputs in(shape, options);
      in.target[1] = 1;
      in.h.set(1 * shape.depth + 2, NAN);
      in.h.set(4 * shape.depth + 1, -INFINITY);
      check(in, 2);
      // The last row of an incomplete tile: what stands in for the missing ones must not double it.
      Inputs last(shape, options);
      last.target[shape.rows - 1] = 0;
      last.h.set((shape.rows - 1) * shape.depth, INFINITY);
      check(last, 2);
      Inputs weights(shape, options);
      weights.weight.set(1 * shape.depth, NAN);
      check(weights, 2);
      Inputs bias(shape, options);
      bias.bias.set(2, -INFINITY);
      bias.target[0] = 2;
      check(bias, 2);
      Inputs certain(shape, options);
      certain.bias.set(1, 200.0f);
      check(certain, 2);
    }
  }
}

void expect_error(const char* what, cudaError_t got, cudaError_t wanted) {
  if (got != wanted) fail("%s: error %d, expected %d", what, static_cast<int>(got), static_cast<int>(wanted));
}

void check_launch() {
  const auto stream = reinterpret_cast<cudaStream_t>(uintptr_t{0x5eed});
  // Resident and fused; resident, more than 48 KiB; streamed through with a second kernel for dweight.
  for (const Shape shape : {Shape{5, 7, 3}, Shape{3, 900, 10}, Shape{2, 260, 150}}) {
    const Inputs in(shape, Options{});
    Outputs out(in);
    const Workspace workspace(workspace_of(in));
    lct::CriticHead args = arguments(in, out, workspace);
    const auto run_on = [&](int device) { return lct::critic_head_cuda(args, device, stream); };

    for (const int device : {0, 1}) {
      host_cuda::device = 1 - device;
      host_cuda::last_stream = nullptr;
      host_cuda::calls = 0;
      expect_error("a plain call", run_on(device), cudaSuccess);
      if (host_cuda::last_device != device)
        fail("ran on device %d, not on %d", host_cuda::last_device, device);
      if (host_cuda::last_stream != stream) fail("did not use the stream");
      if (host_cuda::device != 1 - device) fail("left another device current");

      // Whichever call fails, the launcher says so, launches nothing more, and puts the device back. (The
      // last call is what puts it back.)
      const int calls = host_cuda::calls;
      for (int i = 0; i + 1 < calls; ++i) {
        host_cuda::calls = 0;
        host_cuda::fail_at_call = i;
        expect_error("a failing call", run_on(device), cudaErrorUnknown);
        if (host_cuda::device != 1 - device) fail("left another device current after call %d failed", i);
        if (host_cuda::calls > i + 2) fail("went on after call %d failed", i);
      }
      host_cuda::fail_at_call = -1;
    }
    host_cuda::device = 0;
    expect_error("no such device", run_on(2), cudaErrorInvalidDevice);

    args.classes = 0;
    expect_error("no classes", run_on(0), cudaErrorInvalidValue);
    args.classes = shape.classes;
    args.depth = 0;
    expect_error("no columns", run_on(0), cudaErrorInvalidValue);
    args.depth = int64_t{1} << 40;
    expect_error("too many columns", run_on(0), cudaErrorInvalidValue);
    args.depth = shape.depth;
    args.rows = -1;
    expect_error("fewer than no rows", run_on(0), cudaErrorInvalidValue);
  }
  // The workspace stays bounded, and sizes past 32 bits do not wrap.
  const auto workspace = [](int64_t rows, int64_t depth, int64_t classes) {
    return lct::critic_head_cuda_workspace(rows, depth, classes, DType::bf16, DType::bf16, true, 0);
  };
  constexpr size_t kBound = 64 << 20;
  for (const int64_t rows : {int64_t{1}, int64_t{65536}, int64_t{1} << 33}) {
    for (const int64_t classes : {10, 128, 129, 1000}) {
      if (workspace(rows, 2048, classes) > kBound) fail("%ld rows, %ld classes: over 64 MiB", rows, classes);
    }
  }
  if (workspace(1 << 20, 1 << 20, 1 << 14) != (size_t{1} << 34) * 4 + (size_t{1} << 14) * 4) {
    fail("a partial of more than 2^32 entries: %zu bytes", workspace(1 << 20, 1 << 20, 1 << 14));
  }
}

}  // namespace

int main(int count, char** words) {
  const std::string what = count > 1 ? words[1] : "";
  if (what == "case" && (count == 5 || count == 6)) {
    const Shape shape{std::atol(words[2]), std::atol(words[3]), std::atol(words[4])};
    check_case(shape, count == 6 ? std::atoi(words[5]) : 6);
  } else if (what == "special") {
    check_special();
    check_infinite_row();
  } else if (what == "launch") {
    check_launch();
  } else {
    std::fprintf(stderr, "usage: critic_head_host case ROWS DEPTH CLASSES [COUNT] | special | launch\n");
    return 2;
  }
  return failures ? 1 : 0;
}
