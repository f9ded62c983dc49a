#include "cpu/simd.h"
#include "cpu/vq_filter.h"
#include "cpu/vq_tasks.h"

namespace lct {
namespace LCT_SIMD_LEVEL {
namespace {

// Vectors of 16 rows that the search keeps in registers beside six words.
#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 1;
#endif

// A step of its own: inlined, the steps of a block would fight over registers, and profiles would mix them.
#define LCT_APART __attribute__((noinline))

LCT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- arithmetic that gives the same bits on every instruction set -------------------------------------

#if defined(__AVX512F__)

// c - a * b, rounded once.
LCT_INLINE Vec minus_product(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
// c + a * b, rounded once.
LCT_INLINE Vec plus_product(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a where a < b, else b, also where either is NaN.
LCT_INLINE Vec smaller(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
// x where a < b, else y.
LCT_INLINE Vec where_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
}

// Four floats of each of sixteen rows, turned: at(i) is where row i's begin.
template <class At>
LCT_INLINE void four_columns(At at, Vec (&out)[4]) {
  __m512 row[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    row[j] = _mm512_castps128_ps512(_mm_loadu_ps(at(j)));
    row[j] = _mm512_insertf32x4(row[j], _mm_loadu_ps(at(4 + j)), 1);
    row[j] = _mm512_insertf32x4(row[j], _mm_loadu_ps(at(8 + j)), 2);
    row[j] = _mm512_insertf32x4(row[j], _mm_loadu_ps(at(12 + j)), 3);
  }
  const __m512 a = _mm512_unpacklo_ps(row[0], row[1]), b = _mm512_unpacklo_ps(row[2], row[3]);
  const __m512 c = _mm512_unpackhi_ps(row[0], row[1]), d = _mm512_unpackhi_ps(row[2], row[3]);
  out[0].v = _mm512_shuffle_ps(a, b, 0x44);
  out[1].v = _mm512_shuffle_ps(a, b, 0xee);
  out[2].v = _mm512_shuffle_ps(c, d, 0x44);
  out[3].v = _mm512_shuffle_ps(c, d, 0xee);
}

#elif defined(__AVX2__)

LCT_INLINE Vec minus_product(Vec a, Vec b, Vec c) {
  return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
LCT_INLINE Vec plus_product(Vec a, Vec b, Vec c) { return fma(a, b, c); }
LCT_INLINE Vec smaller(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
LCT_INLINE Vec where_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
template <class At>
LCT_INLINE void four_columns_of_eight(At at, int first, __m256& x, __m256& y, __m256& z, __m256& w) {
  __m256 row[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
    row[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at(first + j))),
                                  _mm_loadu_ps(at(first + 4 + j)), 1);
  const __m256 a = _mm256_unpacklo_ps(row[0], row[1]), b = _mm256_unpacklo_ps(row[2], row[3]);
  const __m256 c = _mm256_unpackhi_ps(row[0], row[1]), d = _mm256_unpackhi_ps(row[2], row[3]);
  x = _mm256_shuffle_ps(a, b, 0x44);
  y = _mm256_shuffle_ps(a, b, 0xee);
  z = _mm256_shuffle_ps(c, d, 0x44);
  w = _mm256_shuffle_ps(c, d, 0xee);
}
template <class At>
LCT_INLINE void four_columns(At at, Vec (&out)[4]) {
  four_columns_of_eight(at, 0, out[0].lo, out[1].lo, out[2].lo, out[3].lo);
  four_columns_of_eight(at, 8, out[0].hi, out[1].hi, out[2].hi, out[3].hi);
}

#else

#if defined(__FP_FAST_FMAF)
LCT_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// c + a * b rounded once, without an instruction for it. The product is exact in double; the sum is rounded to
// odd there (the last bit set where digits were lost), which leaves the second rounding nothing to get wrong.
LCT_INLINE float fused(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b), wide = static_cast<double>(c);
  double sum = product + wide;
  const double back = sum - product;
  const double lost = (product - (sum - back)) + (wide - back);
  uint64_t bits;
  memcpy(&bits, &sum, sizeof bits);
  // Where the sum is not finite, lost is NaN and neither comparison holds.
  if ((lost > 0.0 || lost < 0.0) && !(bits & 1)) bits += (lost > 0.0) == (sum > 0.0) ? uint64_t{1} : ~uint64_t{0};
  memcpy(&sum, &bits, sizeof bits);
  return static_cast<float>(sum);
}
#endif

LCT_INLINE Vec minus_product(Vec a, Vec b, Vec c) {
  for (int i = 0; i < kLanes; ++i) c.v[i] = fused(-a.v[i], b.v[i], c.v[i]);
  return c;
}
LCT_INLINE Vec plus_product(Vec a, Vec b, Vec c) {
  for (int i = 0; i < kLanes; ++i) c.v[i] = fused(a.v[i], b.v[i], c.v[i]);
  return c;
}
LCT_INLINE Vec smaller(Vec a, Vec b) {
  for (int i = 0; i < kLanes; ++i) b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return b;
}
LCT_INLINE Vec where_less(Vec a, Vec b, Vec x, Vec y) {
  for (int i = 0; i < kLanes; ++i) y.v[i] = a.v[i] < b.v[i] ? x.v[i] : y.v[i];
  return y;
}
struct Eight {
  float v[8];
};
LCT_INLINE Eight load_eight(const float* p) {
  Eight x;
  for (int i = 0; i < 8; ++i) x.v[i] = p[i];
  return x;
}
LCT_INLINE Eight minus_product(float a, Eight b, Eight c) {
  for (int i = 0; i < 8; ++i) c.v[i] = fused(-a, b.v[i], c.v[i]);
  return c;
}
LCT_INLINE unsigned equal(Eight a, float b) {
  unsigned bits = 0;
  for (int i = 0; i < 8; ++i) bits |= (a.v[i] == b ? 1u : 0u) << i;
  return bits;
}
template <class At>
LCT_INLINE void four_columns(At at, Vec (&out)[4]) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) out[j].v[i] = at(i)[j];
}

#endif

#if defined(__AVX2__)
// Eight floats, for the words of one tile.
struct Eight {
  __m256 v;
};
LCT_INLINE Eight load_eight(const float* p) { return {_mm256_loadu_ps(p)}; }
LCT_INLINE Eight minus_product(float a, Eight b, Eight c) {
  return {_mm256_fnmadd_ps(_mm256_set1_ps(a), b.v, c.v)};
}
// A bit for each lane where a == b.
LCT_INLINE unsigned equal(Eight a, float b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, _mm256_set1_ps(b), _CMP_EQ_OQ)));
}
#endif

// Four floats at any address: half a register, where the compiler has one.
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

LCT_INLINE void add_to(float* to, const float* from, int64_t width) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(to + d, add(load(to + d), load(from + d)));
  for (; d < width; d += 4) *reinterpret_cast<Four*>(to + d) += *reinterpret_cast<const Four*>(from + d);
}

LCT_INLINE void add_and_clear(float* to, float* from, int64_t width) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    store(to + d, add(load(to + d), load(from + d)));
    store(from + d, broadcast(0.0f));
  }
  for (; d < width; d += 4) {
    *reinterpret_cast<Four*>(to + d) += *reinterpret_cast<const Four*>(from + d);
    *reinterpret_cast<Four*>(from + d) = Four{};
  }
}

template <class T>
LCT_INLINE Vec load_up_to(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, static_cast<int>(n));
}

// ---- the codebook -------------------------------------------------------------------------------------

LCT_INLINE float* panel_of(const VqWork& work, int64_t group, int64_t tile) {
  return work.panels + (group * work.tiles + tile) * kVqPitch * work.args.depth;
}
LCT_INLINE float* half_norms_of(const VqWork& work, int64_t group, int64_t tile) {
  return work.half_norms + (group * work.tiles + tile) * kVqPitch;
}

void pack(const VqWork& work, int64_t group, int64_t first, int64_t count) {
  const VqEncode& args = work.args;
  const int64_t depth = args.depth;
  const float* from = args.codebook + group * args.codewords * depth;
  float* panel = panel_of(work, group, first / kVqTile);
  float* half_norms = half_norms_of(work, group, first / kVqTile);
  const int64_t end = first + count;
  for (int64_t k = first; k < end; k += kVqTile, half_norms += kVqPitch) {
    float square[kLanes] = {};
    for (int64_t d = 0; d < depth; ++d, panel += kVqPitch) {
      float six[kLanes] = {};
      for (int64_t c = 0; c < kVqTile; ++c) six[c] = k + c < end ? from[(k + c) * depth + d] : 0.0f;
      const Vec x = load(six);
      store(square, plus_product(x, x, load(square)));
      for (int64_t c = 0; c < kVqPitch; ++c) panel[c] = six[c];
    }
    for (int64_t c = 0; c < kVqPitch; ++c)
      half_norms[c] = c < kVqTile && k + c < end ? 0.5f * square[c] : __builtin_inff();
  }
  if (!work.padded_words) return;
  for (int64_t k = first; k < end; ++k) {
    float* to = work.padded_words + (group * args.codewords + k) * work.width;
    for (int64_t d = 0; d < work.width; ++d) to[d] = d < depth ? from[k * depth + d] : 0.0f;
  }
}

// ---- the search ---------------------------------------------------------------------------------------

// Scratch of one thread.
struct Scratch {
  float* columns;   // [width][64]
  float* rows;      // [64][width]: a group's vectors, where they cannot be read from x as they are
  float* wide;      // [64][groups * depth]: x as floats, where it is not
  int32_t* codes;   // [groups][64]
  // Over all runs that this thread has had, whose rows came before: a row that does not surpass them cannot win.
  float* slot_scores;  // [groups][slots]
  float* least_slot;   // [groups] the smallest of them
  float* errors;    // [64]
  float* scores;    // [64]
  float* best;      // [64]
  float* tile;      // [64] the tile with the best word; a float counts to 2^24 exactly
};

LCT_INLINE bool widens(const VqWork& work) { return work.args.dtype != DType::f32; }

LCT_INLINE int64_t lay_out(const VqWork& work, char* base, Scratch& scratch) {
  int64_t used = 0;
  const auto take = [&](int64_t floats) __attribute__((always_inline)) {
    float* to = reinterpret_cast<float*>(base + used);
    used += (floats * 4 + 63) / 64 * 64;
    return to;
  };
  scratch.columns = take(work.width * kVqBlock);
  scratch.rows = take(work.width * kVqBlock);
  scratch.wide = take(widens(work) ? work.args.groups * work.args.depth * kVqBlock : 0);
  scratch.codes = reinterpret_cast<int32_t*>(take(work.args.groups * kVqBlock));
  scratch.slot_scores = take(work.args.groups * work.args.slots);
  scratch.least_slot = take(work.args.groups);
  scratch.errors = take(kVqBlock);
  scratch.scores = take(kVqBlock);
  scratch.best = take(kVqBlock);
  scratch.tile = take(kVqBlock);
  return used;
}

// Scores of a tile's six words for 16 * kVectors rows; `least_score` becomes the smallest of them and itself.
// Depth: of the vectors, where it is known early; small ones are unrolled.
template <int Depth>
LCT_INLINE void score_tile(const float* columns, const float* panel, const float* half_norms, int64_t depth,
                           Vec (&least_score)[kVectors]) {
  Vec score[kVqTile][kVectors];
#pragma GCC unroll 6
  for (int c = 0; c < kVqTile; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) score[c][v] = broadcast(half_norms[c]);
#pragma GCC unroll 8
  for (int64_t d = 0; d < (Depth ? Depth : depth); ++d, columns += kVqBlock, panel += kVqPitch) {
    Vec x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = load(columns + v * kLanes);
#pragma GCC unroll 6
    for (int c = 0; c < kVqTile; ++c) {
      const Vec word = broadcast(panel[c]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) score[c][v] = minus_product(x[v], word, score[c][v]);
    }
  }
  // The running minimum is never NaN, and of a NaN and another it is the second operand that stays.
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 6
    for (int c = 0; c < kVqTile; ++c) least_score[v] = smaller(score[c][v], least_score[v]);
}

// best and tile for the 64 rows in columns: the smallest score of each and the first tile that has it.
template <int Depth>
void search_of(const VqWork& work, int64_t group, const Scratch& scratch) {
  const int64_t depth = Depth ? Depth : work.args.depth;
  const float* panels = panel_of(work, group, 0);
  const float* half_norms = half_norms_of(work, group, 0);
  for (int64_t row = 0; row < kVqBlock; row += kVectors * kLanes) {
    Vec best[kVectors], tile[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      best[v] = broadcast(__builtin_inff());
      tile[v] = broadcast(0.0f);
    }
    const float* panel = panels;
    for (int64_t t = 0; t < work.tiles; ++t, panel += kVqPitch * depth) {
      Vec score[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) score[v] = best[v];
      score_tile<Depth>(scratch.columns + row, panel, half_norms + t * kVqPitch, depth, score);
      const Vec here = broadcast(static_cast<float>(t));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        tile[v] = where_less(score[v], best[v], here, tile[v]);
        best[v] = score[v];
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store(scratch.best + row + v * kLanes, best[v]);
      store(scratch.tile + row + v * kLanes, tile[v]);
    }
  }
}

LCT_APART void search(const VqWork& work, int64_t group, const Scratch& scratch) {
  switch (work.args.depth) {
    case 4: return search_of<4>(work, group, scratch);
    case 8: return search_of<8>(work, group, scratch);
  }
  return search_of<0>(work, group, scratch);
}

// Which word of the best tile it was: its scores are computed again, in the same steps, with the six words in
// lanes. Cheaper than to carry an index through the search.
LCT_APART void resolve(const VqWork& work, int64_t group, const Scratch& scratch) {
  constexpr int at_once = 8;
  const int64_t depth = work.args.depth;
  const float* panels = panel_of(work, group, 0);
  const float* half_norms = half_norms_of(work, group, 0);
  int32_t* codes = scratch.codes + group * kVqBlock;
  for (int64_t row = 0; row < kVqBlock; row += at_once) {
    Eight score[at_once];
    const float* panel[at_once];
#pragma GCC unroll 8
    for (int i = 0; i < at_once; ++i) {
      const int64_t tile = static_cast<int64_t>(scratch.tile[row + i]);
      panel[i] = panels + tile * kVqPitch * depth;
      score[i] = load_eight(half_norms + tile * kVqPitch);
    }
    const float* column = scratch.columns + row;
    for (int64_t d = 0; d < depth; ++d, column += kVqBlock)
#pragma GCC unroll 8
      for (int i = 0; i < at_once; ++i) score[i] = minus_product(column[i], load_eight(panel[i] + d * kVqPitch), score[i]);
#pragma GCC unroll 8
    for (int i = 0; i < at_once; ++i) {
      const float best = scratch.best[row + i];
      const unsigned which = equal(score[i], best) | 1u << kVqTile;
      // Where no score was below +inf there is nothing to choose.
      const int32_t code = static_cast<int32_t>(scratch.tile[row + i]) * static_cast<int32_t>(kVqTile);
      codes[row + i] = best < __builtin_inff() ? code + __builtin_ctz(which) : 0;
    }
  }
}

// ---- a block of rows ----------------------------------------------------------------------------------

template <class X>
void widen(const VqWork& work, int64_t first, int64_t count, float* to) {
  const int64_t size = count * work.args.groups * work.args.depth;
  const X* from = static_cast<const X*>(work.args.x) + first * work.args.groups * work.args.depth;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(to + i, load(from + i));
  if (i < size) store_first(to + i, load_first(from + i, static_cast<int>(size - i)), static_cast<int>(size - i));
}

// x as floats, [count][groups * depth].
LCT_INLINE const float* floats_of(const VqWork& work, int64_t first, int64_t count, const Scratch& scratch) {
  switch (work.args.dtype) {
    case DType::f32: break;
    case DType::f16: widen<Half>(work, first, count, scratch.wide); return scratch.wide;
    case DType::bf16: widen<Bfloat16>(work, first, count, scratch.wide); return scratch.wide;
  }
  return static_cast<const float*>(work.args.x) + first * work.args.groups * work.args.depth;
}

// The squared error of every row, and whether one was not finite: such a row gets code and error 0.
LCT_APART bool measure(const VqWork& work, int64_t group, int64_t count, const Scratch& scratch) {
  const int64_t width = work.width;
  const float* words = work.words + group * work.args.codewords * width;
  int32_t* codes = scratch.codes + group * kVqBlock;
  for (int64_t row = 0; row < kVqBlock; row += kLanes) {
    Vec error = broadcast(0.0f);
    for (int64_t d = 0; d < width; d += 4) {
      Vec word[4];
      four_columns([&](int i) __attribute__((always_inline)) { return words + codes[row + i] * width + d; }, word);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vec difference = sub(load(scratch.columns + (d + j) * kVqBlock + row), word[j]);
        error = plus_product(difference, difference, error);
      }
    }
    store(scratch.errors + row, error);
  }
  bool found = false;
  for (int64_t row = 0; row < count; ++row) found |= !(scratch.errors[row] < __builtin_inff());
  if (!found) return false;
  for (int64_t row = 0; row < count; ++row) {
    if (scratch.errors[row] < __builtin_inff()) continue;
    scratch.errors[row] = 0.0f;
    codes[row] = -1;
  }
  return true;
}

// Adds the rows to their words, every second row to the other copy where there is one. Codes of -1 are left out,
// and then read 0.
template <int Width>
LCT_INLINE void add_rows_of(int64_t width, int64_t count, bool some_left_out, const float* from, int64_t stride,
                            int64_t other_copy, int32_t* codes, float* sums, int32_t* counts) {
  for (int64_t row = 0; row < count; ++row) {
    const int32_t code = codes[row];
    if (some_left_out && code < 0) {
      codes[row] = 0;
      continue;
    }
    ++counts[code];
    float* to = sums + (row & 1) * other_copy;
    add_to(to + code * (Width ? Width : width), from + row * stride, Width ? Width : width);
  }
}

LCT_APART void add_rows(int64_t width, int64_t count, bool some_left_out, const float* from, int64_t stride,
                        int64_t other_copy, int32_t* codes, float* sums, int32_t* counts) {
  if (width == 4) return add_rows_of<4>(width, count, some_left_out, from, stride, other_copy, codes, sums, counts);
  if (width == 8) return add_rows_of<8>(width, count, some_left_out, from, stride, other_copy, codes, sums, counts);
  return add_rows_of<0>(width, count, some_left_out, from, stride, other_copy, codes, sums, counts);
}

// How good a candidate each of the 64 rows is; see vq.h.
LCT_INLINE void score_candidates(int64_t first, const float* errors, float* scores) {
  const uint32_t place = static_cast<uint32_t>(static_cast<uint64_t>(first) % kVqChunk);
  for (uint32_t row = 0; row < kVqBlock; ++row) {
    uint32_t h;
    memcpy(&h, errors + row, sizeof h);
    h ^= (place + row) * 0x9e3779b1u;
    // The finalizer of MurmurHash3.
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    h = (h ^ (h >> 13)) * 0xc2b2ae35u;
    h ^= h >> 16;
    scores[row] = errors[row] / static_cast<float>(static_cast<int32_t>(h >> 8 | 1));
  }
}

LCT_APART void put_forward(const VqWork& work, int64_t group, int64_t first, int64_t count,
                           const Scratch& scratch, VqPlace& place) {
  float* scores = scratch.scores;
  score_candidates(first, scratch.errors, scores);
  Vec most = load(scores);
  for (int64_t row = kLanes; row < kVqBlock; row += kLanes) most = max(most, load(scores + row));
  if (reduce_max(most) <= scratch.least_slot[group]) return;
  const int64_t slots = work.args.slots;
  float* best = scratch.slot_scores + group * slots;
  int64_t slot = static_cast<int64_t>(static_cast<uint64_t>(first) % kVqChunk % static_cast<uint64_t>(slots));
  for (int64_t row = 0; row < count; ++row) {
    if (scores[row] > best[slot]) {
      best[slot] = scores[row];
      place.slot_scores[group * slots + slot] = scores[row];
      place.slot_rows[group * slots + slot] = first + row;
    }
    if (++slot == slots) slot = 0;
  }
  float smallest = best[0];
  for (int64_t i = 1; i < slots; ++i) smallest = best[i] < smallest ? best[i] : smallest;
  scratch.least_slot[group] = smallest;
}

// Codes of a block of rows to the stream; the block starts with a byte of its own.
LCT_APART void write_codes(const VqWork& work, int64_t first, int64_t count, const int32_t* codes) {
  const int64_t groups = work.args.groups, bits = work.bits;
  uint8_t* to = work.args.codes + first / 8 * groups * bits;
  if (bits == 8) {
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t row = 0; row < count; ++row)
        to[row * groups + group] = static_cast<uint8_t>(codes[group * kVqBlock + row]);
    return;
  }
  uint64_t pending = 0;
  int64_t held = 0;
  for (int64_t row = 0; row < count; ++row)
    for (int64_t group = 0; group < groups; ++group) {
      pending |= static_cast<uint64_t>(static_cast<uint32_t>(codes[group * kVqBlock + row])) << held;
      held += bits;
      for (; held >= 8; held -= 8, pending >>= 8) *to++ = static_cast<uint8_t>(pending);
    }
  if (held) *to = static_cast<uint8_t>(pending);
}

void begin(const VqWork& work, int slot) {
  Scratch scratch;
  lay_out(work, work.scratch + slot * work.scratch_bytes, scratch);
  for (int64_t i = 0; i < work.args.groups * work.args.slots; ++i) scratch.slot_scores[i] = 0.0f;
  for (int64_t group = 0; group < work.args.groups; ++group) scratch.least_slot[group] = 0.0f;
}

LCT_APART void turn(const float* from, int64_t stride, int64_t width, float* columns) {
  for (int64_t row = 0; row < kVqBlock; row += kLanes)
    for (int64_t d = 0; d < width; d += 4) {
      Vec column[4];
      four_columns([&](int i) __attribute__((always_inline)) { return from + (row + i) * stride + d; }, column);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) store(columns + (d + j) * kVqBlock + row, column[j]);
    }
}

// Asks for a group's share of the next block of x, which comes while this one is searched.
LCT_INLINE void bring_next(const VqWork& work, int64_t group, int64_t first, int64_t end) {
  const int64_t row_bytes = work.args.groups * work.args.depth * (widens(work) ? 2 : 4);
  const int64_t bytes = least(kVqBlock, end - first) * row_bytes;
  const char* from = static_cast<const char*>(work.args.x) + first * row_bytes;
  const int64_t last = (group + 1) * bytes / work.args.groups;
  for (int64_t i = group * bytes / work.args.groups; i < last; i += 64) prefetch(from + i);
}

void run(const VqWork& work, int64_t first, int64_t count, VqPlace& place, int slot) {
  const VqEncode& args = work.args;
  Scratch scratch;
  lay_out(work, work.scratch + slot * work.scratch_bytes, scratch);
  const int64_t depth = args.depth, width = work.width, stride = args.groups * depth;
  for (int64_t i = 0; i < args.groups * args.slots; ++i) place.slot_scores[i] = 0.0f;
  place.flag = false;
  Vec total = broadcast(0.0f);
  for (const int64_t end = first + count; first < end; first += kVqBlock) {
    const int64_t rows = least(kVqBlock, end - first);
    const float* x = floats_of(work, first, rows, scratch);
    for (int64_t group = 0; group < args.groups; ++group) {
      const float* from = x + group * depth;
      int64_t from_stride = stride;
      if (width != depth || rows < kVqBlock) {
        for (int64_t row = 0; row < kVqBlock; ++row)
          for (int64_t d = 0; d < width; ++d)
            scratch.rows[row * width + d] = row < rows && d < depth ? from[row * stride + d] : 0.0f;
        from = scratch.rows;
        from_stride = width;
      }
      turn(from, from_stride, width, scratch.columns);
      bring_next(work, group, first + kVqBlock, end);
      int32_t* codes = scratch.codes + group * kVqBlock;
      if (!work.filter || !work.filter->search(work, group, scratch.columns, from, from_stride, codes, slot)) {
        search(work, group, scratch);
        resolve(work, group, scratch);
      }
      const bool some_left_out = measure(work, group, rows, scratch);
      place.flag |= some_left_out;
      const int64_t other_copy = work.copies > 1 ? args.groups * args.codewords * width : 0;
      add_rows(width, rows, some_left_out, from, from_stride, other_copy, codes,
               place.sums + group * args.codewords * width, place.counts + group * args.codewords);
      for (int64_t row = rows; row < kVqBlock; ++row) scratch.errors[row] = 0.0f;
      for (int64_t row = 0; row < kVqBlock; row += kLanes) total = add(total, load(scratch.errors + row));
      if (args.slots) put_forward(work, group, first, rows, scratch, place);
    }
    write_codes(work, first, rows, scratch.codes);
  }
  place.squared_error = reduce_add(total);
}

// ---- folding ------------------------------------------------------------------------------------------

void fold(VqWork& work, VqPlace& place, bool last) {
  const VqEncode& args = work.args;
  const int64_t words = args.groups * args.codewords, width = work.width;
  if (args.codewords <= 2 * kVqRun) {
    for (int64_t k = 0; k < words; ++k) args.counts[k] += place.counts[k];
    for (int64_t copy = 0; copy < work.copies; ++copy)
      add_and_clear(work.chunk_sums, place.sums + copy * words * width, words * width);
    for (int64_t k = 0; k < words; ++k) place.counts[k] = 0;
  } else {
    // Most words were chosen by no row; their sums are zero, and adding zero changes nothing.
    for (int64_t k = 0; k < words; ++k) {
      if (place.counts[k] == 0) continue;
      args.counts[k] += place.counts[k];
      place.counts[k] = 0;
      for (int64_t copy = 0; copy < work.copies; ++copy)
        add_and_clear(work.chunk_sums + k * width, place.sums + (copy * words + k) * width, width);
    }
  }
  work.chunk_error += place.squared_error;
  for (int64_t i = 0; i < args.groups * args.slots; ++i)
    if (place.slot_scores[i] > args.candidate_scores[i]) {
      args.candidate_scores[i] = place.slot_scores[i];
      work.slot_rows[i] = place.slot_rows[i];
    }
  if (place.flag) *args.flag = 1;
  if (!last) return;
  add_and_clear(work.total_sums, work.chunk_sums, words * width);
  work.total_error += work.chunk_error;
  work.chunk_error = 0.0f;
}

template <class X>
void copy_candidates(const VqWork& work, int64_t group) {
  const VqEncode& args = work.args;
  const int64_t depth = args.depth;
  for (int64_t slot = group * args.slots; slot < (group + 1) * args.slots; ++slot) {
    float* to = args.candidates + slot * depth;
    const bool found = args.candidate_scores[slot] > 0.0f;
    const X* from = static_cast<const X*>(args.x);
    if (found) from += (work.slot_rows[slot] * args.groups + group) * depth;
    for (int64_t d = 0; d < depth; d += kLanes) {
      const int64_t n = least(kLanes, depth - d);
      const Vec x = found ? load_up_to(from + d, n) : broadcast(__builtin_nanf(""));
      store_first(to + d, x, static_cast<int>(n));
    }
  }
}

void finish(const VqWork& work, int64_t group) {
  const VqEncode& args = work.args;
  if (work.width != args.depth)
    for (int64_t k = group * args.codewords; k < (group + 1) * args.codewords; ++k)
      for (int64_t d = 0; d < args.depth; ++d) args.sums[k * args.depth + d] = work.total_sums[k * work.width + d];
  switch (args.dtype) {
    case DType::f32: return copy_candidates<float>(work, group);
    case DType::f16: return copy_candidates<Half>(work, group);
    case DType::bf16: return copy_candidates<Bfloat16>(work, group);
  }
}

// ---- decoding -----------------------------------------------------------------------------------------

template <class X>
void narrow_to(const float* from, X* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = least(kLanes, count - i);
    if (n == kLanes) store(to + i, load(from + i));
    else store_first(to + i, load_first(from + i, static_cast<int>(n)), static_cast<int>(n));
  }
}

void narrow(const float* from, void* to, int64_t count, DType dtype) {
  switch (dtype) {
    case DType::f32: return narrow_to(from, static_cast<float*>(to), count);
    case DType::f16: return narrow_to(from, static_cast<Half*>(to), count);
    case DType::bf16: return narrow_to(from, static_cast<Bfloat16*>(to), count);
  }
}

// Size: bytes of a word, 0 where only `size` knows.
template <int64_t Size>
bool decode_of(const VqDecodeWork& work, int64_t first, int64_t count, int64_t size) {
  const VqDecode& args = work.args;
  if (Size) size = Size;
  const uint64_t mask = (uint64_t{1} << work.bits) - 1;
  const uint8_t* from = args.codes + first / 8 * args.groups * work.bits;
  char* to = static_cast<char*>(args.x) + first * args.groups * size;
  uint64_t pending = 0;
  int64_t held = 0;
  bool clamped = false;
  for (int64_t row = 0; row < count; ++row) {
    const char* words = static_cast<const char*>(work.words);
    for (int64_t group = 0; group < args.groups; ++group, words += args.codewords * size, to += size) {
      for (; held < work.bits; held += 8) pending |= static_cast<uint64_t>(*from++) << held;
      int64_t code = static_cast<int64_t>(pending & mask);
      pending >>= work.bits;
      held -= work.bits;
      if (code >= args.codewords) {
        code = args.codewords - 1;
        clamped = true;
      }
      memcpy(to, words + code * size, static_cast<size_t>(size));
    }
  }
  return clamped;
}

bool decode(const VqDecodeWork& work, int64_t first, int64_t count) {
  const int64_t size = work.args.depth * (work.args.dtype == DType::f32 ? 4 : 2);
  switch (size) {
    case 8: return decode_of<8>(work, first, count, size);
    case 16: return decode_of<16>(work, first, count, size);
    case 32: return decode_of<32>(work, first, count, size);
    case 64: return decode_of<64>(work, first, count, size);
    case 128: return decode_of<128>(work, first, count, size);
    case 256: return decode_of<256>(work, first, count, size);
  }
  return decode_of<0>(work, first, count, size);
}

int64_t scratch_bytes(const VqWork& work) {
  Scratch scratch;
  return lay_out(work, nullptr, scratch);
}

}  // namespace

const VqTasks vq_tasks = {scratch_bytes, begin, pack, run, fold, finish, narrow, decode};

}  // namespace LCT_SIMD_LEVEL
}  // namespace lct
