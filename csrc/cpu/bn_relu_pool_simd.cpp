#include "cpu/bn_relu_pool_tasks.h"
#include "cpu/simd.h"

namespace lct {
namespace LCT_SIMD_LEVEL {
namespace {

// Below it z does not count as active: "z < kSmallest" is "not z > 0" that lets NaN through.
constexpr float kSmallest = 1.17549435e-38f;

// Vectors side by side: what one row of a map brings in two cache lines or more.
#if defined(__AVX2__)
constexpr int kWide = 4, kPair = 2;
#else
// A vector is sixteen scalars already: more would only take longer to compile.
constexpr int kWide = 1, kPair = 1;
#endif

#define LCT_MEMBER inline __attribute__((always_inline))

LCT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
LCT_INLINE T* at(void* base, int64_t index) {
  return static_cast<T*>(base) + index;
}
template <class T>
LCT_INLINE const T* at(const void* base, int64_t index) {
  return static_cast<const T*>(base) + index;
}

template <class T>
LCT_INLINE Vec load_up_to(const T* p, int n) {
  return n >= kLanes ? load(p) : load_first(p, n);
}

LCT_INLINE void write(float* p, Vec x, int n, bool past_cache) {
  if (past_cache) return stream(p, x);
  if (n >= kLanes) return store(p, x);
  store_first(p, x, n);
}
template <class T>
LCT_INLINE void write(T* p, Vec x, int n, bool) {
  if (n >= kLanes) return store(p, x);
  store_first(p, x, n);
}

LCT_INLINE Vec active(Vec z, Vec x) { return zero_where_less(z, broadcast(kSmallest), x); }
// max gives its second operand where one is NaN, so NaN stays.
LCT_INLINE Vec relu(Vec z) { return max(broadcast(0.0f), z); }

// ---- statistics of planes -----------------------------------------------------------------------------

template <class T>
LCT_INLINE Vec sum_of_run(const T* from, int64_t length) {
  Vec sum[kWide];
  for (int v = 0; v < kWide; ++v) sum[v] = broadcast(0.0f);
  int64_t i = 0;
  for (; i + kWide * kLanes <= length; i += kWide * kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) sum[v] = add(sum[v], load(from + i + v * kLanes));
  for (; i < length; i += kLanes)
    sum[0] = add(sum[0], load_up_to(from + i, static_cast<int>(least(kLanes, length - i))));
  for (int v = 1; v < kWide; ++v) sum[0] = add(sum[0], sum[v]);
  return sum[0];
}

template <class T>
LCT_INLINE void squares_of_run(const T* from, int64_t length, Vec shift, Vec& sum, Vec& square) {
  Vec s[kWide], q[kWide];
  for (int v = 0; v < kWide; ++v) s[v] = q[v] = broadcast(0.0f);
  int64_t i = 0;
  for (; i + kWide * kLanes <= length; i += kWide * kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) {
      const Vec d = sub(load(from + i + v * kLanes), shift);
      s[v] = add(s[v], d);
      q[v] = fma(d, d, q[v]);
    }
  for (; i < length; i += kLanes) {
    const int n = static_cast<int>(least(kLanes, length - i));
    Vec d = sub(load_up_to(from + i, n), shift);
    if (n < kLanes) d = first_lanes(d, n, 0.0f);
    s[0] = add(s[0], d);
    q[0] = fma(d, d, q[0]);
  }
  // A run is added up by itself first: fewer additions in turn.
  for (int v = 1; v < kWide; ++v) {
    s[0] = add(s[0], s[v]);
    q[0] = add(q[0], q[v]);
  }
  sum = add(sum, s[0]);
  square = add(square, q[0]);
}

template <class T>
void plane_statistics_of(const BnReluPoolWork& work, int64_t channel, int64_t chunk, const void* from,
                         int64_t stride) {
  const int64_t piece = (work.map + work.pieces - 1) / work.pieces;
  const int64_t length = least(piece, work.map - chunk % work.pieces * piece);
  const int64_t first = chunk / work.pieces * work.chunk_samples;
  const int64_t planes = least(work.chunk_samples, work.shape.samples - first);
  Vec sum = broadcast(0.0f);
  for (int64_t n = 0; n < planes; ++n) sum = add(sum, sum_of_run(at<T>(from, n * stride), length));
  // Any number near the mean will do: the second pass is exact about it.
  const float shift = reduce_add(sum) / static_cast<float>(planes * length);
  sum = broadcast(0.0f);
  Vec square = broadcast(0.0f);
  for (int64_t n = 0; n < planes; ++n)
    squares_of_run(at<T>(from, n * stride), length, broadcast(shift), sum, square);
  float* partial = work.partials + (channel * work.chunks + chunk) * kPartial;
  partial[0] = shift;
  partial[1] = reduce_add(sum);
  partial[2] = reduce_add(square);
}

// ---- planes -------------------------------------------------------------------------------------------

struct Channel {
  Vec mean, scale, beta;
};

LCT_INLINE Channel channel_of(const BnReluPoolWork& work, int64_t channel) {
  return {broadcast(work.mean[channel]), broadcast(work.scale[channel]), broadcast(work.beta[channel])};
}

// Calls body.template run<Vectors>(column, lanes of the last vector) over the columns of a map.
template <class Body>
LCT_INLINE void each_column(int64_t width, Body&& body) {
  int64_t column = 0;
  if (kWide > 1) {
    for (; column + kWide * kLanes <= width; column += kWide * kLanes) body.template run<kWide>(column, kLanes);
    for (; column + kPair * kLanes <= width; column += kPair * kLanes) body.template run<kPair>(column, kLanes);
  }
  for (; column < width; column += kLanes)
    body.template run<1>(column, static_cast<int>(least(kLanes, width - column)));
}

// Sums of columns [first, first + count).
LCT_INLINE float sum_of_columns(const float* sums, int64_t first, int64_t count) {
  Vec sum = broadcast(0.0f);
  for (int64_t i = 0; i < count; i += kLanes)
    sum = add(sum, load_up_to(sums + first + i, static_cast<int>(least(kLanes, count - i))));
  return reduce_add(sum);
}

template <class T>
struct OutputRows {
  const BnReluPoolWork& work;
  Channel c;
  const T* from;
  T* to;
  float* sums;  // [3][padded_width]: relu(z), active, active * (x - mean)

  template <int V>
  LCT_MEMBER void run(int64_t column, int n) const {
    const int64_t width = work.shape.width;
    Vec value[V], count[V], moment[V];
    for (int v = 0; v < V; ++v) value[v] = count[v] = moment[v] = broadcast(0.0f);
    for (int64_t h = 0; h < work.rows; ++h) {
      const int64_t index = h * width + column;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec x = sub(load_up_to(from + index + v * kLanes, V > 1 ? kLanes : n), c.mean);
        const Vec z = fma(x, c.scale, c.beta);
        const Vec y = relu(z);
        write(to + index + v * kLanes, y, V > 1 ? kLanes : n, work.stream);
        value[v] = add(value[v], y);
        count[v] = add(count[v], active(z, broadcast(1.0f)));
        moment[v] = add(moment[v], active(z, x));
      }
    }
    for (int v = 0; v < V; ++v) {
      float* p = sums + column + v * kLanes;
      store(p, value[v]);
      store(p + work.padded_width, count[v]);
      store(p + 2 * work.padded_width, moment[v]);
    }
  }
};

template <class T>
void plane_output_of(const BnReluPoolWork& work, int64_t sample, int64_t channel, const void* from,
                     int slot) {
  const FlushSubnormals flush;
  const BnReluPoolShape& s = work.shape;
  const int64_t plane = sample * s.channels + channel;
  const float share = 1.0f / static_cast<float>(work.rows * work.columns);
  float* moments = work.moments + plane * work.windows;
  const int64_t planes = s.samples * s.channels * work.windows;
  OutputRows<T> rows{work, channel_of(work, channel), at<T>(from, 0), at<T>(work.out, plane * work.map),
                     work.scratch + slot * work.scratch_size};
  for (int64_t i = 0; i < s.pool; ++i) {
    each_column(s.width, rows);
    for (int64_t j = 0; j < s.pool; ++j) {
      float sums[kPartial];
      for (int k = 0; k < kPartial; ++k)
        sums[k] = share * sum_of_columns(rows.sums + k * work.padded_width, j * work.columns, work.columns);
      const int64_t window = i * s.pool + j;
      store_first(at<T>(work.pooled, plane * work.windows + window), broadcast(sums[0]), 1);
      moments[window] = sums[1];
      moments[planes + window] = sums[2] * work.rstd[channel];
    }
    rows.from += work.rows * s.width;
    rows.to += work.rows * s.width;
  }
}

// dpooled / area times `factor` for each column of one row of windows.
template <class T>
LCT_INLINE void spread_columns(const BnReluPoolWork& work, int64_t plane, int64_t row, float factor, float* to) {
  const T* from = at<T>(work.dpooled, plane * work.windows + row * work.shape.pool);
  const float share = factor / static_cast<float>(work.rows * work.columns);
  for (int64_t j = 0; j < work.shape.pool; ++j) {
    float d[kLanes];
    store(d, load_first(from + j, 1));
    const float value = d[0] * share;
    for (int64_t i = 0; i < work.columns; ++i) to[j * work.columns + i] = value;
  }
}

template <class T>
struct TermRows {
  const BnReluPoolWork& work;
  Channel c;
  const T* from;
  const T* from_dy;
  const float* spread;  // [padded_width]
  Vec& total;
  Vec& total_moment;

  template <int V>
  LCT_MEMBER void run(int64_t column, int n) const {
    const int64_t width = work.shape.width;
    Vec sum[V], moment[V];
    for (int v = 0; v < V; ++v) sum[v] = moment[v] = broadcast(0.0f);
    for (int64_t h = 0; h < work.rows; ++h) {
      const int64_t index = h * width + column;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int lanes = V > 1 ? kLanes : n;
        const Vec x = sub(load_up_to(from + index + v * kLanes, lanes), c.mean);
        const Vec z = fma(x, c.scale, c.beta);
        Vec g = add(load_up_to(from_dy + index + v * kLanes, lanes), load(spread + column + v * kLanes));
        g = active(z, g);
        if (lanes < kLanes) g = first_lanes(g, lanes, 0.0f);
        sum[v] = add(sum[v], g);
        moment[v] = fma(g, lanes < kLanes ? first_lanes(x, lanes, 0.0f) : x, moment[v]);
      }
    }
    for (int v = 0; v < V; ++v) {
      total = add(total, sum[v]);
      total_moment = add(total_moment, moment[v]);
    }
  }
};

template <class T>
void plane_terms_of(const BnReluPoolWork& work, int64_t channel, int64_t chunk, int slot) {
  const FlushSubnormals flush;
  const BnReluPoolShape& s = work.shape;
  const int64_t first = chunk * work.chunk_samples;
  const int64_t last = least(s.samples, first + work.chunk_samples);
  float* d = work.scratch + slot * work.scratch_size;
  Vec sum = broadcast(0.0f), moment = broadcast(0.0f);
  for (int64_t n = first; n < last; ++n) {
    const int64_t plane = n * s.channels + channel;
    Vec plane_sum = broadcast(0.0f), plane_moment = broadcast(0.0f);
    TermRows<T> rows{work, channel_of(work, channel), at<T>(work.x, plane * work.map),
                     at<T>(work.dy, plane * work.map), d, plane_sum, plane_moment};
    for (int64_t i = 0; i < s.pool; ++i) {
      spread_columns<T>(work, plane, i, 1.0f, d);
      each_column(s.width, rows);
      rows.from += work.rows * s.width;
      rows.from_dy += work.rows * s.width;
    }
    sum = add(sum, plane_sum);
    moment = add(moment, plane_moment);
  }
  float* partial = work.partials + (channel * work.chunks + chunk) * kPartial;
  partial[0] = reduce_add(sum);
  partial[1] = reduce_add(moment);
}

template <class T, bool WithDy, bool Batch>
struct DxRows {
  const BnReluPoolWork& work;
  Channel c;
  Vec slope, offset;
  const T* from;
  const T* from_dy;
  T* to;
  const float* spread;  // [padded_width], times scale

  template <int V>
  LCT_MEMBER void run(int64_t column, int n) const {
    const int64_t width = work.shape.width;
    Vec d[V];
    for (int v = 0; v < V; ++v) d[v] = load(spread + column + v * kLanes);
    for (int64_t h = 0; h < work.rows; ++h) {
      const int64_t index = h * width + column;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int lanes = V > 1 ? kLanes : n;
        const Vec x = sub(load_up_to(from + index + v * kLanes, lanes), c.mean);
        const Vec z = fma(x, c.scale, c.beta);
        Vec g = d[v];
        if (WithDy) g = fma(load_up_to(from_dy + index + v * kLanes, lanes), c.scale, g);
        g = active(z, g);
        if (Batch) g = add(g, fma(x, slope, offset));
        write(to + index + v * kLanes, g, lanes, work.stream);
      }
    }
  }
};

template <class T, bool WithDy, bool Batch>
void plane_dx_as(const BnReluPoolWork& work, int64_t sample, int64_t channel, int slot) {
  const FlushSubnormals flush;
  const BnReluPoolShape& s = work.shape;
  const int64_t plane = sample * s.channels + channel, first = plane * work.map;
  float* d = work.scratch + slot * work.scratch_size;
  DxRows<T, WithDy, Batch> rows{work,
                                channel_of(work, channel),
                                broadcast(work.slope[channel]),
                                broadcast(work.offset[channel]),
                                at<T>(work.x, first),
                                WithDy ? at<T>(work.dy, first) : nullptr,
                                at<T>(work.out, first),
                                d};
  for (int64_t i = 0; i < s.pool; ++i) {
    spread_columns<T>(work, plane, i, work.scale[channel], d);
    each_column(s.width, rows);
    rows.from += work.rows * s.width;
    if (WithDy) rows.from_dy += work.rows * s.width;
    rows.to += work.rows * s.width;
  }
}

template <class T>
void plane_dx_of(const BnReluPoolWork& work, int64_t sample, int64_t channel, int slot) {
  if (work.dy)
    work.batch_statistics ? plane_dx_as<T, true, true>(work, sample, channel, slot)
                          : plane_dx_as<T, true, false>(work, sample, channel, slot);
  else
    work.batch_statistics ? plane_dx_as<T, false, true>(work, sample, channel, slot)
                          : plane_dx_as<T, false, false>(work, sample, channel, slot);
}

// ---- rows ---------------------------------------------------------------------------------------------

// Calls body.template run<Vectors>(channel, lanes of the last vector).
template <class Body>
LCT_INLINE void each_channel(int64_t channels, Body&& body) {
  int64_t c = 0;
  if (kPair > 1)
    for (; c + kPair * kLanes <= channels; c += kPair * kLanes) body.template run<kPair>(c, kLanes);
  for (; c < channels; c += kLanes) body.template run<1>(c, static_cast<int>(least(kLanes, channels - c)));
}

template <class T>
struct ChunkStatistics {
  const BnReluPoolWork& work;
  const T* from;
  int64_t count;
  float* partial;  // [3][padded_channels]

  template <int V>
  LCT_MEMBER void run(int64_t c, int n) const {
    const int64_t channels = work.shape.channels, padded = work.padded_channels;
    const int lanes = V > 1 ? kLanes : n;
    Vec sum[V], square[V], shift[V];
    for (int v = 0; v < V; ++v) sum[v] = square[v] = broadcast(0.0f);
    for (int64_t r = 0; r < count; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        sum[v] = add(sum[v], load_up_to(from + r * channels + c + v * kLanes, lanes));
    const Vec share = broadcast(1.0f / static_cast<float>(count));
    for (int v = 0; v < V; ++v) {
      shift[v] = mul(sum[v], share);
      sum[v] = broadcast(0.0f);
    }
    for (int64_t r = 0; r < count; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec d = sub(load_up_to(from + r * channels + c + v * kLanes, lanes), shift[v]);
        sum[v] = add(sum[v], d);
        square[v] = fma(d, d, square[v]);
      }
    for (int v = 0; v < V; ++v) {
      float* p = partial + c + v * kLanes;
      store(p, shift[v]);
      store(p + padded, sum[v]);
      store(p + 2 * padded, square[v]);
    }
  }
};

template <class T>
void row_statistics_of(const BnReluPoolWork& work, int64_t chunk) {
  const int64_t first = chunk * work.chunk_rows, all = work.shape.samples * work.map;
  ChunkStatistics<T> body{work, at<T>(work.x, first * work.shape.channels),
                          least(work.chunk_rows, all - first),
                          work.partials + chunk * kPartial * work.padded_channels};
  each_channel(work.shape.channels, body);
}

template <class T>
struct OutputWindow {
  const BnReluPoolWork& work;
  const T* from;
  T* to;
  int64_t sample, window;

  template <int V>
  LCT_MEMBER void run(int64_t c, int n) const {
    const BnReluPoolShape& s = work.shape;
    const int lanes = V > 1 ? kLanes : n;
    Vec mean[V], scale[V], beta[V], value[V], count[V], moment[V];
    for (int v = 0; v < V; ++v) {
      mean[v] = load(work.mean + c + v * kLanes);
      scale[v] = load(work.scale + c + v * kLanes);
      beta[v] = load(work.beta + c + v * kLanes);
      value[v] = count[v] = moment[v] = broadcast(0.0f);
    }
    for (int64_t h = 0; h < work.rows; ++h) {
      // A row has sums of its own: fewer additions in turn.
      Vec row_value[V], row_count[V], row_moment[V];
      for (int v = 0; v < V; ++v) row_value[v] = row_count[v] = row_moment[v] = broadcast(0.0f);
      for (int64_t w = 0; w < work.columns; ++w) {
        const int64_t index = (h * s.width + w) * s.channels + c;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const Vec x = sub(load_up_to(from + index + v * kLanes, lanes), mean[v]);
          const Vec z = fma(x, scale[v], beta[v]);
          const Vec y = relu(z);
          write(to + index + v * kLanes, y, lanes, work.stream);
          row_value[v] = add(row_value[v], y);
          row_count[v] = add(row_count[v], active(z, broadcast(1.0f)));
          row_moment[v] = add(row_moment[v], active(z, x));
        }
      }
      for (int v = 0; v < V; ++v) {
        value[v] = add(value[v], row_value[v]);
        count[v] = add(count[v], row_count[v]);
        moment[v] = add(moment[v], row_moment[v]);
      }
    }
    const Vec share = broadcast(1.0f / static_cast<float>(work.rows * work.columns));
    for (int v = 0; v < V; ++v) {
      float sums[kPartial][kLanes];
      T pooled[kLanes];
      store(pooled, mul(value[v], share));
      store(sums[1], mul(count[v], share));
      store(sums[2], mul(mul(moment[v], share), load(work.rstd + c + v * kLanes)));
      for (int i = 0; i < lanes; ++i) {
        const int64_t target = (sample * s.channels + c + v * kLanes + i) * work.windows + window;
        at<T>(work.pooled, target)[0] = pooled[i];
        work.moments[target] = sums[1][i];
        work.moments[s.samples * s.channels * work.windows + target] = sums[2][i];
      }
    }
  }
};

// Pixel (window_row * rows, 0) of a sample.
LCT_INLINE int64_t first_of_row(const BnReluPoolWork& work, int64_t sample, int64_t window_row) {
  return (sample * work.map + window_row * work.rows * work.shape.width) * work.shape.channels;
}

template <class T>
void row_output_of(const BnReluPoolWork& work, int64_t sample, int64_t window_row) {
  const FlushSubnormals flush;
  const BnReluPoolShape& s = work.shape;
  const int64_t first = first_of_row(work, sample, window_row);
  for (int64_t j = 0; j < s.pool; ++j) {
    const int64_t start = first + j * work.columns * s.channels;
    OutputWindow<T> body{work, at<T>(work.x, start), at<T>(work.out, start), sample,
                         window_row * s.pool + j};
    each_channel(s.channels, body);
  }
}

// dpooled / area of one window, for every channel.
template <class T>
LCT_INLINE void spread_channels(const BnReluPoolWork& work, int64_t sample, int64_t window, float* to) {
  const T* from = at<T>(work.dpooled, sample * work.shape.channels * work.windows + window);
  const Vec share = broadcast(1.0f / static_cast<float>(work.rows * work.columns));
  for (int64_t c = 0; c < work.shape.channels; c += kLanes) {
    T d[kLanes] = {};
    const int64_t n = least(kLanes, work.shape.channels - c);
    for (int64_t i = 0; i < n; ++i) d[i] = from[(c + i) * work.windows];
    store(to + c, mul(load(d), share));
  }
}

template <class T>
struct TermWindow {
  const BnReluPoolWork& work;
  const T* from;
  const T* from_dy;
  const float* spread;  // [padded_channels]
  float* partial;  // [3][padded_channels], added to

  template <int V>
  LCT_MEMBER void run(int64_t c, int n) const {
    const int lanes = V > 1 ? kLanes : n;
    Vec mean[V], scale[V], beta[V], d[V], sum[V], moment[V];
    for (int v = 0; v < V; ++v) {
      mean[v] = load(work.mean + c + v * kLanes);
      scale[v] = load(work.scale + c + v * kLanes);
      beta[v] = load(work.beta + c + v * kLanes);
      d[v] = load(spread + c + v * kLanes);
      sum[v] = load(partial + c + v * kLanes);
      moment[v] = load(partial + work.padded_channels + c + v * kLanes);
    }
    for (int64_t h = 0; h < work.rows; ++h) {
      Vec row_sum[V], row_moment[V];
      for (int v = 0; v < V; ++v) row_sum[v] = row_moment[v] = broadcast(0.0f);
      for (int64_t w = 0; w < work.columns; ++w) {
        const int64_t index = (h * work.shape.width + w) * work.shape.channels + c;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const Vec x = sub(load_up_to(from + index + v * kLanes, lanes), mean[v]);
          const Vec z = fma(x, scale[v], beta[v]);
          const Vec g = active(z, add(load_up_to(from_dy + index + v * kLanes, lanes), d[v]));
          row_sum[v] = add(row_sum[v], g);
          row_moment[v] = fma(g, x, row_moment[v]);
        }
      }
      for (int v = 0; v < V; ++v) {
        sum[v] = add(sum[v], row_sum[v]);
        moment[v] = add(moment[v], row_moment[v]);
      }
    }
    for (int v = 0; v < V; ++v) {
      store(partial + c + v * kLanes, sum[v]);
      store(partial + work.padded_channels + c + v * kLanes, moment[v]);
    }
  }
};

template <class T>
void row_terms_of(const BnReluPoolWork& work, int64_t sample, int64_t window_row, int slot) {
  const FlushSubnormals flush;
  const BnReluPoolShape& s = work.shape;
  const int64_t first = first_of_row(work, sample, window_row);
  float* d = work.scratch + slot * work.scratch_size;
  float* partial = work.partials + (sample * s.pool + window_row) * kPartial * work.padded_channels;
  for (int64_t c = 0; c < 2 * work.padded_channels; c += kLanes) store(partial + c, broadcast(0.0f));
  for (int64_t j = 0; j < s.pool; ++j) {
    spread_channels<T>(work, sample, window_row * s.pool + j, d);
    const int64_t start = first + j * work.columns * s.channels;
    TermWindow<T> body{work, at<T>(work.x, start), at<T>(work.dy, start), d, partial};
    each_channel(s.channels, body);
  }
}

template <class T, bool WithDy, bool Batch>
struct DxWindow {
  const BnReluPoolWork& work;
  const T* from;
  const T* from_dy;
  T* to;
  const float* spread;  // [padded_channels]

  template <int V>
  LCT_MEMBER void run(int64_t c, int n) const {
    const int lanes = V > 1 ? kLanes : n;
    Vec mean[V], scale[V], beta[V], slope[V], offset[V], d[V];
    for (int v = 0; v < V; ++v) {
      mean[v] = load(work.mean + c + v * kLanes);
      scale[v] = load(work.scale + c + v * kLanes);
      beta[v] = load(work.beta + c + v * kLanes);
      slope[v] = load(work.slope + c + v * kLanes);
      offset[v] = load(work.offset + c + v * kLanes);
      d[v] = mul(scale[v], load(spread + c + v * kLanes));
    }
    for (int64_t h = 0; h < work.rows; ++h)
      for (int64_t w = 0; w < work.columns; ++w) {
        const int64_t index = (h * work.shape.width + w) * work.shape.channels + c;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const Vec x = sub(load_up_to(from + index + v * kLanes, lanes), mean[v]);
          const Vec z = fma(x, scale[v], beta[v]);
          Vec g = d[v];
          if (WithDy) g = fma(load_up_to(from_dy + index + v * kLanes, lanes), scale[v], g);
          g = active(z, g);
          if (Batch) g = add(g, fma(x, slope[v], offset[v]));
          write(to + index + v * kLanes, g, lanes, work.stream);
        }
      }
  }
};

template <class T, bool WithDy, bool Batch>
void row_dx_as(const BnReluPoolWork& work, int64_t sample, int64_t window_row, int slot) {
  const FlushSubnormals flush;
  const BnReluPoolShape& s = work.shape;
  const int64_t first = first_of_row(work, sample, window_row);
  float* d = work.scratch + slot * work.scratch_size;
  for (int64_t j = 0; j < s.pool; ++j) {
    spread_channels<T>(work, sample, window_row * s.pool + j, d);
    const int64_t start = first + j * work.columns * s.channels;
    DxWindow<T, WithDy, Batch> body{work, at<T>(work.x, start), WithDy ? at<T>(work.dy, start) : nullptr,
                                    at<T>(work.out, start), d};
    each_channel(s.channels, body);
  }
}

template <class T>
void row_dx_of(const BnReluPoolWork& work, int64_t sample, int64_t window_row, int slot) {
  if (work.dy)
    work.batch_statistics ? row_dx_as<T, true, true>(work, sample, window_row, slot)
                          : row_dx_as<T, true, false>(work, sample, window_row, slot);
  else
    work.batch_statistics ? row_dx_as<T, false, true>(work, sample, window_row, slot)
                          : row_dx_as<T, false, false>(work, sample, window_row, slot);
}

// ---- element types ------------------------------------------------------------------------------------

#define LCT_BY_DTYPE(name, ...)                              \
  switch (work.shape.dtype) {                                \
    case DType::f32: return name<float>(work, __VA_ARGS__);  \
    case DType::f16: return name<Half>(work, __VA_ARGS__);   \
    case DType::bf16: return name<Bfloat16>(work, __VA_ARGS__); \
  }

void plane_statistics(const BnReluPoolWork& work, int64_t channel, int64_t chunk, const void* from,
                      int64_t stride) {
  LCT_BY_DTYPE(plane_statistics_of, channel, chunk, from, stride)
}
void plane_output(const BnReluPoolWork& work, int64_t sample, int64_t channel, const void* from, int slot) {
  LCT_BY_DTYPE(plane_output_of, sample, channel, from, slot)
}
void plane_terms(const BnReluPoolWork& work, int64_t channel, int64_t chunk, int slot) {
  LCT_BY_DTYPE(plane_terms_of, channel, chunk, slot)
}
void plane_dx(const BnReluPoolWork& work, int64_t sample, int64_t channel, int slot) {
  LCT_BY_DTYPE(plane_dx_of, sample, channel, slot)
}
void row_statistics(const BnReluPoolWork& work, int64_t chunk) { LCT_BY_DTYPE(row_statistics_of, chunk) }
void row_output(const BnReluPoolWork& work, int64_t sample, int64_t window_row) {
  LCT_BY_DTYPE(row_output_of, sample, window_row)
}
void row_terms(const BnReluPoolWork& work, int64_t sample, int64_t window_row, int slot) {
  LCT_BY_DTYPE(row_terms_of, sample, window_row, slot)
}
void row_dx(const BnReluPoolWork& work, int64_t sample, int64_t window_row, int slot) {
  LCT_BY_DTYPE(row_dx_of, sample, window_row, slot)
}

}  // namespace

const BnReluPoolTasks bn_relu_pool_tasks = {plane_statistics, plane_output,  plane_terms, plane_dx,
                                                   row_statistics,   row_output,    row_terms,   row_dx};

}  // namespace LCT_SIMD_LEVEL
}  // namespace lct
