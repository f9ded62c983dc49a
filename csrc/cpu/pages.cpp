#include "cpu/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lct {

#if defined(__linux__)
void advise_huge_pages(void* start, int64_t bytes) {
  constexpr uintptr_t huge = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + huge - 1) / huge * huge;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(bytes)) / huge * huge;
  // Only advice: failure changes nothing but the speed.
  if (last >= first + 2 * huge) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}
#else
void advise_huge_pages(void*, int64_t) {}
#endif

}  // namespace lct
