#include "lct/group_linear.h"

#include <algorithm>

#ifdef LCT_X86
#include <cpuid.h>
#endif

#include "cpu/group_linear_tasks.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"

namespace lct {
namespace {

constexpr int64_t kCacheLine = 64;
// A block of x should stay in L2 (floats), with as many rows as use each panel of weight often.
constexpr int64_t kBlock = int64_t{1} << 18;
constexpr int64_t kMostRows = 96, kLeastRows = 48;
// Rows of the register tiles divide this.
constexpr int64_t kRowStep = 12;
// Sums of dbias, one a chunk of rows.
constexpr int64_t kMostChunks = 256;

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t rounded_up(int64_t n, int64_t to) { return pieces(n, to) * to; }

const GroupLinearTasks& tasks() { return LCT_AT_LEVEL(group_linear_tasks); }

// Whether the AVX-512 kernels may multiply bf16 in pairs.
bool has_bf16_products() {
#ifdef LCT_X86
  unsigned a, b, c, d;
  constexpr unsigned avx512_bf16 = 1u << 5;
  return simd_level() >= SimdLevel::avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & avx512_bf16);
#else
  return false;
#endif
}

// Hands out pieces of a workspace, or only counts them where it is null.
class Layout {
 public:
  explicit Layout(void* base) : base_(static_cast<char*>(base)) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(base);
    used_ = base ? static_cast<int64_t>((kCacheLine - start % kCacheLine) % kCacheLine) : kCacheLine;
  }
  void take(float*& to, int64_t floats) {
    to = base_ ? reinterpret_cast<float*>(base_ + used_) : nullptr;
    used_ += rounded_up(floats * static_cast<int64_t>(sizeof(float)), kCacheLine);
  }
  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* base_;
  int64_t used_;
};

size_t plan(GroupLinearWork& work, int threads, void* workspace) {
  const GroupLinearShape& shape = work.args.shape;
  work.output_panels = pieces(shape.outputs, kPanel);
  work.class_panels = pieces(shape.classes, kPanel);
  work.column_blocks = pieces(shape.outputs, kColumns);
  work.pairs = work.args.x_dtype == DType::bf16 && has_bf16_products();
  work.words = work.pairs ? pieces(shape.inputs, 2) : shape.inputs;
  work.depths = pieces(work.words, kDepth);

  const int64_t row_floats = work.depths * kStride;
  const int64_t most = std::clamp(kBlock / row_floats / kRowStep * kRowStep, 2 * kRowStep, kMostRows);
  // Rows don't depend on each other, so how they are shared out may depend on the threads.
  const int64_t shares = rounded_up(pieces(shape.rows, most), threads);
  work.block_rows =
      std::clamp(rounded_up(pieces(shape.rows, shares), kRowStep), std::min(kLeastRows, most), most);
  const int64_t row_blocks = pieces(shape.rows, work.block_rows);
  work.blocks_a_task = pieces(work.column_blocks, pieces(threads, row_blocks));
  work.split = work.blocks_a_task < work.column_blocks;

  const int64_t lanes = work.class_panels * kPanel;
  work.block_size = work.depths * (work.block_rows + kSpareRows) * kStride;
  work.tile_size = (work.block_rows + kSpareRows) * kStride;
  const int64_t partial_rows = work.split ? shape.rows : work.block_rows;
  const int64_t partial_size = work.column_blocks * partial_rows * lanes;
  work.scratch_size = work.block_size + work.tile_size + (work.split ? 0 : partial_size);

  Layout layout(workspace);
  layout.take(work.weight, work.output_panels * kPanel * work.words);
  layout.take(work.bias, work.output_panels * kPanel);
  layout.take(work.critic, lanes * shape.outputs);
  layout.take(work.critic_bias, lanes);
  layout.take(work.partial, work.split ? partial_size : 0);
  layout.take(work.scratch, work.scratch_size * threads);
  return layout.used();
}

size_t plan(GroupLinearBackwardWork& work, int threads, void* workspace) {
  const GroupLinearShape& shape = work.args.shape;
  work.output_panels = pieces(shape.outputs, kPanel);
  work.column_blocks = pieces(shape.outputs, kColumns);
  work.depths = pieces(shape.classes, kDepth);
  work.block_rows = kMostRows;
  work.chunk_rows = kMostRows * pieces(shape.rows, kMostRows * kMostChunks);
  work.chunks = pieces(shape.rows, work.chunk_rows);
  work.block_size = work.depths * (work.block_rows + kSpareRows) * kStride;
  work.scratch_size = work.block_size + (work.block_rows + kSpareRows) * kStride;

  Layout layout(workspace);
  layout.take(work.critic, work.output_panels * kPanel * shape.classes);
  layout.take(work.sums, work.chunks * work.output_panels * kPanel);
  layout.take(work.scratch, work.scratch_size * threads);
  return layout.used();
}

}  // namespace

size_t group_linear_cpu_workspace(const GroupLinearShape& shape, DType x_dtype, int threads) {
  GroupLinearWork work{};
  work.args.shape = shape;
  work.args.x_dtype = x_dtype;
  return plan(work, threads, nullptr);
}

void group_linear_cpu(const GroupLinear& args, int threads) {
  const GroupLinearTasks& task = tasks();
  const GroupLinearShape& shape = args.shape;
  GroupLinearWork work{};
  work.args = args;
  plan(work, threads, args.workspace);
  advise_huge_pages(args.h, shape.rows * shape.outputs * (args.x_dtype == DType::f32 ? 4 : 2));

  parallel_for(threads, work.output_panels + work.class_panels, [&](int64_t panel, int) {
    if (panel < work.output_panels) task.pack_weight(work, panel);
    else task.pack_critic(work, panel - work.output_panels);
  });
  const int64_t row_blocks = pieces(shape.rows, work.block_rows);
  const int64_t column_tasks = pieces(work.column_blocks, work.blocks_a_task);
  parallel_for(threads, row_blocks * column_tasks, [&](int64_t index, int slot) {
    const int64_t first = index / column_tasks * work.block_rows;
    const int64_t count = std::min(work.block_rows, shape.rows - first);
    task.rows(work, first, count, index % column_tasks * work.blocks_a_task, slot);
  });
  if (!work.split || !args.critic_weight) return;
  parallel_for(threads, row_blocks, [&](int64_t block, int) {
    const int64_t first = block * work.block_rows;
    task.logits(work, first, std::min(work.block_rows, shape.rows - first));
  });
}

size_t group_linear_backward_cpu_workspace(const GroupLinearShape& shape, int threads) {
  GroupLinearBackwardWork work{};
  work.args.shape = shape;
  return plan(work, threads, nullptr);
}

void group_linear_backward_cpu(const GroupLinearBackward& args, int threads) {
  const GroupLinearTasks& task = tasks();
  const GroupLinearShape& shape = args.shape;
  GroupLinearBackwardWork work{};
  work.args = args;
  plan(work, threads, args.workspace);
  advise_huge_pages(args.dpre, shape.rows * shape.outputs * (args.x_dtype == DType::f32 ? 4 : 2));

  if (args.dlogits)
    parallel_for(threads, work.output_panels, [&](int64_t panel, int) { task.pack_backward(work, panel); });
  parallel_for(threads, work.chunks * work.column_blocks, [&](int64_t index, int slot) {
    task.chunk(work, index / work.column_blocks, index % work.column_blocks, slot);
  });
  task.fold(work);
}

}  // namespace lct
