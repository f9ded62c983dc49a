#include "lct/bn_relu_pool.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/bn_relu_pool_tasks.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"

namespace lct {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kLanes = 16;
// Elements of a chunk of a channel's planes: 16 KiB of floats, read twice within L1.
constexpr int64_t kPlaneChunk = 4096;
// Elements of a chunk of pixels, all channels: within L2.
constexpr int64_t kRowChunk = 16384;
// Bytes of a group of planes that are copied: within L2, with room for what streams through.
constexpr int64_t kCopyBytes = int64_t{640} << 10;
// Bytes side by side in x that make a group of small planes worth visiting.
constexpr int64_t kRunBytes = 4096;
// Bytes of x and out beyond which out would only push other data out of the last cache.
constexpr int64_t kStreamBytes = int64_t{32} << 20;
// Bytes of planes of one task of dx.
constexpr int64_t kTaskBytes = int64_t{128} << 10;

int64_t pieces_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t rounded_up(int64_t n, int64_t to) { return pieces_of(n, to) * to; }
int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

const BnReluPoolTasks& tasks() { return LCT_AT_LEVEL(bn_relu_pool_tasks); }

enum class Pass { forward, backward, backward_with_dy };

// How the channels of contiguous maps are shared out.
struct Groups {
  int64_t size;   // channels
  bool copy;      // into scratch
  bool each;      // a group to a thread, through all passes; else passes one after another
};

Groups groups_of(const BnReluPoolShape& shape, Pass pass, int threads) {
  const int64_t plane = shape.height * shape.width * bytes_of(shape.dtype);
  Groups groups{};
  groups.size = std::min(shape.channels, pieces_of(kRunBytes, plane));
  while (groups.size > 1 && (groups.size * shape.samples * plane > kCopyBytes ||
                             pieces_of(shape.channels, groups.size) < 4 * threads))
    groups.size = (groups.size + 1) / 2;
  groups.each = threads == 1 || pieces_of(shape.channels, groups.size) >= 2 * threads;
  groups.copy = groups.each && pass == Pass::forward && groups.size * shape.samples * plane <= kCopyBytes;
  return groups;
}

// Lays out the workspace from `base`, or only counts it where base is null. Returns bytes.
size_t plan(BnReluPoolWork& work, Pass pass, int threads, void* base) {
  const BnReluPoolShape& shape = work.shape;
  work.map = shape.height * shape.width;
  work.rows = shape.height / shape.pool;
  work.columns = shape.width / shape.pool;
  work.windows = shape.pool * shape.pool;
  work.padded_channels = rounded_up(shape.channels, kLanes);
  work.padded_width = rounded_up(shape.width, kLanes);

  const bool with_dy = pass == Pass::backward_with_dy;
  int64_t partials;
  if (shape.channels_last) {
    const int64_t pixels = shape.samples * work.map;
    work.chunk_rows = std::clamp<int64_t>(kRowChunk / shape.channels, 32, 256);
    work.chunks = with_dy ? shape.samples * shape.pool : pieces_of(pixels, work.chunk_rows);
    partials = work.chunks * kPartial * work.padded_channels;
    work.scratch_size = work.padded_channels;
  } else {
    // Gradients are summed a row of windows at a time, so their chunks are of whole planes.
    work.pieces = with_dy ? 1 : pieces_of(work.map, kPlaneChunk);
    work.chunk_samples = std::max<int64_t>(kPlaneChunk / work.map, 1);
    work.chunks = pieces_of(shape.samples, work.chunk_samples) * work.pieces;
    partials = shape.channels * work.chunks * kPartial;
    work.scratch_size = kPartial * work.padded_width;
    const Groups groups = groups_of(shape, pass, threads);
    if (groups.copy)
      work.scratch_size +=
          rounded_up(pieces_of(groups.size * shape.samples * work.map * bytes_of(shape.dtype), 4), kLanes);
  }
  if (pass == Pass::backward) partials = 0;

  const uintptr_t start = reinterpret_cast<uintptr_t>(base);
  int64_t used = base ? static_cast<int64_t>(rounded_up(start, kCacheLine) - start) : kCacheLine;
  const auto take = [&](float*& to, int64_t floats) {
    to = base && floats ? reinterpret_cast<float*>(static_cast<char*>(base) + used) : nullptr;
    used += rounded_up(floats * static_cast<int64_t>(sizeof(float)), kCacheLine);
  };
  for (float** array : {&work.mean, &work.rstd, &work.scale, &work.beta, &work.slope, &work.offset})
    take(*array, work.padded_channels);
  take(work.partials, partials);
  take(work.scratch, work.scratch_size * std::max(threads, 1));
  return static_cast<size_t>(used);
}

bool past_cache(const BnReluPoolWork& work) {
  const BnReluPoolShape& shape = work.shape;
  const int64_t bytes = 2 * shape.samples * shape.channels * work.map * bytes_of(shape.dtype);
  const int64_t run = shape.channels_last ? shape.channels : shape.width;
  return shape.dtype == DType::f32 && bytes > kStreamBytes && run % kLanes == 0 &&
         reinterpret_cast<uintptr_t>(work.out) % kCacheLine == 0;
}

float* partial_of(const BnReluPoolWork& work, int64_t channel, int64_t chunk, int64_t which) {
  return work.shape.channels_last
             ? work.partials + (chunk * kPartial + which) * work.padded_channels + channel
             : work.partials + (channel * work.chunks + chunk) * kPartial + which;
}

int64_t count_of(const BnReluPoolWork& work, int64_t chunk) {
  if (work.shape.channels_last)
    return std::min(work.chunk_rows, work.shape.samples * work.map - chunk * work.chunk_rows);
  const int64_t piece = pieces_of(work.map, work.pieces);
  const int64_t length = std::min(piece, work.map - chunk % work.pieces * piece);
  const int64_t first = chunk / work.pieces * work.chunk_samples;
  return length * std::min(work.chunk_samples, work.shape.samples - first);
}

// What the output needs of one channel whose mean and var are known.
void set_channel(BnReluPoolWork& work, int64_t c, float mean, float var, double eps, const float* gamma,
                 const float* beta) {
  work.mean[c] = mean;
  work.rstd[c] = static_cast<float>(1.0 / std::sqrt(static_cast<double>(var) + eps));
  work.scale[c] = gamma[c] * work.rstd[c];
  work.beta[c] = beta[c];
}

void clear_padding(BnReluPoolWork& work) {
  for (float* array : {work.mean, work.rstd, work.scale, work.beta, work.slope, work.offset})
    std::fill(array + work.shape.channels, array + work.padded_channels, 0.0f);
}

// Folds the chunks of one channel in order.
void fold_statistics(const BnReluPool& args, BnReluPoolWork& work, int64_t c) {
  if (args.batch_statistics) {
    const double all = static_cast<double>(work.shape.samples) * static_cast<double>(work.map);
    double mean = 0, square = 0;
    for (int64_t i = 0; i < work.chunks; ++i)
      mean += static_cast<double>(*partial_of(work, c, i, 0)) * static_cast<double>(count_of(work, i)) +
              static_cast<double>(*partial_of(work, c, i, 1));
    mean /= all;
    for (int64_t i = 0; i < work.chunks; ++i) {
      const double count = static_cast<double>(count_of(work, i));
      const double shift = static_cast<double>(*partial_of(work, c, i, 0)) - mean;
      // sum (x - mean)^2 with x - mean = (x - shift_i) + (shift_i - mean)
      square += static_cast<double>(*partial_of(work, c, i, 2)) +
                shift * (2 * static_cast<double>(*partial_of(work, c, i, 1)) + count * shift);
    }
    args.mean[c] = static_cast<float>(mean);
    // Not std::max, which would lose a NaN.
    args.var[c] = square < 0 ? 0.0f : static_cast<float>(square / all);
  }
  set_channel(work, c, args.mean[c], args.var[c], args.eps, args.gamma, args.beta);
}

void planes_forward(const BnReluPool& args, BnReluPoolWork& work, int threads) {
  const BnReluPoolShape& shape = work.shape;
  const BnReluPoolTasks& task = tasks();
  const int64_t element = bytes_of(shape.dtype);
  const char* x = static_cast<const char*>(args.x);
  const Groups groups = groups_of(shape, Pass::forward, threads);
  const int64_t plane_bytes = work.map * element, stride = shape.channels * work.map;

  const auto statistics = [&](int64_t c, int64_t chunk) {
    const int64_t first = chunk / work.pieces * work.chunk_samples;
    const int64_t skipped = chunk % work.pieces * pieces_of(work.map, work.pieces);
    task.plane_statistics(work, c, chunk, x + ((first * shape.channels + c) * work.map + skipped) * element, stride);
  };
  if (!groups.each) {
    if (args.batch_statistics)
      parallel_for(threads, shape.channels * work.chunks,
                   [&](int64_t i, int) { statistics(i / work.chunks, i % work.chunks); });
    for (int64_t c = 0; c < shape.channels; ++c) fold_statistics(args, work, c);
    parallel_for(threads, shape.samples * shape.channels, [&](int64_t i, int slot) {
      task.plane_output(work, i / shape.channels, i % shape.channels, x + i * plane_bytes, slot);
    });
    return;
  }
  parallel_for(threads, pieces_of(shape.channels, groups.size), [&](int64_t index, int slot) {
    const int64_t first = index * groups.size, count = std::min(groups.size, shape.channels - first);
    const bool copy = groups.copy && args.batch_statistics;
    char* copied = reinterpret_cast<char*>(work.scratch + slot * work.scratch_size + kPartial * work.padded_width);
    if (args.batch_statistics) {
      for (int64_t chunk = 0; chunk < work.chunks; ++chunk) {
        const int64_t from = chunk / work.pieces * work.chunk_samples;
        const int64_t to = std::min(shape.samples, from + work.chunk_samples);
        if (copy && chunk % work.pieces == 0)
          for (int64_t n = from; n < to; ++n)
            std::memcpy(copied + n * count * plane_bytes, x + (n * shape.channels + first) * plane_bytes,
                        static_cast<size_t>(count * plane_bytes));
        for (int64_t c = 0; c < count; ++c) {
          if (copy)
            task.plane_statistics(work, first + c, chunk,
                                  copied + ((from * count + c) * work.map +
                                            chunk % work.pieces * pieces_of(work.map, work.pieces)) *
                                               element,
                                  count * work.map);
          else
            statistics(first + c, chunk);
        }
      }
    }
    for (int64_t c = first; c < first + count; ++c) fold_statistics(args, work, c);
    for (int64_t n = 0; n < shape.samples; ++n)
      for (int64_t c = 0; c < count; ++c)
        task.plane_output(work, n, first + c,
                          copy ? copied + (n * count + c) * plane_bytes
                               : x + (n * shape.channels + first + c) * plane_bytes,
                          slot);
  });
}

void rows_forward(const BnReluPool& args, BnReluPoolWork& work, int threads) {
  const BnReluPoolShape& shape = work.shape;
  const BnReluPoolTasks& task = tasks();
  if (args.batch_statistics)
    parallel_for(threads, work.chunks, [&](int64_t chunk, int) { task.row_statistics(work, chunk); });
  parallel_for(threads, pieces_of(shape.channels, kLanes), [&](int64_t block, int) {
    for (int64_t c = block * kLanes; c < std::min(shape.channels, (block + 1) * kLanes); ++c)
      fold_statistics(args, work, c);
  });
  // Backwards: what the statistics read last is still in the last cache.
  const int64_t all = shape.samples * shape.pool;
  parallel_for(threads, all, [&](int64_t i, int) {
    const int64_t row = all - 1 - i;
    task.row_output(work, row / shape.pool, row % shape.pool);
  });
}

// dgamma and dbeta of one channel, and what dx needs of them with batch statistics.
void finish_channel(const BnReluPoolBackward& args, BnReluPoolWork& work, int64_t c, double sum,
                    double moment) {
  args.dbeta[c] = static_cast<float>(sum);
  args.dgamma[c] = static_cast<float>(moment);
  const double share = static_cast<double>(work.scale[c]) / static_cast<double>(work.shape.samples * work.map);
  work.offset[c] = static_cast<float>(-share * sum);
  work.slope[c] = static_cast<float>(-share * static_cast<double>(work.rstd[c]) * moment);
}

void fold_terms(const BnReluPoolBackward& args, BnReluPoolWork& work, int64_t c) {
  double sum = 0, moment = 0;
  for (int64_t i = 0; i < work.chunks; ++i) {
    sum += static_cast<double>(*partial_of(work, c, i, 0));
    moment += static_cast<double>(*partial_of(work, c, i, 1));
  }
  finish_channel(args, work, c, sum, moment * static_cast<double>(work.rstd[c]));
}

float widened(const void* from, int64_t index, DType dtype) {
  if (dtype == DType::f32) return static_cast<const float*>(from)[index];
  const uint32_t bits = static_cast<const uint16_t*>(from)[index];
  uint32_t wide = bits << 16;
  float value;
  if (dtype == DType::bf16) {
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  const uint32_t exponent = (bits >> 10) & 31u, mantissa = bits & 0x3ffu;
  if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    wide = (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
    std::memcpy(&value, &wide, sizeof value);
  }
  return bits & 0x8000u ? -value : value;
}

// Without dy all of g is in dpooled and moments.
void fold_moments(const BnReluPoolBackward& args, BnReluPoolWork& work, int64_t c) {
  const BnReluPoolShape& shape = work.shape;
  const float* second = args.moments + shape.samples * shape.channels * work.windows;
  double sum = 0, moment = 0;
  for (int64_t n = 0; n < shape.samples; ++n) {
    const int64_t first = (n * shape.channels + c) * work.windows;
    for (int64_t i = first; i < first + work.windows; ++i) {
      const double d = static_cast<double>(widened(args.dpooled, i, shape.dtype));
      sum += d * static_cast<double>(args.moments[i]);
      moment += d * static_cast<double>(second[i]);
    }
  }
  finish_channel(args, work, c, sum, moment);
}

void planes_backward(const BnReluPoolBackward& args, BnReluPoolWork& work, int threads) {
  const BnReluPoolShape& shape = work.shape;
  const BnReluPoolTasks& task = tasks();
  if (!args.dy) {
    const int64_t planes = shape.samples * shape.channels;
    const int64_t run = std::max<int64_t>(kTaskBytes / (work.map * bytes_of(shape.dtype)), 1);
    parallel_for(threads, pieces_of(planes, run), [&](int64_t index, int slot) {
      for (int64_t i = index * run; i < std::min(planes, (index + 1) * run); ++i)
        task.plane_dx(work, i / shape.channels, i % shape.channels, slot);
    });
    return;
  }
  const Groups groups = groups_of(shape, Pass::backward_with_dy, threads);
  if (!groups.each) {
    parallel_for(threads, shape.channels * work.chunks, [&](int64_t i, int slot) {
      task.plane_terms(work, i / work.chunks, i % work.chunks, slot);
    });
    for (int64_t c = 0; c < shape.channels; ++c) fold_terms(args, work, c);
    parallel_for(threads, shape.samples * shape.channels, [&](int64_t i, int slot) {
      task.plane_dx(work, i / shape.channels, i % shape.channels, slot);
    });
    return;
  }
  parallel_for(threads, pieces_of(shape.channels, groups.size), [&](int64_t index, int slot) {
    const int64_t first = index * groups.size, last = std::min(shape.channels, first + groups.size);
    for (int64_t chunk = 0; chunk < work.chunks; ++chunk)
      for (int64_t c = first; c < last; ++c) task.plane_terms(work, c, chunk, slot);
    for (int64_t c = first; c < last; ++c) fold_terms(args, work, c);
    for (int64_t n = 0; n < shape.samples; ++n)
      for (int64_t c = first; c < last; ++c) task.plane_dx(work, n, c, slot);
  });
}

void rows_backward(const BnReluPoolBackward& args, BnReluPoolWork& work, int threads) {
  const BnReluPoolShape& shape = work.shape;
  const BnReluPoolTasks& task = tasks();
  const int64_t all = shape.samples * shape.pool;
  if (args.dy) {
    parallel_for(threads, all, [&](int64_t i, int slot) {
      task.row_terms(work, i / shape.pool, i % shape.pool, slot);
    });
    parallel_for(threads, pieces_of(shape.channels, kLanes), [&](int64_t block, int) {
      for (int64_t c = block * kLanes; c < std::min(shape.channels, (block + 1) * kLanes); ++c)
        fold_terms(args, work, c);
    });
  }
  parallel_for(threads, all, [&](int64_t i, int slot) {
    const int64_t row = all - 1 - i;
    task.row_dx(work, row / shape.pool, row % shape.pool, slot);
  });
}

}  // namespace

size_t bn_relu_pool_cpu_workspace(const BnReluPoolShape& shape, int threads) {
  BnReluPoolWork work{};
  work.shape = shape;
  return plan(work, Pass::forward, threads, nullptr);
}

void bn_relu_pool_cpu(const BnReluPool& args, int threads) {
  BnReluPoolWork work{};
  work.shape = args.shape;
  work.x = args.x;
  work.out = args.y;
  work.pooled = args.pooled;
  work.moments = args.moments;
  work.batch_statistics = args.batch_statistics;
  plan(work, Pass::forward, threads, args.workspace);
  work.stream = past_cache(work);
  advise_huge_pages(args.y, work.shape.samples * work.shape.channels * work.map * bytes_of(work.shape.dtype));
  clear_padding(work);
  work.shape.channels_last ? rows_forward(args, work, threads) : planes_forward(args, work, threads);
}

size_t bn_relu_pool_backward_cpu_workspace(const BnReluPoolShape& shape, bool with_dy, int threads) {
  BnReluPoolWork work{};
  work.shape = shape;
  return plan(work, with_dy ? Pass::backward_with_dy : Pass::backward, threads, nullptr);
}

void bn_relu_pool_backward_cpu(const BnReluPoolBackward& args, int threads) {
  BnReluPoolWork work{};
  work.shape = args.shape;
  work.x = args.x;
  work.dy = args.dy;
  work.dpooled = args.dpooled;
  work.out = args.dx;
  work.batch_statistics = args.batch_statistics;
  plan(work, args.dy ? Pass::backward_with_dy : Pass::backward, threads, args.workspace);
  work.stream = past_cache(work);
  advise_huge_pages(args.dx, work.shape.samples * work.shape.channels * work.map * bytes_of(work.shape.dtype));
  clear_padding(work);
  const int64_t channels = work.shape.channels;
  for (int64_t c = 0; c < channels; ++c)
    set_channel(work, c, args.mean[c], args.var[c], args.eps, args.gamma, args.beta);
  if (!args.dy) {
    const int64_t block = pieces_of(channels, threads);
    parallel_for(threads, pieces_of(channels, block), [&](int64_t index, int) {
      for (int64_t c = index * block; c < std::min(channels, (index + 1) * block); ++c)
        fold_moments(args, work, c);
    });
  }
  work.shape.channels_last ? rows_backward(args, work, threads) : planes_backward(args, work, threads);
}

}  // namespace lct
