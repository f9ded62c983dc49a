// vq_encode, vq_decode and vq_update in lct_fast._C.
#include "lct/vq.h"

#include "bindings/bindings.h"

namespace lct::bindings {
namespace {

void check_codebook(int64_t groups, int64_t codewords, int64_t depth) {
  if (groups < 1 || codewords < 2 || codewords > 65536 || depth < 1)
    throw py::value_error("expected groups >= 1, codewords in [2, 65536], depth >= 1, got " +
                          std::to_string(groups) + ", " + std::to_string(codewords) + ", " + std::to_string(depth));
}

void check_rows(int64_t rows) {
  if (rows < 1) throw py::value_error("expected rows >= 1, got " + std::to_string(rows));
}

void check_slots(int64_t slots) {
  if (slots < 0 || slots > 4096) throw py::value_error("expected slots in [0, 4096], got " + std::to_string(slots));
}

lct::VqEncode encode(Address x, Address codebook, Address codes, Address counts, Address sums, Address squared_error,
                     Address candidates, Address candidate_scores, Address flag, Address workspace, int64_t rows,
                     int64_t groups, int64_t codewords, int64_t depth, int64_t slots, int dtype) {
  check_rows(rows);
  check_codebook(groups, codewords, depth);
  check_slots(slots);
  return {pointer<void>(x),
          pointer<float>(codebook),
          pointer<uint8_t>(codes),
          pointer<int64_t>(counts),
          pointer<float>(sums),
          pointer<float>(squared_error),
          pointer<float>(candidates),
          pointer<float>(candidate_scores),
          pointer<uint8_t>(flag),
          pointer<void>(workspace),
          rows,
          groups,
          codewords,
          depth,
          slots,
          dtype_of("dtype", dtype)};
}

lct::VqDecode decode(Address codes, Address codebook, Address x, Address flag, Address workspace, int64_t rows,
                     int64_t groups, int64_t codewords, int64_t depth, int dtype) {
  check_rows(rows);
  check_codebook(groups, codewords, depth);
  return {pointer<uint8_t>(codes),
          pointer<float>(codebook),
          pointer<void>(x),
          pointer<uint8_t>(flag),
          pointer<void>(workspace),
          rows,
          groups,
          codewords,
          depth,
          dtype_of("dtype", dtype)};
}

lct::VqUpdate update(Address codebook, Address state_counts, Address state_sums, Address counts, Address sums,
                     Address candidates, int64_t groups, int64_t codewords, int64_t depth, int64_t slots, double decay,
                     double eps, double revive_below) {
  check_codebook(groups, codewords, depth);
  check_slots(slots);
  return {pointer<float>(codebook),
          pointer<float>(state_counts),
          pointer<float>(state_sums),
          pointer<int64_t>(counts),
          pointer<float>(sums),
          pointer<float>(candidates),
          groups,
          codewords,
          depth,
          slots,
          decay,
          eps,
          revive_below};
}

}  // namespace

void bind_vq(py::module_& module) {
#define LCT_CODEBOOK_ARGUMENTS py::arg("groups"), py::arg("codewords"), py::arg("depth")
#define LCT_ENCODE_TENSORS                                                                               \
  py::arg("x"), py::arg("codebook"), py::arg("codes"), py::arg("counts"), py::arg("sums"),               \
      py::arg("squared_error"), py::arg("candidates"), py::arg("candidate_scores"), py::arg("flag")
#define LCT_ENCODE_SIZES py::arg("rows"), LCT_CODEBOOK_ARGUMENTS, py::arg("slots"), py::arg("dtype")
#define LCT_DECODE_TENSORS py::arg("codes"), py::arg("codebook"), py::arg("x"), py::arg("flag")
#define LCT_DECODE_SIZES py::arg("rows"), LCT_CODEBOOK_ARGUMENTS, py::arg("dtype")
#define LCT_UPDATE_TENSORS                                                                      \
  py::arg("codebook"), py::arg("state_counts"), py::arg("state_sums"), py::arg("counts"),       \
      py::arg("sums"), py::arg("candidates")
#define LCT_UPDATE_SIZES \
  LCT_CODEBOOK_ARGUMENTS, py::arg("slots"), py::arg("decay"), py::arg("eps"), py::arg("revive_below")

  module.def(
      "vq_encode_cpu_workspace",
      [](int64_t rows, int64_t groups, int64_t codewords, int64_t depth, int64_t slots, int dtype, int threads) {
        check_rows(rows);
        check_codebook(groups, codewords, depth);
        check_slots(slots);
        check_threads(threads);
        return lct::vq_encode_cpu_workspace(rows, groups, codewords, depth, slots, dtype_of("dtype", dtype),
                                            threads);
      },
      py::arg("rows"), LCT_CODEBOOK_ARGUMENTS, py::arg("slots"), py::arg("dtype"), py::arg("threads"),
      "Bytes of workspace.");
  module.def(
      "vq_encode_cpu",
      [](Address x, Address codebook, Address codes, Address counts, Address sums, Address squared_error,
         Address candidates, Address candidate_scores, Address flag, Address workspace, int64_t rows,
         int64_t groups, int64_t codewords, int64_t depth, int64_t slots, int dtype, int threads) {
        check_threads(threads);
        const lct::VqEncode args = encode(x, codebook, codes, counts, sums, squared_error, candidates,
                                          candidate_scores, flag, workspace, rows, groups, codewords, depth, slots,
                                          dtype);
        py::gil_scoped_release release;
        lct::vq_encode_cpu(args, threads);
      },
      LCT_ENCODE_TENSORS, py::arg("workspace"), LCT_ENCODE_SIZES, py::arg("threads"));
  module.def(
      "vq_decode_cpu_workspace",
      [](int64_t rows, int64_t groups, int64_t codewords, int64_t depth, int dtype) {
        check_rows(rows);
        check_codebook(groups, codewords, depth);
        return lct::vq_decode_cpu_workspace(rows, groups, codewords, depth, dtype_of("dtype", dtype));
      },
      py::arg("rows"), LCT_CODEBOOK_ARGUMENTS, py::arg("dtype"), "Bytes of workspace.");
  module.def(
      "vq_decode_cpu",
      [](Address codes, Address codebook, Address x, Address flag, Address workspace, int64_t rows, int64_t groups,
         int64_t codewords, int64_t depth, int dtype, int threads) {
        check_threads(threads);
        const lct::VqDecode args =
            decode(codes, codebook, x, flag, workspace, rows, groups, codewords, depth, dtype);
        py::gil_scoped_release release;
        lct::vq_decode_cpu(args, threads);
      },
      LCT_DECODE_TENSORS, py::arg("workspace"), LCT_DECODE_SIZES, py::arg("threads"));
  module.def(
      "vq_update_cpu",
      [](Address codebook, Address state_counts, Address state_sums, Address counts, Address sums,
         Address candidates, int64_t groups, int64_t codewords, int64_t depth, int64_t slots, double decay,
         double eps, double revive_below, int threads) {
        check_threads(threads);
        const lct::VqUpdate args = update(codebook, state_counts, state_sums, counts, sums, candidates, groups,
                                          codewords, depth, slots, decay, eps, revive_below);
        py::gil_scoped_release release;
        lct::vq_update_cpu(args, threads);
      },
      LCT_UPDATE_TENSORS, LCT_UPDATE_SIZES, py::arg("threads"));

#ifdef LCT_WITH_CUDA
  module.def(
      "vq_encode_cuda_workspace",
      [](int64_t rows, int64_t groups, int64_t codewords, int64_t depth, int64_t slots) {
        check_rows(rows);
        check_codebook(groups, codewords, depth);
        check_slots(slots);
        return lct::vq_encode_cuda_workspace(rows, groups, codewords, depth, slots);
      },
      py::arg("rows"), LCT_CODEBOOK_ARGUMENTS, py::arg("slots"), "Bytes of workspace.");
  module.def(
      "vq_encode_cuda",
      [](Address x, Address codebook, Address codes, Address counts, Address sums, Address squared_error,
         Address candidates, Address candidate_scores, Address flag, Address workspace, size_t workspace_bytes,
         int64_t rows, int64_t groups, int64_t codewords, int64_t depth, int64_t slots, int dtype, int device,
         Address stream) {
        const lct::VqEncode args = encode(x, codebook, codes, counts, sums, squared_error, candidates,
                                          candidate_scores, flag, workspace, rows, groups, codewords, depth, slots,
                                          dtype);
        py::gil_scoped_release release;
        check(lct::vq_encode_cuda(args, workspace_bytes, device, reinterpret_cast<cudaStream_t>(stream)));
      },
      LCT_ENCODE_TENSORS, py::arg("workspace"), py::arg("workspace_bytes"), LCT_ENCODE_SIZES, py::arg("device"),
      py::arg("stream"));
  module.def(
      "vq_decode_cuda",
      [](Address codes, Address codebook, Address x, Address flag, int64_t rows, int64_t groups, int64_t codewords,
         int64_t depth, int dtype, int device, Address stream) {
        const lct::VqDecode args = decode(codes, codebook, x, flag, 0, rows, groups, codewords, depth, dtype);
        py::gil_scoped_release release;
        check(lct::vq_decode_cuda(args, device, reinterpret_cast<cudaStream_t>(stream)));
      },
      LCT_DECODE_TENSORS, LCT_DECODE_SIZES, py::arg("device"), py::arg("stream"));
  module.def(
      "vq_update_cuda_workspace",
      [](int64_t groups, int64_t codewords) {
        check_codebook(groups, codewords, 1);
        return lct::vq_update_cuda_workspace(groups, codewords);
      },
      py::arg("groups"), py::arg("codewords"), "Bytes of workspace.");
  module.def(
      "vq_update_cuda",
      [](Address codebook, Address state_counts, Address state_sums, Address counts, Address sums,
         Address candidates, Address workspace, int64_t groups, int64_t codewords, int64_t depth, int64_t slots,
         double decay, double eps, double revive_below, int device, Address stream) {
        const lct::VqUpdate args = update(codebook, state_counts, state_sums, counts, sums, candidates, groups,
                                          codewords, depth, slots, decay, eps, revive_below);
        py::gil_scoped_release release;
        check(lct::vq_update_cuda(args, pointer<void>(workspace), device, reinterpret_cast<cudaStream_t>(stream)));
      },
      LCT_UPDATE_TENSORS, py::arg("workspace"), LCT_UPDATE_SIZES, py::arg("device"), py::arg("stream"));
#endif
}

}  // namespace lct::bindings
