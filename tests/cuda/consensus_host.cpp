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
#include "lct/consensus.h"

namespace {

int failures = 0;

template <typename... Arguments>
void fail(const char* format, Arguments... args) {
  std::printf(format, args...);
  std::printf("\n");
  ++failures;
}

// Memory of exactly this size, all bits set.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : bytes_(bytes), memory_(static_cast<char*>(std::malloc(bytes))) {
    std::memset(memory_.get(), 0xff, bytes);
  }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(memory_.get());
  }
  // Takes its bytes of `from`, which begin at `at`, and moves that on.
  void fill(const std::string& from, size_t& at) const {
    std::memcpy(memory_.get(), from.data() + at, bytes_);
    at += bytes_;
  }
  std::string bytes() const { return std::string(memory_.get(), bytes_); }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  int64_t bytes_;
  std::unique_ptr<char, Free> memory_;
};

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
  x.fill(in, at);
  lambda.fill(in, at);
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
  p.fill(in, at);
  x_prev.fill(in, at);
  lambda.fill(in, at);
  if (c.multipliers) kappa.fill(in, at);
  const cudaError_t error = lct::consensus_update_cuda(
      {lambda.as<float>(), c.multipliers ? kappa.as<float>() : nullptr, p.as<void>(), x_prev.as<void>(),
       next.as<float>(), c.multipliers ? after.as<float>() : nullptr, c.size(), c.beta, c.eta, c.dtype},
      0, nullptr);
  if (error != cudaSuccess) fail("consensus_update_cuda returns %d", static_cast<int>(error));
  return next.bytes() + after.bytes();
}

void expect_error(const char* what, cudaError_t got, cudaError_t wanted) {
  if (got != wanted) fail("%s: error %d, expected %d", what, static_cast<int>(got), static_cast<int>(wanted));
}

template <typename Args>
void check_launch(Args args, int64_t Args::*size, cudaError_t (*run)(const Args&, int, cudaStream_t)) {
  const auto stream = reinterpret_cast<cudaStream_t>(uintptr_t{0x5eed});
  for (const int device : {0, 1}) {
    host_cuda::device = 1 - device;
    host_cuda::last_stream = nullptr;
    host_cuda::calls = 0;
    expect_error("a plain call", run(args, device, stream), cudaSuccess);
    if (host_cuda::last_device != device) fail("ran on device %d, not on %d", host_cuda::last_device, device);
    if (host_cuda::last_stream != stream) fail("did not use the stream");
    if (host_cuda::device != 1 - device) fail("left another device current");

    // Whichever call fails, the launcher says so and puts the device back. (The last call is what does.)
    const int calls = host_cuda::calls;
    for (int i = 0; i + 1 < calls; ++i) {
      host_cuda::calls = 0;
      host_cuda::fail_at_call = i;
      expect_error("a failing call", run(args, device, stream), cudaErrorUnknown);
      if (host_cuda::device != 1 - device) fail("left another device current after call %d failed", i);
    }
    host_cuda::fail_at_call = -1;
  }
  host_cuda::device = 0;
  expect_error("no such device", run(args, 2, stream), cudaErrorInvalidDevice);
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
