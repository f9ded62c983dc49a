#include "cpu/group_linear_tasks.h"
#include "cpu/simd.h"

namespace lct {
namespace LCT_SIMD_LEVEL {
namespace {

// Register tiles of up to 3 kRowStep rows x kPanels panels: they fill the registers without spilling.
#if defined(__AVX512F__)
constexpr int kRowStep = 4, kPanels = 2;
#elif defined(__AVX2__)
constexpr int kRowStep = 2, kPanels = 1;
#else
constexpr int kRowStep = 1, kPanels = 1;
#endif

LCT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
LCT_INLINE int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class T>
LCT_INLINE T* at(void* base, int64_t index) {
  return static_cast<T*>(base) + index;
}
template <class T>
LCT_INLINE const T* at(const void* base, int64_t index) {
  return static_cast<const T*>(base) + index;
}

// The first min(n, 16) elements, zeros in the other lanes.
template <class T>
LCT_INLINE Vec read(const T* from, int64_t n) {
  return n >= kLanes ? load(from) : load_first(from, static_cast<int>(n));
}
template <class T>
LCT_INLINE void write(T* to, Vec x, int64_t n) {
  if (n >= kLanes) {
    store(to, x);
  } else {
    store_first(to, x, static_cast<int>(n));
  }
}

// x as it stands in memory once it is stored as a T.
template <class T>
LCT_INLINE Vec rounded(Vec x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    T stored[kLanes];
    store(stored, x);
    return load(stored);
  }
}

// ---- packing ------------------------------------------------------------------------------------------

// Rows [16 panel, 16 panel + 16) of a matrix [rows, depth], turned: to [depth][16], zeros beyond the last row.
template <class W>
void pack_panel(const void* matrix, int64_t rows, int64_t depth, int64_t panel, float* to) {
  const int64_t first = panel * kPanel;
  const int64_t count = least(kPanel, rows - first);
  for (int64_t k = 0; k < depth; k += kLanes) {
    const int64_t n = least(kLanes, depth - k);
#if defined(__AVX512F__)
    Vec x[kLanes];
    for (int64_t i = 0; i < kLanes; ++i)
      x[i] = i < count ? read(at<W>(matrix, (first + i) * depth + k), n) : broadcast(0.0f);
    transpose(x);
    for (int64_t j = 0; j < n; ++j) store(to + (k + j) * kPanel, x[j]);
#else
    for (int64_t i = 0; i < kPanel; ++i) {
      float row[kLanes];
      store(row, i < count ? read(at<W>(matrix, (first + i) * depth + k), n) : broadcast(0.0f));
      for (int64_t j = 0; j < n; ++j) to[(k + j) * kPanel + i] = row[j];
    }
#endif
  }
}

#if defined(__AVX512F__)
// The first n of 32 elements as pairs of bf16, zeros behind them.
template <class W>
LCT_INLINE Vec read_pairs(const W* from, int64_t n) {
  Bfloat16 all[2 * kLanes] = {};
  for (int64_t j = 0; j < n; j += kLanes) store(all + j, read(from + j, n - j));
  return load(reinterpret_cast<const float*>(all));
}
LCT_INLINE Vec read_pairs(const Bfloat16* from, int64_t n) {
  if (n == 2 * kLanes) return load(reinterpret_cast<const float*>(from));
  Bfloat16 all[2 * kLanes] = {};
  memcpy(all, from, static_cast<size_t>(n) * sizeof(Bfloat16));
  return load(reinterpret_cast<const float*>(all));
}

// The same in pairs of bf16: to [words][16].
template <class W>
void pack_pairs(const void* matrix, int64_t rows, int64_t depth, int64_t panel, float* to) {
  const int64_t first = panel * kPanel;
  const int64_t count = least(kPanel, rows - first);
  for (int64_t k = 0; k < depth; k += 2 * kLanes, to += kLanes * kPanel) {
    Vec x[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t left = i < count ? least(depth - k, 2 * kLanes) : 0;
      x[i] = read_pairs(at<W>(matrix, (first + i) * depth + k), left);
    }
    transpose(x);
    const int64_t n = least(kLanes, pieces(depth - k, 2));
    for (int64_t j = 0; j < n; ++j) store(to + j * kPanel, x[j]);
  }
}
#endif

template <class W>
void pack_bias(const void* bias, int64_t count, int64_t panel, float* to) {
  const bool present = bias != nullptr;
  store(to, present ? read(at<W>(bias, panel * kPanel), count - panel * kPanel) : broadcast(0.0f));
}

template <class W>
void pack_weight_of(const GroupLinearWork& work, int64_t panel) {
  const GroupLinear& args = work.args;
  const GroupLinearShape& shape = args.shape;
  float* to = work.weight + panel * work.words * kPanel;
#if defined(__AVX512F__)
  if (work.pairs) pack_pairs<W>(args.weight, shape.outputs, shape.inputs, panel, to);
  else
#endif
    pack_panel<W>(args.weight, shape.outputs, shape.inputs, panel, to);
  pack_bias<W>(args.bias, shape.outputs, panel, work.bias + panel * kPanel);
}

template <class W>
void pack_critic_of(const GroupLinearWork& work, int64_t panel) {
  const GroupLinear& args = work.args;
  const GroupLinearShape& shape = args.shape;
  pack_panel<W>(args.critic_weight, shape.classes, shape.outputs, panel,
                work.critic + panel * shape.outputs * kPanel);
  pack_bias<W>(args.critic_bias, shape.classes, panel, work.critic_bias + panel * kPanel);
}

template <class W>
void pack_backward_of(const GroupLinearBackwardWork& work, int64_t panel) {
  const GroupLinearShape& shape = work.args.shape;
  const int64_t first = panel * kPanel;
  float* to = work.critic + panel * shape.classes * kPanel;
  for (int64_t v = 0; v < shape.classes; ++v)
    store(to + v * kPanel,
          read(at<W>(work.args.critic_weight, v * shape.outputs + first), shape.outputs - first));
}

// Rows of a matrix [.., depth] as a block; the spare rows are zeros.
template <class X>
void pack_block(const void* matrix, int64_t first, int64_t count, int64_t depth, int64_t block_rows,
                float* block) {
  for (int64_t k = 0; k < depth; k += kDepth, block += (block_rows + kSpareRows) * kStride) {
    const int64_t columns = least(kDepth, depth - k);
    for (int64_t r = 0; r < count; ++r) {
      const X* from = at<X>(matrix, (first + r) * depth + k);
      for (int64_t j = 0; j < columns; j += kLanes) store(block + r * kStride + j, read(from + j, columns - j));
    }
    for (int64_t r = count; r < count + kSpareRows; ++r)
      for (int64_t j = 0; j < columns; j += kLanes) store(block + r * kStride + j, broadcast(0.0f));
  }
}

#if defined(__AVX512F__)
// The same in pairs, for bf16, whose rows are pairs already.
void pack_pair_block(const GroupLinearWork& work, int64_t first, int64_t count, float* block) {
  const int64_t inputs = work.args.shape.inputs;
  for (int64_t k = 0; k < inputs; k += 2 * kDepth, block += (work.block_rows + kSpareRows) * kStride) {
    const int64_t columns = least(2 * kDepth, inputs - k);
    for (int64_t r = 0; r < count + kSpareRows; ++r) {
      float* to = block + r * kStride;
      // An odd input is paired with a zero.
      if (r >= count || columns % 2) memset(to, 0, static_cast<size_t>(pieces(columns, 2)) * sizeof(float));
      if (r < count)
        memcpy(to, at<Bfloat16>(work.args.x, (first + r) * inputs + k),
               static_cast<size_t>(columns) * sizeof(Bfloat16));
    }
  }
}
#endif

// ---- products -----------------------------------------------------------------------------------------

// A packed matrix from some depth on: [panels][depth][16], `stride` floats from panel to panel.
struct Packed {
  const float* from;
  int64_t stride;
};

// Where products go: out[row][panel][16].
struct Out {
  float* to;
  int64_t row_stride;
  bool add;  // to what stands there
};

template <int Rows, int Panels>
LCT_INLINE void store_tile(const Vec (&sum)[Rows][Panels], int64_t valid, Out out) {
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    if (r >= valid) break;
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      float* to = out.to + r * out.row_stride + p * kPanel;
      store(to, out.add ? add(load(to), sum[r][p]) : sum[r][p]);
    }
  }
}

template <int Rows, int Panels>
LCT_INLINE void product_tile(int64_t depth, int64_t valid, const float* block, Packed weight, Out out) {
  Vec sum[Rows][Panels];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) sum[r][p] = broadcast(0.0f);
  const float* w = weight.from;
  for (int64_t k = 0; k < depth; ++k, w += kPanel) {
    Vec column[Panels];
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) column[p] = load(w + p * weight.stride);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec x = broadcast(block[r * kStride + k]);
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) sum[r][p] = fma(x, column[p], sum[r][p]);
    }
  }
  store_tile<Rows, Panels>(sum, valid, out);
}

template <int Panels>
void product_rows(int64_t rows, int64_t depth, const float* block, Packed weight, Out out) {
  constexpr int most = 3 * kRowStep;
  for (int64_t r = 0; r < rows; r += most, block += most * kStride, out.to += most * out.row_stride) {
    const int64_t left = rows - r;
    switch (least(3, pieces(left, kRowStep))) {
      case 1: product_tile<kRowStep, Panels>(depth, left, block, weight, out); break;
      case 2: product_tile<2 * kRowStep, Panels>(depth, left, block, weight, out); break;
      default: product_tile<most, Panels>(depth, left, block, weight, out);
    }
  }
}

// out = block [rows, depth] times `panels` panels of weight; depth <= kDepth.
void products(int64_t rows, int64_t panels, int64_t depth, const float* block, Packed weight, Out out) {
  for (; panels >= kPanels; panels -= kPanels, weight.from += kPanels * weight.stride, out.to += kPanels * kPanel)
    product_rows<kPanels>(rows, depth, block, weight, out);
  for (; panels > 0; --panels, weight.from += weight.stride, out.to += kPanel)
    product_rows<1>(rows, depth, block, weight, out);
}

#if defined(__AVX512F__)
// The three functions above over pairs of bf16. Only they are compiled for AVX512-BF16, which not every processor with
// AVX-512 has.
#define LCT_BF16_PRODUCTS __attribute__((target("avx512bf16")))

template <int Rows, int Panels>
LCT_BF16_PRODUCTS LCT_INLINE void pair_tile(int64_t words, int64_t valid, const float* block, Packed weight,
                                            Out out) {
  Vec sum[Rows][Panels];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) sum[r][p] = broadcast(0.0f);
  const float* w = weight.from;
  for (int64_t k = 0; k < words; ++k, w += kPanel) {
    __m512bh column[Panels];
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) column[p] = (__m512bh)load(w + p * weight.stride).v;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const __m512bh x = (__m512bh)broadcast(block[r * kStride + k]).v;
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) sum[r][p].v = _mm512_dpbf16_ps(sum[r][p].v, x, column[p]);
    }
  }
  store_tile<Rows, Panels>(sum, valid, out);
}

template <int Panels>
LCT_BF16_PRODUCTS void pair_rows(int64_t rows, int64_t words, const float* block, Packed weight, Out out) {
  constexpr int most = 3 * kRowStep;
  for (int64_t r = 0; r < rows; r += most, block += most * kStride, out.to += most * out.row_stride) {
    const int64_t left = rows - r;
    switch (least(3, pieces(left, kRowStep))) {
      case 1: pair_tile<kRowStep, Panels>(words, left, block, weight, out); break;
      case 2: pair_tile<2 * kRowStep, Panels>(words, left, block, weight, out); break;
      default: pair_tile<most, Panels>(words, left, block, weight, out);
    }
  }
}

LCT_BF16_PRODUCTS void pair_products(int64_t rows, int64_t panels, int64_t words, const float* block,
                                     Packed weight, Out out) {
  for (; panels >= kPanels; panels -= kPanels, weight.from += kPanels * weight.stride, out.to += kPanels * kPanel)
    pair_rows<kPanels>(rows, words, block, weight, out);
  for (; panels > 0; --panels, weight.from += weight.stride, out.to += kPanel)
    pair_rows<1>(rows, words, block, weight, out);
}
#else
// Never called: `pairs` is false.
void pack_pair_block(const GroupLinearWork&, int64_t, int64_t, float*) {}
constexpr auto pair_products = products;
#endif

// tile = all runs of a block times the panels of one column block of a packed matrix [panels][depth][16].
void column_block_products(int64_t rows, int64_t block_rows, int64_t depth, const float* block,
                           const float* matrix, int64_t column_block, int64_t all_panels, bool pairs,
                           float* tile) {
  constexpr int64_t block_panels = kColumns / kPanel;
  const int64_t first_panel = column_block * block_panels;
  const int64_t panels = least(block_panels, all_panels - first_panel);
  const float* from = matrix + first_panel * depth * kPanel;
  for (int64_t k = 0; k < depth; k += kDepth) {
    const auto product = pairs ? pair_products : products;
    product(rows, panels, least(kDepth, depth - k), block, {from + k * kPanel, depth * kPanel},
            {tile, kStride, k > 0});
    block += (block_rows + kSpareRows) * kStride;
  }
}

// ---- forward ------------------------------------------------------------------------------------------

// gelu(x) = x Phi(x) and its derivative Phi(x) + x phi(x), to 2e-7 of max(|x|, 1).
LCT_INLINE void gelu(Vec x, Vec& value, Vec& slope) {
  const Vec size = max(x, sub(broadcast(0.0f), x));
  // Phi(-|x|) = exp(-x^2 / 2) t P(t), t = 1 / (1 + 0.3 |x|): fitted over |x| < 14, relative error 4e-9. Beyond,
  // exp is 0.
  const Vec t = inverse(fma(size, broadcast(0.3f), broadcast(1.0f)));
  Vec p = broadcast(-0.0206128508f);
  p = fma(p, t, broadcast(0.112375893f));
  p = fma(p, t, broadcast(-0.228067786f));
  p = fma(p, t, broadcast(0.191582039f));
  p = fma(p, t, broadcast(-0.0792476311f));
  p = fma(p, t, broadcast(0.0960579813f));
  p = fma(p, t, broadcast(0.0784255266f));
  p = fma(p, t, broadcast(0.110227332f));
  p = fma(p, t, broadcast(0.119572841f));
  p = fma(p, t, broadcast(0.119686633f));
  const Vec bell = exp_nonpositive(mul(mul(x, x), broadcast(-0.5f)));
  const Vec tail = mul(bell, mul(p, t));
  // tail, or 1 - tail where x > 0.
  const Vec above = keep_where_greater(x, broadcast(0.0f), fma(tail, broadcast(-2.0f), broadcast(1.0f)));
  const Vec phi = add(tail, above);
  value = mul(x, phi);
  slope = fma(mul(x, broadcast(0.398942280f)), bell, phi);
}

// Turns a tile of products into h, which is written and, for the critic, left in the tile.
template <class X>
void activate(const GroupLinearWork& work, int64_t first, int64_t count, int64_t column_block, float* tile) {
  const GroupLinear& args = work.args;
  const int64_t outputs = args.shape.outputs;
  const int64_t begin = column_block * kColumns;
  const int64_t columns = least(kColumns, outputs - begin);
  const bool keep = args.critic_weight != nullptr;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = (first + r) * outputs + begin;
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec x = add(load(tile + r * kStride + j), load(work.bias + begin + j));
      if (args.activation == Activation::relu) {
        // max gives its second operand where one is NaN, so NaN stays.
        x = max(broadcast(0.0f), x);
      } else if (args.activation == Activation::gelu) {
        Vec slope;
        gelu(x, x, slope);
        if (args.slope) write(at<X>(args.slope, row + j), slope, columns - j);
      }
      write(at<X>(args.h, row + j), x, columns - j);
      if (keep) store(tile + r * kStride + j, rounded<X>(x));
    }
  }
}

// The shares of `rows` rows' logits, added up in order, and the bias.
template <class X>
void write_logits(const GroupLinearWork& work, int64_t first, int64_t count, const float* partial, int64_t rows) {
  const GroupLinear& args = work.args;
  const int64_t classes = args.shape.classes, lanes = work.class_panels * kPanel;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t v = 0; v < classes; v += kLanes) {
      Vec sum = load(work.critic_bias + v);
      for (int64_t block = 0; block < work.column_blocks; ++block)
        sum = add(sum, load(partial + (block * rows + r) * lanes + v));
      write(at<X>(args.logits, (first + r) * classes + v), sum, classes - v);
    }
}

template <class X>
void rows_of(const GroupLinearWork& work, int64_t first, int64_t count, int64_t column_block, int slot) {
  const GroupLinear& args = work.args;
  const GroupLinearShape& shape = args.shape;
  const int64_t lanes = work.class_panels * kPanel;
  float* block = work.scratch + slot * work.scratch_size;
  float* tile = block + work.block_size;
  float* partial = work.split ? work.partial + first * lanes : tile + work.tile_size;
  const int64_t partial_rows = work.split ? shape.rows : work.block_rows;

  if (work.pairs) pack_pair_block(work, first, count, block);
  else pack_block<X>(args.x, first, count, shape.inputs, work.block_rows, block);
  const int64_t end = least(column_block + work.blocks_a_task, work.column_blocks);
  for (; column_block < end; ++column_block) {
    // Whole register tiles, so that the spare rows are numbers too.
    column_block_products(pieces(count, kRowStep) * kRowStep, work.block_rows, work.words, block, work.weight,
                          column_block, work.output_panels, work.pairs, tile);
    activate<X>(work, first, count, column_block, tile);
    if (!args.critic_weight) continue;
    const int64_t begin = column_block * kColumns;
    products(count, work.class_panels, least(kColumns, shape.outputs - begin), tile,
             {work.critic + begin * kPanel, shape.outputs * kPanel},
             {partial + column_block * partial_rows * lanes, lanes, false});
  }
  if (args.critic_weight && !work.split) write_logits<X>(work, first, count, partial, partial_rows);
}

// ---- backward -----------------------------------------------------------------------------------------

template <class X>
void chunk_of(const GroupLinearBackwardWork& work, int64_t chunk, int64_t column_block, int slot) {
  const GroupLinearBackward& args = work.args;
  const GroupLinearShape& shape = args.shape;
  const int64_t begin = column_block * kColumns;
  const int64_t columns = least(kColumns, shape.outputs - begin);
  float* block = work.scratch + slot * work.scratch_size;
  float* tile = block + work.block_size;
  float* sums = work.sums + chunk * work.output_panels * kPanel + begin;
  for (int64_t j = 0; j < columns; j += kLanes) store(sums + j, broadcast(0.0f));

  const int64_t end = least(shape.rows, (chunk + 1) * work.chunk_rows);
  for (int64_t first = chunk * work.chunk_rows; first < end; first += work.block_rows) {
    const int64_t count = least(work.block_rows, end - first);
    if (args.dlogits) {
      pack_block<X>(args.dlogits, first, count, shape.classes, work.block_rows, block);
      column_block_products(count, work.block_rows, shape.classes, block, work.critic, column_block,
                            work.output_panels, false, tile);
    }
    // Block by block: one running sum over a chunk would lose digits.
    float here[kColumns];
    for (int64_t j = 0; j < columns; j += kLanes) store(here + j, broadcast(0.0f));
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = (first + r) * shape.outputs + begin;
      for (int64_t j = 0; j < columns; j += kLanes) {
        const int64_t n = columns - j;
        Vec g = args.dlogits ? load(tile + r * kStride + j) : broadcast(0.0f);
        if (args.dh) g = add(g, read(at<X>(args.dh, row + j), n));
        if (args.activation == Activation::relu) {
          // Where h is NaN the gradient passes, as in torch's relu. Below the smallest normal float h counts as 0,
          // whether or not the caller's thread takes subnormals for zeros.
          g = zero_where_less(read(at<X>(args.gate, row + j), n), broadcast(1.17549435e-38f), g);
        } else if (args.activation == Activation::gelu) {
          g = mul(g, read(at<X>(args.gate, row + j), n));
        }
        store(here + j, add(load(here + j), g));
        write(at<X>(args.dpre, row + j), g, n);
      }
    }
    for (int64_t j = 0; j < columns; j += kLanes) store(sums + j, add(load(sums + j), load(here + j)));
  }
}

void fold(const GroupLinearBackwardWork& work) {
  const int64_t outputs = work.args.shape.outputs;
  for (int64_t j = 0; j < outputs; j += kLanes) {
    Vec sum = broadcast(0.0f);
    for (int64_t chunk = 0; chunk < work.chunks; ++chunk)
      sum = add(sum, load(work.sums + chunk * work.output_panels * kPanel + j));
    write(work.args.dbias + j, sum, outputs - j);
  }
}

// ---- tasks, by type -----------------------------------------------------------------------------------

void pack_weight(const GroupLinearWork& work, int64_t panel) {
  switch (work.args.weight_dtype) {
    case DType::f32: return pack_weight_of<float>(work, panel);
    case DType::f16: return pack_weight_of<Half>(work, panel);
    case DType::bf16: return pack_weight_of<Bfloat16>(work, panel);
  }
}

void pack_critic(const GroupLinearWork& work, int64_t panel) {
  switch (work.args.critic_dtype) {
    case DType::f32: return pack_critic_of<float>(work, panel);
    case DType::f16: return pack_critic_of<Half>(work, panel);
    case DType::bf16: return pack_critic_of<Bfloat16>(work, panel);
  }
}

void rows(const GroupLinearWork& work, int64_t first, int64_t count, int64_t column_block, int slot) {
  switch (work.args.x_dtype) {
    case DType::f32: return rows_of<float>(work, first, count, column_block, slot);
    case DType::f16: return rows_of<Half>(work, first, count, column_block, slot);
    case DType::bf16: return rows_of<Bfloat16>(work, first, count, column_block, slot);
  }
}

void logits(const GroupLinearWork& work, int64_t first, int64_t count) {
  const float* partial = work.partial + first * work.class_panels * kPanel;
  const int64_t all = work.args.shape.rows;
  switch (work.args.x_dtype) {
    case DType::f32: return write_logits<float>(work, first, count, partial, all);
    case DType::f16: return write_logits<Half>(work, first, count, partial, all);
    case DType::bf16: return write_logits<Bfloat16>(work, first, count, partial, all);
  }
}

void pack_backward(const GroupLinearBackwardWork& work, int64_t panel) {
  switch (work.args.critic_dtype) {
    case DType::f32: return pack_backward_of<float>(work, panel);
    case DType::f16: return pack_backward_of<Half>(work, panel);
    case DType::bf16: return pack_backward_of<Bfloat16>(work, panel);
  }
}

void chunk(const GroupLinearBackwardWork& work, int64_t index, int64_t column_block, int slot) {
  switch (work.args.x_dtype) {
    case DType::f32: return chunk_of<float>(work, index, column_block, slot);
    case DType::f16: return chunk_of<Half>(work, index, column_block, slot);
    case DType::bf16: return chunk_of<Bfloat16>(work, index, column_block, slot);
  }
}

}  // namespace

const GroupLinearTasks group_linear_tasks = {pack_weight, pack_critic, rows, logits, pack_backward, chunk, fold};

}  // namespace LCT_SIMD_LEVEL
}  // namespace lct
