// consensus_adjoint and consensus_update in lct_fast._C.
#include "lct/consensus.h"

#include "bindings/bindings.h"

namespace lct::bindings {
namespace {

void check_size(const char* name, int64_t size) {
  if (size < 0) throw py::value_error("expected " + std::string(name) + " >= 0, got " + std::to_string(size));
}

lct::ConsensusAdjoint adjoint(Address x, Address lambda, Address kappa, Address loss, Address p, int64_t rows,
                              int64_t depth, float beta, int dtype) {
  check_size("rows", rows);
  check_size("depth", depth);
  return {pointer<void>(x), pointer<float>(lambda), pointer<float>(kappa), pointer<float>(loss),
          pointer<void>(p), rows, depth, beta, dtype_of("dtype", dtype)};
}

lct::ConsensusUpdate update(Address lambda, Address kappa, Address p, Address x_prev, Address lambda_out,
                            Address kappa_out, int64_t size, float beta, float eta, int dtype) {
  check_size("size", size);
  return {pointer<float>(lambda), pointer<float>(kappa), pointer<void>(p), pointer<void>(x_prev),
          pointer<float>(lambda_out), pointer<float>(kappa_out), size, beta, eta, dtype_of("dtype", dtype)};
}

}  // namespace

#define LCT_ADJOINT_ARGUMENTS                                                                             \
  py::arg("x"), py::arg("lambda_next"), py::arg("kappa"), py::arg("loss"), py::arg("p"), py::arg("rows"), \
      py::arg("depth"), py::arg("beta"), py::arg("dtype")
#define LCT_UPDATE_ARGUMENTS                                                                      \
  py::arg("lambda_"), py::arg("kappa"), py::arg("p"), py::arg("x_prev"), py::arg("lambda_out"),  \
      py::arg("kappa_out"), py::arg("size"), py::arg("beta"), py::arg("eta"), py::arg("dtype")

void bind_consensus(py::module_& module) {
  module.def(
      "consensus_adjoint_cpu",
      [](Address x, Address lambda, Address kappa, Address loss, Address p, int64_t rows, int64_t depth,
         float beta, int dtype, int threads) {
        const lct::ConsensusAdjoint args = adjoint(x, lambda, kappa, loss, p, rows, depth, beta, dtype);
        check_threads(threads);
        py::gil_scoped_release release;
        lct::consensus_adjoint_cpu(args, threads);
      },
      LCT_ADJOINT_ARGUMENTS, py::arg("threads"));
  module.def(
      "consensus_update_cpu",
      [](Address lambda, Address kappa, Address p, Address x_prev, Address lambda_out, Address kappa_out,
         int64_t size, float beta, float eta, int dtype, int threads) {
        const lct::ConsensusUpdate args =
            update(lambda, kappa, p, x_prev, lambda_out, kappa_out, size, beta, eta, dtype);
        check_threads(threads);
        py::gil_scoped_release release;
        lct::consensus_update_cpu(args, threads);
      },
      LCT_UPDATE_ARGUMENTS, py::arg("threads"));

#ifdef LCT_WITH_CUDA
  module.def(
      "consensus_adjoint_cuda",
      [](Address x, Address lambda, Address kappa, Address loss, Address p, int64_t rows, int64_t depth,
         float beta, int dtype, int device, Address stream) {
        const lct::ConsensusAdjoint args = adjoint(x, lambda, kappa, loss, p, rows, depth, beta, dtype);
        py::gil_scoped_release release;
        check(lct::consensus_adjoint_cuda(args, device, reinterpret_cast<cudaStream_t>(stream)));
      },
      LCT_ADJOINT_ARGUMENTS, py::arg("device"), py::arg("stream"));
  module.def(
      "consensus_update_cuda",
      [](Address lambda, Address kappa, Address p, Address x_prev, Address lambda_out, Address kappa_out,
         int64_t size, float beta, float eta, int dtype, int device, Address stream) {
        const lct::ConsensusUpdate args =
            update(lambda, kappa, p, x_prev, lambda_out, kappa_out, size, beta, eta, dtype);
        py::gil_scoped_release release;
        check(lct::consensus_update_cuda(args, device, reinterpret_cast<cudaStream_t>(stream)));
      },
      LCT_UPDATE_ARGUMENTS, py::arg("device"), py::arg("stream"));
#endif
}

}  // namespace lct::bindings
