// Runs csrc/cuda/block_quantize.cu on the host over files of bytes that the test writes and compares.
//
//     block_quantize_host quantize IN OUT SIZE BLOCK KIND DTYPE OFFSET
//         IN: the values. OUT: payload, then scales. KIND and DTYPE as numbers of the contract.
//     block_quantize_host dequantize IN OUT SIZE BLOCK KIND DTYPE OFFSET
//         IN: payload, then scales. OUT: the values.
//     block_quantize_host launch
//         devices, streams, failing calls, sizes that are refused
//
// OFFSET 1 moves the values, 2 the payload, by one element past malloc's alignment. Each case runs with several
// orders of threads; exit status 1 and a line for what is wrong. Built with AddressSanitizer, every buffer has its exact
// size, so that an access past one stops the program.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>

#include "host_cuda.h"
#include "host_driver.h"
#include "lct/block_quantize.h"

namespace {

using host_driver::Buffer;
using host_driver::check_calls;
using host_driver::expect_error;
using host_driver::fail;
using host_driver::failures;

struct Case {
  int64_t size, block;
  lct::BlockKind kind;
  lct::DType dtype;
  int64_t offset;

  int64_t element() const { return dtype == lct::DType::f32 ? 4 : 2; }
  int64_t payload() const {
    const int bits = kind == lct::BlockKind::int4 ? 4 : kind == lct::BlockKind::int2 ? 2 : 8;
    return (size * bits + 7) / 8;
  }
  int64_t scales() const { return (size + block - 1) / block; }
};

std::string quantize(const Case& c, const std::string& in) {
  const Buffer x(c.size * c.element(), c.offset == 1 ? c.element() : 0);
  const Buffer payload(c.payload(), c.offset == 2);
  const Buffer scales(2 * c.scales(), c.offset ? 2 : 0);
  x.fill(in, 0);
  const cudaError_t error = lct::block_quantize_cuda(
      {x.as<void>(), payload.as<uint8_t>(), scales.as<uint16_t>(), c.size, c.block, c.kind, c.dtype}, 0,
      nullptr);
  if (error != cudaSuccess) fail("block_quantize_cuda returns %d", static_cast<int>(error));
  return payload.bytes() + scales.bytes();
}

std::string dequantize(const Case& c, const std::string& in) {
  const Buffer x(c.size * c.element(), c.offset == 1 ? c.element() : 0);
  const Buffer payload(c.payload(), c.offset == 2);
  const Buffer scales(2 * c.scales(), c.offset ? 2 : 0);
  payload.fill(in, 0);
  scales.fill(in, c.payload());
  const cudaError_t error = lct::block_dequantize_cuda(
      {payload.as<uint8_t>(), scales.as<uint16_t>(), x.as<void>(), c.size, c.block, c.kind, c.dtype}, 0,
      nullptr);
  if (error != cudaSuccess) fail("block_dequantize_cuda returns %d", static_cast<int>(error));
  return x.bytes();
}

template <typename Args>
void check_launch(Args args, cudaError_t (*run)(const Args&, int, cudaStream_t)) {
  const cudaStream_t stream = nullptr;
  check_calls([&](int device, cudaStream_t on) { return run(args, device, on); });
  for (const int64_t block : {0, 1, 16, 48, 96, 512, -64}) {
    args.block = block;
    expect_error("an unknown block", run(args, 0, stream), cudaErrorInvalidValue);
  }
  args.block = 64;
  args.size = -1;
  expect_error("fewer than no values", run(args, 0, stream), cudaErrorInvalidValue);
  host_cuda::calls = 0;
  args.size = 0;
  expect_error("no values", run(args, 0, stream), cudaSuccess);
  if (host_cuda::calls != 0) fail("no values took %d calls", host_cuda::calls);
  // More blocks than a grid has: refused, not wrapped.
  args.size = int64_t{1} << 43;
  expect_error("too many values", run(args, 0, stream), cudaErrorInvalidConfiguration);
}

}  // namespace

int main(int count, char** words) {
  const std::string what = count > 1 ? words[1] : "";
  if (what == "launch") {
    const Buffer x(4 * 70, 0), payload(70, 0), scales(2 * 2, 0);
    x.fill(std::string(4 * 70, '\0'), 0);
    const auto kind = lct::BlockKind::int8;
    check_launch<lct::BlockQuantize>({x.as<void>(), payload.as<uint8_t>(), scales.as<uint16_t>(), 70, 64,
                                      kind, lct::DType::f32},
                                     lct::block_quantize_cuda);
    check_launch<lct::BlockDequantize>({payload.as<uint8_t>(), scales.as<uint16_t>(), x.as<void>(), 70, 64,
                                        kind, lct::DType::f32},
                                       lct::block_dequantize_cuda);
    return failures ? 1 : 0;
  }
  if ((what != "quantize" && what != "dequantize") || count != 9) {
    std::fprintf(stderr, "usage: see the head of %s\n", __FILE__);
    return 2;
  }
  const Case c{std::atol(words[4]), std::atol(words[5]), static_cast<lct::BlockKind>(std::atoi(words[6])),
               static_cast<lct::DType>(std::atoi(words[7])), std::atol(words[8])};
  std::ifstream file(words[2], std::ios::binary);
  const std::string in{std::istreambuf_iterator<char>(file), {}};
  const auto run = what == "quantize" ? quantize : dequantize;
  const std::string out = run(c, in);
  for (host_cuda::seed = 1; host_cuda::seed < 3; ++host_cuda::seed) {
    if (run(c, in) != out) fail("bits vary with the order of threads");
  }
  std::ofstream(words[3], std::ios::binary).write(out.data(), static_cast<std::streamsize>(out.size()));
  return failures ? 1 : 0;
}
