// What the drivers of elementwise kernels share: failures are counted, buffers have their exact size, launchers are
// called with devices, streams and calls that fail.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "host_cuda.h"

namespace host_driver {

inline int failures = 0;

template <typename... Arguments>
void fail(const char* format, Arguments... args) {
  std::printf(format, args...);
  std::printf("\n");
  ++failures;
}

// Memory of exactly this size, `skip` bytes past malloc's alignment, all bits set.
class Buffer {
 public:
  explicit Buffer(int64_t bytes, int64_t skip = 0)
      : bytes_(bytes), memory_(static_cast<char*>(std::malloc(skip + bytes))) {
    data_ = memory_.get() + skip;
    std::memset(memory_.get(), 0xff, skip + bytes);
  }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  // Takes its bytes of `from`, which begin at `start`; where they end.
  size_t fill(const std::string& from, size_t start) const {
    std::memcpy(data_, from.data() + start, bytes_);
    return start + bytes_;
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

inline void expect_error(const char* what, cudaError_t got, cudaError_t wanted) {
  if (got != wanted) fail("%s: error %d, expected %d", what, static_cast<int>(got), static_cast<int>(wanted));
}

// `run(device, stream)` on either device: it works there, on that stream, and leaves the current device as it was, also
// when one of its calls fails.
template <typename Run>
void check_calls(Run run) {
  const auto stream = reinterpret_cast<cudaStream_t>(uintptr_t{0x5eed});
  for (const int device : {0, 1}) {
    host_cuda::device = 1 - device;
    host_cuda::last_stream = nullptr;
    host_cuda::calls = 0;
    expect_error("a plain call", run(device, stream), cudaSuccess);
    if (host_cuda::last_device != device) fail("ran on device %d, not on %d", host_cuda::last_device, device);
    if (host_cuda::last_stream != stream) fail("did not use the stream");
    if (host_cuda::device != 1 - device) fail("left another device current");

    // Whichever call fails, the launcher says so and puts the device back. (The last call is what does.)
    const int calls = host_cuda::calls;
    for (int i = 0; i + 1 < calls; ++i) {
      host_cuda::calls = 0;
      host_cuda::fail_at_call = i;
      expect_error("a failing call", run(device, stream), cudaErrorUnknown);
      if (host_cuda::device != 1 - device) fail("left another device current after call %d failed", i);
    }
    host_cuda::fail_at_call = -1;
  }
  host_cuda::device = 0;
  expect_error("no such device", run(2, stream), cudaErrorInvalidDevice);
}

}  // namespace host_driver
