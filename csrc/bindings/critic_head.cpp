// critic_head and critic_head_wgrad in lct_fast._C.
#include "lct/critic_head.h"

#include "bindings/bindings.h"

namespace lct::bindings {
namespace {

lct::Activation activation_of(int value) {
  if (value < 0 || value > 1)
    throw py::value_error("activation must be 0 (none) or 1 (relu), got " + std::to_string(value));
  return static_cast<lct::Activation>(value);
}

void check_sizes(int64_t rows, int64_t depth, int64_t classes) {
  if (rows < 0 || depth < 1 || classes < 1)
    throw py::value_error("expected rows >= 0, depth >= 1, classes >= 1, got " + std::to_string(rows) + ", " +
                          std::to_string(depth) + ", " + std::to_string(classes));
}

lct::CriticHead critic_head(Address h, Address weight, Address bias, Address target, Address scale,
                            Address row_scale, Address loss, Address dlogits, Address dh, Address dweight,
                            Address dbias, Address workspace, int64_t rows, int64_t depth, int64_t classes,
                            int h_dtype, int weight_dtype, int activation, int64_t ignore_index) {
  check_sizes(rows, depth, classes);
  lct::CriticHead args;
  args.h = pointer<void>(h);
  args.weight = pointer<void>(weight);
  args.bias = pointer<void>(bias);
  args.target = pointer<int64_t>(target);
  args.scale = pointer<float>(scale);
  args.row_scale = pointer<float>(row_scale);
  args.loss = pointer<float>(loss);
  args.dlogits = pointer<void>(dlogits);
  args.dh = pointer<void>(dh);
  args.dweight = pointer<void>(dweight);
  args.dbias = pointer<void>(dbias);
  args.workspace = pointer<void>(workspace);
  args.rows = rows;
  args.depth = depth;
  args.classes = classes;
  args.h_dtype = dtype_of("h_dtype", h_dtype);
  args.weight_dtype = dtype_of("weight_dtype", weight_dtype);
  args.activation = activation_of(activation);
  args.ignore_index = ignore_index;
  return args;
}

lct::CriticHeadWgrad critic_head_wgrad(Address h, Address dlogits, Address row_scale, Address dweight,
                                       Address dbias, Address workspace, int64_t rows, int64_t depth,
                                       int64_t classes, int h_dtype, int weight_dtype, int activation) {
  check_sizes(rows, depth, classes);
  lct::CriticHeadWgrad args;
  args.h = pointer<void>(h);
  args.dlogits = pointer<void>(dlogits);
  args.row_scale = pointer<float>(row_scale);
  args.dweight = pointer<void>(dweight);
  args.dbias = pointer<void>(dbias);
  args.workspace = pointer<void>(workspace);
  args.rows = rows;
  args.depth = depth;
  args.classes = classes;
  args.h_dtype = dtype_of("h_dtype", h_dtype);
  args.weight_dtype = dtype_of("weight_dtype", weight_dtype);
  args.activation = activation_of(activation);
  return args;
}

}  // namespace

void bind_critic_head(py::module_& module) {
#define LCT_HEAD_ARGUMENTS                                                                                 \
  py::arg("h"), py::arg("weight"), py::arg("bias"), py::arg("target"), py::arg("scale"),                   \
      py::arg("row_scale"), py::arg("loss"), py::arg("dlogits"), py::arg("dh"), py::arg("dweight"),        \
      py::arg("dbias"), py::arg("workspace"), py::arg("rows"), py::arg("depth"), py::arg("classes"),       \
      py::arg("h_dtype"), py::arg("weight_dtype"), py::arg("activation"), py::arg("ignore_index")
#define LCT_WGRAD_ARGUMENTS                                                                                \
  py::arg("h"), py::arg("dlogits"), py::arg("row_scale"), py::arg("dweight"), py::arg("dbias"),            \
      py::arg("workspace"), py::arg("rows"), py::arg("depth"), py::arg("classes"), py::arg("h_dtype"),     \
      py::arg("weight_dtype"), py::arg("activation")
#define LCT_SHAPE_ARGUMENTS \
  py::arg("rows"), py::arg("depth"), py::arg("classes"), py::arg("h_dtype"), py::arg("weight_dtype")

  module.def(
      "critic_head_cpu",
      [](Address h, Address weight, Address bias, Address target, Address scale, Address row_scale,
         Address loss, Address dlogits, Address dh, Address dweight, Address dbias, Address workspace,
         int64_t rows, int64_t depth, int64_t classes, int h_dtype, int weight_dtype, int activation,
         int64_t ignore_index, int threads) {
        const lct::CriticHead args =
            critic_head(h, weight, bias, target, scale, row_scale, loss, dlogits, dh, dweight, dbias,
                        workspace, rows, depth, classes, h_dtype, weight_dtype, activation, ignore_index);
        check_threads(threads);
        py::gil_scoped_release release;
        lct::critic_head_cpu(args, threads);
      },
      LCT_HEAD_ARGUMENTS, py::arg("threads"));
  module.def(
      "critic_head_cpu_workspace",
      [](int64_t rows, int64_t depth, int64_t classes, int h_dtype, int weight_dtype, bool with_wgrad,
         int threads) {
        check_sizes(rows, depth, classes);
        check_threads(threads);
        return lct::critic_head_cpu_workspace(rows, depth, classes, dtype_of("h_dtype", h_dtype),
                                              dtype_of("weight_dtype", weight_dtype), with_wgrad, threads);
      },
      LCT_SHAPE_ARGUMENTS, py::arg("with_wgrad"), py::arg("threads"), "Bytes of workspace.");
  module.def(
      "critic_head_wgrad_cpu",
      [](Address h, Address dlogits, Address row_scale, Address dweight, Address dbias, Address workspace,
         int64_t rows, int64_t depth, int64_t classes, int h_dtype, int weight_dtype, int activation,
         int threads) {
        const lct::CriticHeadWgrad args =
            critic_head_wgrad(h, dlogits, row_scale, dweight, dbias, workspace, rows, depth, classes, h_dtype,
                              weight_dtype, activation);
        check_threads(threads);
        py::gil_scoped_release release;
        lct::critic_head_wgrad_cpu(args, threads);
      },
      LCT_WGRAD_ARGUMENTS, py::arg("threads"));
  module.def(
      "critic_head_wgrad_cpu_workspace",
      [](int64_t rows, int64_t depth, int64_t classes, int h_dtype, int weight_dtype, int threads) {
        check_sizes(rows, depth, classes);
        check_threads(threads);
        return lct::critic_head_wgrad_cpu_workspace(rows, depth, classes, dtype_of("h_dtype", h_dtype),
                                                    dtype_of("weight_dtype", weight_dtype), threads);
      },
      LCT_SHAPE_ARGUMENTS, py::arg("threads"), "Bytes of workspace.");

#ifdef LCT_WITH_CUDA
  module.def(
      "critic_head_cuda",
      [](Address h, Address weight, Address bias, Address target, Address scale, Address row_scale,
         Address loss, Address dlogits, Address dh, Address dweight, Address dbias, Address workspace,
         int64_t rows, int64_t depth, int64_t classes, int h_dtype, int weight_dtype, int activation,
         int64_t ignore_index, int device, Address stream) {
        const lct::CriticHead args =
            critic_head(h, weight, bias, target, scale, row_scale, loss, dlogits, dh, dweight, dbias,
                        workspace, rows, depth, classes, h_dtype, weight_dtype, activation, ignore_index);
        py::gil_scoped_release release;
        check(lct::critic_head_cuda(args, device, reinterpret_cast<cudaStream_t>(stream)));
      },
      LCT_HEAD_ARGUMENTS, py::arg("device"), py::arg("stream"));
  module.def(
      "critic_head_cuda_workspace",
      [](int64_t rows, int64_t depth, int64_t classes, int h_dtype, int weight_dtype, bool with_wgrad,
         int device) {
        check_sizes(rows, depth, classes);
        return lct::critic_head_cuda_workspace(rows, depth, classes, dtype_of("h_dtype", h_dtype),
                                               dtype_of("weight_dtype", weight_dtype), with_wgrad, device);
      },
      LCT_SHAPE_ARGUMENTS, py::arg("with_wgrad"), py::arg("device"), "Bytes of workspace.");
  module.def(
      "critic_head_wgrad_cuda",
      [](Address h, Address dlogits, Address row_scale, Address dweight, Address dbias, Address workspace,
         int64_t rows, int64_t depth, int64_t classes, int h_dtype, int weight_dtype, int activation,
         int device, Address stream) {
        const lct::CriticHeadWgrad args =
            critic_head_wgrad(h, dlogits, row_scale, dweight, dbias, workspace, rows, depth, classes, h_dtype,
                              weight_dtype, activation);
        py::gil_scoped_release release;
        check(lct::critic_head_wgrad_cuda(args, device, reinterpret_cast<cudaStream_t>(stream)));
      },
      LCT_WGRAD_ARGUMENTS, py::arg("device"), py::arg("stream"));
  module.def(
      "critic_head_wgrad_cuda_workspace",
      [](int64_t rows, int64_t depth, int64_t classes, int h_dtype, int weight_dtype, int device) {
        check_sizes(rows, depth, classes);
        return lct::critic_head_wgrad_cuda_workspace(rows, depth, classes, dtype_of("h_dtype", h_dtype),
                                                     dtype_of("weight_dtype", weight_dtype), device);
      },
      LCT_SHAPE_ARGUMENTS, py::arg("device"), "Bytes of workspace.");
#endif
}

}  // namespace lct::bindings
