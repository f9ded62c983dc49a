// group_linear: a group's linear layer, its activation and its linear critic's logits, with their gradients.
//
//   pre     = x weight^T + bias                            fp32
//   h       = act(pre)                                     none | relu | gelu (with erf); rounded
//   logits  = h critic_weight^T + critic_bias              of h as rounded
//   slope   = act'(pre)                                    for gelu; rounded
//
//   g       = dh + dlogits critic_weight                   fp32; either may be absent
//   dpre    = g                                            none
//           = g where not (h <= 0), else 0                 relu
//           = g * slope                                    gelu
//   dbias   = sum_n dpre_n                                 before dpre is rounded
//
// The rest of the backward is plain matrix products of dpre, dlogits, x, h and the weights, and is left to others.
//
// Layout       row-major and dense.
// Types        x, h, logits, slope, dh, dlogits, dpre: x_dtype. weight, bias: weight_dtype. critic_weight,
//              critic_bias: critic_dtype. dbias: fp32. All sums are fp32.
//              Where x is bf16 and the processor multiplies bf16 by itself, weight is rounded to bf16 first.
// NaN, Inf     a row of x that is not finite spoils its own rows of h, logits and dpre, as in plain arithmetic.
// Sizes        rows, inputs, outputs >= 1; classes >= 1 with a critic, else 0. Made for classes < 64: the work
//              for them is done where h is at hand.
// Determinism  the same bits for every thread count: sums run over fixed blocks of inputs and outputs, and dbias
//              over fixed chunks of rows, all folded in order.
// Memory       nothing is allocated; `workspace` holds what *_workspace returns, in bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lct/types.h"

namespace lct {

struct GroupLinearShape {
  int64_t rows, inputs, outputs, classes;
};

struct GroupLinear {
  GroupLinearShape shape;
  const void* x;              // [rows, inputs]
  const void* weight;         // [outputs, inputs]
  const void* bias;           // [outputs] or null
  const void* critic_weight;  // [classes, outputs] or null
  const void* critic_bias;    // [classes] or null
  void* h;                    // [rows, outputs]
  void* logits;               // [rows, classes], untouched without critic_weight
  void* slope;                // [rows, outputs] or null; gelu alone
  void* workspace;
  DType x_dtype, weight_dtype, critic_dtype;
  Activation activation;
};

struct GroupLinearBackward {
  GroupLinearShape shape;     // inputs is unread; classes is 0 without dlogits
  const void* dh;             // [rows, outputs] or null
  const void* dlogits;        // [rows, classes] or null
  const void* critic_weight;  // [classes, outputs], unread without dlogits
  const void* gate;           // [rows, outputs]: h for relu, slope for gelu; unread for none
  void* dpre;                 // [rows, outputs]
  float* dbias;               // [outputs]
  void* workspace;
  DType x_dtype, critic_dtype;
  Activation activation;
};

size_t group_linear_cpu_workspace(const GroupLinearShape& shape, DType x_dtype, int threads);
void group_linear_cpu(const GroupLinear& args, int threads);

size_t group_linear_backward_cpu_workspace(const GroupLinearShape& shape, int threads);
void group_linear_backward_cpu(const GroupLinearBackward& args, int threads);

}  // namespace lct
