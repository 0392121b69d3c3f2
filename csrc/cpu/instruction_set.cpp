// Which of the row kernels' variants this machine runs.
#include <ATen/Version.h>

#include "row_kernels.h"

namespace hermesflow {

InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
#ifdef HERMESFLOW_X86_VARIANTS
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return InstructionSet::kAvx512;
    if (capability == "AVX2") return InstructionSet::kAvx2;
#endif
    return InstructionSet::kPortable;
  }();
  return chosen;
}

const char* instruction_set_name() {
  constexpr const char* kNames[] = {"portable", "avx2", "avx512"};
  return kNames[static_cast<int>(instruction_set())];
}

}  // namespace hermesflow
