// block_quantize and block_dequantize in lct_fast._C.
#include "lct/block_quantize.h"

#include "bindings/bindings.h"

namespace lct::bindings {
namespace {

lct::BlockKind kind_of(int value) {
  if (value < 0 || value > 3)
    throw py::value_error("kind must be 0 (int8), 1 (int4), 2 (int2) or 3 (fp8), got " +
                          std::to_string(value));
  return static_cast<lct::BlockKind>(value);
}

void check_sizes(int64_t size, int64_t block) {
  if (size < 0) throw py::value_error("expected size >= 0, got " + std::to_string(size));
  if (block < lct::kLeastQuantizeBlock || block > lct::kMostQuantizeBlock || (block & (block - 1)))
    throw py::value_error("block must be 32, 64, 128 or 256, got " + std::to_string(block));
}

lct::BlockQuantize quantize(Address x, Address payload, Address scales, int64_t size, int64_t block, int kind,
                            int dtype) {
  check_sizes(size, block);
  return {pointer<void>(x), pointer<uint8_t>(payload), pointer<uint16_t>(scales), size, block, kind_of(kind),
          dtype_of("dtype", dtype)};
}

lct::BlockDequantize dequantize(Address payload, Address scales, Address x, int64_t size, int64_t block,
                                int kind, int dtype) {
  check_sizes(size, block);
  return {pointer<uint8_t>(payload), pointer<uint16_t>(scales), pointer<void>(x), size, block, kind_of(kind),
          dtype_of("dtype", dtype)};
}

}  // namespace

#define LCT_CODE_ARGUMENTS py::arg("size"), py::arg("block"), py::arg("kind"), py::arg("dtype")
#define LCT_QUANTIZE_ARGUMENTS py::arg("x"), py::arg("payload"), py::arg("scales"), LCT_CODE_ARGUMENTS
#define LCT_DEQUANTIZE_ARGUMENTS py::arg("payload"), py::arg("scales"), py::arg("x"), LCT_CODE_ARGUMENTS

void bind_block_quantize(py::module_& module) {
  module.def(
      "block_quantize_cpu",
      [](Address x, Address payload, Address scales, int64_t size, int64_t block, int kind, int dtype,
         int threads) {
        const lct::BlockQuantize args = quantize(x, payload, scales, size, block, kind, dtype);
        check_threads(threads);
        py::gil_scoped_release release;
        lct::block_quantize_cpu(args, threads);
      },
      LCT_QUANTIZE_ARGUMENTS, py::arg("threads"));
  module.def(
      "block_dequantize_cpu",
      [](Address payload, Address scales, Address x, int64_t size, int64_t block, int kind, int dtype,
         int threads) {
        const lct::BlockDequantize args = dequantize(payload, scales, x, size, block, kind, dtype);
        check_threads(threads);
        py::gil_scoped_release release;
        lct::block_dequantize_cpu(args, threads);
      },
      LCT_DEQUANTIZE_ARGUMENTS, py::arg("threads"));

#ifdef LCT_WITH_CUDA
  module.def(
      "block_quantize_cuda",
      [](Address x, Address payload, Address scales, int64_t size, int64_t block, int kind, int dtype,
         int device, Address stream) {
        const lct::BlockQuantize args = quantize(x, payload, scales, size, block, kind, dtype);
        py::gil_scoped_release release;
        check(lct::block_quantize_cuda(args, device, reinterpret_cast<cudaStream_t>(stream)));
      },
      LCT_QUANTIZE_ARGUMENTS, py::arg("device"), py::arg("stream"));
  module.def(
      "block_dequantize_cuda",
      [](Address payload, Address scales, Address x, int64_t size, int64_t block, int kind, int dtype,
         int device, Address stream) {
        const lct::BlockDequantize args = dequantize(payload, scales, x, size, block, kind, dtype);
        py::gil_scoped_release release;
        check(lct::block_dequantize_cuda(args, device, reinterpret_cast<cudaStream_t>(stream)));
      },
      LCT_DEQUANTIZE_ARGUMENTS, py::arg("device"), py::arg("stream"));
#endif
}

}  // namespace lct::bindings
