#include "lct/perturb.h"

#include <algorithm>

#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/perturb_tasks.h"

namespace lct {
namespace {

// Values of noise a task: enough to pay for claiming it, few enough that threads end together.
constexpr int64_t kTask = 64 * kNoiseChunk;

const PerturbTasks& tasks() { return LCT_AT_LEVEL(perturb_tasks); }

template <class Args>
void run(const Args& args, void (*task)(const Args&, int64_t, int64_t), int threads) {
  const int64_t size = args.shape.rows * args.shape.channels * args.shape.inner;
  advise_huge_pages(args.out, size * (args.dtype == DType::f32 ? 4 : 2));
  const int64_t count = args.noise.antithetic ? size / 2 : size;
  parallel_for(threads, (count + kTask - 1) / kTask, [&](int64_t index, int) {
    const int64_t first = index * kTask;
    task(args, first, std::min(kTask, count - first));
  });
}

}  // namespace

void perturb_cpu(const Perturb& args, int threads) { run(args, tasks().perturb, threads); }

void score_cpu(const Score& args, int threads) { run(args, tasks().score, threads); }

}  // namespace lct
