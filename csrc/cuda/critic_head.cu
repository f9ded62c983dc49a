// critic_head in fp32 arithmetic, for few classes, where the time goes into reading h and writing dh.
//
// A block takes tiles of 64 rows, 8 to a warp, and each warp carries its rows through all of
//
//   - logits: 8 rows x 8 classes in registers, each lane one quad of every 128 columns; then summed over lanes
//   - softmax: in the warp's scratch [classes][8 rows], which from then on holds dlogits in fp32
//   - dh: 8 rows x one quad of columns a lane
//   - dweight: the block's 64 rows at once, added to sums that stay in shared memory for all of its tiles
//
// so that h comes from memory once (later readings find it in L1 or L2) and every weight read from shared
// memory serves 8 rows. A lane reads a quad of a row at once: 16 bytes in fp32, 8 in fp16 and bf16, where a
// warp's request is 256 contiguous bytes and a row of 128 columns keeps every lane busy.
//
// What does not fit 96 KiB of shared memory (any GPU from sm_80 on has that) is done in other ways, chosen by
// the sizes alone: weights pass through it in tiles of 32 KiB, dweight takes a second kernel, and the scratch
// lies in the workspace from 129 classes on.
//
// Partial sums: a block's rows are a fixed chunk, a function of (rows, depth, classes) alone. Partials go to
// the workspace, [chunk][classes * depth + classes], and fold_kernel adds them in a fixed order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>

#include "cuda/launch.h"
#include "lct/critic_head.h"

namespace lct {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kRows = 8;  // that a warp works on at once
constexpr int kTileRows = kWarps * kRows;
constexpr int kClasses = 8;            // that a warp accumulates at once
constexpr int kQuad = 4;               // columns a lane works on at once
constexpr int kStep = kLanes * kQuad;  // columns a warp works on at once
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr int kSharedFloats = 96 * 1024 / sizeof(float);
constexpr int kStreamFloats = 32 * 1024 / sizeof(float);
constexpr int kStreamDepth = kStreamFloats / kClasses;  // a tile of weights for the logits
constexpr int kStreamClasses = kStreamFloats / kStep;   // a tile of weights for dh
constexpr int kSharedScratchClasses = 128;

// Two blocks on each of an H100's 132 multiprocessors. A constant: results must not depend on the device.
constexpr int64_t kMaxChunks = 264;
constexpr int64_t kMaxWorkspaceFloats = 64 * 1024 * 1024 / sizeof(float);  // unless one chunk needs more

template <typename T>
struct alignas(kQuad * sizeof(T)) Quad {
  T at[kQuad];
};

// One store to global memory: plain assignment of a quad just put together is split into its elements.
template <typename T>
__device__ __forceinline__ void store_quad(T* to, const Quad<T>& quad) {
  if constexpr (sizeof(T) == sizeof(float)) {
    __stwb(reinterpret_cast<float4*>(to), make_float4(quad.at[0], quad.at[1], quad.at[2], quad.at[3]));
  } else {
    uint2 bits;
    memcpy(&bits, &quad, sizeof bits);
    __stwb(reinterpret_cast<uint2*>(to), bits);
  }
}

template <typename T>
__device__ float to_float(T x);
template <>
__device__ float to_float(float x) {
  return x;
}
template <>
__device__ float to_float(__half x) {
  return __half2float(x);
}
template <>
__device__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <typename T>
__device__ T from_float(float x);
template <>
__device__ float from_float(float x) {
  return x;
}
template <>
__device__ __half from_float(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}

__device__ float load(const void* from, int64_t index, DType dtype) {
  if (dtype == DType::f32) return static_cast<const float*>(from)[index];
  if (dtype == DType::f16) return to_float(static_cast<const __half*>(from)[index]);
  return to_float(static_cast<const __nv_bfloat16*>(from)[index]);
}

__device__ void store(void* to, int64_t index, DType dtype, float x) {
  if (dtype == DType::f32)
    static_cast<float*>(to)[index] = x;
  else if (dtype == DType::f16)
    static_cast<__half*>(to)[index] = from_float<__half>(x);
  else
    static_cast<__nv_bfloat16*>(to)[index] = from_float<__nv_bfloat16>(x);
}

// NaN stays NaN.
__device__ __forceinline__ float relu(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < 0.0f ? 0.0f : x;
#endif
}

// Rows whose quads are read at once where all of them are aligned, and element by element where not.
template <typename T, bool kAligned>
struct Matrix {
  const T* data;
  int depth;

  __device__ const T* at(int64_t row, int column) const { return data + row * depth + column; }
};

// x[r] = the quad at column d of row first + r; zeros for columns from depth on. Rows from `count` on repeat
// the last one before: that takes no predicate a row, and their results are dropped.
template <int kCount, typename T, bool kAligned>
__device__ __forceinline__ void load_quads(float (&x)[kCount][kQuad], const Matrix<T, kAligned>& h,
                                           int64_t first, int count, int d) {
  Quad<T> raw[kCount];
  const T* from = h.at(first, d);
#pragma unroll
  for (int r = 0; r < kCount; ++r) {
    raw[r] = Quad<T>{};
    if constexpr (kAligned) {
      if (d < h.depth) raw[r] = *reinterpret_cast<const Quad<T>*>(from);
    } else {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        if (d + j < h.depth) raw[r].at[j] = from[j];
      }
    }
    if (r + 1 < count) from += h.depth;
  }
#pragma unroll
  for (int r = 0; r < kCount; ++r)
#pragma unroll
    for (int j = 0; j < kQuad; ++j) x[r][j] = to_float(raw[r].at[j]);
}

template <int kCount>
__device__ __forceinline__ void apply_relu(float (&x)[kCount][kQuad]) {
#pragma unroll
  for (int r = 0; r < kCount; ++r)
#pragma unroll
    for (int j = 0; j < kQuad; ++j) x[r][j] = relu(x[r][j]);
}

__device__ __forceinline__ float4 quad_at(const float* p) { return *reinterpret_cast<const float4*>(p); }

__device__ __forceinline__ void put_quad(float* p, const float (&x)[kQuad]) {
  *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
}

// tile[v][d] = weight[v0 + v][d0 + d] as fp32 for v < count, d < span; zeros past the last class or column.
template <typename W>
__device__ __forceinline__ void copy_weights(float* tile, const W* weight, int classes, int depth, int v0,
                                             int count, int d0, int span) {
#pragma unroll 1
  for (int v = threadIdx.x / kLanes; v < count; v += kWarps) {
    const W* row = weight + (v0 + v) * int64_t{depth} + d0;
#pragma unroll 4
    for (int d = threadIdx.x % kLanes; d < span; d += kLanes) {
      tile[v * span + d] = v0 + v < classes && d0 + d < depth ? to_float(row[d]) : 0.0f;
    }
  }
}

__device__ __forceinline__ void copy_weights(float* tile, const CriticHead& args, int v0, int count, int d0,
                                             int span) {
  const int classes = static_cast<int>(args.classes), depth = static_cast<int>(args.depth);
  if (args.weight_dtype == DType::f32) {
    copy_weights(tile, static_cast<const float*>(args.weight), classes, depth, v0, count, d0, span);
  } else if (args.weight_dtype == DType::f16) {
    copy_weights(tile, static_cast<const __half*>(args.weight), classes, depth, v0, count, d0, span);
  } else {
    copy_weights(tile, static_cast<const __nv_bfloat16*>(args.weight), classes, depth, v0, count, d0, span);
  }
}

// Sizes, and from them alone which of the ways above is taken.
struct Plan {
  int padded_depth, padded_classes;
  int weight_classes;  // in shared memory, with zeros past the last
  bool resident;       // all weights stay in shared memory
  bool shared_scratch;
  bool fused;                     // dweight and dbias are summed in the same pass
  int splits;                     // of a tile's rows, so that every warp has work in the dweight sums
  int weight_floats, sum_floats;  // in shared memory
  int64_t scratch_floats;         // a block
  int tiles, tiles_per_chunk, chunks;

  size_t shared_bytes() const {
    return (weight_floats + sum_floats + (shared_scratch ? scratch_floats : 0)) * sizeof(float);
  }
  int64_t workspace_floats(int64_t depth, int64_t classes) const {
    const int64_t partial = fused ? classes * depth + classes : 0;
    return chunks * (partial + (shared_scratch ? 0 : scratch_floats));
  }
};

// Of the 8 classes that a step may have, how many the last one works out.
constexpr int in_last_step(int64_t classes) {
  const int left = static_cast<int>((classes - 1) % kClasses) + 1;
  return left > 4 ? 8 : left > 2 ? 4 : 2;
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Chunks {
  int tiles, tiles_per_chunk, chunks;
};

// Equal chunks of whole tiles, so many that a share of `floats` for each stays within the bound.
Chunks chunks_of(int64_t rows, int64_t floats) {
  const int64_t tiles = divide_up(rows, kTileRows);
  const int64_t most = std::clamp(kMaxWorkspaceFloats / std::max<int64_t>(floats, 1), int64_t{1}, kMaxChunks);
  const int64_t tiles_per_chunk = std::max<int64_t>(divide_up(tiles, most), 1);
  return {static_cast<int>(tiles), static_cast<int>(tiles_per_chunk),
          static_cast<int>(divide_up(tiles, tiles_per_chunk))};
}

Plan make_plan(int64_t rows, int64_t depth, int64_t classes, bool with_wgrad) {
  Plan plan{};
  plan.padded_depth = static_cast<int>(divide_up(depth, kStep) * kStep);
  plan.padded_classes = static_cast<int>(divide_up(classes, kClasses) * kClasses);
  plan.scratch_floats = int64_t{kTileRows} * plan.padded_classes;
  plan.shared_scratch = classes <= kSharedScratchClasses;

  const int room = kSharedFloats - (plan.shared_scratch ? static_cast<int>(plan.scratch_floats) : 0);
  plan.weight_classes = plan.padded_classes - kClasses + in_last_step(classes);
  plan.resident = plan.shared_scratch && plan.weight_classes <= room / plan.padded_depth;
  plan.weight_floats = plan.resident ? plan.weight_classes * plan.padded_depth : kStreamFloats;

  if (with_wgrad && plan.resident) {
    const int tasks = plan.padded_classes / kClasses * (plan.padded_depth / kStep);
    plan.splits = 1;
    while (plan.splits < kWarps && tasks * plan.splits * 2 <= kWarps) plan.splits *= 2;
    const int sums = plan.splits * plan.weight_floats + plan.padded_classes;
    plan.fused = plan.weight_floats + sums <= room;
    if (plan.fused) plan.sum_floats = sums;
  }

  const Chunks split = chunks_of(rows, plan.shared_scratch ? 0 : plan.scratch_floats);
  plan.tiles = split.tiles;
  plan.tiles_per_chunk = split.tiles_per_chunk;
  plan.chunks = split.chunks;
  return plan;
}

// Sums kSums numbers over the warp's lanes, halving what is exchanged at each step: for 64 that takes 62
// shuffles, where one number at a time takes 320. Lane l is left with the totals of entries
// l * kSums / 32 and up, as many as kSums / 32 or one.
template <int kSums, int kOffset = kLanes / 2, int kSize>
__device__ __forceinline__ void reduce(float (&acc)[kSize], int lane) {
  if constexpr (kSums == 1) {
    acc[0] += __shfl_xor_sync(kAllLanes, acc[0], kOffset);
  } else {
    const bool upper = lane & kOffset;
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) {
      const float keep = upper ? acc[i + kSums / 2] : acc[i];
      const float give = upper ? acc[i] : acc[i + kSums / 2];
      acc[i] = keep + __shfl_xor_sync(kAllLanes, give, kOffset);
    }
  }
  if constexpr (kOffset > 1) reduce<(kSums > 1 ? kSums / 2 : 1), kOffset / 2>(acc, lane);
}

// acc[class][row] += weights . act(h) over the columns d0 .. d0 + span, for kCount classes.
template <int kCount, typename T, bool kAligned>
__device__ __forceinline__ void accumulate_logits(float (&acc)[kCount * kRows], const Matrix<T, kAligned>& h,
                                                  int64_t first, int count, Activation activation,
                                                  const float* weights, int stride, int d0, int span) {
#pragma unroll 1
  for (int d = threadIdx.x % kLanes * kQuad; d < span; d += kStep) {
    float x[kRows][kQuad];
    load_quads(x, h, first, count, d0 + d);
    if (activation == Activation::relu) apply_relu(x);
    const float* from = weights + d;
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const float4 w = quad_at(from);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float& sum = acc[v * kRows + r];
        sum += x[r][0] * w.x;
        sum += x[r][1] * w.y;
        sum += x[r][2] * w.z;
        sum += x[r][3] * w.w;
      }
      from += stride;
    }
  }
}

// scratch[class][row] = logits of kCount classes from v0 on. Every warp of the block comes here, also one
// without rows (count <= 0), because weights that are not resident pass through shared memory on the way.
template <int kCount, bool kResident, typename T, bool kAligned>
__device__ __forceinline__ void compute_logits(float* scratch, float* weights, const Matrix<T, kAligned>& h,
                                               const CriticHead& args, const Plan& plan, int64_t first,
                                               int count, int v0) {
  const int lane = threadIdx.x % kLanes;
  const int classes = static_cast<int>(args.classes), padded = plan.padded_depth;
  float acc[kCount * kRows] = {};
  if constexpr (kResident) {
    if (count <= 0) return;
    accumulate_logits<kCount>(acc, h, first, count, args.activation, weights + v0 * padded, padded, 0,
                              padded);
  } else {
#pragma unroll 1
    for (int d0 = 0; d0 < padded; d0 += kStreamDepth) {
      __syncthreads();
      copy_weights(weights, args, v0, kCount, d0, kStreamDepth);
      __syncthreads();
      if (count > 0) {
        accumulate_logits<kCount>(acc, h, first, count, args.activation, weights, kStreamDepth, d0,
                                  min(kStreamDepth, padded - d0));
      }
    }
    if (count <= 0) return;
  }

  constexpr int kSums = kCount * kRows;
  constexpr int kLeft = kSums > kLanes ? kSums / kLanes : 1;
  reduce<kSums>(acc, lane);
  const int entry = lane * kSums / kLanes;
  const int v = v0 + entry / kRows;
  const float bias = args.bias && v < classes ? load(args.bias, v, args.weight_dtype) : 0.0f;
#pragma unroll
  for (int i = 0; i < kLeft; ++i) scratch[v0 * kRows + entry + i] = acc[i] + bias;
}

// Turns the scratch [classes][8 rows] from logits into dlogits, and writes those and the loss.
// Four lanes share a row; no lane touches another's entries.
template <typename T>
__device__ __forceinline__ void softmax(float* scratch, const CriticHead& args, int64_t first, int count,
                                        int lane) {
  constexpr int kShare = kLanes / kRows;
  const int row = lane % kRows, part = lane / kRows;
  const int64_t target = row < count ? args.target[first + row] : args.ignore_index;
  const bool ignored = target == args.ignore_index;
  const bool counted = !ignored && target >= 0 && target < args.classes;

  const int classes = static_cast<int>(args.classes);
  float largest = -INFINITY;
  float chosen = 0.0f;
  for (int v = part; v < classes; v += kShare) {
    const float logit = scratch[v * kRows + row];
    largest = fmaxf(largest, logit);
    if (v == target) chosen = logit;
  }
#pragma unroll
  for (int offset = kRows; offset < kLanes; offset *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
    chosen += __shfl_xor_sync(kAllLanes, chosen, offset);
  }

  float sum = 0.0f;
  for (int v = part; v < classes; v += kShare) {
    const float e = expf(scratch[v * kRows + row] - largest);
    scratch[v * kRows + row] = e;
    sum += e;
  }
#pragma unroll
  for (int offset = kRows; offset < kLanes; offset *= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);

  const float inverse = 1.0f / sum;
  T* dlogits = static_cast<T*>(args.dlogits) + (first + row) * args.classes;
  for (int v = part; v < classes; v += kShare) {
    const float p = scratch[v * kRows + row] * inverse;
    const float g = counted ? (v == target ? p - 1.0f : p) : 0.0f;
    scratch[v * kRows + row] = g;
    if (row < count) dlogits[v] = from_float<T>(g);
  }
  if (part == 0 && row < count) {
    args.loss[first + row] = counted ? logf(sum) + (largest - chosen) : ignored ? 0.0f : NAN;
  }
}

// acc[row][column] += dlogits . weights over `classes` classes, for one quad of columns.
__device__ __forceinline__ void accumulate_dh(float (&acc)[kRows][kQuad], const float* scratch,
                                              const float* weights, int stride, int classes) {
#pragma unroll 2
  for (int v = 0; v < classes; ++v) {
    const float4 w = quad_at(weights + v * stride);
    const float4 low = quad_at(scratch + v * kRows), high = quad_at(scratch + v * kRows + kQuad);
    const float g[kRows] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      acc[r][0] += g[r] * w.x;
      acc[r][1] += g[r] * w.y;
      acc[r][2] += g[r] * w.z;
      acc[r][3] += g[r] * w.w;
    }
  }
}

// dh = scale * acc * act'(h), rounded. Four rows at a time, which keeps fewer of h's in registers.
template <typename T, bool kAligned>
__device__ __forceinline__ void store_dh(const float (&acc)[kRows][kQuad], T* dh,
                                         const Matrix<T, kAligned>& h, int64_t first, int count,
                                         Activation activation, float scale, int d) {
#pragma unroll
  for (int half = 0; half < kRows; half += kQuad) {
    if (half >= count) return;
    float x[kQuad][kQuad];
#pragma unroll
    for (int r = 0; r < kQuad; ++r)
#pragma unroll
      for (int j = 0; j < kQuad; ++j) x[r][j] = 1.0f;
    if (activation == Activation::relu) load_quads(x, h, first + half, count - half, d);

    T* to = dh + (first + half) * h.depth + d;
#pragma unroll
    for (int r = 0; r < kQuad; ++r) {
      Quad<T> quad;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        quad.at[j] = from_float<T>(x[r][j] > 0.0f ? scale * acc[half + r][j] : 0.0f);
      }
      if constexpr (kAligned) {
        if (half + r < count && d < h.depth) store_quad(to, quad);
      } else {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          if (half + r < count && d + j < h.depth) to[j] = quad.at[j];
        }
      }
      to += h.depth;
    }
  }
}

template <int kCount>
__device__ __forceinline__ void clear_rows(float (&x)[kCount][kQuad], int from) {
#pragma unroll
  for (int r = 0; r < kCount; ++r)
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (r >= from) x[r][j] = 0.0f;
    }
}

// acc[class][column] += sum over 8 rows of scratch[class][row] * act(h)[row][column], for the first kCount
// classes. The scratch already carries row_scale.
template <int kCount, typename T, bool kAligned>
__device__ __forceinline__ void accumulate_dweight(float (&acc)[kClasses][kQuad], const float* scratch,
                                                   const Matrix<T, kAligned>& h, int64_t first, int count,
                                                   Activation activation, int d) {
#pragma unroll(kAligned ? 2 : 1)
  for (int half = 0; half < kRows; half += kQuad) {
    if (half >= count) return;
    float x[kQuad][kQuad];
    load_quads(x, h, first + half, count - half, d);
    if (activation == Activation::relu) apply_relu(x);
    // A repeated row must not count: its weight is 0, but 0 * inf is not.
    if (count - half < kQuad) clear_rows(x, count - half);
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const float4 g = quad_at(scratch + v * kRows + half);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        acc[v][j] += g.x * x[0][j];
        acc[v][j] += g.y * x[1][j];
        acc[v][j] += g.z * x[2][j];
        acc[v][j] += g.w * x[3][j];
      }
    }
  }
}

// The same for the row groups [begin, end) of a tile, whose scratches lie `stride` floats apart. `classes`
// counts what is left from the first class on: the sums of no more than 8, 4 or 2 are worked out.
template <typename T, bool kAligned>
__device__ __forceinline__ void accumulate_groups(float (&acc)[kClasses][kQuad], const float* scratch,
                                                  int stride, int begin, int end,
                                                  const Matrix<T, kAligned>& h, int64_t first, int64_t rows,
                                                  Activation activation, int classes, int d) {
#pragma unroll 1
  for (int group = begin; group < end; ++group) {
    const int64_t row = first + group * kRows;
    const int count = static_cast<int>(min(rows - row, int64_t{kRows}));
    if (count <= 0) return;
    const float* from = scratch + group * stride;
    if (classes > 4)
      accumulate_dweight<8>(acc, from, h, row, count, activation, d);
    else if (classes > 2)
      accumulate_dweight<4>(acc, from, h, row, count, activation, d);
    else
      accumulate_dweight<2>(acc, from, h, row, count, activation, d);
  }
}

// The sum of one class over a tile's rows, in order.
__device__ __forceinline__ float sum_of_class(const float* scratch, int stride) {
  float sum = 0.0f;
  for (int group = 0; group < kWarps; ++group) {
    const float4 low = quad_at(scratch + group * stride), high = quad_at(scratch + group * stride + kQuad);
    sum += low.x;
    sum += low.y;
    sum += low.z;
    sum += low.w;
    sum += high.x;
    sum += high.y;
    sum += high.z;
    sum += high.w;
  }
  return sum;
}

// Adds a tile's dweight and dbias to the block's sums. The scratches hold row_scale * dlogits.
template <typename T, bool kAligned>
__device__ __forceinline__ void add_wgrad(float* sums, float* bias_sums, const float* scratches,
                                          const Matrix<T, kAligned>& h, const CriticHead& args,
                                          const Plan& plan, int64_t first) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int classes = static_cast<int>(args.classes), padded = plan.padded_depth;
  const int group_stride = kRows * plan.padded_classes;
  const int class_tasks = plan.padded_classes / kClasses;
  const int tasks = class_tasks * (padded / kStep) * plan.splits;
  const int groups = kWarps / plan.splits;
#pragma unroll 1
  for (int task = warp; task < tasks; task += kWarps) {
    const int split = task % plan.splits;
    const int v0 = task / plan.splits % class_tasks * kClasses;
    const int d = task / plan.splits / class_tasks * kStep + lane * kQuad;
    float* to = sums + (split * plan.weight_classes + v0) * padded + d;
    float acc[kClasses][kQuad] = {};
#pragma unroll
    for (int v = 0; v < kClasses; ++v) {
      if (v0 + v < classes) {
        const float4 before = quad_at(to + v * padded);
        acc[v][0] = before.x;
        acc[v][1] = before.y;
        acc[v][2] = before.z;
        acc[v][3] = before.w;
      }
    }
    accumulate_groups(acc, scratches + v0 * kRows, group_stride, split * groups, (split + 1) * groups, h,
                      first, args.rows, args.activation, classes - v0, d);
#pragma unroll
    for (int v = 0; v < kClasses; ++v) {
      if (v0 + v < classes) put_quad(to + v * padded, acc[v]);
    }
  }
  for (int v = threadIdx.x; v < classes; v += kThreads) {
    bias_sums[v] += sum_of_class(scratches + v * kRows, group_stride);
  }
}

// Writes the block's partial: the splits' sums in order.
__device__ __forceinline__ void store_partial(float* partial, const float* sums, const float* bias_sums,
                                              int64_t depth, int classes, const Plan& plan) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int v = warp; v < classes; v += kWarps) {
    for (int d = lane; d < depth; d += kLanes) {
      float sum = 0.0f;
      for (int split = 0; split < plan.splits; ++split)
        sum += sums[(split * plan.weight_classes + v) * plan.padded_depth + d];
      partial[v * depth + d] = sum;
    }
  }
  for (int v = threadIdx.x; v < classes; v += kThreads) partial[classes * depth + v] = bias_sums[v];
}

template <typename T, bool kAligned, bool kResident>
__global__ void __launch_bounds__(kThreads, 2) head_kernel(const CriticHead args, const Plan plan) {
  LCT_DYNAMIC_SHARED(float, shared);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int classes = static_cast<int>(args.classes), padded = plan.padded_depth;
  const int64_t depth = args.depth;
  const int group_stride = kRows * plan.padded_classes;

  float* weights = shared;                     // [classes][padded], or the tile that passes through
  float* sums = weights + plan.weight_floats;  // fused: [splits][weight_classes][padded], then dbias
  float* bias_sums = sums + plan.splits * plan.weight_classes * padded;
  float* scratches = kResident || plan.shared_scratch
                         ? sums + plan.sum_floats
                         : static_cast<float*>(args.workspace) + blockIdx.x * plan.scratch_floats;
  float* scratch = scratches + warp * group_stride;  // this warp's, [padded_classes][8 rows]

  const Matrix<T, kAligned> h{static_cast<const T*>(args.h), static_cast<int>(args.depth)};

  if (kResident) {
    copy_weights(weights, args, 0, plan.weight_classes, 0, padded);
    for (int i = threadIdx.x; i < plan.sum_floats; i += kThreads) sums[i] = 0.0f;
    __syncthreads();
  }

  const int begin = static_cast<int>(blockIdx.x) * plan.tiles_per_chunk;
  int64_t first = begin * int64_t{kTileRows} + warp * kRows;
#pragma unroll 1
  for (int left = min(plan.tiles_per_chunk, plan.tiles - begin); left > 0; --left, first += kTileRows) {
    // Zero or less: this warp has no rows, and only copies weights and meets the others at barriers.
    const int count = static_cast<int>(min(args.rows - first, int64_t{kRows}));

#pragma unroll 1
    for (int v0 = 0; v0 < classes; v0 += kClasses) {
      const int rest = classes - v0;
      if (!kResident || rest > 4) {
        compute_logits<8, kResident>(scratch, weights, h, args, plan, first, count, v0);
      } else if (rest > 2) {
        compute_logits<4, true>(scratch, weights, h, args, plan, first, count, v0);
      } else {
        compute_logits<2, true>(scratch, weights, h, args, plan, first, count, v0);
      }
    }

    if (count > 0) {
      __syncwarp();
      softmax<T>(scratch, args, first, count, lane);
      __syncwarp();
    }

    const int dh_span = kResident ? classes : kStreamClasses;
#pragma unroll 1
    for (int d0 = 0; d0 < padded; d0 += kStep) {
      float acc[kRows][kQuad] = {};
#pragma unroll 1
      for (int v0 = 0; v0 < classes; v0 += dh_span) {
        if (!kResident) {
          __syncthreads();
          copy_weights(weights, args, v0, kStreamClasses, d0, kStep);
          __syncthreads();
        }
        if (count > 0) {
          accumulate_dh(acc, scratch + v0 * kRows, weights + (kResident ? d0 : 0) + lane * kQuad,
                        kResident ? padded : kStep, min(dh_span, classes - v0));
        }
      }
      if (count > 0) {
        store_dh(acc, static_cast<T*>(args.dh), h, first, count, args.activation, *args.scale,
                 d0 + lane * kQuad);
      }
    }

    // From here on the scratch is written again, here or for the next tile.
    __syncwarp();
    if (kResident && plan.fused) {
      // A warp without rows has no dlogits either: its scratch is set, not scaled.
      const int row = lane % kRows;
      const float factor = row < count ? args.row_scale[first + row] : 0.0f;
      for (int v = lane / kRows; v < classes; v += kLanes / kRows) {
        scratch[v * kRows + row] = row < count ? factor * scratch[v * kRows + row] : 0.0f;
      }
      __syncthreads();
      add_wgrad(sums, bias_sums, scratches, h, args, plan, first - warp * kRows);
      __syncthreads();
    }
  }

  if (kResident && plan.fused) {
    store_partial(static_cast<float*>(args.workspace) + blockIdx.x * (classes * depth + classes), sums,
                  bias_sums, depth, classes, plan);
  }
}

// How the warps of a block of wgrad_kernel lie over classes, columns and rows.
struct WgradPlan {
  int class_warps, depth_warps, splits;
  int class_tiles, depth_tiles;
  int tiles, tiles_per_chunk, chunks;

  int64_t blocks() const { return int64_t{chunks} * class_tiles * depth_tiles; }
  int64_t partial_floats(int64_t depth, int64_t classes) const {
    return chunks * (classes * depth + classes);
  }
};

WgradPlan make_wgrad_plan(int64_t rows, int64_t depth, int64_t classes) {
  WgradPlan plan{};
  plan.class_warps = plan.depth_warps = 1;
  while (plan.class_warps < kWarps && plan.class_warps * kClasses < classes) plan.class_warps *= 2;
  while (plan.class_warps * plan.depth_warps < kWarps && plan.depth_warps * kStep < depth)
    plan.depth_warps *= 2;
  plan.splits = kWarps / (plan.class_warps * plan.depth_warps);
  plan.class_tiles = static_cast<int>(divide_up(classes, plan.class_warps * kClasses));
  plan.depth_tiles = static_cast<int>(divide_up(depth, plan.depth_warps * kStep));
  const Chunks split = chunks_of(rows, classes * depth + classes);
  plan.tiles = split.tiles;
  plan.tiles_per_chunk = split.tiles_per_chunk;
  plan.chunks = split.chunks;
  return plan;
}

constexpr int64_t kWgradFloats = kWarps * kClasses * kStep;

// Block (chunk, class tile, column tile): partial dweight and, in the first column tile, dbias. A warp keeps
// its 8 classes x 128 columns in registers for the whole chunk.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    wgrad_kernel(const CriticHeadWgrad args, const WgradPlan plan) {
  LCT_DYNAMIC_SHARED(float, shared);  // [groups][class_warps * 8][8 rows]; in the end [warps][8][128]
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int width = plan.class_warps * kClasses;
  const int group_stride = width * kRows;
  const int chunk = static_cast<int>(blockIdx.x) % plan.chunks,
            block = static_cast<int>(blockIdx.x) / plan.chunks;
  const int class_tile = block % plan.class_tiles, depth_tile = block / plan.class_tiles;

  const int class_warp = warp % plan.class_warps;
  const int depth_warp = warp / plan.class_warps % plan.depth_warps;
  const int split = warp / plan.class_warps / plan.depth_warps;
  const int groups = kWarps / plan.splits;
  const int classes = static_cast<int>(args.classes), depth = static_cast<int>(args.depth);
  const int tile_class = class_tile * width;
  const int v0 = tile_class + class_warp * kClasses;
  const int d0 = (depth_tile * plan.depth_warps + depth_warp) * kStep;

  const Matrix<T, kAligned> h{static_cast<const T*>(args.h), depth};
  const T* dlogits = static_cast<const T*>(args.dlogits);

  float acc[kClasses][kQuad] = {};
  float bias_sum = 0.0f;
  const int begin = chunk * plan.tiles_per_chunk;
  const int end = begin + min(plan.tiles_per_chunk, plan.tiles - begin);
#pragma unroll 1
  for (int tile = begin; tile < end; ++tile) {
    const int64_t first = tile * int64_t{kTileRows};
    for (int i = threadIdx.x; i < kTileRows * width; i += kThreads) {
      const int row = i / width, v = i % width;
      float g = 0.0f;
      if (first + row < args.rows && tile_class + v < classes) {
        g = args.row_scale[first + row] * to_float(dlogits[(first + row) * args.classes + tile_class + v]);
      }
      shared[row / kRows * group_stride + v * kRows + row % kRows] = g;
    }
    __syncthreads();
    if (v0 < classes && d0 < depth) {
      accumulate_groups(acc, shared + class_warp * kClasses * kRows, group_stride, split * groups,
                        (split + 1) * groups, h, first, args.rows, args.activation, classes - v0,
                        d0 + lane * kQuad);
    }
    if (static_cast<int>(threadIdx.x) < width) {
      bias_sum += sum_of_class(shared + threadIdx.x * kRows, group_stride);
    }
    __syncthreads();
  }

  float* mine = shared + warp * kClasses * kStep + lane * kQuad;
#pragma unroll
  for (int v = 0; v < kClasses; ++v) {
    put_quad(mine + v * kStep, acc[v]);
  }
  __syncthreads();

  float* partial = static_cast<float*>(args.workspace) + chunk * (args.classes * args.depth + args.classes);
  if (split == 0) {
    const int stride = plan.class_warps * plan.depth_warps * kClasses * kStep;
    for (int v = 0; v < kClasses && v0 + v < classes; ++v) {
      for (int d = lane; d < kStep && d0 + d < depth; d += kLanes) {
        const float* from = shared + (warp * kClasses + v) * kStep + d;
        float sum = from[0];
        for (int s = 1; s < plan.splits; ++s) sum += from[s * stride];
        partial[(v0 + v) * args.depth + d0 + d] = sum;
      }
    }
  }
  const int v = tile_class + static_cast<int>(threadIdx.x);
  if (depth_tile == 0 && static_cast<int>(threadIdx.x) < width && v < classes) {
    partial[args.classes * args.depth + v] = bias_sum;
  }
}

// Adds the chunks' partials: each warp a run of chunks in order, then the 8 runs in order. A lane is an entry
// of dweight or, after those, of dbias. No chunk at all gives zeros.
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const float* partials, const int64_t chunks, const int64_t weights, const int64_t classes,
                void* dweight, void* dbias, const DType dtype) {
  LCT_DYNAMIC_SHARED(float, shared);  // [warps][lanes]
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t entries = weights + classes;
  const int64_t entry = blockIdx.x * int64_t{kLanes} + lane;
  const int64_t run = (chunks + kWarps - 1) / kWarps;

  float sum = 0.0f;
  if (entry < entries) {
    const int64_t end = min((warp + 1) * run, chunks);
#pragma unroll 8
    for (int64_t chunk = warp * run; chunk < end; ++chunk) sum += partials[chunk * entries + entry];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || entry >= entries) return;
  for (int w = 1; w < kWarps; ++w) sum += shared[w * kLanes + lane];
  if (entry < weights)
    store(dweight, entry, dtype, sum);
  else if (dbias)
    store(dbias, entry - weights, dtype, sum);
}

cudaError_t fold(const void* partials, int64_t chunks, int64_t depth, int64_t classes, void* dweight,
                 void* dbias, DType dtype, cudaStream_t stream) {
  const int64_t weights = classes * depth;
  return launch(fold_kernel, divide_up(weights + classes, kLanes), kThreads, kThreads * sizeof(float), stream,
                static_cast<const float*>(partials), chunks, weights, classes, dweight, dbias, dtype);
}

size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Every row starts on the boundary of a quad.
bool aligned(const void* data, int64_t depth, DType dtype) {
  return depth % kQuad == 0 && reinterpret_cast<uintptr_t>(data) % (kQuad * size_of(dtype)) == 0;
}

template <typename T>
auto head_kernel_for(bool aligned, bool resident) {
  if (aligned) return resident ? head_kernel<T, true, true> : head_kernel<T, true, false>;
  return resident ? head_kernel<T, false, true> : head_kernel<T, false, false>;
}

auto head_kernel_for(DType dtype, bool aligned, bool resident) {
  if (dtype == DType::f32) return head_kernel_for<float>(aligned, resident);
  if (dtype == DType::f16) return head_kernel_for<__half>(aligned, resident);
  return head_kernel_for<__nv_bfloat16>(aligned, resident);
}

auto wgrad_kernel_for(DType dtype, bool aligned) {
  if (dtype == DType::f32) return aligned ? wgrad_kernel<float, true> : wgrad_kernel<float, false>;
  if (dtype == DType::f16) return aligned ? wgrad_kernel<__half, true> : wgrad_kernel<__half, false>;
  return aligned ? wgrad_kernel<__nv_bfloat16, true> : wgrad_kernel<__nv_bfloat16, false>;
}

cudaError_t launch_wgrad(const CriticHeadWgrad& args, cudaStream_t stream) {
  const WgradPlan plan = make_wgrad_plan(args.rows, args.depth, args.classes);
  if (plan.chunks > 0) {
    const auto kernel = wgrad_kernel_for(args.h_dtype, aligned(args.h, args.depth, args.h_dtype));
    const cudaError_t error =
        launch(kernel, plan.blocks(), kThreads, kWgradFloats * sizeof(float), stream, args, plan);
    if (error != cudaSuccess) return error;
  }
  return fold(args.workspace, plan.chunks, args.depth, args.classes, args.dweight, args.dbias,
              args.weight_dtype, stream);
}

// Tiles, columns and classes are each counted in 32 bits, and no product of them is.
bool fits(int64_t rows, int64_t depth, int64_t classes) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return rows >= 0 && rows <= kMost * kTileRows && depth >= 1 && depth <= kMost && classes >= 1 &&
         classes <= kMost;
}

}  // namespace

size_t critic_head_wgrad_cuda_workspace(int64_t rows, int64_t depth, int64_t classes, DType, DType, int) {
  if (!fits(rows, depth, classes)) return 0;
  return make_wgrad_plan(rows, depth, classes).partial_floats(depth, classes) * sizeof(float);
}

cudaError_t critic_head_wgrad_cuda(const CriticHeadWgrad& args, int device, cudaStream_t stream) {
  if (!fits(args.rows, args.depth, args.classes)) return cudaErrorInvalidValue;
  const DeviceGuard guard(device);
  return guard.error != cudaSuccess ? guard.error : launch_wgrad(args, stream);
}

// The two kernels of a pass that is not fused follow each other on the stream, so they share the workspace.
size_t critic_head_cuda_workspace(int64_t rows, int64_t depth, int64_t classes, DType h_dtype,
                                  DType weight_dtype, bool with_wgrad, int device) {
  if (!fits(rows, depth, classes)) return 0;
  const Plan plan = make_plan(rows, depth, classes, with_wgrad);
  const size_t pass = plan.workspace_floats(depth, classes) * sizeof(float);
  if (!with_wgrad || plan.fused) return pass;
  return std::max(pass,
                  critic_head_wgrad_cuda_workspace(rows, depth, classes, h_dtype, weight_dtype, device));
}

cudaError_t critic_head_cuda(const CriticHead& args, int device, cudaStream_t stream) {
  if (!fits(args.rows, args.depth, args.classes)) return cudaErrorInvalidValue;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;

  const bool with_wgrad = args.dweight != nullptr;
  const Plan plan = make_plan(args.rows, args.depth, args.classes, with_wgrad);
  if (plan.chunks > 0) {
    const bool quads =
        aligned(args.h, args.depth, args.h_dtype) && aligned(args.dh, args.depth, args.h_dtype);
    const auto kernel = head_kernel_for(args.h_dtype, quads, plan.resident);
    const cudaError_t error = launch(kernel, plan.chunks, kThreads, plan.shared_bytes(), stream, args, plan);
    if (error != cudaSuccess) return error;
  }
  if (!with_wgrad) return cudaSuccess;
  if (plan.fused) {
    return fold(args.workspace, plan.chunks, args.depth, args.classes, args.dweight, args.dbias,
                args.weight_dtype, stream);
  }
  return launch_wgrad({args.h, args.dlogits, args.row_scale, args.dweight, args.dbias, args.workspace,
                       args.rows, args.depth, args.classes, args.h_dtype, args.weight_dtype, args.activation},
                      stream);
}

}  // namespace lct
