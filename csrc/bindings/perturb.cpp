// perturb and score in lct_fast._C.
#include "lct/perturb.h"

#include "bindings/bindings.h"

namespace lct::bindings {
namespace {

lct::NoiseShape shape_of(int64_t rows, int64_t channels, int64_t inner, int64_t sigmas) {
  if (rows < 0 || channels < 0 || inner < 0) throw py::value_error("expected sizes >= 0");
  if (sigmas != 1 && sigmas != channels)
    throw py::value_error("sigmas must be 1 or the number of channels, got " + std::to_string(sigmas));
  return {rows, channels, inner};
}

lct::Noise noise_of(uint64_t seed, uint64_t offset, bool antithetic, int64_t rows) {
  if (antithetic && rows % 2)
    throw py::value_error("antithetic noise needs an even number of rows, got " + std::to_string(rows));
  return {seed, offset, antithetic};
}

lct::Perturb perturb(Address z, Address sigma, Address out, int64_t rows, int64_t channels, int64_t inner,
                     int64_t copies, int64_t sigmas, uint64_t seed, uint64_t offset, bool antithetic,
                     int dtype) {
  if (copies < 1 || rows % copies)
    throw py::value_error("rows must be a multiple of copies >= 1, got " + std::to_string(copies));
  return {pointer<void>(z), pointer<float>(sigma), pointer<void>(out), shape_of(rows, channels, inner, sigmas),
          copies, sigmas, noise_of(seed, offset, antithetic, rows), dtype_of("dtype", dtype)};
}

lct::Score score(Address loss, Address sigma, Address out, int64_t rows, int64_t channels, int64_t inner,
                 int64_t total, int64_t sigmas, uint64_t seed, uint64_t offset, bool antithetic, int dtype) {
  return {pointer<float>(loss), pointer<float>(sigma), pointer<void>(out),
          shape_of(rows, channels, inner, sigmas), total, sigmas,
          noise_of(seed, offset, antithetic, rows), dtype_of("dtype", dtype)};
}

}  // namespace

#define LCT_NOISE_PARAMETERS                                                                             \
  Address from, Address sigma, Address out, int64_t rows, int64_t channels, int64_t inner, int64_t count, \
      int64_t sigmas, uint64_t seed, uint64_t offset, bool antithetic, int dtype
#define LCT_NOISE_VALUES \
  from, sigma, out, rows, channels, inner, count, sigmas, seed, offset, antithetic, dtype
#define LCT_NOISE_NAMES(from, count)                                                                      \
  py::arg(from), py::arg("sigma"), py::arg("out"), py::arg("rows"), py::arg("channels"), py::arg("inner"), \
      py::arg(count), py::arg("sigmas"), py::arg("seed"), py::arg("offset"), py::arg("antithetic"),        \
      py::arg("dtype")

void bind_perturb(py::module_& module) {
  module.def(
      "perturb_cpu",
      [](LCT_NOISE_PARAMETERS, int threads) {
        const lct::Perturb args = perturb(LCT_NOISE_VALUES);
        check_threads(threads);
        py::gil_scoped_release release;
        lct::perturb_cpu(args, threads);
      },
      LCT_NOISE_NAMES("z", "copies"), py::arg("threads"));
  module.def(
      "score_cpu",
      [](LCT_NOISE_PARAMETERS, int threads) {
        const lct::Score args = score(LCT_NOISE_VALUES);
        check_threads(threads);
        py::gil_scoped_release release;
        lct::score_cpu(args, threads);
      },
      LCT_NOISE_NAMES("loss", "total"), py::arg("threads"));

#ifdef LCT_WITH_CUDA
  module.def(
      "perturb_cuda",
      [](LCT_NOISE_PARAMETERS, int device, Address stream) {
        const lct::Perturb args = perturb(LCT_NOISE_VALUES);
        py::gil_scoped_release release;
        check(lct::perturb_cuda(args, device, reinterpret_cast<cudaStream_t>(stream)));
      },
      LCT_NOISE_NAMES("z", "copies"), py::arg("device"), py::arg("stream"));
  module.def(
      "score_cuda",
      [](LCT_NOISE_PARAMETERS, int device, Address stream) {
        const lct::Score args = score(LCT_NOISE_VALUES);
        py::gil_scoped_release release;
        check(lct::score_cuda(args, device, reinterpret_cast<cudaStream_t>(stream)));
      },
      LCT_NOISE_NAMES("loss", "total"), py::arg("device"), py::arg("stream"));
#endif
}

}  // namespace lct::bindings
