// hermesflow.kernels._C with the CUDA kernels alone, run on the CPU by the emulator: they answer for CPU tensors.
#include <cuda_runtime.h>

#if !defined(__x86_64__)
#error "the emulator of CUDA switches fibers in x86-64 assembly"
#endif

// Saves the registers that a call keeps on one stack and restores them from another.
asm(R"(
.text
.globl hermesflow_switch_fiber
.type hermesflow_switch_fiber, @function
hermesflow_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hermesflow_switch_fiber, .-hermesflow_switch_fiber
)");

#include <torch/library.h>
#define HERMESFLOW_CUDA "emulated"
#include "../../csrc/bindings.cpp"

#include "../../csrc/arguments.h"

// The entry points register themselves for CUDA; here they serve the CPU.
#define CUDA CPU
#include HERMESFLOW_CUDA_SOURCES
