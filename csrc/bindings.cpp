// Schemas of the ops (backends register themselves in cpu/ and cuda/) and the module's build facts.
#include <pybind11/pybind11.h>
#include <torch/library.h>

TORCH_LIBRARY(hermesflow, library) {
  library.def(
      "guided_sample(Tensor cond, Tensor? uncond, float guidance_scale, float temperature, "
      "Tensor seed, Tensor step, Tensor position) -> (Tensor token, Tensor logprob)");
  library.def(
      "mask_topk(Tensor logprob, Tensor known, Tensor num_masked, Tensor temperature, "
      "Tensor seed, Tensor step) -> Tensor masked");
}

namespace hermesflow {
const char* row_instructions();  // cpu/guided_sample.cpp
}

PYBIND11_MODULE(_C, module) {
  module.def("build_facts", [] {
    pybind11::dict facts;
    facts["compiler"] = __VERSION__;
    facts["cpu_instructions"] = hermesflow::row_instructions();
#ifdef HERMESFLOW_CUDA
    facts["cuda"] = true;
#else
    facts["cuda"] = false;
#endif
    return facts;
  }, "Compiler, the instruction set that the CPU kernels chose on this machine, and whether CUDA kernels are in.");
}
