// block_quantize: codes of 8, 4 or 2 bits with one scale a block of values, and back.
//
//   scale = bf16(max|x| / most)
//   code  = round(x * (1 / scale))        half to even, within [-most, most]
//   x'    = code * scale
//
// Kinds        int8: most = 127. int4: 7. int2: 1. fp8: 448, codes are float8_e4m3fn. Codes are two's
//              complement. A block of int4 or int2 without values below zero has most = 15 or 3, unsigned
//              codes, and is marked by a negative scale.
// Layout       x [size], payload [ceil(size * bits / 8)] bytes, scales [ceil(size / block)] as bf16 bits.
//              Value i takes bits [i * bits, (i + 1) * bits) of payload, least significant first; unused bits
//              of the last byte are 0. The last block may be short.
// Types        x: f32, f16 or bf16; computed in fp32. block: 32, 64, 128 or 256.
// Limits       A scale below 2^-100 (after rounding) becomes 0 and so do its block's codes; one above 2^126
//              becomes 2^126. A block with a NaN or an Inf has scale NaN (0x7fc0) and codes 0.
// Back         What the dtype of x cannot hold becomes its largest number. A scale that is not finite, and
//              fp8's code for NaN, give the NaN 0x7fc00000, 0x7e00 or 0x7fc0. Any bytes may come: nothing is
//              read out of bounds.
// Determinism  the same bits from every backend, instruction set, thread count and grid: each operation is
//              rounded once, to the nearest, and a product never meets its sum in a fused instruction.
// Empty input  size == 0 writes nothing.
// Memory       nothing is allocated, and there is no workspace.
#pragma once

#include <cstdint>

#include "lct/types.h"

#ifdef LCT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace lct {

// Values are part of the Python binding: never renumber.
enum class BlockKind : int { int8 = 0, int4 = 1, int2 = 2, fp8 = 3 };

constexpr int64_t kLeastQuantizeBlock = 32, kMostQuantizeBlock = 256;

struct BlockQuantize {
  const void* x;     // [size], dtype
  uint8_t* payload;  // [ceil(size * bits / 8)]
  uint16_t* scales;  // [ceil(size / block)]
  int64_t size, block;
  BlockKind kind;
  DType dtype;
};

struct BlockDequantize {
  const uint8_t* payload;
  const uint16_t* scales;
  void* x;  // [size], dtype
  int64_t size, block;
  BlockKind kind;
  DType dtype;
};

void block_quantize_cpu(const BlockQuantize& args, int threads);
void block_dequantize_cpu(const BlockDequantize& args, int threads);

#ifdef LCT_WITH_CUDA
cudaError_t block_quantize_cuda(const BlockQuantize& args, int device, cudaStream_t stream);
cudaError_t block_dequantize_cuda(const BlockDequantize& args, int device, cudaStream_t stream);
#endif

}  // namespace lct
