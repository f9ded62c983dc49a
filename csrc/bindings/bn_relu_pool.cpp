// bn_relu_pool and its backward in lct_fast._C.
#include "lct/bn_relu_pool.h"

#include "bindings/bindings.h"

namespace lct::bindings {
namespace {

lct::BnReluPoolShape shape_of(int64_t samples, int64_t channels, int64_t height, int64_t width, int64_t pool,
                              bool channels_last, int dtype) {
  const auto list = [&] {
    return std::to_string(samples) + ", " + std::to_string(channels) + ", " + std::to_string(height) + ", " +
           std::to_string(width) + ", pool " + std::to_string(pool);
  };
  if (samples < 1 || channels < 1 || height < 1 || width < 1)
    throw py::value_error("expected samples, channels, height and width >= 1, got " + list());
  if (pool < 1 || height % pool != 0 || width % pool != 0)
    throw py::value_error("expected a pool that divides height and width, got " + list());
  return {samples, channels, height, width, pool, channels_last, dtype_of("dtype", dtype)};
}

}  // namespace

void bind_bn_relu_pool(py::module_& module) {
#define LCT_SHAPE_ARGUMENTS                                                                               \
  py::arg("samples"), py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("pool"),          \
      py::arg("channels_last"), py::arg("dtype")

  module.def(
      "bn_relu_pool_cpu",
      [](Address x, Address gamma, Address beta, Address y, Address pooled, Address mean, Address var,
         Address moments, Address workspace, int64_t samples, int64_t channels, int64_t height, int64_t width,
         int64_t pool, bool channels_last, int dtype, bool batch_statistics, double eps, int threads) {
        lct::BnReluPool args;
        args.shape = shape_of(samples, channels, height, width, pool, channels_last, dtype);
        args.x = pointer<void>(x);
        args.gamma = pointer<float>(gamma);
        args.beta = pointer<float>(beta);
        args.y = pointer<void>(y);
        args.pooled = pointer<void>(pooled);
        args.mean = pointer<float>(mean);
        args.var = pointer<float>(var);
        args.moments = pointer<float>(moments);
        args.workspace = pointer<void>(workspace);
        args.batch_statistics = batch_statistics;
        args.eps = eps;
        check_threads(threads);
        py::gil_scoped_release release;
        lct::bn_relu_pool_cpu(args, threads);
      },
      py::arg("x"), py::arg("gamma"), py::arg("beta"), py::arg("y"), py::arg("pooled"), py::arg("mean"),
      py::arg("var"), py::arg("moments"), py::arg("workspace"), LCT_SHAPE_ARGUMENTS,
      py::arg("batch_statistics"), py::arg("eps"), py::arg("threads"));
  module.def(
      "bn_relu_pool_cpu_workspace",
      [](int64_t samples, int64_t channels, int64_t height, int64_t width, int64_t pool, bool channels_last,
         int dtype, int threads) {
        check_threads(threads);
        return lct::bn_relu_pool_cpu_workspace(
            shape_of(samples, channels, height, width, pool, channels_last, dtype), threads);
      },
      LCT_SHAPE_ARGUMENTS, py::arg("threads"), "Bytes of workspace.");
  module.def(
      "bn_relu_pool_backward_cpu",
      [](Address dy, Address dpooled, Address x, Address gamma, Address beta, Address mean, Address var,
         Address moments, Address dx, Address dgamma, Address dbeta, Address workspace, int64_t samples,
         int64_t channels, int64_t height, int64_t width, int64_t pool, bool channels_last, int dtype,
         bool batch_statistics, double eps, int threads) {
        lct::BnReluPoolBackward args;
        args.shape = shape_of(samples, channels, height, width, pool, channels_last, dtype);
        args.dy = pointer<void>(dy);
        args.dpooled = pointer<void>(dpooled);
        args.x = pointer<void>(x);
        args.gamma = pointer<float>(gamma);
        args.beta = pointer<float>(beta);
        args.mean = pointer<float>(mean);
        args.var = pointer<float>(var);
        args.moments = pointer<float>(moments);
        args.dx = pointer<void>(dx);
        args.dgamma = pointer<float>(dgamma);
        args.dbeta = pointer<float>(dbeta);
        args.workspace = pointer<void>(workspace);
        args.batch_statistics = batch_statistics;
        args.eps = eps;
        check_threads(threads);
        py::gil_scoped_release release;
        lct::bn_relu_pool_backward_cpu(args, threads);
      },
      py::arg("dy"), py::arg("dpooled"), py::arg("x"), py::arg("gamma"), py::arg("beta"), py::arg("mean"),
      py::arg("var"), py::arg("moments"), py::arg("dx"), py::arg("dgamma"), py::arg("dbeta"),
      py::arg("workspace"), LCT_SHAPE_ARGUMENTS, py::arg("batch_statistics"), py::arg("eps"),
      py::arg("threads"));
  module.def(
      "bn_relu_pool_backward_cpu_workspace",
      [](int64_t samples, int64_t channels, int64_t height, int64_t width, int64_t pool, bool channels_last,
         int dtype, bool with_dy, int threads) {
        check_threads(threads);
        return lct::bn_relu_pool_backward_cpu_workspace(
            shape_of(samples, channels, height, width, pool, channels_last, dtype), with_dy, threads);
      },
      LCT_SHAPE_ARGUMENTS, py::arg("with_dy"), py::arg("threads"), "Bytes of workspace.");
}

}  // namespace lct::bindings
