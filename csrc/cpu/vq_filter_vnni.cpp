#include "cpu/simd.h"
#include "cpu/vq_filter.h"

namespace lct {
namespace LCT_SIMD_LEVEL {
namespace {

#define LCT_APART __attribute__((noinline))

constexpr int kVectors = static_cast<int>(kVqBlock) / kLanes;
// Scales of x and of words between these leave no sum that overflows and no underflow that the bound misses.
constexpr float kLeastScale = 0x1p-32f, kMostScale = 0x1p32f, kLongestWord = 0x1p45f;
// Scores are whole numbers of at most 2^27: half norms give a part of up to 2^26, products the other. A score is
// kept as a key, eight times the score plus the place of the word in its tile.
constexpr float kMostUnits = 0x1p26f;
constexpr int kKeyBits = 3;
// What a score starts from that may never be the smallest, and a limit that no other score comes near.
constexpr float kNever = 0x1.8p27f, kMostLimit = 0x1.2p27f;
// Blocks that are searched plainly after some for which the filter was of no use, at most.
constexpr int32_t kLongestPause = 63;
// Pairs that are scored again together.
constexpr int kAtOnce = 8;
// Tiles that are compared with a limit together.
constexpr int kAbreast = 8;

// A group's words, less their mean, as numbers of few bits: word = scale * number, but for rounding. `Columns` of
// a vector share 32 bits: 4 with 8 bits each, or 2 with 16.
struct Words {
  float* mean;           // [width], padded with zeros to whole vectors
  float* half_norms;     // [tiles][8] of what is left; +inf where a word can never be chosen
  int32_t* corrections;  // [tiles][8] what the offset of the rows' numbers adds to a score, negated
  int32_t* panels;       // [tiles][width / Columns][6] numbers of the words, negated
  // All over words that may be chosen.
  float* scale;
  float* longest;        // of what is left
  float* residual;       // the longest difference to what the numbers say
  float* longest_whole;  // of words as they are
};

// Of one thread.
struct Scratch {
  int32_t* columns;   // [width / Columns][64] numbers of every row, each plus the offset
  int32_t* offsets;   // [tiles][8] what a score starts from
  int32_t* least;     // [tiles][64] the smallest key of a tile's words
  int32_t* first;     // [64] the tile with the smallest of those
  int32_t* smallest;  // [64] that key
  int32_t* second;    // [64] the smallest key of all other words
  int32_t* limits;    // [64] the largest key of a word that may be the nearest
  float* residuals;   // [64] length of what the numbers leave of a row
  float* lengths;     // [64] of rows less the mean
  float* shifts;      // [64] by how much scores exceed those without the mean
  float* errors;      // [64] by how much a score may be wrong
  float* best;        // [64] the smallest score in the steps of vq.h
  int32_t* pairs;     // [most_pairs] 64 * tile + row: to be scored again
  int32_t* pause;     // [0] blocks still to be searched plainly, [1] how many after the last one tried
};

class Layout {
 public:
  explicit Layout(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* to = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return to;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

LCT_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <int Columns>
LCT_INLINE int64_t lay_out(const VqWork& work, char* base, Words& words) {
  Layout layout(base);
  words.mean = layout.take<float>(padded(work.width));
  words.half_norms = layout.take<float>(padded(work.tiles * kVqPitch));
  words.corrections = layout.take<int32_t>(padded(work.tiles * kVqPitch));
  words.panels = layout.take<int32_t>(work.tiles * work.width / Columns * kVqTile);
  float* lengths = layout.take<float>(4);
  words.scale = lengths;
  words.longest = lengths + 1;
  words.residual = lengths + 2;
  words.longest_whole = lengths + 3;
  return layout.used();
}

// With more pairs scored again the plain search is as fast.
LCT_INLINE int64_t most_pairs(const VqWork& work) { return 2 * work.tiles + kVqBlock; }

template <int Columns>
LCT_INLINE int64_t lay_out(const VqWork& work, char* base, Scratch& scratch) {
  Layout layout(base);
  scratch.columns = layout.take<int32_t>(work.width / Columns * kVqBlock);
  scratch.offsets = layout.take<int32_t>(padded(work.tiles * kVqPitch));
  scratch.least = layout.take<int32_t>((work.tiles + kAbreast - 1) * kVqBlock);
  scratch.first = layout.take<int32_t>(kVqBlock);
  scratch.smallest = layout.take<int32_t>(kVqBlock);
  scratch.second = layout.take<int32_t>(kVqBlock);
  scratch.limits = layout.take<int32_t>(kVqBlock);
  scratch.residuals = layout.take<float>(kVqBlock);
  scratch.lengths = layout.take<float>(kVqBlock);
  scratch.shifts = layout.take<float>(kVqBlock);
  scratch.errors = layout.take<float>(kVqBlock);
  scratch.best = layout.take<float>(kVqBlock);
  scratch.pairs = layout.take<int32_t>(most_pairs(work) + kAbreast * kLanes + kAtOnce);
  scratch.pause = layout.take<int32_t>(2);
  return layout.used();
}

template <int Columns>
LCT_INLINE Words words_of(const VqWork& work, int64_t group) {
  Words words;
  lay_out<Columns>(work, work.filter_words + group * work.filter_group_bytes, words);
  return words;
}

template <int Columns>
LCT_INLINE Scratch scratch_of(const VqWork& work, int slot) {
  Scratch scratch;
  lay_out<Columns>(work, work.filter_scratch + slot * work.filter_scratch_bytes, scratch);
  return scratch;
}

template <int Columns>
int64_t group_bytes(const VqWork& work) {
  Words words;
  return lay_out<Columns>(work, nullptr, words);
}

template <int Columns>
int64_t scratch_bytes(const VqWork& work) {
  Scratch scratch;
  return lay_out<Columns>(work, nullptr, scratch);
}

template <int Columns>
void begin(const VqWork& work, int slot) {
  const Scratch scratch = scratch_of<Columns>(work, slot);
  scratch.pause[0] = scratch.pause[1] = 0;
}

LCT_INLINE Vec load_up_to(const float* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, static_cast<int>(n));
}
LCT_INLINE Vec magnitude(Vec x) { return {_mm512_abs_ps(x.v)}; }
LCT_INLINE Vec root(Vec x) { return {_mm512_sqrt_ps(x.v)}; }
// c - a * b.
LCT_INLINE Vec minus_product(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
LCT_INLINE float root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
LCT_INLINE float larger(float a, float b) { return a > b ? a : b; }

// Ternary logic: bits of the second where the first is set, of the third elsewhere.
constexpr int kEither = 0xca;

// What the two kinds of numbers differ in.
template <int Columns>
struct Numbers;

template <>
struct Numbers<4> {
  // The instruction takes bytes of x without a sign.
  static constexpr int kOffset = 128;
  // By how many bits a sum is to be moved to become a key.
  static constexpr int kShift = kKeyBits;
  static float most(int64_t) { return 127.0f; }
  // To each sum, the products of the numbers beside it. The intrinsic does the same, but GCC 12 copies its sums to
  // and fro.
  static __attribute__((always_inline)) void add_products(__m512i& sum, __m512i x, __m512i word) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(word));
  }
  // Sixteen numbers of a word, close together.
  static __attribute__((always_inline)) void narrow(__m512i x, int32_t* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x));
  }
  // The lowest bits of each together.
  static __attribute__((always_inline)) __m512i join(const __m512i* x) {
    const __m512i low = _mm512_set1_epi32(0xff), half = _mm512_set1_epi32(0xffff);
    const __m512i front = _mm512_ternarylogic_epi32(low, x[0], _mm512_slli_epi32(x[1], 8), kEither);
    const __m512i back = _mm512_ternarylogic_epi32(low, x[2], _mm512_slli_epi32(x[3], 8), kEither);
    return _mm512_ternarylogic_epi32(half, front, _mm512_slli_epi32(back, 16), kEither);
  }
};
template <>
struct Numbers<2> {
  static constexpr int kOffset = 0;
  // Numbers of words are multiples of eight, so that sums are keys as they are.
  static constexpr int kShift = 0;
  // Keeps sums of products below 2^26, and eight times a word's number below 2^15.
  static float most(int64_t width) { return 8190.0f * root(1.0f / static_cast<float>(width)); }
  static __attribute__((always_inline)) void add_products(__m512i& sum, __m512i x, __m512i word) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(word));
  }
  static __attribute__((always_inline)) void narrow(__m512i x, int32_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(x));
  }
  static __attribute__((always_inline)) __m512i join(const __m512i* x) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffff), x[0], _mm512_slli_epi32(x[1], 16), kEither);
  }
};

// ---- the words ----------------------------------------------------------------------------------------

// A word whose half norm is not finite has no score below +inf.
LCT_INLINE bool may_be_chosen(const VqWork& work, int64_t group, int64_t k) {
  const float* half_norms = work.half_norms + group * work.tiles * kVqPitch;
  return half_norms[k / kVqTile * kVqPitch + k % kVqTile] < __builtin_inff();
}

void average(const VqWork& work, int64_t group, const float* from, const Words& words) {
  const int64_t width = work.width;
  for (int64_t d = 0; d < padded(width); ++d) words.mean[d] = 0.0f;
  float count = 0.0f;
  for (int64_t k = 0; k < work.args.codewords; ++k) {
    if (!may_be_chosen(work, group, k)) continue;
    count += 1.0f;
    for (int64_t d = 0; d < width; ++d) words.mean[d] += from[k * width + d];
  }
  for (int64_t d = 0; d < width; ++d) words.mean[d] /= larger(count, 1.0f);
}

// Half norms, the scale, and the longest.
template <int Columns>
void survey(const VqWork& work, int64_t group, const float* from, const Words& words) {
  const int64_t width = work.width;
  for (int64_t i = 0; i < padded(work.tiles * kVqPitch); ++i) words.half_norms[i] = __builtin_inff();
  Vec largest = broadcast(0.0f);
  float longest = 0.0f, longest_whole = 0.0f;
  for (int64_t k = 0; k < work.args.codewords; ++k) {
    if (!may_be_chosen(work, group, k)) continue;
    Vec square = broadcast(0.0f), square_whole = broadcast(0.0f);
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec whole = load_up_to(from + k * width + d, width - d), x = sub(whole, load(words.mean + d));
      largest = max(largest, magnitude(x));
      square = fma(x, x, square);
      square_whole = fma(whole, whole, square_whole);
    }
    const float norm = reduce_add(square);
    words.half_norms[k / kVqTile * kVqPitch + k % kVqTile] = 0.5f * norm;
    longest = larger(norm, longest);
    longest_whole = larger(reduce_add(square_whole), longest_whole);
  }
  *words.scale = reduce_max(largest) / Numbers<Columns>::most(width);
  *words.longest = root(longest);
  *words.longest_whole = root(longest_whole);
}

template <int Columns>
void narrow_words(const VqWork& work, int64_t group, const float* from, const Words& words) {
  const int64_t width = work.width, steps = width / Columns;
  for (int64_t i = 0; i < work.tiles * steps * kVqTile; ++i) words.panels[i] = 0;
  for (int64_t i = 0; i < padded(work.tiles * kVqPitch); ++i) words.corrections[i] = 0;
  const Vec scale = broadcast(*words.scale), inverse_scale = inverse(scale);
  float residual = 0.0f;
  for (int64_t k = 0; k < work.args.codewords; ++k) {
    if (!may_be_chosen(work, group, k)) continue;
    int32_t* panel = words.panels + k / kVqTile * steps * kVqTile + k % kVqTile;
    Vec square = broadcast(0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec x = sub(load_up_to(from + k * width + d, width - d), load(words.mean + d));
      const Vec rounded = round(mul(x, inverse_scale));
      const Vec left = minus_product(rounded, scale, x);
      square = fma(left, left, square);
      const __m512i number = _mm512_cvtps_epi32(rounded.v);
      sum = _mm512_add_epi32(sum, number);
      int32_t close[kLanes / Columns];
      const __m512i negative = _mm512_sub_epi32(_mm512_setzero_si512(), number);
      Numbers<Columns>::narrow(_mm512_slli_epi32(negative, kKeyBits - Numbers<Columns>::kShift), close);
      for (int64_t j = 0; j < kLanes / Columns && d / Columns + j < steps; ++j)
        panel[(d / Columns + j) * kVqTile] = close[j];
    }
    words.corrections[k / kVqTile * kVqPitch + k % kVqTile] =
        Numbers<Columns>::kOffset * _mm512_reduce_add_epi32(sum);
    residual = larger(reduce_add(square), residual);
  }
  *words.residual = root(residual);
}

template <int Columns>
void prepare(const VqWork& work, int64_t group) {
  const Words words = words_of<Columns>(work, group);
  const float* from = work.words + group * work.args.codewords * work.width;
  average(work, group, from, words);
  survey<Columns>(work, group, from, words);
  const float scale = *words.scale;
  if (scale >= kLeastScale && scale <= kMostScale && *words.longest_whole <= kLongestWord) {
    narrow_words<Columns>(work, group, from, words);
  } else {
    *words.scale = 0.0f;
  }
}

// ---- the rows -----------------------------------------------------------------------------------------

// Rows as numbers, all with the scale that is returned; 0 where that is out of range. A row that is not finite has
// no finite length.
template <int Columns>
LCT_APART float narrow_rows(const VqWork& work, const Words& words, const float* columns, const Scratch& scratch) {
  const int64_t width = work.width;
  Vec largest[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) largest[v] = broadcast(0.0f);
  for (int64_t d = 0; d < width; ++d) {
    const Vec mean = broadcast(words.mean[d]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      largest[v] = max(largest[v], magnitude(sub(load(columns + d * kVqBlock + v * kLanes), mean)));
  }
  const float most = reduce_max(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
  const float coarsest = 0.5f * *words.longest * *words.longest / (kMostUnits * *words.scale);
  const float scale = larger(most / Numbers<Columns>::most(width), coarsest);
  if (!(scale >= kLeastScale && scale <= kMostScale)) return 0.0f;

  // Added to a float below 2^22 it leaves that, rounded to a whole number, plus the offset, in the lowest bits.
  const Vec magic = broadcast(0x1.8p23f + static_cast<float>(Numbers<Columns>::kOffset));
  const Vec inverse_scale = broadcast(1.0f / scale), unit = broadcast(scale);
  float half_norm = 0.0f;
  for (int64_t d = 0; d < width; ++d) half_norm = __builtin_fmaf(words.mean[d], words.mean[d], half_norm);
#pragma GCC unroll 1
  for (int v = 0; v < kVectors; ++v) {
    Vec residual = broadcast(0.0f), length = broadcast(0.0f), shift = broadcast(0.5f * half_norm);
    for (int64_t d = 0; d < width; d += Columns) {
      __m512i bits[Columns];
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) {
        const Vec whole = load(columns + (d + j) * kVqBlock + v * kLanes), mean = broadcast(words.mean[d + j]);
        const Vec x = sub(whole, mean), moved = fma(x, inverse_scale, magic);
        const Vec left = minus_product(sub(moved, magic), unit, x);
        residual = fma(left, left, residual);
        length = fma(x, x, length);
        shift = minus_product(whole, mean, shift);
        bits[j] = _mm512_castps_si512(moved.v);
      }
      _mm512_storeu_si512(scratch.columns + d / Columns * kVqBlock + v * kLanes, Numbers<Columns>::join(bits));
    }
    store(scratch.residuals + v * kLanes, root(residual));
    store(scratch.lengths + v * kLanes, root(length));
    store(scratch.shifts + v * kLanes, shift);
  }
  return scale;
}

// Steps: how many take a row to its end, where it is known early. Then they are few, and a tile takes as long to
// compare as to score: half the rows leave registers for that.
template <int Columns, int Steps>
LCT_INLINE void score_in_steps(const VqWork& work, const Words& words, const Scratch& scratch) {
  constexpr int together = Steps ? kVectors / 2 : kVectors, shift = Numbers<Columns>::kShift;
  const int64_t steps = Steps ? Steps : work.width / Columns;
  for (int64_t row = 0; row < kVqBlock; row += together * kLanes) {
    __m512i here = _mm512_setzero_si512(), smallest[together], second[together], first[together];
#pragma GCC unroll 4
    for (int v = 0; v < together; ++v) {
      smallest[v] = second[v] = _mm512_set1_epi32(INT32_MAX);
      first[v] = _mm512_setzero_si512();
    }
    const int32_t* panel = words.panels;
    const int32_t* offset = scratch.offsets;
    int32_t* to = scratch.least + row;
    for (int32_t tile = 0; tile < work.tiles; ++tile, offset += kVqPitch, to += kVqBlock) {
      __m512i key[kVqTile][together];
#pragma GCC unroll 6
      for (int c = 0; c < kVqTile; ++c)
#pragma GCC unroll 4
        for (int v = 0; v < together; ++v) key[c][v] = _mm512_set1_epi32(offset[c]);
      const int32_t* column = scratch.columns + row;
#pragma GCC unroll 4
      for (int64_t step = 0; step < steps; ++step, column += kVqBlock, panel += kVqTile) {
        __m512i x[together];
#pragma GCC unroll 4
        for (int v = 0; v < together; ++v) x[v] = _mm512_loadu_si512(column + v * kLanes);
#pragma GCC unroll 6
        for (int c = 0; c < kVqTile; ++c) {
          const __m512i word = _mm512_set1_epi32(panel[c]);
#pragma GCC unroll 4
          for (int v = 0; v < together; ++v) Numbers<Columns>::add_products(key[c][v], x[v], word);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < together; ++v) {
        if (shift)
#pragma GCC unroll 6
          for (int c = 0; c < kVqTile; ++c)
            key[c][v] = _mm512_or_si512(_mm512_slli_epi32(key[c][v], shift), _mm512_set1_epi32(c));
        // Pairs in order; then of the three smaller ones and all the larger ones the first two.
        __m512i low[3], high[3];
#pragma GCC unroll 3
        for (int c = 0; c < 3; ++c) {
          low[c] = _mm512_min_epi32(key[2 * c][v], key[2 * c + 1][v]);
          high[c] = _mm512_max_epi32(key[2 * c][v], key[2 * c + 1][v]);
        }
        const __m512i both = _mm512_min_epi32(low[0], low[1]), least = _mm512_min_epi32(both, low[2]);
        __m512i next = _mm512_min_epi32(_mm512_max_epi32(low[0], low[1]), _mm512_max_epi32(both, low[2]));
        next = _mm512_min_epi32(next, _mm512_min_epi32(_mm512_min_epi32(high[0], high[1]), high[2]));
        _mm512_storeu_si512(to + v * kLanes, least);
        first[v] = _mm512_mask_mov_epi32(first[v], _mm512_cmplt_epi32_mask(least, smallest[v]), here);
        second[v] = _mm512_min_epi32(_mm512_min_epi32(second[v], next), _mm512_max_epi32(smallest[v], least));
        smallest[v] = _mm512_min_epi32(smallest[v], least);
      }
      here = _mm512_add_epi32(here, _mm512_set1_epi32(1));
    }
#pragma GCC unroll 4
    for (int v = 0; v < together; ++v) {
      _mm512_storeu_si512(scratch.first + row + v * kLanes, first[v]);
      _mm512_storeu_si512(scratch.smallest + row + v * kLanes, smallest[v]);
      _mm512_storeu_si512(scratch.second + row + v * kLanes, second[v]);
    }
  }
}

// The smallest key of every tile for every row, the smallest two of all, and the first's tile.
template <int Columns>
LCT_APART void score(const VqWork& work, const Words& words, float units, const Scratch& scratch) {
  constexpr int shift = Numbers<Columns>::kShift;
  const __m512i places = _mm512_and_si512(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                          _mm512_set1_epi32(kVqPitch - 1));
  for (int64_t i = 0; i < work.tiles * kVqPitch; i += kLanes) {
    const __m512 half_norm = _mm512_mul_ps(load(words.half_norms + i).v, _mm512_set1_ps(units));
    const __m512i whole = _mm512_cvtps_epi32(_mm512_min_ps(half_norm, _mm512_set1_ps(kNever)));
    const __m512i offset = _mm512_add_epi32(whole, _mm512_loadu_si512(words.corrections + i));
    _mm512_storeu_si512(scratch.offsets + i,
                        shift ? offset : _mm512_or_si512(_mm512_slli_epi32(offset, kKeyBits), places));
  }
  // No word is behind the last one.
  int32_t* const end = scratch.least + work.tiles * kVqBlock;
  for (int64_t i = 0; i < (kAbreast - 1) * kVqBlock; ++i) end[i] = INT32_MAX;
  if (work.width / Columns == 4) return score_in_steps<Columns, 4>(work, words, scratch);
  return score_in_steps<Columns, 0>(work, words, scratch);
}

// ---- scoring again ------------------------------------------------------------------------------------

// Scores of each pair's tile in the steps of vq.h, words in lanes; the best of them and its word take the place
// of the row's where they are better, or as good with a lower code.
LCT_APART void score_again(const VqWork& work, int64_t group, const float* rows, int64_t stride, int64_t count,
                           const Scratch& scratch, int32_t* codes) {
  const int64_t depth = work.args.depth;
  const float* panels = work.panels + group * work.tiles * kVqPitch * depth;
  const float* half_norms = work.half_norms + group * work.tiles * kVqPitch;
  // Those that fill up the last eight are harmless: what they give is already known.
  for (int64_t i = count; i % kAtOnce; ++i) scratch.pairs[i] = scratch.pairs[0];
  for (int64_t i = 0; i < count; i += kAtOnce) {
    __m256 score[kAtOnce];
    const float *panel[kAtOnce], *row[kAtOnce];
    const int32_t* pair = scratch.pairs + i;
#pragma GCC unroll 8
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t tile = pair[j] / kVqBlock;
      panel[j] = panels + tile * kVqPitch * depth;
      row[j] = rows + pair[j] % kVqBlock * stride;
      score[j] = _mm256_loadu_ps(half_norms + tile * kVqPitch);
    }
    for (int64_t d = 0; d < depth; ++d)
#pragma GCC unroll 8
      for (int j = 0; j < kAtOnce; ++j)
        score[j] = _mm256_fnmadd_ps(_mm256_set1_ps(row[j][d]), _mm256_loadu_ps(panel[j] + d * kVqPitch), score[j]);
#pragma GCC unroll 8
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t tile = pair[j] / kVqBlock, at = pair[j] % kVqBlock;
      // Of a NaN and another the second stays.
      const __m256 number = _mm256_min_ps(score[j], _mm256_set1_ps(__builtin_inff()));
      __m256 least = _mm256_min_ps(number, _mm256_permute2f128_ps(number, number, 1));
      least = _mm256_min_ps(least, _mm256_permute_ps(least, 0x4e));
      least = _mm256_min_ps(least, _mm256_permute_ps(least, 0xb1));
      const unsigned which = _mm256_cmp_ps_mask(score[j], least, _CMP_EQ_OQ);
      const int32_t code = static_cast<int32_t>(tile * kVqTile) + __builtin_ctz(which | 1u << kVqPitch);
      const float best = _mm256_cvtss_f32(least);
      if (best < scratch.best[at] || (best == scratch.best[at] && code < codes[at])) {
        scratch.best[at] = best;
        codes[at] = code;
      }
    }
  }
}

// By how much the score of any word of a row, and what it is compared with, may be wrong; see docs/vq.md.
LCT_INLINE Vec error_of(const Words& words, float depth, float unit, Vec residual, Vec length) {
  const Vec longest = broadcast(*words.longest), whole = broadcast(*words.longest_whole);
  const Vec steps = broadcast(0x1p-24f * (3.0f * depth + 16.0f)), fewer_steps = broadcast(0x1p-24f * (depth + 16.0f));
  Vec error = broadcast(unit);
  error = fma(residual, longest, error);
  error = fma(add(length, residual), broadcast(*words.residual), error);
  error = fma(mul(steps, whole), add(add(whole, whole), length), error);
  error = fma(mul(fewer_steps, longest), add(longest, length), error);
  return mul(error, broadcast(1.0f + 0x1p-8f));
}

// The smallest key for a score of at least this.
LCT_INLINE __m512i key_above(Vec score) {
  const __m512i whole = _mm512_cvt_roundps_epi32(score.v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  return _mm512_add_epi32(_mm512_slli_epi32(whole, kKeyBits), _mm512_set1_epi32((1 << kKeyBits) - 1));
}
LCT_INLINE bool all_below(Vec x, float limit) {
  return _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_LT_OQ) == 0xffff;
}

// Codes by the smallest key. Rows whose bits are returned are open: another word may be the nearest, too. Where a
// bound is not finite or too large, `good` is false.
LCT_APART uint64_t find_open(const VqWork& work, const Words& words, float scale, float units,
                             const Scratch& scratch, int32_t* codes, bool& good) {
  const float depth = static_cast<float>(work.args.depth), unit = scale * *words.scale;
  uint64_t open = 0;
  good = true;
  for (int64_t row = 0; row < kVqBlock; row += kLanes) {
    const Vec error = error_of(words, depth, unit, load(scratch.residuals + row), load(scratch.lengths + row));
    store(scratch.errors + row, error);
    const Vec apart = mul(error, broadcast(2.0f * units));
    good &= all_below(apart, kMostUnits);
    const __m512i smallest = _mm512_loadu_si512(scratch.smallest + row);
    const __m512i place_bits = _mm512_set1_epi32((1 << kKeyBits) - 1);
    const __m512i limit = _mm512_add_epi32(_mm512_or_si512(smallest, place_bits), key_above(apart));
    open |= static_cast<uint64_t>(_mm512_cmple_epi32_mask(_mm512_loadu_si512(scratch.second + row), limit)) << row;
    const __m512i first = _mm512_mullo_epi32(_mm512_loadu_si512(scratch.first + row), _mm512_set1_epi32(kVqTile));
    _mm512_storeu_si512(codes + row, _mm512_add_epi32(first, _mm512_and_si512(smallest, place_bits)));
  }
  return open;
}

// The pairs of open rows and the tiles of their smallest keys.
LCT_INLINE int64_t first_pairs(uint64_t open, const Scratch& scratch) {
  int64_t count = 0;
  for (; open; open &= open - 1) {
    const int32_t row = __builtin_ctzll(open);
    scratch.best[row] = __builtin_inff();
    scratch.pairs[count++] = scratch.first[row] * static_cast<int32_t>(kVqBlock) + row;
  }
  return count;
}

// The largest key of a word at least as good as the best of the first tile. False where one is out of range.
LCT_INLINE bool find_limits(uint64_t open, float units, const Scratch& scratch) {
  bool good = true;
  for (int64_t row = 0; row < kVqBlock; row += kLanes) {
    const __mmask16 some = static_cast<__mmask16>(open >> row);
    const Vec best = {_mm512_maskz_loadu_ps(some, scratch.best + row)};
    const Vec score = mul(add(sub(best, load(scratch.shifts + row)), load(scratch.errors + row)), broadcast(units));
    const Vec limit = {_mm512_maskz_mov_ps(some, score.v)};
    good &= all_below(limit, kMostLimit);
    _mm512_storeu_si512(scratch.limits + row,
                        _mm512_mask_mov_epi32(_mm512_set1_epi32(INT32_MIN), some, key_above(limit)));
  }
  return good;
}

// Pairs of an open row and a tile, but for the first, that the limit does not rule out; -1 where they are too many.
LCT_APART int64_t find_pairs(const VqWork& work, uint64_t open, const Scratch& scratch) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  int64_t count = 0;
  const int64_t most = most_pairs(work);
  for (int32_t row = 0; row < kVqBlock; row += kLanes) {
    if (!(open >> row & 0xffff)) continue;
    const __m512i limit = _mm512_loadu_si512(scratch.limits + row), first = _mm512_loadu_si512(scratch.first + row);
    __m512i here = _mm512_setzero_si512(), pairs = _mm512_add_epi32(lanes, _mm512_set1_epi32(row));
    const int32_t* least = scratch.least + row;
    for (int32_t tile = 0; tile < work.tiles; tile += kAbreast, least += kAbreast * kVqBlock) {
      __mmask16 inside[kAbreast];
      unsigned any = 0;
#pragma GCC unroll 8
      for (int i = 0; i < kAbreast; ++i) {
        inside[i] = _mm512_mask_cmple_epi32_mask(_mm512_cmpneq_epi32_mask(first, here),
                                                 _mm512_loadu_si512(least + i * kVqBlock), limit);
        any |= inside[i];
        here = _mm512_add_epi32(here, _mm512_set1_epi32(1));
      }
      if (count > most) return -1;
      if (any) {
        // Without a branch for each: which of them have some is hard to foresee.
        __m512i next = pairs;
#pragma GCC unroll 8
        for (int i = 0; i < kAbreast; ++i) {
          _mm512_storeu_si512(scratch.pairs + count, _mm512_maskz_compress_epi32(inside[i], next));
          count += __builtin_popcount(inside[i]);
          next = _mm512_add_epi32(next, _mm512_set1_epi32(kVqBlock));
        }
      }
      pairs = _mm512_add_epi32(pairs, _mm512_set1_epi32(kAbreast * kVqBlock));
    }
  }
  return count;
}

template <int Columns>
bool try_search(const VqWork& work, int64_t group, const float* columns, const float* rows, int64_t stride,
                const Scratch& scratch, int32_t* codes) {
  const Words words = words_of<Columns>(work, group);
  if (*words.scale == 0.0f) return false;
  const float scale = narrow_rows<Columns>(work, words, columns, scratch);
  if (scale == 0.0f) return false;
  const float units = 1.0f / (scale * *words.scale);
  score<Columns>(work, words, units, scratch);
  bool good;
  const uint64_t open = find_open(work, words, scale, units, scratch, codes, good);
  if (!good) return false;
  if (!open) return true;
  score_again(work, group, rows, stride, first_pairs(open, scratch), scratch, codes);
  if (!find_limits(open, units, scratch)) return false;
  const int64_t count = find_pairs(work, open, scratch);
  if (count < 0) return false;
  score_again(work, group, rows, stride, count, scratch, codes);
  return true;
}

template <int Columns>
bool search(const VqWork& work, int64_t group, const float* columns, const float* rows, int64_t stride,
            int32_t* codes, int slot) {
  const Scratch scratch = scratch_of<Columns>(work, slot);
  int32_t* pause = scratch.pause;
  if (pause[0] > 0) {
    --pause[0];
    return false;
  }
  const bool done = try_search<Columns>(work, group, columns, rows, stride, scratch, codes);
  pause[1] = done ? pause[1] / 2 : pause[1] < kLongestPause ? 2 * pause[1] + 1 : kLongestPause;
  pause[0] = pause[1];
  return done;
}

}  // namespace

const VqFilter vq_filter_8_bits = {group_bytes<4>, scratch_bytes<4>, begin<4>, prepare<4>, search<4>};
const VqFilter vq_filter_16_bits = {group_bytes<2>, scratch_bytes<2>, begin<2>, prepare<2>, search<2>};

}  // namespace LCT_SIMD_LEVEL
}  // namespace lct
