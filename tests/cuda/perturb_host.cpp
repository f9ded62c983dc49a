// Runs csrc/cuda/perturb.cu on the host over files of bytes that the test writes and compares.
//
//     perturb_host perturb IN OUT ROWS CHANNELS INNER COUNT SIGMAS SEED OFFSET ANTITHETIC DTYPE SKIP
//         IN: z, then sigma. OUT: the result. COUNT: copies. DTYPE as a number of the contract.
//     perturb_host score IN OUT ...
//         IN: loss, then sigma. COUNT: total.
//     perturb_host launch
//         devices, streams, failing calls, sizes that are refused
//
// SKIP moves input and output by so many elements past malloc's alignment. Each case runs with several orders of
// threads; exit status 1 and a line for what is wrong. Built with AddressSanitizer, every buffer has its exact size, so
// that an access past one stops the program.
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
#include "lct/perturb.h"

namespace {

using host_driver::Buffer;
using host_driver::check_calls;
using host_driver::expect_error;
using host_driver::fail;
using host_driver::failures;

struct Case {
  lct::NoiseShape shape;
  int64_t count, sigmas;
  lct::Noise noise;
  lct::DType dtype;
  int64_t skip;

  int64_t element() const { return dtype == lct::DType::f32 ? 4 : 2; }
  int64_t features() const { return shape.channels * shape.inner; }
};

std::string perturb(const Case& c, const std::string& in) {
  const int64_t element = c.element(), values = c.shape.rows / c.count * c.features();
  const Buffer z(values * element, c.skip * element), sigma(4 * c.sigmas, 0);
  const Buffer out(c.shape.rows * c.features() * element, c.skip * element);
  z.fill(in, 0);
  sigma.fill(in, values * element);
  const cudaError_t error = lct::perturb_cuda({z.as<void>(), sigma.as<float>(), out.as<void>(), c.shape,
                                               c.count, c.sigmas, c.noise, c.dtype},
                                              0, nullptr);
  if (error != cudaSuccess) fail("perturb_cuda returns %d", static_cast<int>(error));
  return out.bytes();
}

std::string score(const Case& c, const std::string& in) {
  const Buffer loss(4 * c.shape.rows, 0), sigma(4 * c.sigmas, 0);
  const Buffer out(c.shape.rows * c.features() * c.element(), c.skip * c.element());
  loss.fill(in, 0);
  sigma.fill(in, 4 * c.shape.rows);
  const cudaError_t error = lct::score_cuda({loss.as<float>(), sigma.as<float>(), out.as<void>(), c.shape,
                                             c.count, c.sigmas, c.noise, c.dtype},
                                            0, nullptr);
  if (error != cudaSuccess) fail("score_cuda returns %d", static_cast<int>(error));
  return out.bytes();
}

template <typename Args>
void check_launch(const Args& given, cudaError_t (*run)(const Args&, int, cudaStream_t)) {
  const cudaStream_t stream = nullptr;
  check_calls([&](int device, cudaStream_t on) { return run(given, device, on); });
  Args args = given;
  args.sigmas = 3;
  expect_error("sigma of no shape", run(args, 0, stream), cudaErrorInvalidValue);
  args = given;
  args.shape.inner = -1;
  expect_error("fewer than no values", run(args, 0, stream), cudaErrorInvalidValue);
  args = given;
  args.shape.rows = 3;
  args.noise.antithetic = true;
  expect_error("half a pair", run(args, 0, stream), cudaErrorInvalidValue);
  host_cuda::calls = 0;
  args = given;
  args.shape.inner = 0;
  expect_error("no values", run(args, 0, stream), cudaSuccess);
  if (host_cuda::calls != 0) fail("no values took %d calls", host_cuda::calls);
  // More blocks than a grid has: refused, not wrapped.
  args = given;
  args.shape.inner = int64_t{1} << 42;
  expect_error("too many values", run(args, 0, stream), cudaErrorInvalidConfiguration);
}

}  // namespace

int main(int count, char** words) {
  const std::string what = count > 1 ? words[1] : "";
  if (what == "launch") {
    const Buffer z(4 * 20, 0), sigma(4, 0), loss(4 * 2, 0), out(4 * 20, 0);
    const lct::NoiseShape shape{2, 5, 2};
    check_launch<lct::Perturb>(
        {z.as<void>(), sigma.as<float>(), out.as<void>(), shape, 1, 1, {1, 0, false}, lct::DType::f32},
        lct::perturb_cuda);
    check_launch<lct::Score>(
        {loss.as<float>(), sigma.as<float>(), out.as<void>(), shape, 2, 1, {1, 0, false}, lct::DType::f32},
        lct::score_cuda);
    lct::Perturb copies{z.as<void>(), sigma.as<float>(), out.as<void>(), shape, 3, 1, {1, 0, false},
                        lct::DType::f32};
    expect_error("copies that do not divide rows", lct::perturb_cuda(copies, 0, nullptr),
                 cudaErrorInvalidValue);
    return failures ? 1 : 0;
  }
  if ((what != "perturb" && what != "score") || count != 14) {
    std::fprintf(stderr, "usage: see the head of %s\n", __FILE__);
    return 2;
  }
  const auto number = [&](int i) { return std::atol(words[i]); };
  const Case c{{number(4), number(5), number(6)},
               number(7),
               number(8),
               {std::strtoull(words[9], nullptr, 10), std::strtoull(words[10], nullptr, 10), number(11) != 0},
               static_cast<lct::DType>(number(12)),
               number(13)};
  std::ifstream file(words[2], std::ios::binary);
  const std::string in{std::istreambuf_iterator<char>(file), {}};
  const auto run = what == "perturb" ? perturb : score;
  const std::string out = run(c, in);
  for (host_cuda::seed = 1; host_cuda::seed < 3; ++host_cuda::seed) {
    if (run(c, in) != out) fail("bits vary with the order of threads");
  }
  std::ofstream(words[3], std::ios::binary).write(out.data(), static_cast<std::streamsize>(out.size()));
  return failures ? 1 : 0;
}
