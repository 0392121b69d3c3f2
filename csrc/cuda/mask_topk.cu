// mask_topk on CUDA: checks, launch.
#include "mask_topk.cuh"

#include "entry.h"

namespace hermesflow {
namespace {

at::Tensor mask_topk(at::Tensor logprob, at::Tensor known, const at::Tensor& num_masked, double temperature,
                     const std::optional<at::Tensor>& temperatures, const at::Tensor& seed, const at::Tensor& step) {
  const c10::cuda::CUDAGuard guard(logprob.device());
  at::Tensor masked;
  const MaskTopkArguments args = mask_topk_arguments(logprob, known, num_masked, temperature, temperatures, seed, step, masked);
  check_launch("mask_topk", launch_mask_topk(args, logprob.size(0), at::cuda::getCurrentCUDAStream()));
  return masked;
}

}  // namespace

TORCH_LIBRARY_IMPL(hermesflow, CUDA, library) { library.impl("mask_topk", &mask_topk); }

}  // namespace hermesflow
