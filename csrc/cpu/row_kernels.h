// What the CPU ops share outside their row kernels: row pointers and the choice of an instruction set at run time.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../arguments.h"
#include "../philox.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HERMESFLOW_X86_VARIANTS
#endif

namespace hermesflow {

constexpr int kTile = 128;  // SAMPLE_TILE of kernels/sampling.py
constexpr int kLanes = 16;  // values that the row kernels' inner loops take at a time: one AVX-512 register

enum class InstructionSet { kPortable, kAvx2, kAvx512 };
// The best of this machine: torch's own choice, which ATEN_CPU_CAPABILITY overrides.
InstructionSet instruction_set();

inline const char* row_pointer(const at::Tensor& matrix, int64_t row) {
  return static_cast<const char*>(matrix.const_data_ptr()) + row * matrix.stride(0) * matrix.element_size();
}

}  // namespace hermesflow
