// The fibers behind host_cuda.h. Build this file without UBSan and with optimization: nearly all the time of
// a run goes into switching.
#include "host_cuda.h"

#include <ucontext.h>

#include <cstdio>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace host_cuda {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
};

struct Warp {
  unsigned arrived = 0, mask = 0;
  int operation = 0;
  uint64_t given[kWarpSize], published[kWarpSize];
};

struct Block {
  std::mt19937& draw;
  unsigned size, now, ended;
  std::vector<Warp> warps;
  std::vector<unsigned> ready, waiting;
  void (*body)(const void*);
  const void* of;
  ucontext_t main;
  void* main_fake_stack;
  const void* main_stack;
  size_t main_bytes;
};

Block* block = nullptr;
std::vector<Fiber> fibers;  // kept from block to block

// AddressSanitizer has to know which stack it is looking at.
void start_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* stack,
                  [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#endif
}

void finish_switch([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** stack,
                   [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, stack, bytes);
#endif
}

unsigned pick() {
  std::vector<unsigned>& ready = block->ready;
  if (ready.empty()) stop("others wait at a barrier or warp operation that not every thread reaches");
  std::swap(ready[block->draw() % ready.size()], ready.back());
  const unsigned next = ready.back();
  ready.pop_back();
  return next;
}

Fiber& go_to(unsigned next) {
  block->now = next;
  threadIdx = dim3(next, 0, 0);
  return fibers[next];
}

// Lets any thread that can run go on, perhaps the caller.
void yield() {
  const unsigned mine = block->now, next = pick();
  if (next == mine) return;
  Fiber& to = go_to(next);
  start_switch(&fibers[mine].fake_stack, to.stack.get(), kStackBytes);
  swapcontext(&fibers[mine].context, &to.context);
  finish_switch(fibers[mine].fake_stack, nullptr, nullptr);
}

void thread_main() {
  const void* from = nullptr;
  size_t bytes = 0;
  finish_switch(nullptr, &from, &bytes);
  // The first thread to run comes from the caller of run_block.
  if (block->main_stack == nullptr) {
    block->main_stack = from;
    block->main_bytes = bytes;
  }
  block->body(block->of);
  if (++block->ended == block->size) {
    start_switch(nullptr, block->main_stack, block->main_bytes);
    setcontext(&block->main);
  }
  Fiber& to = go_to(pick());
  start_switch(nullptr, to.stack.get(), kStackBytes);
  setcontext(&to.context);
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), kStackBytes);
#endif
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  fiber.fake_stack = nullptr;
  makecontext(&fiber.context, &thread_main, 0);
  // AddressSanitizer would otherwise clear what it knows of the stack at each switch, which takes most of the
  // time and hides overflows of arrays that live across a barrier.
  fiber.context.uc_stack.ss_size = 0;
}

}  // namespace

void stop(const char* what) {
  std::fprintf(stderr, "host_cuda: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

void run_block(unsigned threads, std::mt19937& draw, void (*body)(const void*), const void* of) {
  Block mine{draw, threads, 0, 0, {}, {}, {}, body, of, {}, nullptr, nullptr, 0};
  mine.warps.resize((threads + kWarpSize - 1) / kWarpSize);
  block = &mine;
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    prepare(fibers[i]);
    mine.ready.push_back(i);
  }
  Fiber& first = go_to(pick());
  start_switch(&mine.main_fake_stack, first.stack.get(), kStackBytes);
  swapcontext(&mine.main, &first.context);
  finish_switch(mine.main_fake_stack, nullptr, nullptr);
  block = nullptr;
}

void barrier() {
  block->waiting.push_back(block->now);
  if (block->waiting.size() == block->size) block->ready.swap(block->waiting);
  yield();
}

const uint64_t* exchange(unsigned mask, uint64_t value, int operation) {
  Warp& warp = block->warps[block->now / kWarpSize];
  const unsigned lane = block->now % kWarpSize, bit = 1u << lane;
  if (!(mask & bit)) stop("calls a warp operation whose mask leaves it out");
  if (warp.arrived && (warp.mask != mask || warp.operation != operation)) {
    stop("meets lanes of its warp at another operation");
  }
  warp.mask = mask;
  warp.operation = operation;
  warp.given[lane] = value;
  warp.arrived |= bit;
  if (warp.arrived == mask) {
    // The next exchange cannot be published before every lane has come back for this one.
    std::copy(warp.given, warp.given + kWarpSize, warp.published);
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (mask >> i & 1) block->ready.push_back(block->now - lane + i);
    }
    warp.arrived = 0;
  }
  yield();
  return warp.published;
}

}  // namespace host_cuda
