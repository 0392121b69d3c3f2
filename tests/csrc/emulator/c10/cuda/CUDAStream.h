#pragma once
#include <cuda_runtime.h>
#include <torch/headeronly/macros/Macros.h>  // makes c10::cuda visible as at::cuda, as in a CUDA build

namespace c10::cuda {
inline cudaStream_t getCurrentCUDAStream() { return nullptr; }
}  // namespace c10::cuda
