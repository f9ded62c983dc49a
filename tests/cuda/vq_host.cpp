// Runs csrc/cuda/vq*.cu on the host over files of bytes that the test writes and compares.
//
//     vq_host encode IN OUT ROWS GROUPS CODEWORDS DEPTH SLOTS DTYPE OFFSET
//         IN: x, codebook. OUT: codes, counts, sums, squared_error, candidates, candidate_scores, flag.
//     vq_host decode IN OUT ROWS GROUPS CODEWORDS DEPTH 0 DTYPE OFFSET
//         IN: codes, codebook. OUT: x, flag.
//     vq_host update IN OUT GROUPS CODEWORDS DEPTH SLOTS DECAY EPS REVIVE_BELOW
//         IN: codebook, state counts and sums, counts, sums, candidates. OUT: the first three.
//     vq_host launch
//         devices, streams, failing calls, sizes that are refused, workspace
//
// DTYPE is a number of the contract. OFFSET 1 moves x, 2 the codebook, 3 the codes by one element past malloc's
// alignment. Each case runs with several orders of threads, and the encoder in one wave and in waves of one chunk;
// exit status 1 and a line for what is wrong. Built with AddressSanitizer, every buffer has its exact size, so that an
// access past one stops the program.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <string>

#include "host_cuda.h"
#include "lct/vq.h"

namespace {

int failures = 0;

template <typename... Arguments>
void fail(const char* format, Arguments... args) {
  std::printf(format, args...);
  std::printf("\n");
  ++failures;
}

// Memory of exactly this size, `skip` bytes past malloc's alignment, all of them `poison`: NaN or, for what kernels
// compare, larger than any score.
constexpr int kNan = 0xff, kLarge = 0x7f;
class Buffer {
 public:
  explicit Buffer(int64_t bytes, int64_t skip = 0, int poison = kNan)
      : bytes_(bytes), memory_(static_cast<char*>(std::malloc(skip + bytes))) {
    data_ = memory_.get() + skip;
    std::memset(memory_.get(), poison, skip + bytes);
  }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  // Takes its bytes from `from`, and moves `start` behind them.
  void fill(const std::string& from, size_t& start) const {
    std::memcpy(data_, from.data() + start, bytes_);
    start += bytes_;
  }
  std::string bytes() const { return std::string(data_, bytes_); }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  int64_t bytes_;
  std::unique_ptr<char, Free> memory_;
  char* data_;
};

struct Case {
  int64_t rows, groups, codewords, depth, slots;
  lct::DType dtype;
  int64_t offset;

  int64_t element() const { return dtype == lct::DType::f32 ? 4 : 2; }
  int64_t x() const { return rows * groups * depth * element(); }
  int64_t words() const { return groups * codewords * depth * 4; }
  int64_t codes() const {
    int64_t bits = 0;
    while ((int64_t{1} << bits) < codewords) ++bits;
    return (rows * groups * bits + 7) / 8;
  }
};

void expect_error(const char* what, cudaError_t got, cudaError_t wanted) {
  if (got != wanted) fail("%s: error %d, expected %d", what, static_cast<int>(got), static_cast<int>(wanted));
}

std::string encode(const Case& c, const std::string& in, int64_t workspace_bytes) {
  const Buffer x(c.x(), c.offset == 1 ? c.element() : 0), codebook(c.words(), c.offset == 2 ? 4 : 0);
  const Buffer codes(c.codes(), c.offset == 3), counts(c.groups * c.codewords * 8), sums(c.words());
  const Buffer squared_error(4), candidates(c.groups * c.slots * c.depth * 4), scores(c.groups * c.slots * 4);
  const Buffer flag(1), workspace(workspace_bytes, 0, kLarge);
  size_t start = 0;
  x.fill(in, start);
  codebook.fill(in, start);
  expect_error("vq_encode_cuda",
               lct::vq_encode_cuda({x.as<void>(), codebook.as<float>(), codes.as<uint8_t>(),
                                    counts.as<int64_t>(), sums.as<float>(), squared_error.as<float>(),
                                    candidates.as<float>(), scores.as<float>(), flag.as<uint8_t>(),
                                    workspace.as<void>(), c.rows, c.groups, c.codewords, c.depth, c.slots,
                                    c.dtype},
                                   static_cast<size_t>(workspace_bytes), 0, nullptr),
               cudaSuccess);
  std::string out;
  for (const Buffer* each : {&codes, &counts, &sums, &squared_error, &candidates, &scores, &flag})
    out += each->bytes();
  return out;
}

int64_t workspace_for(const Case& c, int64_t rows) {
  return static_cast<int64_t>(lct::vq_encode_cuda_workspace(rows, c.groups, c.codewords, c.depth, c.slots));
}

std::string decode(const Case& c, const std::string& in) {
  const Buffer codes(c.codes(), c.offset == 3), codebook(c.words(), c.offset == 2 ? 4 : 0);
  const Buffer x(c.x(), c.offset == 1 ? c.element() : 0), flag(1);
  size_t start = 0;
  codes.fill(in, start);
  codebook.fill(in, start);
  expect_error("vq_decode_cuda",
               lct::vq_decode_cuda({codes.as<uint8_t>(), codebook.as<float>(), x.as<void>(), flag.as<uint8_t>(),
                                    nullptr, c.rows, c.groups, c.codewords, c.depth, c.dtype},
                                   0, nullptr),
               cudaSuccess);
  return x.bytes() + flag.bytes();
}

struct Update {
  int64_t groups, codewords, depth, slots;
  double decay, eps, revive_below;
};

std::string update(const Update& u, const std::string& in) {
  const int64_t words = u.groups * u.codewords;
  const Buffer codebook(words * u.depth * 4), state_counts(words * 4), state_sums(words * u.depth * 4);
  const Buffer counts(words * 8), sums(words * u.depth * 4), candidates(u.groups * u.slots * u.depth * 4);
  const Buffer workspace(static_cast<int64_t>(lct::vq_update_cuda_workspace(u.groups, u.codewords)));
  size_t start = 0;
  for (const Buffer* each : {&codebook, &state_counts, &state_sums, &counts, &sums, &candidates})
    each->fill(in, start);
  expect_error("vq_update_cuda",
               lct::vq_update_cuda({codebook.as<float>(), state_counts.as<float>(), state_sums.as<float>(),
                                    counts.as<int64_t>(), sums.as<float>(), candidates.as<float>(), u.groups,
                                    u.codewords, u.depth, u.slots, u.decay, u.eps, u.revive_below},
                                   workspace.as<void>(), 0, nullptr),
               cudaSuccess);
  return codebook.bytes() + state_counts.bytes() + state_sums.bytes();
}

// `launches`: how many kernels and memsets a call is.
void check_launch(const char* what, int launches, const std::function<cudaError_t(int, cudaStream_t)>& run) {
  const auto stream = reinterpret_cast<cudaStream_t>(uintptr_t{0x5eed});
  for (const int device : {0, 1}) {
    host_cuda::device = 1 - device;
    host_cuda::last_stream = nullptr;
    host_cuda::calls = 0;
    expect_error(what, run(device, stream), cudaSuccess);
    if (host_cuda::last_device != device) fail("%s ran on device %d, not on %d", what, host_cuda::last_device, device);
    if (host_cuda::last_stream != stream) fail("%s did not use the stream", what);
    if (host_cuda::device != 1 - device) fail("%s left another device current", what);

    // Two calls to learn and change the device and one to put it back.
    const int calls = host_cuda::calls;
    if (calls != launches + 3) fail("%s took %d calls, expected %d", what, calls, launches + 3);
    // Whichever call fails, the launcher says so and puts the device back. (The last call is what does.)
    for (int i = 0; i + 1 < calls; ++i) {
      host_cuda::calls = 0;
      host_cuda::fail_at_call = i;
      expect_error(what, run(device, stream), cudaErrorUnknown);
      if (host_cuda::device != 1 - device) fail("%s left another device current after call %d failed", what, i);
    }
    host_cuda::fail_at_call = -1;
  }
  host_cuda::device = 0;
  expect_error("no such device", run(2, stream), cudaErrorInvalidDevice);
}

void check_launches() {
  const Case c{4100, 1, 2, 1, 1, lct::DType::f32, 0};
  const Case deep{1, 1, 2, 17, 1, lct::DType::f32, 0};
  const Buffer x(c.x()), codebook(deep.words()), codes(c.codes()), counts(16), sums(deep.words()), squared_error(4);
  const Buffer candidates(deep.depth * 4), scores(4), flag(1);
  const int64_t bytes = workspace_for(c, 4096);
  const Buffer workspace(std::max(bytes, workspace_for(deep, 1)));
  std::memset(codebook.as<void>(), 0, static_cast<size_t>(deep.words()));
  lct::VqEncode args{x.as<void>(),          codebook.as<float>(), codes.as<uint8_t>(),    counts.as<int64_t>(),
                     sums.as<float>(),      squared_error.as<float>(), candidates.as<float>(), scores.as<float>(),
                     flag.as<uint8_t>(),    workspace.as<void>(), c.rows,                 c.groups,
                     c.codewords,           c.depth,              c.slots,                c.dtype};
  size_t given = static_cast<size_t>(bytes);
  const auto run = [&](int device, cudaStream_t stream) {
    return lct::vq_encode_cuda(args, given, device, stream);
  };
  check_launch("encode in two waves", 4, run);
  args.rows = 4096;
  check_launch("encode in one wave", 2, run);
  args.rows = 1;
  args.depth = deep.depth;
  given = static_cast<size_t>(workspace_for(deep, 1));
  check_launch("encode deep vectors", 3, run);
  given -= 1;
  expect_error("too little workspace", run(0, nullptr), cudaErrorInvalidValue);
  args.rows = c.rows;
  args.depth = c.depth;
  given = static_cast<size_t>(bytes);
  const auto refused = [&](const char* what, int64_t& size, std::initializer_list<int64_t> values) {
    const int64_t before = size;
    for (const int64_t value : values) {
      size = value;
      expect_error(what, run(0, nullptr), cudaErrorInvalidValue);
    }
    size = before;
  };
  refused("rows", args.rows, {0, -1});
  refused("groups", args.groups, {0, -1, (int64_t{1} << 30) + 1});
  refused("codewords", args.codewords, {1, 65537});
  refused("depth", args.depth, {0, (int64_t{1} << 30) + 1});
  refused("slots", args.slots, {-1, 4097});

  lct::VqDecode back{codes.as<uint8_t>(), codebook.as<float>(), x.as<void>(), flag.as<uint8_t>(), nullptr,
                     c.rows,              c.groups,             c.codewords,  c.depth,            c.dtype};
  const auto decode_it = [&](int device, cudaStream_t stream) { return lct::vq_decode_cuda(back, device, stream); };
  check_launch("decode", 2, decode_it);
  back.rows = int64_t{1} << 53;
  expect_error("more blocks than a grid has", decode_it(0, nullptr), cudaErrorInvalidConfiguration);
  back.rows = 0;
  expect_error("no rows", decode_it(0, nullptr), cudaErrorInvalidValue);

  const Buffer state(8), state_sums(8);
  const Buffer fates(static_cast<int64_t>(lct::vq_update_cuda_workspace(1, 2)));
  lct::VqUpdate move{codebook.as<float>(), state.as<float>(), state_sums.as<float>(), counts.as<int64_t>(),
                     sums.as<float>(),     candidates.as<float>(), 1, 2, 1, 1, 0.9, 0.0, 0.0};
  const auto update_it = [&](int device, cudaStream_t stream) {
    return lct::vq_update_cuda(move, fates.as<void>(), device, stream);
  };
  check_launch("update", 2, update_it);
  move.codewords = 1;
  expect_error("one word", update_it(0, nullptr), cudaErrorInvalidValue);
}

void check_workspace() {
  constexpr int64_t most = 64 << 20;
  for (const Case& c : {Case{0, 1, 256, 4, 16, lct::DType::f32, 0}, Case{0, 8, 1024, 8, 4096, lct::DType::f32, 0},
                        Case{0, 1, 65536, 64, 0, lct::DType::f32, 0}, Case{0, 2048, 65536, 256, 1, lct::DType::f32, 0}}) {
    const int64_t one = workspace_for(c, 1), many = workspace_for(c, int64_t{1} << 40);
    // Eight runs of sums and counts, half norms, and of each row a code and of each slot at most 512.
    const int64_t chunk = 9 * c.groups * c.codewords * (c.depth + 1) * 4 + 8 * c.groups * (512 * 2 + 513 * 8);
    if (one > chunk) fail("workspace: %ld bytes for a row, expected at most %ld", one, chunk);
    if (many > std::max(most + c.words(), chunk)) fail("workspace: %ld bytes for many rows", many);
    if (workspace_for(c, 4096) != one) fail("workspace: a chunk takes more than a row of it");
  }
}

}  // namespace

int main(int count, char** words) {
  const std::string what = count > 1 ? words[1] : "";
  if (what == "launch") {
    check_launches();
    check_workspace();
    return failures ? 1 : 0;
  }
  if ((what != "encode" && what != "decode" && what != "update") || count != 11) {
    std::fprintf(stderr, "usage: see the head of %s\n", __FILE__);
    return 2;
  }
  std::ifstream file(words[2], std::ios::binary);
  const std::string in{std::istreambuf_iterator<char>(file), {}};
  const auto number = [&](int i) { return std::atol(words[i]); };
  const Case c{number(4), number(5), number(6), number(7), number(8), static_cast<lct::DType>(number(9)), number(10)};
  const Update u{number(4),          number(5),          number(6),          number(7),
                 std::atof(words[8]), std::atof(words[9]), std::atof(words[10])};
  const auto run = [&] {
    return what == "encode" ? encode(c, in, workspace_for(c, c.rows)) : what == "decode" ? decode(c, in) : update(u, in);
  };
  const std::string out = run();
  for (host_cuda::seed = 1; host_cuda::seed < 3; ++host_cuda::seed) {
    if (run() != out) fail("bits vary with the order of threads");
  }
  if (what == "encode" && c.rows > 4096 && encode(c, in, workspace_for(c, 4096)) != out)
    fail("bits vary with the length of a wave");
  std::ofstream(words[3], std::ios::binary).write(out.data(), static_cast<std::streamsize>(out.size()));
  return failures ? 1 : 0;
}
