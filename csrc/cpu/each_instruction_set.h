// Compiles the file HERMESFLOW_ROW (and vector_math.h before it) once for each instruction set, in the namespaces portable,
// avx2 and avx512. HERMESFLOW_PICK(function) is then that function for this machine. Include it inside the op's anonymous
// namespace; no include guard, since each op includes it once.

namespace portable {
#include "vector_math.h"
#include HERMESFLOW_ROW
}  // namespace portable

#ifdef HERMESFLOW_X86_VARIANTS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "vector_math.h"
#include HERMESFLOW_ROW
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include "vector_math.h"
#include HERMESFLOW_ROW
}  // namespace avx512
#pragma GCC pop_options

#define HERMESFLOW_PICK(function)                                                              \
  (instruction_set() == InstructionSet::kAvx512 ? avx512::function                             \
   : instruction_set() == InstructionSet::kAvx2 ? avx2::function : portable::function)
#else
#define HERMESFLOW_PICK(function) portable::function
#endif
