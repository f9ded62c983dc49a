// What the kernels of vq's encoder share: sizes, the workspace, and how vectors are read.
//
// Rows are taken in runs of 512, eight to a chunk, and one block works on one group's share of a run. What a
// run adds up to goes to the workspace; the fold adds runs to chunks and chunks to totals, in order. So that
// the workspace is bounded however many rows there are, a call goes over them in waves of whole chunks, one
// wave after the other on the stream. Neither the grid nor the length of a wave changes a bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>

#include "cuda/launch.h"
#include "lct/vq.h"

namespace lct::vq {

constexpr int kLanes = 32;
constexpr int64_t kChunkRows = 4096;
constexpr int64_t kRunRows = 512;
constexpr int64_t kChunkRuns = kChunkRows / kRunRows;
// A wave's counts are added up in floats, which are exact up to 2^24.
constexpr int64_t kMostChunks = (int64_t{1} << 24) / kChunkRows;
// Deeper vectors do not fit a thread's registers.
constexpr int64_t kMostWidth = 16;

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Wave {
  VqEncode args;
  int64_t first;        // row, the first of a chunk
  int64_t rows, runs;   // of this wave
  int64_t kept_slots;   // of a run: all slots, or as many as it has rows
  float* half_norms;    // [groups, codewords], where depth > kMostWidth
  float* partials;      // [runs, groups, codewords, depth + 1]: sums, and the count beside them
  float* slot_scores;   // [runs, groups, kept_slots]
  uint32_t* slot_rows;  // [runs, groups, kept_slots], in the run
  float* errors;        // [runs, groups]
  uint32_t* flags;      // [runs, groups]
  uint16_t* codes;      // [rows, groups]
};

// Fills codes and what each run adds up to.
cudaError_t search_shallow(const Wave& wave, cudaStream_t stream);
cudaError_t search_deep(const Wave& wave, cudaStream_t stream);
cudaError_t make_half_norms(const Wave& wave, cudaStream_t stream);

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t bits_of(int64_t codewords) {
  int64_t bits = 0;
  while ((int64_t{1} << bits) < codewords) ++bits;
  return bits;
}

inline bool aligned(const void* data, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// One access to memory.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T at[kCount];
};

template <int kWidth, bool kAligned, typename T>
__device__ __forceinline__ void load_as(float (&x)[kWidth], const T* from, int count) {
  if constexpr (kAligned) {
    constexpr int kMost = 16 / sizeof(T), kCount = kMost < kWidth ? kMost : kWidth;
#pragma unroll
    for (int k = 0; k < kWidth; k += kCount) {
      Vector<T, kCount> vector{};
      if (k < count) vector = *reinterpret_cast<const Vector<T, kCount>*>(from + k);
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[k + i] = widen(vector.at[i]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) x[k] = k < count ? widen(from[k]) : 0.0f;
  }
}

// Columns [0, count) as floats, zeros behind them. kAligned: `from` and `count` are whole vectors.
template <int kWidth, bool kAligned>
__device__ __forceinline__ void load_columns(float (&x)[kWidth], const void* data, int64_t index, int count,
                                             DType dtype) {
  if (dtype == DType::f32)
    load_as<kWidth, kAligned>(x, static_cast<const float*>(data) + index, count);
  else if (dtype == DType::f16)
    load_as<kWidth, kAligned>(x, static_cast<const __half*>(data) + index, count);
  else
    load_as<kWidth, kAligned>(x, static_cast<const __nv_bfloat16*>(data) + index, count);
}

}  // namespace lct::vq
