#include "lct/critic_head.h"

#include <algorithm>

#include "cpu/critic_head_tasks.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"

namespace lct {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kMostChunks = 128;
// Floats of dweight up to which every chunk of rows gets sums of its own: they should stay in L2.
constexpr int64_t kMostChunkSums = int64_t{1} << 16;
// Floats that all chunks' sums may take together (16 MiB).
constexpr int64_t kMostSums = int64_t{1} << 22;
// Floats of dlogits, and of h, behind a slab (8 MiB): what pass two reads again should still be in cache.
constexpr int64_t kSlab = int64_t{1} << 21;
// Floats of a block of h: half a megabyte, within L2.
constexpr int64_t kBlock = int64_t{1} << 17;
// Bytes of h and dh beyond which dh would only push other data out of the last cache.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t rounded_up(int64_t n, int64_t to) { return pieces(n, to) * to; }

// The task to take `index`-th: threads work through runs of their own, far apart. Side by side they would touch
// a fresh page of dh together, and the system would clear it once for each.
int64_t spread(int64_t index, int64_t tasks, int threads) {
  const int64_t runs = std::min<int64_t>(threads, tasks);
  const int64_t length = tasks / runs, longer = tasks % runs;
  const int64_t run = index < length * runs ? index % runs : index - length * runs;
  const int64_t step = index < length * runs ? index / runs : length;
  return run * length + std::min(run, longer) + step;
}

const CriticHeadTasks& tasks() { return LCT_AT_LEVEL(critic_head_tasks); }

// Lays out the workspace from `base`, or only counts it where base is null. Returns bytes.
size_t plan(CriticHeadWork& work, bool with_wgrad, int threads, void* base) {
  const CriticHead& args = work.args;
  const bool with_weight = !work.given_dlogits;
  work.class_panels = pieces(args.classes, kClassPanel);
  work.column_panels = pieces(args.depth, kColumnPanel);
  const int64_t columns = work.column_panels * kColumnPanel;
  const int64_t lanes = work.class_panels * kClassPanel;

  work.block_rows = columns * 64 <= kBlock ? 64 : columns * 32 <= kBlock ? 32 : 16;
  work.block_stride = (work.block_rows + kSpareRows) * kColumnPanel;
  work.dlogits_stride = (work.block_rows + kSpareRows) * kClassPanel;
  work.scratch_size = work.column_panels * work.block_stride + work.class_panels * work.dlogits_stride;
  work.sums_size = args.classes * columns + lanes;

  // Sums cost memory traffic of their own: at least four rows a class before the next chunk starts.
  const int64_t chunk_least = std::max<int64_t>(work.block_rows, 4 * args.classes);
  int64_t chunks = 1;
  while (chunks < kMostChunks && 2 * chunks * chunk_least <= args.rows &&
         2 * chunks * work.sums_size <= kMostSums)
    chunks *= 2;
  work.use_chunks = with_wgrad && work.sums_size <= kMostChunkSums && args.rows >= 16 * chunk_least;
  work.use_slab = with_wgrad && !work.use_chunks;
  work.chunks = work.use_chunks ? chunks : 1;
  work.chunk_rows = pieces(args.rows, work.chunks);
  work.slab_rows =
      work.use_slab ? std::clamp<int64_t>(rounded_up(kSlab / std::max(lanes, columns), work.block_rows),
                                          work.block_rows, rounded_up(args.rows, work.block_rows))
                    : 0;

  const uintptr_t start = reinterpret_cast<uintptr_t>(base);
  int64_t used = base ? static_cast<int64_t>(rounded_up(start, kCacheLine) - start) : kCacheLine;
  const auto take = [&](float*& to, int64_t floats) {
    to = base && floats ? reinterpret_cast<float*>(static_cast<char*>(base) + used) : nullptr;
    used += rounded_up(floats * static_cast<int64_t>(sizeof(float)), kCacheLine);
  };
  take(work.weight_by_class, with_weight ? lanes * args.depth : 0);
  take(work.weight_by_column, with_weight ? args.classes * columns : 0);
  take(work.bias, with_weight ? lanes : 0);
  take(work.scratch, work.scratch_size * std::max(threads, 1));
  take(work.sums, with_wgrad ? work.chunks * work.sums_size : 0);
  take(work.slab, work.use_slab ? work.slab_rows * lanes : 0);
  return static_cast<size_t>(used);
}

void run(CriticHeadWork& work, bool with_wgrad, int threads) {
  const CriticHead& args = work.args;
  plan(work, with_wgrad, threads, args.workspace);
  const CriticHeadTasks& task = tasks();
  if (!work.given_dlogits && args.rows > 0)
    parallel_for(threads, work.column_panels, [&](int64_t panel, int) { task.pack_weight(work, panel); });

  if (work.use_chunks) {
    parallel_for(threads, work.chunks, [&](int64_t index, int slot) {
      task.chunk(work, spread(index, work.chunks, threads), slot);
    });
  } else {
    if (with_wgrad) std::fill_n(work.sums, work.sums_size, 0.0f);
    const int64_t groups = pieces(work.class_panels, kClassGroup);
    const int64_t slab_rows = work.use_slab ? work.slab_rows : std::max<int64_t>(args.rows, 1);
    for (int64_t first = 0; first < args.rows; first += slab_rows) {
      const int64_t count = std::min(slab_rows, args.rows - first);
      // Rows don't depend on each other, so how they are shared out may depend on the threads.
      const int64_t share = std::clamp<int64_t>(rounded_up(pieces(count, threads), 8), 8, 8 * work.block_rows);
      const int64_t shares = pieces(count, share);
      parallel_for(threads, shares, [&](int64_t index, int slot) {
        const int64_t start = spread(index, shares, threads) * share;
        task.rows(work, first + start, std::min(share, count - start), first, slot);
      });
      if (!work.use_slab) continue;
      parallel_for(threads, work.column_panels * groups, [&](int64_t index, int slot) {
        task.slab(work, first, count, index / groups, index % groups, slot);
      });
    }
  }
  if (with_wgrad)
    parallel_for(threads, work.column_panels, [&](int64_t panel, int) { task.fold(work, panel); });
}

CriticHeadWork head_work(const CriticHead& args) {
  CriticHeadWork work{};
  work.args = args;
  const int64_t bytes = args.rows * args.depth * 8;
  work.stream_dh = args.h_dtype == DType::f32 && bytes > kStreamBytes && args.depth % kClassPanel == 0 &&
                   reinterpret_cast<uintptr_t>(args.dh) % kCacheLine == 0;
  return work;
}

// Never read, only told from null.
const char given = 0;

CriticHeadWork shape_work(int64_t rows, int64_t depth, int64_t classes, bool wgrad_alone) {
  CriticHeadWork work{};
  work.args.rows = rows;
  work.args.depth = depth;
  work.args.classes = classes;
  if (wgrad_alone) work.given_dlogits = &given;
  return work;
}

}  // namespace

size_t critic_head_cpu_workspace(int64_t rows, int64_t depth, int64_t classes, DType, DType, bool with_wgrad,
                                 int threads) {
  CriticHeadWork work = shape_work(rows, depth, classes, false);
  return plan(work, with_wgrad, threads, nullptr);
}

void critic_head_cpu(const CriticHead& args, int threads) {
  CriticHeadWork work = head_work(args);
  advise_huge_pages(args.dh, args.rows * args.depth * (args.h_dtype == DType::f32 ? 4 : 2));
  const bool with_wgrad = args.dweight && (args.row_scale || args.rows == 0);
  run(work, with_wgrad, threads);
}

size_t critic_head_wgrad_cpu_workspace(int64_t rows, int64_t depth, int64_t classes, DType, DType,
                                       int threads) {
  CriticHeadWork work = shape_work(rows, depth, classes, true);
  return plan(work, true, threads, nullptr);
}

void critic_head_wgrad_cpu(const CriticHeadWgrad& args, int threads) {
  CriticHeadWork work = shape_work(args.rows, args.depth, args.classes, true);
  work.args.h = args.h;
  work.args.row_scale = args.row_scale;
  work.args.dweight = args.dweight;
  work.args.dbias = args.dbias;
  work.args.workspace = args.workspace;
  work.args.h_dtype = args.h_dtype;
  work.args.weight_dtype = args.weight_dtype;
  work.args.activation = args.activation;
  work.given_dlogits = args.rows > 0 ? args.dlogits : &given;
  run(work, true, threads);
}

}  // namespace lct
