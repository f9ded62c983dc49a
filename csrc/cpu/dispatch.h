// Which instruction set the CPU kernels use.
//
// Every *_simd.cpp is compiled once a level, in a namespace named after it, with that level's compiler flags; but
// for avx512vnni, which adds products of bytes to avx512: what uses those stands in *_vnni.cpp, the rest is shared.
// Such a file may include nothing whose inline functions the linker could merge across levels (no standard
// containers or algorithms): the copy kept might use instructions that this CPU lacks.
#pragma once

namespace lct {

enum class SimdLevel : int { scalar = 0, avx2 = 1, avx512 = 2, avx512vnni = 3 };

inline const char* name_of(SimdLevel level) {
  constexpr const char* names[] = {"scalar", "avx2", "avx512", "avx512vnni"};
  return names[static_cast<int>(level)];
}

// The best one that both this CPU and this build have.
SimdLevel best_simd_level();

// The one in use: the best, unless a test has chosen a lower one.
SimdLevel simd_level();
void set_simd_level(SimdLevel level);

// `tasks` of the namespace that belongs to the level in use; levels beyond avx512 share its kernels.
#ifdef LCT_X86
#define LCT_AT_LEVEL(tasks)                                               \
  (::lct::simd_level() >= ::lct::SimdLevel::avx512 ? ::lct::avx512::tasks \
   : ::lct::simd_level() == ::lct::SimdLevel::avx2 ? ::lct::avx2::tasks   \
                                                   : ::lct::scalar::tasks)
#else
#define LCT_AT_LEVEL(tasks) (::lct::scalar::tasks)
#endif

}  // namespace lct
