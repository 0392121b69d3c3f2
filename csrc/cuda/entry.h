// What the CUDA ops' entry points (NAME.cu) share: torch's device guard and stream, a check of each launch, dtypes.
#pragma once

// Not ATen/cuda/CUDAContext.h, which needs the headers of cuBLAS, cuSPARSE and cuSOLVER: a toolkit may lack them.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../arguments.h"
#include "block.cuh"

namespace hermesflow {

inline void check_launch(const char* op, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, op, ": the CUDA kernel was not launched: ", cudaGetErrorString(error));
}

// Calls run(T{}) with the storage type T of a tensor's dtype.
template <typename Run>
void with_storage_type(const char* op, at::ScalarType type, Run&& run) {
  switch (to_dtype(op, type)) {
    case Dtype::kFloat: return run(float{});
    case Dtype::kBFloat16: return run(Bf16{});
    case Dtype::kHalf: return run(Fp16{});
  }
}

template <typename T>
const T* storage(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

}  // namespace hermesflow
