// hermesflow.kernels._C with the CUDA kernels alone, run on the CPU by the emulator: they answer for CPU tensors.
#include <cuda_runtime.h>

#include <torch/library.h>
#define HERMESFLOW_CUDA "emulated"
#include "../../csrc/bindings.cpp"

#include "../../csrc/arguments.h"

// The entry points register themselves for CUDA; here they serve the CPU.
#define CUDA CPU
#include HERMESFLOW_CUDA_SOURCES
