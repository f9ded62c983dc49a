#include "cpu/critic_head_tasks.h"
#include "cpu/simd.h"

namespace lct {
namespace LCT_SIMD_LEVEL {
namespace {

// Register tiles: rows x class panels for the logits, rows x vectors for dh, classes x vectors for dweight.
// Each fills the registers without spilling and loads less than it multiplies.
#if defined(__AVX512F__)
constexpr int kNarrowRows = 16, kWideRows = 8, kWidePanels = 3;
constexpr int kInputRows = 4, kInputVectors = 4;
constexpr int kWeightClasses = 6, kWeightVectors = 4;
#elif defined(__AVX2__)
constexpr int kNarrowRows = 6, kWideRows = 6, kWidePanels = 1;
constexpr int kInputRows = 6, kInputVectors = 1;
constexpr int kWeightClasses = 6, kWeightVectors = 1;
#else
constexpr int kNarrowRows = 2, kWideRows = 2, kWidePanels = 1;
constexpr int kInputRows = 2, kInputVectors = 1;
constexpr int kWeightClasses = 2, kWeightVectors = 1;
#endif

// Floats of weight beyond which it does not stay in L1 beside everything else.
constexpr int64_t kInnermost = 4096;

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

enum class Label { counted, ignored, bad };

LCT_INLINE Label label_of(const CriticHead& args, int64_t row) {
  if (!args.target) return Label::counted;
  const int64_t target = args.target[row];
  if (target == args.ignore_index) return Label::ignored;
  return target >= 0 && target < args.classes ? Label::counted : Label::bad;
}

// ---- weight -------------------------------------------------------------------------------------------

template <class W>
void pack_weight_of(const CriticHeadWork& work, int64_t panel) {
  const CriticHead& args = work.args;
  const int64_t first = panel * kColumnPanel;
  const int64_t columns = least(kColumnPanel, args.depth - first);
  for (int64_t v = 0; v < work.class_panels * kClassPanel; ++v) {
    float row[kColumnPanel] = {};
    if (v < args.classes) {
      const W* from = at<W>(args.weight, v * args.depth + first);
      for (int64_t k = 0; k < columns; k += kLanes) {
        const int64_t n = columns - k;
        store(row + k, n >= kLanes ? load(from + k) : load_first(from + k, static_cast<int>(n)));
      }
      float* by_column = work.weight_by_column + (panel * args.classes + v) * kColumnPanel;
      for (int64_t k = 0; k < kColumnPanel; k += kLanes) store(by_column + k, load(row + k));
    }
    float* by_class = work.weight_by_class + (v / kClassPanel * args.depth + first) * kClassPanel;
    for (int64_t k = 0; k < columns; ++k) by_class[k * kClassPanel + v % kClassPanel] = row[k];
  }
  if (panel != 0) return;
  for (int64_t v = 0; v < work.class_panels * kClassPanel; v += kLanes) {
    const bool present = args.bias != nullptr;
    const int n = static_cast<int>(least(kLanes, args.classes - v));
    store(work.bias + v, present ? load_first(at<W>(args.bias, v), n) : broadcast(0.0f));
  }
}

void pack_weight(const CriticHeadWork& work, int64_t panel) {
  switch (work.args.weight_dtype) {
    case DType::f32: return pack_weight_of<float>(work, panel);
    case DType::f16: return pack_weight_of<Half>(work, panel);
    case DType::bf16: return pack_weight_of<Bfloat16>(work, panel);
  }
}

// ---- a block of rows ----------------------------------------------------------------------------------

LCT_INLINE Vec activated(const CriticHeadWork& work, Vec x) {
  // max gives its second operand where one is NaN, so NaN stays.
  return work.args.activation == Activation::relu ? max(broadcast(0.0f), x) : x;
}

// Columns [64 panel, 64 panel + 64) of one row of h, zeros right of depth.
template <class H>
LCT_INLINE void pack_columns(const CriticHeadWork& work, int64_t row, int64_t panel, float* to) {
  const int64_t depth = work.args.depth;
  const int64_t columns = depth - panel * kColumnPanel;
  const H* from = at<H>(work.args.h, row * depth + panel * kColumnPanel);
  if (columns >= kColumnPanel) {
#pragma GCC unroll 4
    for (int k = 0; k < kColumnPanel; k += kLanes) store(to + k, activated(work, load(from + k)));
    return;
  }
  for (int64_t k = 0; k < kColumnPanel; k += kLanes) {
    const int64_t n = columns - k;
    const Vec x = n >= kLanes ? load(from + k)
                  : n > 0     ? load_first(from + k, static_cast<int>(n))
                              : broadcast(0.0f);
    store(to + k, activated(work, x));
  }
}

template <class H>
void pack_block(const CriticHeadWork& work, int64_t first, int64_t count, float* block) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t panel = 0; panel < work.column_panels; ++panel)
      pack_columns<H>(work, first + r, panel, block + panel * work.block_stride + r * kColumnPanel);
  for (int64_t panel = 0; panel < work.column_panels; ++panel) {
    float* to = block + panel * work.block_stride;
    const int64_t end = least(work.block_stride, (count + kNarrowRows) * kColumnPanel);
    for (int64_t k = count * kColumnPanel; k < end; k += kLanes) store(to + k, broadcast(0.0f));
  }
}

// What to bring towards this core while it computes: `rows` rows of the next block, a line an iteration.
struct Ahead {
  uintptr_t from;
  int64_t row_bytes;
  int64_t panel_bytes;
};

template <int Rows, int Panels>
LCT_INLINE void logits_step(const float* block, const float* weight, int64_t weight_stride,
                            Vec (&sum)[Rows][Panels]) {
  Vec w[Panels];
#pragma GCC unroll 4
  for (int p = 0; p < Panels; ++p) w[p] = load(weight + p * weight_stride);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    const Vec x = broadcast(block[r * kColumnPanel]);
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) sum[r][p] = fma(x, w[p], sum[r][p]);
  }
}

template <int Rows, int Panels>
LCT_INLINE void logits_tile(const CriticHeadWork& work, const float* block, const float* weight,
                            const float* bias, Ahead ahead, float* logits) {
  const int64_t depth = work.args.depth;
  const int64_t weight_stride = depth * kClassPanel;
  // One panel of columns is summed in registers, then added to what stands in memory: long sums of floats
  // are more exact in two levels.
  for (int64_t first = 0; first < depth; first += kColumnPanel, block += work.block_stride) {
    Vec sum[Rows][Panels];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) sum[r][p] = broadcast(0.0f);
    int k = 0;
    if (Panels == 1 && depth - first >= kColumnPanel) {
      uintptr_t line = ahead.from + first / kColumnPanel * ahead.panel_bytes;
      for (; k < kColumnPanel; k += 4, line += ahead.row_bytes, weight += 4 * kClassPanel) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          prefetch(reinterpret_cast<const void*>(line + j * ahead.panel_bytes / 4));
          logits_step<Rows, Panels>(block + k + j, weight + j * kClassPanel, weight_stride, sum);
        }
      }
    }
    const int columns = static_cast<int>(least(kColumnPanel, depth - first));
    for (; k < columns; ++k, weight += kClassPanel)
      logits_step<Rows, Panels>(block + k, weight, weight_stride, sum);
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p)
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        float* to = logits + p * work.dlogits_stride + r * kClassPanel;
        store(to, add(sum[r][p], first == 0 ? load(bias + p * kClassPanel) : load(to)));
      }
  }
}

template <int Rows, int Panels>
void logits_panels(const CriticHeadWork& work, int64_t count, const float* block, int64_t panel, Ahead ahead,
                   float* logits) {
  const float* weight = work.weight_by_class + panel * work.args.depth * kClassPanel;
  for (int64_t r = 0; r < count; r += Rows, ahead.from += Rows * ahead.row_bytes)
    logits_tile<Rows, Panels>(work, block + r * kColumnPanel, weight, work.bias + panel * kClassPanel, ahead,
                              logits + panel * work.dlogits_stride + r * kClassPanel);
}

void logits_of(const CriticHeadWork& work, int64_t count, const float* block, Ahead ahead, float* logits) {
  if (work.class_panels == 1) return logits_panels<kNarrowRows, 1>(work, count, block, 0, ahead, logits);
  int64_t panel = 0;
  for (int64_t left = pieces(work.class_panels, kWidePanels); left > 0; --left) {
    // As equal as they can be: a last tile of one panel alone would waste its loads.
    const int64_t wide = pieces(work.class_panels - panel, left);
#if defined(__AVX512F__)
    if (wide == 3) logits_panels<kWideRows, 3>(work, count, block, panel, ahead, logits);
    if (wide == 2) logits_panels<kWideRows, 2>(work, count, block, panel, ahead, logits);
#endif
    if (wide == 1) logits_panels<kWideRows, 1>(work, count, block, panel, ahead, logits);
    panel += wide;
  }
}

#if defined(__AVX512F__)
// What softmax_of does, for up to 16 classes: sixteen rows are turned on their side, and every lane has a row
// to work on.
template <class H>
void softmax_narrow(const CriticHeadWork& work, int64_t first, int64_t count, float* logits) {
  const CriticHead& args = work.args;
  const int classes = static_cast<int>(args.classes);
  for (int64_t group = 0; group < count; group += kLanes) {
    const int rows = static_cast<int>(least(kLanes, count - group));
    float* block = logits + group * kClassPanel;
    float at_target[kLanes] = {};
    Vec x[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = load(block + i * kClassPanel);
    for (int i = 0; i < rows; ++i)
      if (label_of(args, first + group + i) == Label::counted)
        at_target[i] = block[i * kClassPanel + args.target[first + group + i]];
    transpose(x);
    Vec top = x[0];
#pragma GCC unroll 16
    for (int v = 1; v < kLanes; ++v) {
      if (v >= classes) break;
      top = max(top, x[v]);
    }
    Vec total = broadcast(0.0f);
#pragma GCC unroll 16
    for (int v = 0; v < kLanes; ++v) {
      if (v >= classes) break;
      x[v] = exp_nonpositive(sub(x[v], top));
      total = add(total, x[v]);
    }
    const Vec factor = inverse(total);
#pragma GCC unroll 16
    for (int v = 0; v < kLanes; ++v) x[v] = v < classes ? mul(x[v], factor) : broadcast(0.0f);
    transpose(x);
    float loss[kLanes];
    store(loss, sub(log_from_one(total), sub(load(at_target), top)));
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i >= rows) break;
      const int64_t row = first + group + i;
      const Label label = label_of(args, row);
      if (label == Label::counted) {
        x[i] = subtract_one_at(x[i], static_cast<int>(args.target[row]));
      } else {
        x[i] = broadcast(0.0f);
        loss[i] = label == Label::ignored ? 0.0f : __builtin_nanf("");
      }
      store(block + i * kClassPanel, x[i]);
      store_first(at<H>(args.dlogits, row * args.classes), x[i], classes);
    }
    store_first(args.loss + first + group, load(loss), rows);
  }
}
#endif

// Turns a block's logits into softmax - onehot, in place and in args.dlogits, and writes the losses.
template <class H>
void softmax_of(const CriticHeadWork& work, int64_t first, int64_t count, float* logits) {
#if defined(__AVX512F__)
  if (work.class_panels == 1) return softmax_narrow<H>(work, first, count, logits);
#endif
  const CriticHead& args = work.args;
  const int64_t last = work.class_panels - 1;
  const int tail = static_cast<int>(args.classes - last * kClassPanel);
  const float infinity = __builtin_inff();
  // One group of rows at a time, so that the logarithm is taken of a whole vector.
  for (int64_t group = 0; group < count; group += kLanes) {
    const int rows = static_cast<int>(least(kLanes, count - group));
    float total[kLanes], shifted[kLanes];
    for (int i = 0; i < kLanes; ++i) total[i] = 1.0f, shifted[i] = 0.0f;
    for (int i = 0; i < rows; ++i) {
      const int64_t row = first + group + i;
      float* x = logits + (group + i) * kClassPanel;
      H* out = at<H>(args.dlogits, row * args.classes);
      const Label label = label_of(args, row);
      if (label != Label::counted) {
        // A loss of 0 is ln 1 - 0.
        if (label == Label::bad) shifted[i] = __builtin_nanf("");
        for (int64_t p = 0; p <= last; ++p) {
          store(x + p * work.dlogits_stride, broadcast(0.0f));
          store_first(out + p * kClassPanel, broadcast(0.0f), p == last ? tail : kLanes);
        }
        continue;
      }
      float* last_x = x + last * work.dlogits_stride;
      const Vec edge = first_lanes(load(last_x), tail, -infinity);
      store(last_x, edge);
      Vec highest = edge;
      for (int64_t p = 0; p < last; ++p) highest = max(highest, load(x + p * work.dlogits_stride));
      const float top = reduce_max(highest);
      const int64_t target = args.target[row];
      float* at_target = x + target / kClassPanel * work.dlogits_stride + target % kClassPanel;
      shifted[i] = *at_target - top;
      Vec sum = broadcast(0.0f);
      for (int64_t p = 0; p <= last; ++p) {
        float* panel = x + p * work.dlogits_stride;
        const Vec e = exp_nonpositive(sub(load(panel), broadcast(top)));
        store(panel, e);
        sum = add(sum, e);
      }
      total[i] = reduce_add(sum);
      const Vec inverse = broadcast(1.0f / total[i]);
      for (int64_t p = 0; p <= last; ++p) {
        float* panel = x + p * work.dlogits_stride;
        store(panel, mul(load(panel), inverse));
      }
      *at_target -= 1.0f;
      for (int64_t p = 0; p < last; ++p) store(out + p * kClassPanel, load(x + p * work.dlogits_stride));
      store_first(out + last * kClassPanel, load(last_x), tail);
    }
    store_first(args.loss + first + group, sub(log_from_one(load(total)), load(shifted)), rows);
  }
}

template <class H>
LCT_INLINE void write(H* to, Vec x, int64_t n, bool) {
  if (n >= kLanes) {
    store(to, x);
  } else {
    store_first(to, x, static_cast<int>(n));
  }
}
LCT_INLINE void write(float* to, Vec x, int64_t n, bool streamed) {
  if (streamed) {
    stream(to, x);
  } else if (n >= kLanes) {
    store(to, x);
  } else {
    store_first(to, x, static_cast<int>(n));
  }
}

// sum += dlogits [Rows, classes] times weight [classes, Vectors].
template <int Rows, int Vectors>
LCT_INLINE void add_classes(const CriticHeadWork& work, int64_t classes, const float* dlogits,
                            const float* weight, Vec (&sum)[Rows][Vectors]) {
  for (int64_t first = 0; first < classes; first += kClassPanel, dlogits += work.dlogits_stride) {
    const int n = static_cast<int>(least(kClassPanel, classes - first));
    for (int k = 0; k < n; ++k, weight += kColumnPanel) {
      Vec w[Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) w[j] = load(weight + j * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const Vec x = broadcast(dlogits[r * kClassPanel + k]);
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) sum[r][j] = fma(x, w[j], sum[r][j]);
      }
    }
  }
}

// dh of `valid` rows in `Vectors` vectors of one panel of columns.
template <class H, int Rows, int Vectors>
LCT_INLINE void input_tile(const CriticHeadWork& work, int64_t valid, const float* dlogits,
                           const float* weight, const float* block, int64_t columns, float scale, H* dh) {
  constexpr int64_t group = kClassGroup * kClassPanel;
  const int64_t classes = work.args.classes;
  Vec sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sum[r][j] = broadcast(0.0f);
  add_classes<Rows, Vectors>(work, least(group, classes), dlogits, weight, sum);
  if (classes > group) {
    // Many classes are summed in two levels, to be more exact; the upper one does not fit the registers.
    float before[Rows][Vectors * kLanes];
    for (int64_t first = group; first < classes; first += group) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) {
          store(before[r] + j * kLanes, sum[r][j]);
          sum[r][j] = broadcast(0.0f);
        }
      add_classes<Rows, Vectors>(work, least(group, classes - first),
                                 dlogits + first / kClassPanel * work.dlogits_stride,
                                 weight + first * kColumnPanel, sum);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) sum[r][j] = add(sum[r][j], load(before[r] + j * kLanes));
    }
  }
  const bool relu = work.args.activation == Activation::relu;
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    if (r >= valid) break;
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      const int64_t n = columns - j * kLanes;
      if (n <= 0) break;
      Vec x = mul(sum[r][j], broadcast(scale));
      if (relu) x = keep_where_greater(load(block + r * kColumnPanel + j * kLanes), broadcast(0.0f), x);
      write(dh + r * work.args.depth + j * kLanes, x, n, work.stream_dh);
    }
  }
}

template <class H>
void input_gradient(const CriticHeadWork& work, int64_t first, int64_t count, const float* block,
                    const float* dlogits) {
  const CriticHead& args = work.args;
  const float scale = *args.scale;
  constexpr int64_t step = kInputVectors * kLanes;
  const auto tile = [&](int64_t r, int64_t column) __attribute__((always_inline)) {
    const uint64_t panel = static_cast<uint64_t>(column) / kColumnPanel;
    const uint64_t within = static_cast<uint64_t>(column) % kColumnPanel;
    input_tile<H, kInputRows, kInputVectors>(
        work, count - r, dlogits + r * kClassPanel,
        work.weight_by_column + panel * static_cast<uint64_t>(args.classes * kColumnPanel) + within,
        block + panel * static_cast<uint64_t>(work.block_stride) + within + r * kColumnPanel,
        args.depth - column, scale, at<H>(args.dh, (first + r) * args.depth + column));
  };
  // A small weight stays in L1, so dh can be written in the order of memory; a large one is walked once.
  if (args.classes * args.depth <= kInnermost) {
    for (int64_t r = 0; r < count; r += kInputRows)
      for (int64_t column = 0; column < args.depth; column += step) tile(r, column);
  } else {
    for (int64_t column = 0; column < args.depth; column += step)
      for (int64_t r = 0; r < count; r += kInputRows) tile(r, column);
  }
  for (int64_t r = 0; r < count; ++r) {
    // 0 * weight is NaN where a weight is not finite.
    if (label_of(args, first + r) == Label::counted) continue;
    H* row = at<H>(args.dh, (first + r) * args.depth);
    for (int64_t k = 0; k < args.depth; k += kLanes) write(row + k, broadcast(0.0f), args.depth - k, false);
  }
}

// ---- weight gradients ---------------------------------------------------------------------------------

template <class H>
void load_dlogits(const CriticHeadWork& work, int64_t first, int64_t count, float* dlogits) {
  const int64_t classes = work.args.classes;
  for (int64_t r = 0; r < count; ++r) {
    const H* from = at<H>(work.given_dlogits, (first + r) * classes);
    for (int64_t v = 0, p = 0; v < classes; v += kClassPanel, ++p) {
      const int64_t n = classes - v;
      store(dlogits + p * work.dlogits_stride + r * kClassPanel,
            n >= kLanes ? load(from + v) : load_first(from + v, static_cast<int>(n)));
    }
  }
}

// row_scale * dlogits into `to`, whose class panels lie `stride` apart; rows that don't count become zeros.
void scale_rows(const CriticHeadWork& work, int64_t first, int64_t count, const float* dlogits, float* to,
                int64_t stride) {
  for (int64_t r = 0; r < count; ++r) {
    const bool counted = label_of(work.args, first + r) == Label::counted;
    const Vec factor = broadcast(work.args.row_scale[first + r]);
    for (int64_t p = 0; p < work.class_panels; ++p) {
      const Vec x = load(dlogits + p * work.dlogits_stride + r * kClassPanel);
      store(to + p * stride + r * kClassPanel, counted ? mul(x, factor) : broadcast(0.0f));
    }
  }
}

// Rows that don't count must not meet 0 * NaN.
void clear_uncounted(const CriticHeadWork& work, int64_t first, int64_t count, float* block, int64_t panels) {
  for (int64_t r = 0; r < count; ++r) {
    if (label_of(work.args, first + r) == Label::counted) continue;
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t k = 0; k < kColumnPanel; k += kLanes)
        store(block + panel * work.block_stride + r * kColumnPanel + k, broadcast(0.0f));
  }
}

template <int Classes>
LCT_INLINE void weight_tile(int64_t count, const float* block, const float* dlogits, float* sums) {
  constexpr int Vectors = kWeightVectors;
  Vec sum[Classes][Vectors];
#pragma GCC unroll 8
  for (int c = 0; c < Classes; ++c)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sum[c][j] = broadcast(0.0f);
  for (int64_t r = 0; r < count; ++r, block += kColumnPanel, dlogits += kClassPanel) {
    Vec a[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) a[j] = load(block + j * kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < Classes; ++c) {
      const Vec x = broadcast(dlogits[c]);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[c][j] = fma(x, a[j], sum[c][j]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < Classes; ++c)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      float* to = sums + c * kColumnPanel + j * kLanes;
      store(to, add(load(to), sum[c][j]));
    }
}

LCT_INLINE void weight_classes(int64_t classes, int64_t count, const float* block, const float* dlogits,
                               float* sums) {
  switch (classes) {
    case 1: return weight_tile<1>(count, block, dlogits, sums);
    case 2: return weight_tile<2>(count, block, dlogits, sums);
#ifdef __AVX2__
    case 3: return weight_tile<3>(count, block, dlogits, sums);
    case 4: return weight_tile<4>(count, block, dlogits, sums);
    case 5: return weight_tile<5>(count, block, dlogits, sums);
    case 6: return weight_tile<6>(count, block, dlogits, sums);
#endif
  }
}

// Adds dlogits^T block over `count` rows to one panel of columns of the sums.
void add_weight_gradient(int64_t classes, int64_t count, const float* block, const float* dlogits,
                         int64_t dlogits_stride, float* sums) {
  for (int64_t column = 0; column < kColumnPanel; column += kWeightVectors * kLanes) {
    for (int64_t first = 0; first < classes; first += kClassPanel) {
      const float* panel = dlogits + first / kClassPanel * dlogits_stride;
      const int64_t here = least(kClassPanel, classes - first);
      int64_t c = 0;
      for (int64_t left = pieces(here, kWeightClasses); left > 0; --left) {
        const int64_t tile = pieces(here - c, left);
        weight_classes(tile, count, block + column, panel + c, sums + (first + c) * kColumnPanel + column);
        c += tile;
      }
    }
  }
}

void add_bias_gradient(int64_t class_panels, int64_t count, const float* dlogits, int64_t stride,
                       float* sums) {
  for (int64_t p = 0; p < class_panels; ++p) {
    Vec sum = broadcast(0.0f);
    for (int64_t r = 0; r < count; ++r) sum = add(sum, load(dlogits + p * stride + r * kClassPanel));
    store(sums + p * kClassPanel, add(load(sums + p * kClassPanel), sum));
  }
}

LCT_INLINE float* bias_sums(const CriticHeadWork& work, float* sums) {
  return sums + work.column_panels * work.args.classes * kColumnPanel;
}

// ---- tasks --------------------------------------------------------------------------------------------

// dlogits of a block, and with a weight to multiply by also loss and dh.
template <class H>
void block_forward(const CriticHeadWork& work, int64_t first, int64_t count, int64_t end, float* block,
                   float* dlogits) {
  if (work.given_dlogits) {
    load_dlogits<H>(work, first, count, dlogits);
    return;
  }
  const int64_t row_bytes = work.args.depth * static_cast<int64_t>(sizeof(H));
  const int64_t next = first + count < end ? first + count : first;
  const Ahead ahead = {reinterpret_cast<uintptr_t>(work.args.h) + next * row_bytes, row_bytes,
                       kColumnPanel * static_cast<int64_t>(sizeof(H))};
  logits_of(work, count, block, ahead, dlogits);
  softmax_of<H>(work, first, count, dlogits);
  input_gradient<H>(work, first, count, block, dlogits);
}

template <class H>
void rows_of(const CriticHeadWork& work, int64_t first, int64_t count, int64_t slab_start, int slot) {
  float* block = work.scratch + slot * work.scratch_size;
  float* dlogits = block + work.column_panels * work.block_stride;
  for (const int64_t end = first + count; first < end; first += work.block_rows) {
    const int64_t n = least(work.block_rows, end - first);
    if (!work.given_dlogits) pack_block<H>(work, first, n, block);
    block_forward<H>(work, first, n, end, block, dlogits);
    if (work.use_slab)
      scale_rows(work, first, n, dlogits, work.slab + (first - slab_start) * kClassPanel,
                 work.slab_rows * kClassPanel);
  }
}

template <class H>
void chunk_of(const CriticHeadWork& work, int64_t chunk, int slot) {
  const CriticHead& args = work.args;
  float* block = work.scratch + slot * work.scratch_size;
  float* dlogits = block + work.column_panels * work.block_stride;
  float* sums = work.sums + chunk * work.sums_size;
  for (int64_t k = 0; k < work.sums_size; k += kLanes) store(sums + k, broadcast(0.0f));
  const int64_t end = least(args.rows, (chunk + 1) * work.chunk_rows);
  for (int64_t first = chunk * work.chunk_rows; first < end; first += work.block_rows) {
    const int64_t n = least(work.block_rows, end - first);
    pack_block<H>(work, first, n, block);
    block_forward<H>(work, first, n, end, block, dlogits);
    scale_rows(work, first, n, dlogits, dlogits, work.dlogits_stride);
    clear_uncounted(work, first, n, block, work.column_panels);
    for (int64_t panel = 0; panel < work.column_panels; ++panel)
      add_weight_gradient(args.classes, n, block + panel * work.block_stride, dlogits, work.dlogits_stride,
                          sums + panel * args.classes * kColumnPanel);
    add_bias_gradient(work.class_panels, n, dlogits, work.dlogits_stride, bias_sums(work, sums));
  }
}

template <class H>
void slab_of(const CriticHeadWork& work, int64_t first, int64_t count, int64_t panel, int64_t group, int slot) {
  const int64_t classes = work.args.classes;
  const int64_t first_class = group * kClassGroup * kClassPanel;
  const int64_t here = least(kClassGroup * kClassPanel, classes - first_class);
  const int64_t stride = work.slab_rows * kClassPanel;
  const float* dlogits = work.slab + group * kClassGroup * stride;
  float* block = work.scratch + slot * work.scratch_size;
  float* sums = work.sums + (panel * classes + first_class) * kColumnPanel;
  for (int64_t done = 0; done < count; done += work.block_rows) {
    const int64_t n = least(work.block_rows, count - done);
    for (int64_t r = 0; r < n; ++r)
      pack_columns<H>(work, first + done + r, panel, block + r * kColumnPanel);
    clear_uncounted(work, first + done, n, block, 1);
    add_weight_gradient(here, n, block, dlogits + done * kClassPanel, stride, sums);
    // Block by block: one running sum over a slab would lose digits.
    if (panel == 0)
      add_bias_gradient(pieces(here, kClassPanel), n, dlogits + done * kClassPanel, stride,
                        bias_sums(work, work.sums) + first_class);
  }
}

template <class W>
void fold_of(const CriticHeadWork& work, int64_t panel) {
  const CriticHead& args = work.args;
  const int64_t first = panel * kColumnPanel;
  for (int64_t v = 0; v < args.classes; ++v) {
    for (int64_t k = 0; k < kColumnPanel && first + k < args.depth; k += kLanes) {
      const float* from = work.sums + (panel * args.classes + v) * kColumnPanel + k;
      Vec sum = broadcast(0.0f);
      for (int64_t chunk = 0; chunk < work.chunks; ++chunk)
        sum = add(sum, load(from + chunk * work.sums_size));
      write(at<W>(args.dweight, v * args.depth + first + k), sum, args.depth - first - k, false);
    }
  }
  if (panel != 0 || !args.dbias) return;
  for (int64_t v = 0; v < args.classes; v += kLanes) {
    Vec sum = broadcast(0.0f);
    for (int64_t chunk = 0; chunk < work.chunks; ++chunk)
      sum = add(sum, load(bias_sums(work, work.sums + chunk * work.sums_size) + v));
    write(at<W>(args.dbias, v), sum, args.classes - v, false);
  }
}

void rows(const CriticHeadWork& work, int64_t first, int64_t count, int64_t slab_start, int slot) {
  const FlushSubnormals flush;
  switch (work.args.h_dtype) {
    case DType::f32: return rows_of<float>(work, first, count, slab_start, slot);
    case DType::f16: return rows_of<Half>(work, first, count, slab_start, slot);
    case DType::bf16: return rows_of<Bfloat16>(work, first, count, slab_start, slot);
  }
}

void chunk(const CriticHeadWork& work, int64_t index, int slot) {
  const FlushSubnormals flush;
  switch (work.args.h_dtype) {
    case DType::f32: return chunk_of<float>(work, index, slot);
    case DType::f16: return chunk_of<Half>(work, index, slot);
    case DType::bf16: return chunk_of<Bfloat16>(work, index, slot);
  }
}

void slab(const CriticHeadWork& work, int64_t first, int64_t count, int64_t panel, int64_t group, int slot) {
  const FlushSubnormals flush;
  switch (work.args.h_dtype) {
    case DType::f32: return slab_of<float>(work, first, count, panel, group, slot);
    case DType::f16: return slab_of<Half>(work, first, count, panel, group, slot);
    case DType::bf16: return slab_of<Bfloat16>(work, first, count, panel, group, slot);
  }
}

void fold(const CriticHeadWork& work, int64_t panel) {
  switch (work.args.weight_dtype) {
    case DType::f32: return fold_of<float>(work, panel);
    case DType::f16: return fold_of<Half>(work, panel);
    case DType::bf16: return fold_of<Bfloat16>(work, panel);
  }
}

}  // namespace

const CriticHeadTasks critic_head_tasks = {pack_weight, rows, chunk, slab, fold};

}  // namespace LCT_SIMD_LEVEL
}  // namespace lct
