// The two pieces of consensus that run in parallel, compiled once an instruction set.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "lct/consensus.h"

namespace lct {

struct ConsensusTasks {
  // Rows [first, first + count).
  void (*adjoint)(const ConsensusAdjoint&, int64_t first, int64_t count);
  // Values [first, first + count).
  void (*update)(const ConsensusUpdate&, int64_t first, int64_t count);
};

namespace scalar {
extern const ConsensusTasks consensus_tasks;
}
namespace avx2 {
extern const ConsensusTasks consensus_tasks;
}
namespace avx512 {
extern const ConsensusTasks consensus_tasks;
}

}  // namespace lct
