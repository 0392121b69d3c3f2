// Schemas of the ops (backends register themselves in cpu/ and cuda/) and the module's build facts.
#include <pybind11/pybind11.h>
#include <torch/library.h>

TORCH_LIBRARY(hermesflow, library) {
  library.def(
      "guided_sample(Tensor cond, Tensor? uncond, Tensor? bias, float guidance_scale, float temperature, "
      "Tensor seed, Tensor step, Tensor position) -> (Tensor token, Tensor logprob)");
  // temperatures, one a row, take temperature's place.
  library.def(
      "mask_topk(Tensor logprob, Tensor known, Tensor num_masked, float temperature, Tensor? temperatures, "
      "Tensor seed, Tensor step) -> Tensor masked");
  library.def(
      "token_sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
      "Tensor seed, Tensor step, Tensor position) -> (Tensor token, Tensor logprob)");
  library.def(
      "token_logprob(Tensor logits, Tensor target, int ignore_index, bool return_entropy) "
      "-> (Tensor logprob, Tensor largest, Tensor total, Tensor entropy)");
  library.def(
      "token_logprob_backward(Tensor logits, Tensor target, Tensor largest, Tensor total, Tensor grad_logprob, "
      "int ignore_index) -> Tensor grad_logits");
  // One block of the logits that linear_logprob never holds as a whole: fp32 [R, C], of the ids from first_id on; bias fp32
  // [C]. state is fp32 [4, R]: the running maximum, sum of exp(y), sum of y exp(y) (y = logit - maximum), and target's logit.
  library.def(
      "linear_logprob_block(Tensor logits, Tensor? bias, Tensor target, int first_id, Tensor(a!) state) -> ()");
  // grad_logits may be logits itself.
  library.def(
      "linear_logprob_block_backward(Tensor logits, Tensor? bias, Tensor target, Tensor lse, Tensor grad_logprob, "
      "int first_id, Tensor(a!) grad_logits) -> ()");
  library.def(
      "pair_dpo(Tensor policy_logprob, Tensor reference_logprob, Tensor segment, int num_pairs, float beta, "
      "str loss_type, float label_smoothing, bool length_normalize, Tensor? pair_weight) "
      "-> (Tensor loss, Tensor win_reward, Tensor lose_reward, Tensor margin, Tensor accuracy, Tensor grad_policy)");
}

namespace hermesflow {
const char* instruction_set_name();  // cpu/instruction_set.cpp
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("build_facts", [] {
    pybind11::dict facts;
    facts["compiler"] = __VERSION__;
#ifdef HERMESFLOW_CUDA
    facts["cuda"] = HERMESFLOW_CUDA;
#else
    facts["cuda"] = "none";
#endif
#ifndef HERMESFLOW_EMULATED
    facts["cpu_instructions"] = hermesflow::instruction_set_name();
#endif
    return facts;
  }, "Compiler, targets of the CUDA kernels, and the instruction set that the CPU kernels chose on this machine.");
}
