// vq's encoder: the waves that it goes over its rows in, and the fold that ends each of them.
//
// The fold adds up what the runs left behind, sums and counts, errors and candidates, and packs the wave's
// codes. All of it is one launch, in which a block's number tells its job, so a call that fits one wave is two
// launches. Chunks are summed 32 at a time, each from its runs in order, and then added to the total in order.
#include <algorithm>

#include "cuda/vq_work.h"

namespace lct {
namespace {

using namespace vq;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kEach = 4;  // chunks that a warp sums at once
constexpr int kAtOnce = kWarps * kEach;
constexpr int64_t kWaveBytes = 64 << 20;  // of workspace, unless one chunk needs more

struct Jobs {
  int64_t sums, slots, errors, codes;  // blocks of each
  int64_t all() const { return sums + slots + errors + codes; }
};

// total + chunk 0 + chunk 1 + ..., of each lane of the first warp. sum_of(chunk) is a lane's part of a chunk;
// the lanes of a warp call it together.
template <typename SumOf>
__device__ __forceinline__ float fold_chunks(float* shared, int64_t chunks, float total, SumOf sum_of) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
#pragma unroll 1
  for (int64_t first = 0; first < chunks; first += kAtOnce) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = i * kWarps + warp;
      shared[at * kLanes + lane] = sum_of(first + at);
    }
    __syncthreads();
    if (warp == 0) {
      const int64_t left = chunks - first;
      const int count = static_cast<int>(left < kAtOnce ? left : kAtOnce);
      for (int i = 0; i < count; ++i) total += shared[i * kLanes + lane];
    }
    __syncthreads();
  }
  return total;
}

// A lane is a column of a word, or its count.
__device__ void fold_sums(const Wave& wave, int64_t block, float* shared) {
  const VqEncode& args = wave.args;
  const int64_t width = args.depth + 1, size = args.groups * args.codewords * width;
  const int64_t entry = block * kLanes + threadIdx.x % kLanes;
  const bool there = entry < size, is_first = wave.first == 0;
  const int64_t word = entry / width, column = entry - word * width;
  const bool is_count = column == args.depth;
  float total = 0.0f;
  if (there && !is_count && !is_first) total = args.sums[word * args.depth + column];
  total = fold_chunks(shared, divide_up(wave.runs, kChunkRuns), total, [&](int64_t chunk) {
    float part[kChunkRuns];
#pragma unroll
    for (int i = 0; i < kChunkRuns; ++i) {
      const int64_t run = chunk * kChunkRuns + i;
      part[i] = there && run < wave.runs ? wave.partials[run * size + entry] : 0.0f;
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunkRuns; ++i) sum += part[i];
    return sum;
  });
  if (threadIdx.x >= kLanes || !there) return;
  if (is_count)
    args.counts[word] = (is_first ? 0 : args.counts[word]) + static_cast<int64_t>(total);
  else
    args.sums[word * args.depth + column] = total;
}

// A chunk's errors: lanes take runs and groups by turns, then a tree of lanes.
__device__ void fold_errors(const Wave& wave, float* shared) {
  const VqEncode& args = wave.args;
  const int lane = threadIdx.x % kLanes;
  const bool is_first = wave.first == 0;
  bool flag = false;
  const float total =
      fold_chunks(shared, divide_up(wave.runs, kChunkRuns), is_first ? 0.0f : *args.squared_error,
                  [&](int64_t chunk) {
                    const int64_t begin = chunk * kChunkRuns * args.groups;
                    const int64_t behind = begin + kChunkRuns * args.groups, end = wave.runs * args.groups;
                    float sum = 0.0f;
                    for (int64_t i = begin + lane; i < (behind < end ? behind : end); i += kLanes) {
                      sum += wave.errors[i];
                      flag |= wave.flags[i] != 0;
                    }
                    for (int apart = kLanes / 2; apart > 0; apart /= 2)
                      sum += __shfl_xor_sync(kAllLanes, sum, apart);
                    return sum;
                  });
  // Every thread has seen other flags. fold_chunks ends with a barrier.
  shared[threadIdx.x] = flag ? 1.0f : 0.0f;
  __syncthreads();
  if (threadIdx.x != 0) return;
  bool any = !is_first && *args.flag;
  for (int i = 0; i < kThreads; ++i) any |= shared[i] != 0.0f;
  *args.squared_error = total;
  *args.flag = any ? 1 : 0;
}

struct Candidate {
  float score;
  uint32_t row;  // in the wave
};

__device__ __forceinline__ Candidate better(Candidate a, Candidate b) {
  return b.score > a.score || (b.score == a.score && b.row < a.row) ? b : a;
}

// A warp is a slot of a group. Its rows are in every run, or, with more slots than a run has rows, at a place
// in the chunk that comes again every `slots` rows.
__device__ void fold_slot(const Wave& wave, int64_t index) {
  const VqEncode& args = wave.args;
  const int lane = threadIdx.x % kLanes;
  if (index >= args.groups * args.slots) return;
  const int64_t group = index / args.slots, slot = index - group * args.slots;
  const int64_t chunks = divide_up(wave.runs, kChunkRuns);
  const int64_t turns = args.slots <= kRunRows ? kChunkRuns : divide_up(kChunkRows, args.slots);
  Candidate best{0.0f, kAllLanes};
  for (int64_t i = lane; i < chunks * turns; i += kLanes) {
    const int64_t chunk = i / turns, place = slot + (i - chunk * turns) * args.slots;
    int64_t run = i, kept = slot;
    if (args.slots > kRunRows) {
      if (place >= kChunkRows) continue;
      run = chunk * kChunkRuns + place / kRunRows;
      kept = place % kRunRows;
    }
    if (run >= wave.runs) continue;
    const int64_t at = (run * args.groups + group) * wave.kept_slots + kept;
    const float score = wave.slot_scores[at];
    const uint32_t row = static_cast<uint32_t>(run * kRunRows) + wave.slot_rows[at];
    if (score > 0.0f) best = better(best, {score, row});
  }
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    const float score = __shfl_xor_sync(kAllLanes, best.score, apart);
    const uint32_t row = __shfl_xor_sync(kAllLanes, best.row, apart);
    best = better(best, {score, row});
  }
  const float before = wave.first == 0 ? 0.0f : args.candidate_scores[index];
  // Every lane has read it before one writes it.
  __syncwarp();
  const bool found = best.score > before;
  if (!found && wave.first != 0) return;
  if (lane == 0) args.candidate_scores[index] = found ? best.score : 0.0f;
  const int64_t from = ((wave.first + best.row) * args.groups + group) * args.depth;
  for (int64_t d = lane; d < args.depth; d += kLanes) {
    float x[1] = {kNan};
    if (found) load_columns<1, false>(x, args.x, from + d, 1, args.dtype);
    args.candidates[index * args.depth + d] = x[0];
  }
}

// A thread is four bytes of the stream. A wave's first code starts with a byte of its own.
__device__ void pack_codes(const Wave& wave, int64_t index, int bits) {
  const VqEncode& args = wave.args;
  const int64_t codes = wave.rows * args.groups, bytes = divide_up(codes * bits, 8);
  const int64_t byte = index * 4;
  if (byte >= bytes) return;
  const int64_t bit = byte * 8;
  int64_t code = bit / bits;
  uint32_t word = 0;
  for (int at = static_cast<int>(code * bits - bit); at < 32 && code < codes; at += bits, ++code) {
    const uint32_t value = wave.codes[code];
    word |= at < 0 ? value >> -at : value << at;
  }
  uint8_t* to = args.codes + wave.first * args.groups / 8 * bits + byte;
  if (byte + 4 <= bytes && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<uint32_t*>(to) = word;
    return;
  }
  for (int i = 0; i < 4 && byte + i < bytes; ++i) to[i] = static_cast<uint8_t>(word >> 8 * i);
}

__global__ void __launch_bounds__(kThreads) fold_kernel(const Wave wave, const Jobs jobs, const int bits) {
  LCT_DYNAMIC_SHARED(float, shared);  // [chunks at once][lanes]
  int64_t block = blockIdx.x;
  if (block < jobs.sums) return fold_sums(wave, block, shared);
  block -= jobs.sums;
  if (block < jobs.errors) return fold_errors(wave, shared);
  block -= jobs.errors;
  if (block < jobs.slots) return fold_slot(wave, block * kWarps + threadIdx.x / kLanes);
  block -= jobs.slots;
  pack_codes(wave, block * kThreads + threadIdx.x, bits);
}

cudaError_t fold(const Wave& wave, cudaStream_t stream) {
  const VqEncode& args = wave.args;
  const int64_t bits = bits_of(args.codewords);
  Jobs jobs{};
  jobs.sums = divide_up(args.groups * args.codewords * (args.depth + 1), kLanes);
  jobs.errors = 1;
  jobs.slots = divide_up(args.groups * args.slots, kWarps);
  jobs.codes = divide_up(divide_up(wave.rows * args.groups * bits, 32), kThreads);
  return launch(fold_kernel, jobs.all(), kThreads, kAtOnce * kLanes * sizeof(float), stream, wave, jobs,
                static_cast<int>(bits));
}

int64_t kept_slots(int64_t slots) { return std::min(slots, kRunRows); }

int64_t half_norm_bytes(int64_t groups, int64_t codewords, int64_t depth) {
  return depth > kMostWidth ? groups * codewords * int64_t{sizeof(float)} : 0;
}

// Of workspace, for each chunk of a wave.
int64_t chunk_bytes(int64_t groups, int64_t codewords, int64_t depth, int64_t slots) {
  const int64_t partial = codewords * (depth + 1) * int64_t{sizeof(float)};
  const int64_t slot = int64_t{sizeof(float) + sizeof(uint32_t)};
  const int64_t run = partial + slot * (kept_slots(slots) + 1) + kRunRows * int64_t{sizeof(uint16_t)};
  return kChunkRuns * groups * run;
}

// A wave's blocks are counted in 32 bits.
int64_t most_chunks(int64_t groups) {
  return std::clamp(std::numeric_limits<int32_t>::max() / (kChunkRuns * groups), int64_t{1}, kMostChunks);
}

template <typename T>
T* take(char*& from, int64_t count) {
  T* const to = reinterpret_cast<T*>(from);
  from += count * int64_t{sizeof(T)};
  return to;
}

Wave first_wave(const VqEncode& args, int64_t chunks) {
  Wave wave{};
  wave.args = args;
  wave.kept_slots = kept_slots(args.slots);
  const int64_t shares = chunks * kChunkRuns * args.groups;
  char* free = static_cast<char*>(args.workspace);
  wave.half_norms = take<float>(free, args.depth > kMostWidth ? args.groups * args.codewords : 0);
  wave.partials = take<float>(free, shares * args.codewords * (args.depth + 1));
  wave.slot_scores = take<float>(free, shares * wave.kept_slots);
  wave.slot_rows = take<uint32_t>(free, shares * wave.kept_slots);
  wave.errors = take<float>(free, shares);
  wave.flags = take<uint32_t>(free, shares);
  wave.codes = take<uint16_t>(free, shares * kRunRows);
  return wave;
}

bool fits(const VqEncode& args) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return args.rows >= 1 && args.groups >= 1 && args.groups <= kMost && args.codewords >= 2 &&
         args.codewords <= 65536 && args.depth >= 1 && args.depth <= kMost && args.slots >= 0 &&
         args.slots <= kChunkRows;
}

}  // namespace

size_t vq_encode_cuda_workspace(int64_t rows, int64_t groups, int64_t codewords, int64_t depth,
                                int64_t slots) {
  const int64_t each = chunk_bytes(groups, codewords, depth, slots);
  const int64_t chunks = std::clamp(kWaveBytes / each, int64_t{1}, most_chunks(groups));
  return static_cast<size_t>(half_norm_bytes(groups, codewords, depth) +
                             std::min(chunks, divide_up(rows, kChunkRows)) * each);
}

cudaError_t vq_encode_cuda(const VqEncode& args, size_t workspace_bytes, int device, cudaStream_t stream) {
  if (!fits(args)) return cudaErrorInvalidValue;
  const int64_t room =
      static_cast<int64_t>(workspace_bytes) - half_norm_bytes(args.groups, args.codewords, args.depth);
  const int64_t each = chunk_bytes(args.groups, args.codewords, args.depth, args.slots);
  if (room < each) return cudaErrorInvalidValue;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;

  const int64_t chunks = std::min(room / each, most_chunks(args.groups));
  Wave wave = first_wave(args, chunks);
  const bool deep = args.depth > kMostWidth;
  cudaError_t error = deep ? make_half_norms(wave, stream) : cudaSuccess;
  for (; error == cudaSuccess && wave.first < args.rows; wave.first += wave.rows) {
    wave.rows = std::min(chunks * kChunkRows, args.rows - wave.first);
    wave.runs = divide_up(wave.rows, kRunRows);
    error = deep ? search_deep(wave, stream) : search_shallow(wave, stream);
    if (error == cudaSuccess) error = fold(wave, stream);
  }
  return error;
}

}  // namespace lct
