// token_logprob on CUDA, forward and backward: checks, dtype switch, launch.
#include "token_logprob.cuh"

#include "entry.h"

namespace hermesflow {
namespace {

template <typename T>
TokenLogprobRows<T> rows_of(const at::Tensor& logits, const at::Tensor& target, int64_t ignore_index) {
  return {storage<T>(logits), logits.stride(0), target.const_data_ptr<int64_t>(), target.stride(0),
          logits.size(0),     logits.size(1),   ignore_index};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> token_logprob(const at::Tensor& logits_in, const at::Tensor& target,
                                                                         int64_t ignore_index, bool return_entropy) {
  const int64_t num_rows = check_token_logprob(logits_in, target);
  const c10::cuda::CUDAGuard guard(logits_in.device());
  const at::Tensor logits = with_unit_column_stride(logits_in);
  const auto row_values = [&](int64_t length) { return at::empty({length}, logits.options().dtype(at::kFloat)); };
  at::Tensor logprob = row_values(num_rows), largest = row_values(num_rows), total = row_values(num_rows);
  at::Tensor entropy = row_values(return_entropy ? num_rows : 0);
  const TokenLogprobResults out{logprob.mutable_data_ptr<float>(), largest.mutable_data_ptr<float>(),
                                total.mutable_data_ptr<float>(), return_entropy ? entropy.mutable_data_ptr<float>() : nullptr};
  with_storage_type("token_logprob", logits.scalar_type(), [&](auto zero) {
    const auto args = rows_of<decltype(zero)>(logits, target, ignore_index);
    check_launch("token_logprob", launch_token_logprob(args, out, at::cuda::getCurrentCUDAStream()));
  });
  return {logprob, largest, total, entropy};
}

at::Tensor token_logprob_backward(const at::Tensor& logits_in, const at::Tensor& target, const at::Tensor& largest_in,
                                  const at::Tensor& total_in, const at::Tensor& grad_logprob, int64_t ignore_index) {
  check_token_logprob_backward(logits_in, target, largest_in, total_in, grad_logprob);
  const c10::cuda::CUDAGuard guard(logits_in.device());
  const at::Tensor logits = with_unit_column_stride(logits_in);
  const at::Tensor largest = largest_in.contiguous(), total = total_in.contiguous();
  at::Tensor grad_logits = at::empty(logits.sizes(), logits.options());
  with_storage_type("token_logprob", logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto args = rows_of<T>(logits, target, ignore_index);
    const TokenLogprobGradient<T> in{largest.const_data_ptr<float>(), total.const_data_ptr<float>(),
                                     grad_logprob.const_data_ptr<float>(), grad_logprob.stride(0),
                                     static_cast<T*>(grad_logits.mutable_data_ptr())};
    check_launch("token_logprob_backward", launch_token_logprob_backward(args, in, at::cuda::getCurrentCUDAStream()));
  });
  return grad_logits;
}

}  // namespace

TORCH_LIBRARY_IMPL(hermesflow, CUDA, library) {
  library.impl("token_logprob", &token_logprob);
  library.impl("token_logprob_backward", &token_logprob_backward);
}

}  // namespace hermesflow
