// What the bindings of every op share: addresses as integers, enumerations checked, CUDA errors as exceptions.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "lct/types.h"

#ifdef LCT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace lct::bindings {

namespace py = pybind11;

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline lct::DType dtype_of(const char* name, int value) {
  if (value < 0 || value > 2)
    throw py::value_error(std::string(name) + " must be 0 (f32), 1 (f16) or 2 (bf16), got " +
                          std::to_string(value));
  return static_cast<lct::DType>(value);
}

inline void check_threads(int threads) {
  if (threads < 1) throw py::value_error("threads must be at least 1, got " + std::to_string(threads));
}

#ifdef LCT_WITH_CUDA
inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status));
}
#endif

}  // namespace lct::bindings
