// A large output is usually fresh memory, and its first touch costs more than the kernel that writes it: 8192
// page faults for 32 MB. Where the system leaves the choice to programs, ask for 2 MB pages.
#pragma once

#include <cstdint>

namespace lct {

// Asks for huge pages in [start, start + bytes); does nothing where that is small or unknown to the system.
void advise_huge_pages(void* start, int64_t bytes);

}  // namespace lct
