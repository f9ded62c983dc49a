#include "lct/consensus.h"

#include <algorithm>

#include "cpu/consensus_tasks.h"
#include "cpu/parallel.h"

namespace lct {
namespace {

// Values a task: enough to pay for claiming it, few enough that threads end together.
constexpr int64_t kTask = int64_t{1} << 15;

const ConsensusTasks& tasks() { return LCT_AT_LEVEL(consensus_tasks); }

template <class Args>
void run(const Args& args, void (*task)(const Args&, int64_t, int64_t), int64_t count, int64_t each,
         int threads) {
  parallel_for(threads, (count + each - 1) / each, [&](int64_t index, int) {
    const int64_t first = index * each;
    task(args, first, std::min(each, count - first));
  });
}

}  // namespace

void consensus_adjoint_cpu(const ConsensusAdjoint& args, int threads) {
  const int64_t each = std::max<int64_t>(1, kTask / std::max<int64_t>(1, args.depth));
  run(args, tasks().adjoint, args.rows, each, threads);
}

void consensus_update_cpu(const ConsensusUpdate& args, int threads) {
  run(args, tasks().update, args.size, kTask, threads);
}

}  // namespace lct
