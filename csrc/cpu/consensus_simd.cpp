// One pass over memory: sixteen values at a time, the rest of a row by itself.
#include "cpu/consensus_tasks.h"
#include "cpu/simd.h"

namespace lct {
namespace LCT_SIMD_LEVEL {
namespace {

// Values whose losses are summed before they are added to the row's sum: long sums of fp32 lose digits.
constexpr int64_t kChunk = 32 * kLanes;

// lambda and kappa of the values beside x; kappa is 0 where there is none.
template <class T>
LCT_INLINE void adjoint_some(Vec x, Vec lambda, Vec kappa, Vec minus_beta, Vec half_beta, Vec& sum, T* p, int n) {
  const Vec d = sub(lambda, x);
  sum = fma(d, sub(mul(half_beta, d), kappa), sum);
  const Vec y = fma(minus_beta, d, kappa);
  if (n >= kLanes) store(p, y);
  else store_first(p, y, n);
}

template <class T>
LCT_INLINE float adjoint_row(const T* x, const float* lambda, const float* kappa, T* p, int64_t depth, float beta) {
  const Vec minus_beta = broadcast(-beta), half_beta = broadcast(0.5f * beta), zero = broadcast(0.0f);
  Vec total = zero;
  int64_t i = 0;
  while (i < depth) {
    const int64_t end = depth - i < kChunk ? depth : i + kChunk;
    Vec sum = zero;
    for (; i + kLanes <= end; i += kLanes) {
      adjoint_some(load(x + i), load(lambda + i), kappa ? load(kappa + i) : zero, minus_beta, half_beta, sum, p + i,
              kLanes);
    }
    if (i < end) {
      // Lanes behind the end hold zeros, whose loss is 0.
      const int rest = static_cast<int>(end - i);
      adjoint_some(load_first(x + i, rest), load_first(lambda + i, rest), kappa ? load_first(kappa + i, rest) : zero,
              minus_beta, half_beta, sum, p + i, rest);
      i = end;
    }
    total = add(total, sum);
  }
  return reduce_add(total);
}

template <class T>
void adjoint_as(const ConsensusAdjoint& args, int64_t first, int64_t count) {
  for (int64_t row = first; row < first + count; ++row) {
    const int64_t at = row * args.depth;
    args.loss[row] =
        adjoint_row(static_cast<const T*>(args.x) + at, args.lambda + at, args.kappa ? args.kappa + at : nullptr,
                    static_cast<T*>(args.p) + at, args.depth, args.beta);
  }
}

struct Stored {
  Vec lambda, kappa;
};

LCT_INLINE Stored updated(Vec lambda, Vec kappa, Vec p, Vec x_prev, Vec beta, Vec eta) {
  const Vec slope = sub(fma(beta, sub(lambda, x_prev), p), kappa);
  const Vec next = sub(lambda, mul(eta, slope));
  return {next, sub(kappa, mul(beta, sub(next, x_prev)))};
}

template <class T>
void update_as(const ConsensusUpdate& args, int64_t first, int64_t count) {
  const T* p = static_cast<const T*>(args.p);
  const T* x_prev = static_cast<const T*>(args.x_prev);
  const Vec beta = broadcast(args.beta), eta = broadcast(args.eta), zero = broadcast(0.0f);
  const int64_t end = first + count;
  int64_t i = first;
  for (; i + kLanes <= end; i += kLanes) {
    const Stored to = updated(load(args.lambda + i), args.kappa ? load(args.kappa + i) : zero, load(p + i),
                              load(x_prev + i), beta, eta);
    store(args.lambda_out + i, to.lambda);
    if (args.kappa) store(args.kappa_out + i, to.kappa);
  }
  if (i == end) return;
  const int rest = static_cast<int>(end - i);
  const Stored to =
      updated(load_first(args.lambda + i, rest), args.kappa ? load_first(args.kappa + i, rest) : zero,
              load_first(p + i, rest), load_first(x_prev + i, rest), beta, eta);
  store_first(args.lambda_out + i, to.lambda, rest);
  if (args.kappa) store_first(args.kappa_out + i, to.kappa, rest);
}

void adjoint(const ConsensusAdjoint& args, int64_t first, int64_t count) {
  switch (args.dtype) {
    case DType::f32: return adjoint_as<float>(args, first, count);
    case DType::f16: return adjoint_as<Half>(args, first, count);
    case DType::bf16: return adjoint_as<Bfloat16>(args, first, count);
  }
}

void update(const ConsensusUpdate& args, int64_t first, int64_t count) {
  switch (args.dtype) {
    case DType::f32: return update_as<float>(args, first, count);
    case DType::f16: return update_as<Half>(args, first, count);
    case DType::bf16: return update_as<Bfloat16>(args, first, count);
  }
}

}  // namespace

extern const ConsensusTasks consensus_tasks = {adjoint, update};

}  // namespace LCT_SIMD_LEVEL
}  // namespace lct
