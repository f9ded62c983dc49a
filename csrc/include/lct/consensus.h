// consensus: what holds a group's output and the stored input of the group behind it together (layer-parallel
// training, arXiv 2009.01462).
//
// Adjoint      d       = lambda - x
//              loss[n] = sum over features of  beta / 2 * d^2 - kappa * d
//              p       = kappa - beta * d
// Update       lambda' = lambda - eta * (p + beta * (lambda - x_prev) - kappa)
//              kappa'  = kappa - beta * (lambda' - x_prev)          with the new lambda
// Layout       x, x_prev, p, lambda, kappa [rows, depth], row-major, dense; loss [rows].
// Types        x, x_prev and both p: f32, f16 or bf16, one dtype a call; lambda, kappa and loss: f32. All is
//              computed in fp32 and rounded once.
// kappa        null where there are no multipliers (the penalty method): zeros, and none are written.
// Aliases      lambda_out may be lambda and kappa_out kappa; no other output may overlap an input.
// NaN and Inf  go through as arithmetic has it.
// Determinism  loss folds over a row in a fixed order: the same bits for any thread count or grid. Instruction
//              sets and devices differ in the last place.
// Empty input  rows == 0 or depth == 0: loss is 0, nothing else is written.
// Memory       nothing is allocated, and there is no workspace.
#pragma once

#include <cstdint>

#include "lct/types.h"

#ifdef LCT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace lct {

struct ConsensusAdjoint {
  const void* x;            // [rows, depth], dtype
  const float* lambda;      // [rows, depth]
  const float* kappa;       // [rows, depth] or null
  float* loss;              // [rows]
  void* p;                  // [rows, depth], dtype
  int64_t rows, depth;
  float beta;
  DType dtype;
};

struct ConsensusUpdate {
  const float* lambda;  // [size]
  const float* kappa;   // [size] or null
  const void* p;        // [size], dtype
  const void* x_prev;   // [size], dtype
  float* lambda_out;    // [size]
  float* kappa_out;     // [size]; null with kappa
  int64_t size;
  float beta, eta;
  DType dtype;
};

void consensus_adjoint_cpu(const ConsensusAdjoint& args, int threads);
void consensus_update_cpu(const ConsensusUpdate& args, int threads);

#ifdef LCT_WITH_CUDA
cudaError_t consensus_adjoint_cuda(const ConsensusAdjoint& args, int device, cudaStream_t stream);
cudaError_t consensus_update_cuda(const ConsensusUpdate& args, int device, cudaStream_t stream);
#endif

}  // namespace lct
