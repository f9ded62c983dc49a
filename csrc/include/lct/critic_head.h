// critic_head: linear layer, softmax cross-entropy and their gradients in one pass.
//
//   a        = act(h)                                       none | relu
//   logits   = a weight^T + bias                            fp32
//   loss_n   = logsumexp(logits_n) - logits_n[target_n]     fp32
//   dlogits  = softmax(logits) - onehot(target)             never scaled
//   dh       = scale * (dlogits weight) * act'(h)           scaled in fp32, then rounded
//   dweight  = sum_n row_scale_n * dlogits_n (x) a_n        only when row_scale is given
//   dbias    = sum_n row_scale_n * dlogits_n
//
// Layout       row-major and dense: h [rows, depth], weight [classes, depth], dlogits [rows, classes].
// Types        h, dlogits, dh: h_dtype. weight, bias, dweight, dbias: weight_dtype. target: int64.
//              loss, scale, row_scale: fp32. All sums are fp32.
// Labels       target == ignore_index: loss 0 and zero gradients. Any other target outside [0, classes):
//              loss NaN, zero gradients, and nothing is read out of bounds.
// Empty input  rows == 0 writes zeros to dweight and dbias, and nothing else.
// Determinism  the same bits for every thread count and grid: partial sums run over fixed chunks of rows
//              and are folded in order.
// Memory       nothing is allocated; `workspace` holds what *_workspace returns, in bytes (may be 0).
#pragma once

#include <cstddef>
#include <cstdint>

#include "lct/types.h"

#ifdef LCT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace lct {

struct CriticHead {
  const void* h;           // [rows, depth]
  const void* weight;      // [classes, depth]
  const void* bias;        // [classes] or null
  const int64_t* target;   // [rows]
  const float* scale;      // []
  const float* row_scale;  // [rows] or null: then dweight and dbias are not computed
  float* loss;             // [rows]
  void* dlogits;           // [rows, classes]
  void* dh;                // [rows, depth]
  void* dweight;           // [classes, depth] or null
  void* dbias;             // [classes] or null
  void* workspace;
  int64_t rows, depth, classes;
  DType h_dtype, weight_dtype;
  Activation activation;
  int64_t ignore_index;
};

// The weight gradient alone, for a row_scale that arrives after the pass above.
struct CriticHeadWgrad {
  const void* h;           // [rows, depth]
  const void* dlogits;     // [rows, classes], h_dtype
  const float* row_scale;  // [rows]
  void* dweight;           // [classes, depth]
  void* dbias;             // [classes] or null
  void* workspace;
  int64_t rows, depth, classes;
  DType h_dtype, weight_dtype;
  Activation activation;
};

size_t critic_head_cpu_workspace(int64_t rows, int64_t depth, int64_t classes, DType h_dtype,
                                 DType weight_dtype, bool with_wgrad, int threads);
void critic_head_cpu(const CriticHead& args, int threads);

size_t critic_head_wgrad_cpu_workspace(int64_t rows, int64_t depth, int64_t classes, DType h_dtype,
                                       DType weight_dtype, int threads);
void critic_head_wgrad_cpu(const CriticHeadWgrad& args, int threads);

#ifdef LCT_WITH_CUDA
size_t critic_head_cuda_workspace(int64_t rows, int64_t depth, int64_t classes, DType h_dtype,
                                  DType weight_dtype, bool with_wgrad, int device);
cudaError_t critic_head_cuda(const CriticHead& args, int device, cudaStream_t stream);

size_t critic_head_wgrad_cuda_workspace(int64_t rows, int64_t depth, int64_t classes, DType h_dtype,
                                        DType weight_dtype, int device);
cudaError_t critic_head_wgrad_cuda(const CriticHeadWgrad& args, int device, cudaStream_t stream);
#endif

}  // namespace lct
