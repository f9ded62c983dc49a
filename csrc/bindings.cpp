// The Python module lct_fast._C: addresses in, nothing allocated, the GIL released while kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "lct/critic_head.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

lct::DType dtype_of(const char* name, int value) {
  if (value < 0 || value > 2)
    throw py::value_error(std::string(name) + " must be 0 (f32), 1 (f16) or 2 (bf16), got " +
                          std::to_string(value));
  return static_cast<lct::DType>(value);
}

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

void check_threads(int threads) {
  if (threads < 1) throw py::value_error("threads must be at least 1, got " + std::to_string(threads));
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

#ifdef LCT_WITH_CUDA
void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status));
}
#endif

std::vector<std::string> simd_levels() {
  std::vector<std::string> levels;
  for (int level = 0; level <= static_cast<int>(lct::best_simd_level()); ++level)
    levels.push_back(lct::name_of(static_cast<lct::SimdLevel>(level)));
  return levels;
}

void set_simd(const std::optional<std::string>& name) {
  if (!name) return lct::set_simd_level(lct::best_simd_level());
  std::string known;
  for (int level = 0; level <= static_cast<int>(lct::best_simd_level()); ++level) {
    const auto candidate = static_cast<lct::SimdLevel>(level);
    if (*name == lct::name_of(candidate)) return lct::set_simd_level(candidate);
    known += std::string(known.empty() ? "" : ", ") + lct::name_of(candidate);
  }
  throw py::value_error("this CPU runs " + known + ", got '" + *name + "'; None chooses the best");
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
#ifdef LCT_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_arch"] = LCT_BUILD_CUDA_ARCHS;
  info["flags"] = LCT_BUILD_FLAGS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of lct_fast; tensors are addresses, 0 is an absent one.";

  module.def("simd_levels", &simd_levels, "Instruction sets that this CPU and this build have, worst first.");
  module.def("set_simd", &set_simd, py::arg("name"), "Use this instruction set from now on; None: the best.");
  module.def("build_info", &build_info);

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
