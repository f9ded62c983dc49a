#include "lct/block_quantize.h"

#include <algorithm>

#include "cpu/block_quantize_tasks.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"

namespace lct {
namespace {

// Values a task: enough to pay for claiming it, few enough that threads end together.
constexpr int64_t kTask = int64_t{1} << 15;

const BlockQuantizeTasks& tasks() { return LCT_AT_LEVEL(block_quantize_tasks); }

template <class Args>
void run(const Args& args, void (*task)(const Args&, int64_t, int64_t), int threads) {
  const int64_t blocks = args.size / args.block + (args.size % args.block != 0);
  const int64_t each = kTask / args.block;
  parallel_for(threads, (blocks + each - 1) / each, [&](int64_t index, int) {
    const int64_t first = index * each;
    task(args, first, std::min(each, blocks - first));
  });
}

}  // namespace

void block_quantize_cpu(const BlockQuantize& args, int threads) { run(args, tasks().quantize, threads); }

void block_dequantize_cpu(const BlockDequantize& args, int threads) {
  advise_huge_pages(args.x, args.size * (args.dtype == DType::f32 ? 4 : 2));
  run(args, tasks().dequantize, threads);
}

}  // namespace lct
