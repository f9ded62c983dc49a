// The two pieces of perturb that run in parallel, compiled once an instruction set.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "lct/perturb.h"

namespace lct {

// Values of noise that are made at once; a task is a whole number of them.
constexpr int64_t kNoiseChunk = 256;

struct PerturbTasks {
  // Noise [first, first + count) of the call, and what it goes to: with antithetic pairs both of each.
  void (*perturb)(const Perturb&, int64_t first, int64_t count);
  void (*score)(const Score&, int64_t first, int64_t count);
};

namespace scalar {
extern const PerturbTasks perturb_tasks;
}
namespace avx2 {
extern const PerturbTasks perturb_tasks;
}
namespace avx512 {
extern const PerturbTasks perturb_tasks;
}

}  // namespace lct
