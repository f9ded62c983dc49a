// Runs csrc/cuda/consensus.cu on the host over files of bytes that the test writes and compares.
//
//     consensus_host adjoint IN OUT ROWS DEPTH DTYPE MULTIPLIERS BETA ETA
//         IN: x, lambda, and kappa if MULTIPLIERS is 1. OUT: loss, then p.
//     consensus_host update IN OUT ROWS DEPTH DTYPE MULTIPLIERS BETA ETA
//         IN: p, x_prev, lambda, and kappa if MULTIPLIERS is 1. OUT: lambda, then kappa.
//     consensus_host launch
//         devices, streams, failing calls, sizes that are refused
//
// Each case runs with several orders of threads; exit status 1 and a line for what is wrong. Built with
// AddressSanitizer, every buffer has its exact size, so that an access past one stops the program.
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
#include "lct/consensus.h"

namespace {

using host_driver::Buffer;
using host_driver::check_calls;
using host_driver::expect_error;
using host_driver::fail;
using host_driver::failures;

struct Case {
  int64_t rows, depth;
  lct::DType dtype;
  bool multipliers;
  float beta, eta;

  int64_t size() const { return rows * depth; }
  int64_t element() const { return dtype == lct::DType::f32 ? 4 : 2; }
};

std::string adjoint(const Case& c, const std::string& in) {
  const Buffer x(c.size() * c.element()), lambda(4 * c.size()), kappa(4 * c.size());
  const Buffer loss(4 * c.rows), p(c.size() * c.element());
  size_t at = 0;
  at = x.fill(in, at);
  at = lambda.fill(in, at);
  if (c.multipliers) kappa.fill(in, at);
  const cudaError_t error = lct::consensus_adjoint_cuda(
      {x.as<void>(), lambda.as<float>(), c.multipliers ? kappa.as<float>() : nullptr, loss.as<float>(),
       p.as<void>(), c.rows, c.depth, c.beta, c.dtype},
      0, nullptr);
  if (error != cudaSuccess) fail("consensus_adjoint_cuda returns %d", static_cast<int>(error));
  return loss.bytes() + p.bytes();
}

std::string update(const Case& c, const std::string& in) {
  const Buffer p(c.size() * c.element()), x_prev(c.size() * c.element());
  const Buffer lambda(4 * c.size()), kappa(4 * c.size()), next(4 * c.size()), after(4 * c.size());
  size_t at = 0;
  at = p.fill(in, at);
  at = x_prev.fill(in, at);
  at = lambda.fill(in, at);
  if (c.multipliers) kappa.fill(in, at);
  const cudaError_t error = lct::consensus_update_cuda(
      {lambda.as<float>(), c.multipliers ? kappa.as<float>() : nullptr, p.as<void>(), x_prev.as<void>(),
       next.as<float>(), c.multipliers ? after.as<float>() : nullptr, c.size(), c.beta, c.eta, c.dtype},
      0, nullptr);
  if (error != cudaSuccess) fail("consensus_update_cuda returns %d", static_cast<int>(error));
  return next.bytes() + after.bytes();
}

template <typename Args>
void check_launch(Args args, int64_t Args::*size, cudaError_t (*run)(const Args&, int, cudaStream_t)) {
  const cudaStream_t stream = nullptr;
  check_calls([&](int device, cudaStream_t on) { return run(args, device, on); });
  args.*size = -1;
  expect_error("fewer than no values", run(args, 0, stream), cudaErrorInvalidValue);
  host_cuda::calls = 0;
  args.*size = 0;
  expect_error("no values", run(args, 0, stream), cudaSuccess);
  if (host_cuda::calls != 0) fail("no values took %d calls", host_cuda::calls);
  // More blocks than a grid has: refused, not wrapped.
  args.*size = int64_t{1} << 43;
  expect_error("too many values", run(args, 0, stream), cudaErrorInvalidConfiguration);
}

}  // namespace

int main(int count, char** words) {
  const std::string what = count > 1 ? words[1] : "";
  if (what == "launch") {
    const Buffer a(4 * 70), b(4 * 70), c(4 * 70), d(4 * 70);
    std::memset(a.as<void>(), 0, 4 * 70);
    std::memset(b.as<void>(), 0, 4 * 70);
    check_launch<lct::ConsensusAdjoint>({a.as<void>(), b.as<float>(), nullptr, c.as<float>(), d.as<void>(), 2, 35,
                                         0.5f, lct::DType::f32},
                                        &lct::ConsensusAdjoint::rows, lct::consensus_adjoint_cuda);
    check_launch<lct::ConsensusUpdate>({a.as<float>(), nullptr, b.as<void>(), b.as<void>(), c.as<float>(), nullptr,
                                        70, 0.5f, 0.1f, lct::DType::f32},
                                       &lct::ConsensusUpdate::size, lct::consensus_update_cuda);
    return failures ? 1 : 0;
  }
  if ((what != "adjoint" && what != "update") || count != 10) {
    std::fprintf(stderr, "usage: see the head of %s\n", __FILE__);
    return 2;
  }
  const Case c{std::atol(words[4]),
               std::atol(words[5]),
               static_cast<lct::DType>(std::atoi(words[6])),
               std::atoi(words[7]) != 0,
               std::strtof(words[8], nullptr),
               std::strtof(words[9], nullptr)};
  std::ifstream file(words[2], std::ios::binary);
  const std::string in{std::istreambuf_iterator<char>(file), {}};
  const auto run = what == "adjoint" ? adjoint : update;
  const std::string out = run(c, in);
  for (host_cuda::seed = 1; host_cuda::seed < 3; ++host_cuda::seed) {
    if (run(c, in) != out) fail("bits vary with the order of threads");
  }
  std::ofstream(words[3], std::ios::binary).write(out.data(), static_cast<std::streamsize>(out.size()));
  return failures ? 1 : 0;
}
