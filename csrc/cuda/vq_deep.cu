// vq's search for vectors of any depth: products of tiles, 128 rows by 64 words, 16 columns at a time.
//
// Where vectors do not fit a thread's registers they pass through shared memory as a matrix product's operands
// do: a thread has 8 rows by 8 words and reads 4 times 16 bytes for 64 fused multiply-subtracts. A run of 512
// rows is four such tiles; what follows the search reads x again, from the cache.
#include "cuda/vq_rows.h"

namespace lct::vq {
namespace {

constexpr int kColumns = 16;  // that pass through shared memory at once
constexpr int kTileRows = 128, kTileWords = 64;
constexpr int kEach = 8;                          // rows and words of a thread
constexpr int kWordThreads = kTileWords / kEach;  // neighbours that share their rows
constexpr int kRowPitch = kTileRows + 4, kWordPitch = kTileWords + 4;
constexpr int kOperandFloats = kColumns * (kRowPitch + kWordPitch);
constexpr int kVector = 4;

struct Shared {
  bool holds_sums;  // where not, the run's sums are added up in the workspace
  int words;        // 4 bytes each: operands, then sums
};

Shared share(int64_t codewords, int64_t depth) {
  const int64_t sums = codewords * (depth + 1);
  const bool holds_sums = sums <= kBlockWords;
  return {holds_sums, static_cast<int>(holds_sums && sums > kOperandFloats ? sums : kOperandFloats)};
}

// A row to a column of `to`.
template <int kWidth>
__device__ __forceinline__ void put_column(float* to, int pitch, const float (&x)[kWidth]) {
#pragma unroll
  for (int d = 0; d < kWidth; ++d) to[d * pitch] = x[d];
}

__device__ __forceinline__ void load_vector(float* to, const float* from) {
  const auto vector = *reinterpret_cast<const Vector<float, kVector>*>(from);
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] = vector.at[i];
}

// A thread's word: four neighbours, and four that lie half a tile on, so that reads do not meet.
__device__ __forceinline__ int word_at(int i) {
  return static_cast<int>(threadIdx.x) % kWordThreads * kVector + i % kVector + i / kVector * (kTileWords / 2);
}

__device__ __forceinline__ int columns_left(int64_t depth, int64_t column, int most) {
  const int64_t left = depth - column;
  return left < 0 ? 0 : left < most ? static_cast<int>(left) : most;
}

// score[row][word] -= x . word over all columns, first column first.
template <bool kAligned>
__device__ __forceinline__ void multiply(const Wave& wave, const Run& run, float* operands, int first_row,
                                         int64_t first_word, float (&score)[kEach][kEach]) {
  const int64_t depth = wave.args.depth, codewords = wave.args.codewords;
  const int thread = threadIdx.x;
  float* rows = operands;
  float* words = operands + kColumns * kRowPitch;
  // Who brings what: a row each, and half a word.
  const int row = first_row + thread;
  const int64_t x = row < run.rows ? start_of(wave, run, row) : 0;
  const int64_t word = first_word + thread / 2;
  const float* codebook = wave.args.codebook + (run.group * codewords + (word < codewords ? word : 0)) * depth;
  const int half = thread % 2 * (kColumns / 2);
#pragma unroll 1
  for (int64_t d0 = 0; d0 < depth; d0 += kColumns) {
    float mine[kColumns], word_columns[kColumns / 2];
    load_columns<kColumns, kAligned>(mine, wave.args.x, x + d0,
                                     row < run.rows ? columns_left(depth, d0, kColumns) : 0, wave.args.dtype);
    load_as<kColumns / 2, kAligned>(word_columns, codebook + d0 + half,
                                    word < codewords ? columns_left(depth, d0 + half, kColumns / 2) : 0);
    __syncthreads();
    put_column(rows + thread, kRowPitch, mine);
    put_column(words + half * kWordPitch + thread / 2, kWordPitch, word_columns);
    __syncthreads();
#pragma unroll 4
    for (int d = 0; d < kColumns; ++d) {
      float a[kEach], b[kEach];
#pragma unroll
      for (int i = 0; i < kEach; i += kVector) {
        load_vector(a + i, rows + d * kRowPitch + thread / kWordThreads * kEach + i);
        load_vector(b + i, words + d * kWordPitch + word_at(i));
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) score[i][j] = fmaf(-a[i], b[j], score[i][j]);
    }
  }
}

// Codes of 128 rows of the run, from first_row on.
template <bool kAligned>
__device__ __forceinline__ void search_rows(const Wave& wave, const Run& run, float* operands, int first_row,
                                            int* codes) {
  const int64_t codewords = wave.args.codewords;
  const float* half_norms = wave.half_norms + run.group * codewords;
  float best[kEach];
  int code[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    best[i] = kInfinity;
    code[i] = 0;
  }
#pragma unroll 1
  for (int first = 0; first < codewords; first += kTileWords) {
    float score[kEach][kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int word = first + word_at(j);
      const float half = word < codewords ? half_norms[word] : kInfinity;
#pragma unroll
      for (int i = 0; i < kEach; ++i) score[i][j] = half;
    }
    multiply<kAligned>(wave, run, operands, first_row, first, score);
#pragma unroll
    for (int j = 0; j < kEach; ++j)
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (score[i][j] < best[i]) {
          best[i] = score[i][j];
          code[i] = first + word_at(j);
        }
      }
  }
  // Neighbours have other words of the same rows: the smallest score, of equal ones the lowest word.
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    for (int apart = kWordThreads / 2; apart > 0; apart /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, best[i], apart);
      const int other_code = __shfl_xor_sync(kAllLanes, code[i], apart);
      if (other < best[i] || (other == best[i] && other_code < code[i])) {
        best[i] = other;
        code[i] = other_code;
      }
    }
    if (threadIdx.x % kWordThreads == 0)
      codes[first_row + static_cast<int>(threadIdx.x) / kWordThreads * kEach + i] = code[i];
  }
}

// Each warp has slices of columns of its own, and takes the run's blocks of rows in order.
template <bool kAligned>
__device__ __forceinline__ void add_rows(const Wave& wave, const Run& run, const int* codes, float* sums) {
  const int64_t depth = wave.args.depth;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
#pragma unroll 1
  for (int64_t d0 = warp * kColumns; d0 < depth; d0 += kWarps * kColumns) {
    const int count = columns_left(depth, d0, kColumns);
#pragma unroll 1
    for (int first = 0; first < run.rows; first += kLanes) {
      const int code = codes[first + lane];
      float x[kColumns];
      load_columns<kColumns, kAligned>(x, wave.args.x, code >= 0 ? start_of(wave, run, first + lane) + d0 : 0,
                                       code >= 0 ? count : 0, wave.args.dtype);
      const unsigned peers = __match_any_sync(kAllLanes, code);
      add_peers<kColumns>(x, peers);
      if (leads(peers, code)) {
        float* to = sums + code * (depth + 1);
#pragma unroll
        for (int d = 0; d < kColumns; ++d) {
          if (d < count) to[d0 + d] += x[d];
        }
        if (d0 == 0) to[depth] += static_cast<float>(__popc(peers));
      }
      __syncwarp();
    }
  }
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) deep_kernel(const Wave wave, const Shared plan) {
  LCT_DYNAMIC_SHARED(float, shared);
  const Run run = this_run(wave);
  const int64_t codewords = wave.args.codewords, depth = wave.args.depth;
  int* codes = reinterpret_cast<int*>(shared + plan.words);
  uint32_t* scratch = reinterpret_cast<uint32_t*>(codes) + kRunRows;

#pragma unroll 1
  for (int first = 0; first < run.rows; first += kTileRows)
    search_rows<kAligned>(wave, run, shared, first, codes);
  __syncthreads();

  int code[kRows];
  float error[kRows];
#pragma unroll
  for (int turn = 0; turn < kRows; ++turn) {
    const int row = row_at(turn);
    const bool there = row < run.rows;
    code[turn] = there ? codes[row] : 0;
    error[turn] = 0.0f;
    const float* from = wave.args.codebook + (run.group * codewords + code[turn]) * depth;
#pragma unroll 1
    for (int64_t d0 = 0; there && d0 < depth; d0 += kColumns) {
      const int count = columns_left(depth, d0, kColumns);
      float x[kColumns], word[kColumns];
      load_columns<kColumns, kAligned>(x, wave.args.x, start_of(wave, run, row) + d0, count,
                                       wave.args.dtype);
      load_as<kColumns, kAligned>(word, from + d0, count);
#pragma unroll
      for (int d = 0; d < kColumns; ++d) {
        const float difference = x[d] - word[d];
        error[turn] = fmaf(difference, difference, error[turn]);
      }
    }
  }
  settle(wave, run, code, error, scratch);

  // Operands are read no more: every thread has been at a barrier of `settle` since.
  float* partial = partial_of(wave);
  float* sums = plan.holds_sums ? shared : partial;
  const int64_t size = codewords * (depth + 1);
  clear(sums, size);
#pragma unroll
  for (int turn = 0; turn < kRows; ++turn) codes[row_at(turn)] = code[turn];
  __syncthreads();
  add_rows<kAligned>(wave, run, codes, sums);
  __syncthreads();
  if (plan.holds_sums) copy(partial, shared, size);
}

// A word a thread.
__global__ void __launch_bounds__(kThreads)
    half_norm_kernel(const float* codebook, float* half_norms, const int64_t words, const int64_t depth) {
  const int64_t word = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (word >= words) return;
  const float* from = codebook + word * depth;
  float square = 0.0f;
#pragma unroll 8
  for (int64_t d = 0; d < depth; ++d) square = fmaf(from[d], from[d], square);
  half_norms[word] = 0.5f * square;
}

}  // namespace

cudaError_t search_deep(const Wave& wave, cudaStream_t stream) {
  const VqEncode& args = wave.args;
  const int64_t vector = args.dtype == DType::f32 ? 4 : 8;
  const bool whole = args.depth % vector == 0 && aligned(args.x, 16) && aligned(args.codebook, 16);
  const Shared plan = share(args.codewords, args.depth);
  const size_t bytes = (plan.words + kRunRows + settle_words(wave.kept_slots)) * sizeof(float);
  const auto kernel = whole ? deep_kernel<true> : deep_kernel<false>;
  return launch(kernel, wave.runs * args.groups, kThreads, bytes, stream, wave, plan);
}

cudaError_t make_half_norms(const Wave& wave, cudaStream_t stream) {
  const int64_t words = wave.args.groups * wave.args.codewords;
  return launch(half_norm_kernel, divide_up(words, kThreads), kThreads, 0, stream, wave.args.codebook,
                wave.half_norms, words, wave.args.depth);
}

}  // namespace lct::vq
