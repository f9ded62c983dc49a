#include "lct/vq.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <mutex>

#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/vq_filter.h"
#include "cpu/vq_tasks.h"

namespace lct {
namespace {

constexpr int64_t kCacheLine = 64;
// Rows that a task of the decoder takes; a multiple of eight, so that its codes start with a byte.
constexpr int64_t kDecodeRows = 1024;
// Words that a task of the packing takes; a multiple of six.
constexpr int64_t kPackWords = 384;
// Columns up to which a run's sums are kept twice.
constexpr int64_t kShortWidth = 8;
// With two places for each, threads seldom wait for the turn of another's run.
constexpr int64_t kPlacesPerThread = 2;
// Fewer columns, words or rows than these gain nothing by the filter; more columns would overflow its scores.
constexpr int64_t kLeastFilterDepth = 8, kMostFilterDepth = 4096, kLeastFilterWords = 48, kLeastFilterRows = 256;
// With many words, making numbers of them costs more than the filter saves unless rows are many, too.
constexpr int64_t kFilterWordsPerRow = 16;
// With fewer columns words lie so close together that numbers of eight bits seldom tell which is the nearest.
constexpr int64_t kByteDepth = 24;

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t rounded_up(int64_t n, int64_t to) { return pieces(n, to) * to; }

int64_t bits_of(int64_t codewords) {
  int64_t bits = 0;
  while ((int64_t{1} << bits) < codewords) ++bits;
  return bits;
}

const VqTasks& tasks() { return LCT_AT_LEVEL(vq_tasks); }

// The filter where it can be used and is worth while, else null.
const VqFilter* filter_for(const VqEncode& args) {
#ifdef LCT_X86
  const bool fits = args.depth >= kLeastFilterDepth && args.depth <= kMostFilterDepth &&
                    args.codewords >= kLeastFilterWords &&
                    args.rows >= std::max(kLeastFilterRows, args.codewords / kFilterWordsPerRow);
  if (fits && simd_level() == SimdLevel::avx512vnni)
    return args.depth < kByteDepth ? &avx512vnni::vq_filter_16_bits : &avx512vnni::vq_filter_8_bits;
#endif
  return nullptr;
}

// Hands out the workspace piece by piece from `base`, or only counts where base is null.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(base);
    used_ = base ? rounded_up(static_cast<int64_t>(start % kCacheLine), kCacheLine) -
                       static_cast<int64_t>(start % kCacheLine)
                 : kCacheLine;
  }
  template <class T>
  T* take(int64_t count) {
    T* to = base_ && count ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += rounded_up(count * static_cast<int64_t>(sizeof(T)), kCacheLine);
    return to;
  }
  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* base_;
  int64_t used_;
};

int64_t places_of(int64_t rows, int threads) {
  const int64_t runs = pieces(rows, kVqRun);
  return std::min<int64_t>(runs, threads > 1 ? threads * kPlacesPerThread : 1);
}

// Lays out the workspace from `base`, or only counts it where base is null. Returns bytes.
size_t plan(VqWork& work, int threads, void* base) {
  const VqEncode& args = work.args;
  work.bits = bits_of(args.codewords);
  work.width = rounded_up(args.depth, 4);
  work.tiles = pieces(args.codewords, kVqTile);
  work.copies = work.width <= kShortWidth ? 2 : 1;
  work.scratch_bytes = rounded_up(tasks().scratch_bytes(work), kCacheLine);
  work.places_count = std::min<int64_t>(pieces(args.rows, kVqRun), threads > 1 ? threads * kPlacesPerThread : 1);
  const int64_t floats = args.groups * args.codewords * work.width;
  const int64_t slots = args.groups * args.slots;
  const bool padded = work.width != args.depth;

  Arena arena(base);
  work.padded_words = arena.take<float>(padded ? floats : 0);
  work.words = padded ? work.padded_words : args.codebook;
  work.panels = arena.take<float>(args.groups * work.tiles * kVqPitch * args.depth);
  work.half_norms = arena.take<float>(args.groups * work.tiles * kVqPitch);
  work.scratch = arena.take<char>(work.scratch_bytes * threads);
  work.filter = filter_for(args);
  work.filter_group_bytes = work.filter ? rounded_up(work.filter->group_bytes(work), kCacheLine) : 0;
  work.filter_scratch_bytes = work.filter ? rounded_up(work.filter->scratch_bytes(work), kCacheLine) : 0;
  work.filter_words = arena.take<char>(work.filter_group_bytes * args.groups);
  work.filter_scratch = arena.take<char>(work.filter_scratch_bytes * threads);
  work.chunk_sums = arena.take<float>(floats);
  float* total = arena.take<float>(padded ? floats : 0);
  work.total_sums = padded ? total : args.sums;
  work.slot_rows = arena.take<int64_t>(slots);
  work.ready = arena.take<bool>(work.places_count);
  work.places = arena.take<VqPlace>(work.places_count);
  for (int64_t i = 0; i < work.places_count; ++i) {
    float* sums = arena.take<float>(work.copies * floats);
    int32_t* counts = arena.take<int32_t>(args.groups * args.codewords);
    float* slot_scores = arena.take<float>(slots);
    int64_t* slot_rows = arena.take<int64_t>(slots);
    if (base) work.places[i] = {sums, counts, slot_scores, slot_rows, 0.0f, false};
  }
  return arena.used();
}

// Runs are worked on in any order and folded in theirs: run i uses place i mod count, once run i - count has
// been folded out of it. Runs are claimed in rising order, so the one that everybody waits for is being worked
// on; whoever ends a run folds all whose turn has come.
class InOrder {
 public:
  InOrder(const VqTasks& task, VqWork& work) : task_(task), work_(work) {}

  VqPlace& begin(int64_t run) {
    std::unique_lock<std::mutex> lock(mutex_);
    turn_.wait(lock, [&] { return run - folded_ < work_.places_count; });
    return work_.places[run % work_.places_count];
  }

  void end(int64_t run) {
    std::lock_guard<std::mutex> lock(mutex_);
    work_.ready[run % work_.places_count] = true;
    for (bool* ready; *(ready = work_.ready + folded_ % work_.places_count);) {
      *ready = false;
      const int64_t rows = (folded_ + 1) * kVqRun;
      task_.fold(work_, work_.places[folded_ % work_.places_count], rows % kVqChunk == 0 || rows >= work_.args.rows);
      ++folded_;
    }
    turn_.notify_all();
  }

 private:
  const VqTasks& task_;
  VqWork& work_;
  int64_t folded_ = 0;
  std::mutex mutex_;
  std::condition_variable turn_;
};

}  // namespace

size_t vq_encode_cpu_workspace(int64_t rows, int64_t groups, int64_t codewords, int64_t depth, int64_t slots,
                               DType dtype, int threads) {
  VqWork work{};
  work.args.rows = rows;
  work.args.groups = groups;
  work.args.codewords = codewords;
  work.args.depth = depth;
  work.args.slots = slots;
  work.args.dtype = dtype;
  return plan(work, threads, nullptr);
}

void vq_encode_cpu(const VqEncode& args, int threads) {
  VqWork work{};
  work.args = args;
  plan(work, threads, args.workspace);
  const VqTasks& task = tasks();
  const int64_t words = args.groups * args.codewords, slots = args.groups * args.slots;

  const int64_t shares = pieces(args.codewords, kPackWords);
  parallel_for(threads, args.groups * shares, [&](int64_t index, int) {
    const int64_t first = index % shares * kPackWords;
    task.pack(work, index / shares, first, std::min(kPackWords, args.codewords - first));
  });
  if (work.filter)
    parallel_for(threads, args.groups, [&](int64_t group, int) { work.filter->prepare(work, group); });
  std::fill_n(work.chunk_sums, words * work.width, 0.0f);
  std::fill_n(work.total_sums, words * work.width, 0.0f);
  std::fill_n(args.counts, words, int64_t{0});
  std::fill_n(args.candidate_scores, slots, 0.0f);
  std::fill_n(work.ready, work.places_count, false);
  for (int64_t i = 0; i < work.places_count; ++i) {
    std::fill_n(work.places[i].sums, work.copies * words * work.width, 0.0f);
    std::fill_n(work.places[i].counts, words, 0);
  }
  for (int slot = 0; slot < threads; ++slot) {
    task.begin(work, slot);
    if (work.filter) work.filter->begin(work, slot);
  }
  *args.flag = 0;

  InOrder in_order(task, work);
  parallel_for(threads, pieces(args.rows, kVqRun), [&](int64_t run, int slot) {
    VqPlace& place = in_order.begin(run);
    const int64_t first = run * kVqRun;
    task.run(work, first, std::min(kVqRun, args.rows - first), place, slot);
    in_order.end(run);
  });
  for (int64_t group = 0; group < args.groups; ++group) task.finish(work, group);
  *args.squared_error = work.total_error;
}

size_t vq_decode_cpu_workspace(int64_t, int64_t groups, int64_t codewords, int64_t depth, DType dtype) {
  if (dtype == DType::f32) return 0;
  Arena arena(nullptr);
  arena.take<uint16_t>(groups * codewords * depth);
  return arena.used();
}

void vq_decode_cpu(const VqDecode& args, int threads) {
  const VqTasks& task = tasks();
  VqDecodeWork work{args, bits_of(args.codewords), args.codebook};
  if (args.dtype != DType::f32) {
    const int64_t words = args.groups * args.codewords, shares = pieces(words, kPackWords);
    uint16_t* narrow = Arena(args.workspace).take<uint16_t>(words * args.depth);
    work.words = narrow;
    parallel_for(threads, shares, [&](int64_t index, int) {
      const int64_t first = index * kPackWords * args.depth;
      task.narrow(args.codebook + first, narrow + first,
                  std::min(kPackWords * args.depth, words * args.depth - first), args.dtype);
    });
  }
  advise_huge_pages(args.x, args.rows * args.groups * args.depth * (args.dtype == DType::f32 ? 4 : 2));
  std::atomic<bool> flag{false};
  parallel_for(threads, pieces(args.rows, kDecodeRows), [&](int64_t index, int) {
    const int64_t first = index * kDecodeRows;
    if (task.decode(work, first, std::min(kDecodeRows, args.rows - first)))
      flag.store(true, std::memory_order_relaxed);
  });
  *args.flag = flag.load() ? 1 : 0;
}

namespace {

bool all_finite(const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!std::isfinite(x[i])) return false;
  return true;
}

void update_group(const VqUpdate& args, int64_t group) {
  const float decay = static_cast<float>(args.decay), rest = static_cast<float>(1.0 - args.decay);
  const float eps = static_cast<float>(args.eps), least = static_cast<float>(args.revive_below);
  const int64_t K = args.codewords, D = args.depth;
  float* n = args.state_counts + group * K;
  const int64_t* counts = args.counts + group * K;
  float total = 0.0f;
  // Runs of words, so that thousands of counts keep their digits.
  for (int64_t first = 0; first < K; first += 64) {
    float part = 0.0f;
    for (int64_t k = first; k < std::min(K, first + 64); ++k) {
      n[k] = decay * n[k] + rest * static_cast<float>(counts[k]);
      part += n[k];
    }
    total += part;
  }
  const float factor = total / (total + static_cast<float>(K) * eps);
  const float fresh = std::max(total / static_cast<float>(K), least);
  const float* candidate = args.candidates + group * args.slots * D;
  const float* const end = candidate + args.slots * D;
  for (int64_t k = 0; k < K; ++k) {
    float* word = args.codebook + (group * K + k) * D;
    float* m = args.state_sums + (group * K + k) * D;
    const float* sum = args.sums + (group * K + k) * D;
    if (n[k] < least) {
      while (candidate != end && !all_finite(candidate, D)) candidate += D;
      if (candidate != end) {
        for (int64_t d = 0; d < D; ++d) {
          word[d] = candidate[d];
          m[d] = fresh * candidate[d];
        }
        n[k] = fresh;
        candidate += D;
        continue;
      }
    }
    const float smoothed = (n[k] + eps) * factor;
    const bool moves = smoothed > 0.0f;
    for (int64_t d = 0; d < D; ++d) {
      m[d] = decay * m[d] + rest * sum[d];
      if (moves) word[d] = m[d] / smoothed;
    }
  }
}

}  // namespace

void vq_update_cpu(const VqUpdate& args, int threads) {
  parallel_for(threads, args.groups, [&](int64_t group, int) { update_group(args, group); });
}

}  // namespace lct
