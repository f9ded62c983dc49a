// What a block does with a run's rows once their codes are known; the same for shallow and deep vectors.
//
// A thread has four rows, and the rows of a warp at one turn are 32 neighbours: block b of the run's sixteen is
// turn b % 4 of warp b / 4.
//
// Sums of a run: in each block of 32 rows those with one code are added as a tree of pairs of neighbours, in
// five steps at most; the block's words then differ, and are added to the run's sums without meeting each
// other, block after block. So a word that many rows choose costs little more than words that few choose.
#pragma once

#include <cstring>

#include "cuda/vq_work.h"

namespace lct::vq {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kLanes;
constexpr int kRows = static_cast<int>(kRunRows) / kThreads;  // of a thread
constexpr int kBlockWords = 10 * 1024;  // 4 bytes each: the most of shared memory that sums take

// The share of a block of threads.
struct Run {
  int64_t index;  // in the wave
  int64_t group;
  int64_t first;  // row
  int rows;
};

__device__ __forceinline__ Run this_run(const Wave& wave) {
  const unsigned groups = static_cast<unsigned>(wave.args.groups);
  const int64_t index = blockIdx.x / groups;
  const int64_t rest = wave.rows - index * kRunRows;
  return {index, blockIdx.x % groups, wave.first + index * kRunRows,
          static_cast<int>(rest < kRunRows ? rest : kRunRows)};
}

// Of the run: the row that this thread has at a turn.
__device__ __forceinline__ int row_at(int turn) {
  return (threadIdx.x / kLanes * kRows + turn) * kLanes + threadIdx.x % kLanes;
}

// Where a row of the run begins in x.
__device__ __forceinline__ int64_t start_of(const Wave& wave, const Run& run, int row) {
  return ((run.first + row) * wave.args.groups + run.group) * wave.args.depth;
}

__device__ __forceinline__ float* partial_of(const Wave& wave) {
  return wave.partials + blockIdx.x * (wave.args.codewords * (wave.args.depth + 1));
}

// 4-byte words of shared memory that `settle` takes.
inline int64_t settle_words(int64_t kept_slots) { return 2 * kWarps + 2 * kept_slots; }

// How good a candidate a row is; see lct/vq.h. `place`: in the chunk.
__device__ __forceinline__ float candidate_score(float error, uint32_t place) {
  uint32_t h;
  memcpy(&h, &error, sizeof h);
  h ^= place * 0x9e3779b1u;
  // The finalizer of MurmurHash3.
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  h ^= h >> 16;
  return error / static_cast<float>(static_cast<int>(h >> 8 | 1u));
}

// Puts forward the best row of each slot. Scores are not negative, so their bits are in the order of the
// numbers; the largest first, then the lowest of the rows that have it: whole numbers, for which it does not
// matter who comes first.
__device__ __forceinline__ void put_forward(const Wave& wave, const Run& run, const float (&error)[kRows],
                                            uint32_t* best, uint32_t* rows) {
  const unsigned kept = static_cast<unsigned>(wave.kept_slots);
  const unsigned start = static_cast<unsigned>(run.first % kChunkRows);
  uint32_t score[kRows];
  unsigned slot[kRows];
#pragma unroll
  for (int turn = 0; turn < kRows; ++turn) {
    const unsigned row = row_at(turn), place = start + row;
    const float exact = candidate_score(error[turn], place);
    memcpy(&score[turn], &exact, sizeof exact);
    // With 512 slots or more each row of a run has its own.
    slot[turn] = kept < kRunRows ? place % kept : row;
    if (score[turn]) atomicMax(best + slot[turn], score[turn]);
  }
  __syncthreads();
#pragma unroll
  for (int turn = 0; turn < kRows; ++turn) {
    if (score[turn] && score[turn] == best[slot[turn]])
      atomicMin(rows + slot[turn], static_cast<uint32_t>(row_at(turn)));
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < kept; i += kThreads) {
    const int64_t to = blockIdx.x * int64_t{kept} + i;
    memcpy(wave.slot_scores + to, best + i, sizeof(float));
    wave.slot_rows[to] = rows[i];
  }
}

// Stores codes, the run's error, its flag and its candidates. Afterwards a row that is left out, or that there
// is not, has code -1. `scratch`: settle_words of shared memory that nobody else uses.
__device__ __forceinline__ void settle(const Wave& wave, const Run& run, int (&code)[kRows],
                                       float (&error)[kRows], uint32_t* scratch) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  float* warp_errors = reinterpret_cast<float*>(scratch);
  uint32_t* warp_flags = scratch + kWarps;
  uint32_t* best = warp_flags + kWarps;
  uint32_t* rows = best + wave.kept_slots;
  for (int i = threadIdx.x; i < wave.kept_slots; i += kThreads) {
    best[i] = 0;
    rows[i] = kAllLanes;
  }

  float total = 0.0f;
  bool left_out = false;
#pragma unroll
  for (int turn = 0; turn < kRows; ++turn) {
    const int row = row_at(turn);
    const bool there = row < run.rows, good = error[turn] < kInfinity;
    if (there) {
      const int64_t to = (run.index * kRunRows + row) * wave.args.groups + run.group;
      wave.codes[to] = static_cast<uint16_t>(good ? code[turn] : 0);
    }
    left_out |= there && !good;
    if (!there || !good) {
      code[turn] = -1;
      error[turn] = 0.0f;
    }
    total += error[turn];
  }
  for (int apart = kLanes / 2; apart > 0; apart /= 2) total += __shfl_xor_sync(kAllLanes, total, apart);
  left_out = __any_sync(kAllLanes, left_out);
  if (lane == 0) {
    warp_errors[warp] = total;
    warp_flags[warp] = left_out;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    uint32_t flag = 0;
    for (int i = 0; i < kWarps; ++i) {
      sum += warp_errors[i];
      flag |= warp_flags[i];
    }
    wave.errors[blockIdx.x] = sum;
    wave.flags[blockIdx.x] = flag;
  }
  if (wave.kept_slots) put_forward(wave, run, error, best, rows);
}

// Adds up x over the lanes that share a code, pairs of neighbours first. The lowest is left with the sum.
template <int kWidth>
__device__ __forceinline__ void add_peers(float (&x)[kWidth], unsigned peers) {
  const int lane = threadIdx.x % kLanes;
  int rank = __popc(peers & ((1u << lane) - 1));
  unsigned above = peers & (~1u << lane);
  while (__any_sync(kAllLanes, above != 0)) {
    const int next = above ? __ffs(static_cast<int>(above)) - 1 : lane;
#pragma unroll
    for (int d = 0; d < kWidth; ++d) {
      const float other = __shfl_sync(kAllLanes, x[d], next);
      if (above) x[d] += other;
    }
    // Those of odd rank have been taken in.
    above &= ~__ballot_sync(kAllLanes, rank & 1);
    if (rank & 1) above = 0;
    rank >>= 1;
  }
}

__device__ __forceinline__ bool leads(unsigned peers, int code) {
  const unsigned below = (1u << threadIdx.x % kLanes) - 1;
  return code >= 0 && !(peers & below);
}

__device__ __forceinline__ void clear(float* sums, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sums[i] = 0.0f;
}

__device__ __forceinline__ void copy(float* to, const float* from, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = from[i];
}

}  // namespace lct::vq
