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

}  // namespace

void bind_vq(py::module_& module) {
#define LCT_CODEBOOK_ARGUMENTS py::arg("groups"), py::arg("codewords"), py::arg("depth")

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
        check_rows(rows);
        check_codebook(groups, codewords, depth);
        check_slots(slots);
        check_threads(threads);
        const lct::VqEncode args = {pointer<void>(x),
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
        py::gil_scoped_release release;
        lct::vq_encode_cpu(args, threads);
      },
      py::arg("x"), py::arg("codebook"), py::arg("codes"), py::arg("counts"), py::arg("sums"),
      py::arg("squared_error"), py::arg("candidates"), py::arg("candidate_scores"), py::arg("flag"),
      py::arg("workspace"), py::arg("rows"), LCT_CODEBOOK_ARGUMENTS, py::arg("slots"), py::arg("dtype"),
      py::arg("threads"));
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
        check_rows(rows);
        check_codebook(groups, codewords, depth);
        check_threads(threads);
        const lct::VqDecode args = {pointer<uint8_t>(codes),
                                    pointer<float>(codebook),
                                    pointer<void>(x),
                                    pointer<uint8_t>(flag),
                                    pointer<void>(workspace),
                                    rows,
                                    groups,
                                    codewords,
                                    depth,
                                    dtype_of("dtype", dtype)};
        py::gil_scoped_release release;
        lct::vq_decode_cpu(args, threads);
      },
      py::arg("codes"), py::arg("codebook"), py::arg("x"), py::arg("flag"), py::arg("workspace"), py::arg("rows"),
      LCT_CODEBOOK_ARGUMENTS, py::arg("dtype"), py::arg("threads"));
  module.def(
      "vq_update_cpu",
      [](Address codebook, Address state_counts, Address state_sums, Address counts, Address sums,
         Address candidates, int64_t groups, int64_t codewords, int64_t depth, int64_t slots, double decay,
         double eps, double revive_below, int threads) {
        check_codebook(groups, codewords, depth);
        check_threads(threads);
        const lct::VqUpdate args = {pointer<float>(codebook),
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
        py::gil_scoped_release release;
        lct::vq_update_cpu(args, threads);
      },
      py::arg("codebook"), py::arg("state_counts"), py::arg("state_sums"), py::arg("counts"), py::arg("sums"),
      py::arg("candidates"), LCT_CODEBOOK_ARGUMENTS, py::arg("slots"), py::arg("decay"), py::arg("eps"),
      py::arg("revive_below"), py::arg("threads"));
}

}  // namespace lct::bindings
