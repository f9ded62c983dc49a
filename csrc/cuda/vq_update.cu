// vq's update: a block a group for its counts and for which word takes which candidate, then all the words.
#include "cuda/vq_work.h"

namespace lct {
namespace {

using namespace vq;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int64_t kPieces = 4096;  // values that a block moves, unless one word has more

// What counts say of a word: its divisor, and the candidate that it takes, or -1.
struct Fate {
  float smoothed;
  int candidate;
};

// VqUpdate as kernels have it: its numbers as floats, and the workspace.
struct Work {
  float* codebook;
  float* n;
  float* m;
  const int64_t* counts;
  const float* sums;
  const float* candidates;
  Fate* fates;  // [groups, codewords]
  int64_t groups, codewords, depth, slots;
  float decay, rest, eps, least;  // rest: 1 - decay
};

__device__ __forceinline__ bool finite(float x) { return fabsf(x) < kInfinity; }

// How many threads before this one hold `mine`; `all`: how many of the block.
__device__ int rank_of(bool mine, int* scratch, int& all) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const unsigned ballot = __ballot_sync(kAllLanes, mine);
  if (lane == 0) scratch[warp] = __popc(ballot);
  __syncthreads();
  int rank = __popc(ballot & ((1u << lane) - 1));
  all = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) rank += scratch[i];
    all += scratch[i];
  }
  __syncthreads();
  return rank;
}

// The sum over the block's threads, in every one of them: a tree of lanes, then warps in order.
__device__ float sum_of(float mine, float* scratch) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2) mine += __shfl_xor_sync(kAllLanes, mine, apart);
  if (threadIdx.x % kLanes == 0) scratch[threadIdx.x / kLanes] = mine;
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < kWarps; ++i) sum += scratch[i];
  __syncthreads();
  return sum;
}

// list = the numbers of the group's finite candidates, in order, for threads that have met since; returns how
// many there are.
__device__ int list_finite(const Work& args, int64_t group, int* list, int* is_finite, int* scratch) {
  const int slots = static_cast<int>(args.slots), warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int slot = warp; slot < slots; slot += kWarps) {
    const float* candidate = args.candidates + (group * slots + slot) * args.depth;
    bool good = true;
    for (int64_t d = lane; d < args.depth; d += kLanes) good &= finite(candidate[d]);
    good = __all_sync(kAllLanes, good);
    if (lane == 0) is_finite[slot] = good;
  }
  __syncthreads();
  int count = 0;
  for (int first = 0; first < slots; first += kThreads) {
    const int slot = first + static_cast<int>(threadIdx.x);
    const bool good = slot < slots && is_finite[slot];
    int all = 0;
    const int rank = rank_of(good, scratch, all);
    if (good) list[count + rank] = slot;
    count += all;
  }
  return count;
}

__global__ void __launch_bounds__(kThreads) count_kernel(const Work args) {
  LCT_DYNAMIC_SHARED(int, shared);  // [warps], [slots], [slots]
  int* list = shared + kWarps;
  const int64_t group = blockIdx.x, codewords = args.codewords;
  const int finite_ones = list_finite(args, group, list, list + args.slots, shared);

  float* n = args.n + group * codewords;
  float mine = 0.0f;
  for (int64_t k = threadIdx.x; k < codewords; k += kThreads) {
    n[k] = args.decay * n[k] + args.rest * static_cast<float>(args.counts[group * codewords + k]);
    mine += n[k];
  }
  const float total = sum_of(mine, reinterpret_cast<float*>(shared));
  const float words = static_cast<float>(static_cast<int>(codewords));
  const float factor = total / (total + words * args.eps), even = total / words;
  const float fresh = even > args.least ? even : args.least;

  // A thread meets its own words again, in both loops.
  int dead_before = 0;
  for (int64_t first = 0; first < codewords; first += kThreads) {
    const int64_t k = first + threadIdx.x;
    const bool there = k < codewords, dead = there && n[k] < args.least;
    int all = 0;
    const int turn = dead_before + rank_of(dead, shared, all);
    dead_before += all;
    if (!there) continue;
    const bool revived = dead && turn < finite_ones;
    args.fates[group * codewords + k] = {(n[k] + args.eps) * factor, revived ? list[turn] : -1};
    if (revived) n[k] = fresh;
  }
}

__global__ void __launch_bounds__(kThreads) move_kernel(const Work args, const unsigned words_a_block) {
  const unsigned depth = static_cast<unsigned>(args.depth);
  const int64_t first = blockIdx.x * int64_t{words_a_block}, rest = args.groups * args.codewords - first;
  const unsigned words = rest < words_a_block ? static_cast<unsigned>(rest) : words_a_block;
  for (unsigned i = threadIdx.x; i < words * depth; i += kThreads) {
    const unsigned word = i / depth;
    const Fate fate = args.fates[first + word];
    const int64_t at = first * depth + i;
    if (fate.candidate >= 0) {
      const int64_t group = (first + word) / args.codewords;
      const float taken = args.candidates[(group * args.slots + fate.candidate) * depth + (i - word * depth)];
      args.codebook[at] = taken;
      args.m[at] = args.n[first + word] * taken;
      continue;
    }
    const float m = args.decay * args.m[at] + args.rest * args.sums[at];
    args.m[at] = m;
    if (fate.smoothed > 0.0f) args.codebook[at] = m / fate.smoothed;
  }
}

bool fits(const VqUpdate& args) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return args.groups >= 1 && args.groups <= kMost && args.codewords >= 2 && args.codewords <= 65536 &&
         args.depth >= 1 && args.depth <= kMost && args.slots >= 0 && args.slots <= kChunkRows;
}

}  // namespace

size_t vq_update_cuda_workspace(int64_t groups, int64_t codewords) {
  return static_cast<size_t>(groups * codewords) * sizeof(Fate);
}

cudaError_t vq_update_cuda(const VqUpdate& args, void* workspace, int device, cudaStream_t stream) {
  if (!fits(args)) return cudaErrorInvalidValue;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  const Work work{args.codebook,
                  args.state_counts,
                  args.state_sums,
                  args.counts,
                  args.sums,
                  args.candidates,
                  static_cast<Fate*>(workspace),
                  args.groups,
                  args.codewords,
                  args.depth,
                  args.slots,
                  static_cast<float>(args.decay),
                  static_cast<float>(1.0 - args.decay),
                  static_cast<float>(args.eps),
                  static_cast<float>(args.revive_below)};
  const size_t shared = (kWarps + 2 * args.slots) * sizeof(int);
  const cudaError_t error = launch(count_kernel, args.groups, kThreads, shared, stream, work);
  if (error != cudaSuccess) return error;
  const int64_t words = args.depth < kPieces ? kPieces / args.depth : 1;
  return launch(move_kernel, divide_up(args.groups * args.codewords, words), kThreads, 0, stream, work,
                static_cast<unsigned>(words));
}

}  // namespace lct
