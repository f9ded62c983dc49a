#include "cpu/parallel.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#endif

namespace lct {
namespace {

struct Region {
  void (*body)(void*, int64_t, int);
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next_task{0};
  std::atomic<int> next_slot{0};
};

void work(void* argument) {
  Region& region = *static_cast<Region*>(argument);
  const int slot = region.next_slot.fetch_add(1, std::memory_order_relaxed);
  for (;;) {
    const int64_t task = region.next_task.fetch_add(1, std::memory_order_relaxed);
    if (task >= region.tasks) return;
    region.body(region.context, task, slot);
  }
}

// GOMP_parallel(function, data, threads, flags): GCC's entry into a parallel region, stable since GCC 4.9
// and offered by LLVM's and Intel's runtimes too.
using Launch = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if defined(__linux__)

struct Mapped {
  char path[4096];
};

int find_openmp(dl_phdr_info* library, size_t, void* found) {
  const char* path = library->dlpi_name;
  if (!path || std::strlen(path) >= sizeof(Mapped::path)) return 0;
  for (const char* runtime : {"/libgomp", "/libiomp5", "/libomp"}) {
    if (!std::strstr(path, runtime)) continue;
    std::strcpy(static_cast<Mapped*>(found)->path, path);
    return 1;
  }
  return 0;
}

Launch find_launch() {
  // What is visible to everyone comes first: torch makes the runtime that it uses so.
  void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  if (!symbol) {
    Mapped mapped;
    const bool present = dl_iterate_phdr(find_openmp, &mapped) != 0;
    void* handle = dlopen(present ? mapped.path : "libgomp.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (handle) symbol = dlsym(handle, "GOMP_parallel");
  }
  return reinterpret_cast<Launch>(symbol);
}

#else

Launch find_launch() { return nullptr; }

#endif

void launch(unsigned threads, Region& region) {
  static const Launch openmp = find_launch();
  if (openmp) {
    openmp(work, &region, threads, 0);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    while (others.size() + 1 < threads) others.emplace_back(work, &region);
  } catch (const std::system_error&) {
    // Fewer threads than asked for do the same work.
  }
  work(&region);
  for (std::thread& other : others) other.join();
}

}  // namespace

void parallel_for(int threads, int64_t tasks, void (*body)(void*, int64_t, int), void* context) {
  if (tasks < threads) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
    return;
  }
  Region region{body, context, tasks};
  launch(static_cast<unsigned>(threads), region);
}

}  // namespace lct
