#include "cpu/dispatch.h"

#include <atomic>

namespace lct {
namespace {

std::atomic<int>& current() {
  static std::atomic<int> level{static_cast<int>(best_simd_level())};
  return level;
}

}  // namespace

SimdLevel best_simd_level() {
#ifdef LCT_X86
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) return SimdLevel::avx512vnni;
  if (avx512) return SimdLevel::avx512;
  if (avx2) return SimdLevel::avx2;
#endif
  return SimdLevel::scalar;
}

SimdLevel simd_level() { return static_cast<SimdLevel>(current().load(std::memory_order_relaxed)); }

void set_simd_level(SimdLevel level) {
  current().store(static_cast<int>(level), std::memory_order_relaxed);
}

}  // namespace lct
