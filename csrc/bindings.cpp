// The Python module lct_fast._C: addresses in, nothing allocated, the GIL released while kernels run.
#include <optional>
#include <vector>

#include "bindings/bindings.h"
#include "cpu/dispatch.h"

namespace lct::bindings {

// One for each csrc/bindings/<op>.cpp.
void bind_bn_relu_pool(py::module_& module);
void bind_block_quantize(py::module_& module);
void bind_consensus(py::module_& module);
void bind_critic_head(py::module_& module);
void bind_group_linear(py::module_& module);
void bind_perturb(py::module_& module);
void bind_vq(py::module_& module);

namespace {

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
}  // namespace lct::bindings

PYBIND11_MODULE(_C, module) {
  using namespace lct::bindings;
  module.doc() = "Native kernels of lct_fast; tensors are addresses, 0 is an absent one.";

  module.def("simd_levels", &simd_levels, "Instruction sets that this CPU and this build have, worst first.");
  module.def("set_simd", &set_simd, py::arg("name"), "Use this instruction set from now on; None: the best.");
  module.def("build_info", &build_info);

  bind_bn_relu_pool(module);
  bind_block_quantize(module);
  bind_consensus(module);
  bind_critic_head(module);
  bind_group_linear(module);
  bind_perturb(module);
  bind_vq(module);
}
