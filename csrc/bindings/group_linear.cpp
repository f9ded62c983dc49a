// group_linear and its backward in lct_fast._C.
#include "lct/group_linear.h"

#include "bindings/bindings.h"

namespace lct::bindings {
namespace {

lct::GroupLinearShape shape_of(int64_t rows, int64_t inputs, int64_t outputs, int64_t classes) {
  if (rows < 1 || inputs < 1 || outputs < 1 || classes < 0)
    throw py::value_error("expected rows, inputs and outputs >= 1 and classes >= 0, got " + std::to_string(rows) +
                          ", " + std::to_string(inputs) + ", " + std::to_string(outputs) + ", " +
                          std::to_string(classes));
  return {rows, inputs, outputs, classes};
}

lct::Activation activation_of(int value) {
  if (value < 0 || value > 2)
    throw py::value_error("activation must be 0 (none), 1 (relu) or 2 (gelu), got " + std::to_string(value));
  return static_cast<lct::Activation>(value);
}

}  // namespace

void bind_group_linear(py::module_& module) {
#define LCT_SHAPE_ARGUMENTS py::arg("rows"), py::arg("inputs"), py::arg("outputs"), py::arg("classes")

  module.def(
      "group_linear_cpu",
      [](Address x, Address weight, Address bias, Address critic_weight, Address critic_bias, Address h,
         Address logits, Address slope, Address workspace, int64_t rows, int64_t inputs, int64_t outputs,
         int64_t classes, int x_dtype, int weight_dtype, int critic_dtype, int activation, int threads) {
        lct::GroupLinear args;
        args.shape = shape_of(rows, inputs, outputs, classes);
        args.x = pointer<void>(x);
        args.weight = pointer<void>(weight);
        args.bias = pointer<void>(bias);
        args.critic_weight = pointer<void>(critic_weight);
        args.critic_bias = pointer<void>(critic_bias);
        args.h = pointer<void>(h);
        args.logits = pointer<void>(logits);
        args.slope = pointer<void>(slope);
        args.workspace = pointer<void>(workspace);
        args.x_dtype = dtype_of("x_dtype", x_dtype);
        args.weight_dtype = dtype_of("weight_dtype", weight_dtype);
        args.critic_dtype = dtype_of("critic_dtype", critic_dtype);
        args.activation = activation_of(activation);
        check_threads(threads);
        py::gil_scoped_release release;
        lct::group_linear_cpu(args, threads);
      },
      py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("critic_weight"), py::arg("critic_bias"),
      py::arg("h"), py::arg("logits"), py::arg("slope"), py::arg("workspace"), LCT_SHAPE_ARGUMENTS,
      py::arg("x_dtype"), py::arg("weight_dtype"), py::arg("critic_dtype"), py::arg("activation"),
      py::arg("threads"));
  module.def(
      "group_linear_cpu_workspace",
      [](int64_t rows, int64_t inputs, int64_t outputs, int64_t classes, int x_dtype, int threads) {
        check_threads(threads);
        return lct::group_linear_cpu_workspace(shape_of(rows, inputs, outputs, classes),
                                               dtype_of("x_dtype", x_dtype), threads);
      },
      LCT_SHAPE_ARGUMENTS, py::arg("x_dtype"), py::arg("threads"), "Bytes of workspace.");
  module.def(
      "group_linear_backward_cpu",
      [](Address dh, Address dlogits, Address critic_weight, Address gate, Address dpre, Address dbias,
         Address workspace, int64_t rows, int64_t outputs, int64_t classes, int x_dtype, int critic_dtype,
         int activation, int threads) {
        lct::GroupLinearBackward args;
        args.shape = shape_of(rows, 1, outputs, classes);
        args.dh = pointer<void>(dh);
        args.dlogits = pointer<void>(dlogits);
        args.critic_weight = pointer<void>(critic_weight);
        args.gate = pointer<void>(gate);
        args.dpre = pointer<void>(dpre);
        args.dbias = pointer<float>(dbias);
        args.workspace = pointer<void>(workspace);
        args.x_dtype = dtype_of("x_dtype", x_dtype);
        args.critic_dtype = dtype_of("critic_dtype", critic_dtype);
        args.activation = activation_of(activation);
        check_threads(threads);
        py::gil_scoped_release release;
        lct::group_linear_backward_cpu(args, threads);
      },
      py::arg("dh"), py::arg("dlogits"), py::arg("critic_weight"), py::arg("gate"), py::arg("dpre"),
      py::arg("dbias"), py::arg("workspace"), py::arg("rows"), py::arg("outputs"), py::arg("classes"),
      py::arg("x_dtype"), py::arg("critic_dtype"), py::arg("activation"), py::arg("threads"));
  module.def(
      "group_linear_backward_cpu_workspace",
      [](int64_t rows, int64_t outputs, int64_t classes, int threads) {
        check_threads(threads);
        return lct::group_linear_backward_cpu_workspace(shape_of(rows, 1, outputs, classes), threads);
      },
      py::arg("rows"), py::arg("outputs"), py::arg("classes"), py::arg("threads"), "Bytes of workspace.");
}

}  // namespace lct::bindings
