// vq's search for vectors of up to 16 columns, which stay in registers from the one reading of x to the sums.
//
// A block has one group's 512 vectors of a run, a thread four of them. Words pass through shared memory, all
// lanes read the same one, and each serves 4 rows of every lane: a word of D columns is D / 4 reads of 16 bytes
// for 4 D fused multiply-subtracts and 12 instructions that keep the smallest score and its word.
#include "cuda/vq_rows.h"

namespace lct::vq {
namespace {

constexpr int kWordFloats = 4 * 1024;  // of shared memory, at the least
constexpr int kWordsAtOnce = 4;

// How shared memory is divided. The sums take the place of the words.
struct Shared {
  int tile;         // words that lie there together, a multiple of four
  bool holds_sums;  // where not, the run's sums are added up in the workspace
  int words;        // 4 bytes each, of both
};

Shared share(int64_t codewords, int64_t depth, int width) {
  const int64_t sums = codewords * (depth + 1);
  Shared shared{};
  shared.holds_sums = sums <= kBlockWords;
  const int64_t room = shared.holds_sums && sums > kWordFloats ? sums : kWordFloats;
  const int64_t all = divide_up(codewords, kWordsAtOnce) * kWordsAtOnce;
  const int64_t most = room / (width + 1) / kWordsAtOnce * kWordsAtOnce;
  shared.tile = static_cast<int>(all < most ? all : most);
  const int64_t used = int64_t{shared.tile} * (width + 1);
  shared.words = static_cast<int>(shared.holds_sums && sums > used ? sums : used);
  // What lies behind stays on whole words of 16 bytes.
  shared.words = static_cast<int>(divide_up(shared.words, 4) * 4);
  return shared;
}

// Words [first, first + tile) of the group and their half norms; behind the last word there are words that no
// row can choose.
template <int kWidth, bool kExact>
__device__ __forceinline__ void load_words(float* words, float* half_norms, const float* codebook,
                                           int64_t first, int tile, int64_t codewords, int depth) {
  for (int k = threadIdx.x; k < tile; k += kThreads) {
    const bool there = first + k < codewords;
    float word[kWidth] = {};
    if (there) load_as<kWidth, kExact>(word, codebook + (first + k) * depth, kExact ? kWidth : depth);
    float square = 0.0f;
#pragma unroll
    for (int d = 0; d < kWidth; ++d) {
      words[k * kWidth + d] = word[d];
      square = fmaf(word[d], word[d], square);
    }
    half_norms[k] = there ? 0.5f * square : kInfinity;
  }
}

// The smallest score of each row among a tile's words, and its word where it beats what came before.
template <int kWidth>
__device__ __forceinline__ void search_tile(const float (&x)[kRows][kWidth], const float* words,
                                            const float* half_norms, int tile, int first,
                                            float (&best)[kRows], int (&code)[kRows]) {
  constexpr int kCount = kWidth < 4 ? kWidth : 4;
#pragma unroll 1
  for (int k = 0; k < tile; k += kWordsAtOnce) {
    const Vector<float, 4> half = *reinterpret_cast<const Vector<float, 4>*>(half_norms + k);
#pragma unroll
    for (int j = 0; j < kWordsAtOnce; ++j) {
      float score[kRows];
#pragma unroll
      for (int turn = 0; turn < kRows; ++turn) score[turn] = half.at[j];
#pragma unroll
      for (int d = 0; d < kWidth; d += kCount) {
        const auto word = *reinterpret_cast<const Vector<float, kCount>*>(words + (k + j) * kWidth + d);
#pragma unroll
        for (int i = 0; i < kCount; ++i)
#pragma unroll
          for (int turn = 0; turn < kRows; ++turn)
            score[turn] = fmaf(-x[turn][d + i], word.at[i], score[turn]);
      }
#pragma unroll
      for (int turn = 0; turn < kRows; ++turn) {
        if (score[turn] < best[turn]) {
          best[turn] = score[turn];
          code[turn] = first + k + j;
        }
      }
    }
  }
}

// Blocks on a multiprocessor: as many as leave a thread the registers that it needs.
constexpr int blocks_of(int width) { return width == kMostWidth ? 3 : 4; }

// kExact: vectors have kWidth columns and are aligned; where not they have fewer, or are not.
template <int kWidth, bool kExact>
__global__ void __launch_bounds__(kThreads, blocks_of(kWidth))
    search_kernel(const Wave wave, const Shared plan) {
  LCT_DYNAMIC_SHARED(float, shared);
  const Run run = this_run(wave);
  const int64_t codewords = wave.args.codewords;
  const int depth = kExact ? kWidth : static_cast<int>(wave.args.depth);
  const float* codebook = wave.args.codebook + run.group * codewords * depth;

  float x[kRows][kWidth];
#pragma unroll
  for (int turn = 0; turn < kRows; ++turn) {
    const int row = row_at(turn);
    load_columns<kWidth, kExact>(x[turn], wave.args.x, row < run.rows ? start_of(wave, run, row) : 0,
                                 row < run.rows ? depth : 0, wave.args.dtype);
  }

  float best[kRows];
  int code[kRows];
#pragma unroll
  for (int turn = 0; turn < kRows; ++turn) {
    best[turn] = kInfinity;
    code[turn] = 0;
  }
  float* words = shared;
  float* half_norms = shared + plan.tile * kWidth;
#pragma unroll 1
  for (int first = 0; first < codewords; first += plan.tile) {
    __syncthreads();
    load_words<kWidth, kExact>(words, half_norms, codebook, first, plan.tile, codewords, depth);
    __syncthreads();
    search_tile<kWidth>(x, words, half_norms, plan.tile, first, best, code);
  }

  float error[kRows];
#pragma unroll
  for (int turn = 0; turn < kRows; ++turn) {
    float word[kWidth];
    load_as<kWidth, kExact>(word, codebook + int64_t{code[turn]} * depth, depth);
    error[turn] = 0.0f;
#pragma unroll
    for (int d = 0; d < kWidth; ++d) {
      const float difference = x[turn][d] - word[d];
      error[turn] = fmaf(difference, difference, error[turn]);
    }
  }
  settle(wave, run, code, error, reinterpret_cast<uint32_t*>(shared + plan.words));

  unsigned peers[kRows];
#pragma unroll
  for (int turn = 0; turn < kRows; ++turn) {
    peers[turn] = __match_any_sync(kAllLanes, code[turn]);
    add_peers<kWidth>(x[turn], peers[turn]);
  }
  // Words are read no more: every thread has been at a barrier of `settle` since.
  float* partial = partial_of(wave);
  float* sums = plan.holds_sums ? shared : partial;
  const int64_t size = codewords * (depth + 1);
  clear(sums, size);
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp == static_cast<int>(threadIdx.x) / kLanes) {
#pragma unroll
      for (int turn = 0; turn < kRows; ++turn) {
        if (leads(peers[turn], code[turn])) {
          float* to = sums + int64_t{code[turn]} * (depth + 1);
#pragma unroll
          for (int d = 0; d < kWidth; ++d) {
            if (kExact || d < depth) to[d] += x[turn][d];
          }
          to[depth] += static_cast<float>(__popc(peers[turn]));
        }
        __syncwarp();
      }
    }
    __syncthreads();
  }
  if (plan.holds_sums) copy(partial, shared, size);
}

template <int kWidth, bool kExact>
cudaError_t launch_search(const Wave& wave, cudaStream_t stream) {
  const Shared plan = share(wave.args.codewords, wave.args.depth, kWidth);
  const size_t bytes = (plan.words + settle_words(wave.kept_slots)) * sizeof(float);
  return launch(search_kernel<kWidth, kExact>, wave.runs * wave.args.groups, kThreads, bytes, stream, wave,
                plan);
}

template <int kWidth>
bool exact(const VqEncode& args) {
  const int64_t size = args.dtype == DType::f32 ? 4 : 2;
  constexpr int64_t kWords = kWidth < 4 ? kWidth : 4;
  const int64_t bytes = kWidth * size < 16 ? kWidth * size : 16;
  return args.depth == kWidth && aligned(args.x, bytes) && aligned(args.codebook, kWords * sizeof(float));
}

}  // namespace

cudaError_t search_shallow(const Wave& wave, cudaStream_t stream) {
  if (exact<2>(wave.args)) return launch_search<2, true>(wave, stream);
  if (exact<4>(wave.args)) return launch_search<4, true>(wave, stream);
  if (exact<8>(wave.args)) return launch_search<8, true>(wave, stream);
  if (exact<16>(wave.args)) return launch_search<16, true>(wave, stream);
  if (wave.args.depth <= 4) return launch_search<4, false>(wave, stream);
  if (wave.args.depth <= 8) return launch_search<8, false>(wave, stream);
  return launch_search<16, false>(wave, stream);
}

}  // namespace lct::vq
