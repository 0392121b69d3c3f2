// linear_logprob on CUDA: checks, dtype switch, launches of what follows a block's matmul.
#include "linear_logprob.cuh"

#include "entry.h"

namespace hermesflow {
namespace {

LogitsBlock logits_block(const at::Tensor& logits, const std::optional<at::Tensor>& bias, const at::Tensor& target,
                         int64_t first_id) {
  check_linear_logprob_block(logits, bias, target);
  return {logits.const_data_ptr<float>(),
          logits.stride(0),
          bias ? bias->const_data_ptr<float>() : nullptr,
          target.const_data_ptr<int64_t>(),
          logits.size(1),
          first_id};
}

void linear_logprob_block(const at::Tensor& logits, const std::optional<at::Tensor>& bias, const at::Tensor& target,
                          int64_t first_id, at::Tensor& state) {
  const LogitsBlock block = logits_block(logits, bias, target, first_id);
  check_linear_logprob_state(logits, state);
  const c10::cuda::CUDAGuard guard(logits.device());
  check_launch("linear_logprob_block",
               launch_linear_logprob_block(block, logits.size(0), state.mutable_data_ptr<float>(), state.stride(0),
                                           at::cuda::getCurrentCUDAStream()));
}

void linear_logprob_block_backward(const at::Tensor& logits, const std::optional<at::Tensor>& bias, const at::Tensor& target,
                                   const at::Tensor& lse, const at::Tensor& grad_logprob, int64_t first_id,
                                   at::Tensor& grad_logits) {
  const LogitsBlock block = logits_block(logits, bias, target, first_id);
  check_linear_logprob_gradient(logits, lse, grad_logprob, grad_logits);
  const c10::cuda::CUDAGuard guard(logits.device());
  with_storage_type("linear_logprob_block_backward", grad_logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_launch("linear_logprob_block_backward",
                 launch_linear_logprob_block_backward(block, logits.size(0), lse.const_data_ptr<float>(),
                                                      grad_logprob.const_data_ptr<float>(),
                                                      static_cast<T*>(grad_logits.mutable_data_ptr()), grad_logits.stride(0),
                                                      at::cuda::getCurrentCUDAStream()));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hermesflow, CUDA, library) {
  library.impl("linear_logprob_block", &linear_logprob_block);
  library.impl("linear_logprob_block_backward", &linear_logprob_block_backward);
}

}  // namespace hermesflow
