// The two pieces of block_quantize that run in parallel, compiled once an instruction set.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "lct/block_quantize.h"

namespace lct {

struct BlockQuantizeTasks {
  // Blocks [first, first + count).
  void (*quantize)(const BlockQuantize&, int64_t first, int64_t count);
  void (*dequantize)(const BlockDequantize&, int64_t first, int64_t count);
};

namespace scalar {
extern const BlockQuantizeTasks block_quantize_tasks;
}
namespace avx2 {
extern const BlockQuantizeTasks block_quantize_tasks;
}
namespace avx512 {
extern const BlockQuantizeTasks block_quantize_tasks;
}

}  // namespace lct
