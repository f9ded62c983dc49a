// Element types and activations shared by every op's contract.
#pragma once

#include <cstdint>

namespace lct {

// Values are part of the Python binding: never renumber.
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

enum class Activation : int { none = 0, relu = 1, gelu = 2 };

}  // namespace lct
