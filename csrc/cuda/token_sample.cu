// token_sample on CUDA: checks, dtype switch, launch.
#include "token_sample.cuh"

#include "entry.h"

namespace hermesflow {
namespace {

std::tuple<at::Tensor, at::Tensor> token_sample(const at::Tensor& logits_in, const at::Tensor& temperature,
                                                const at::Tensor& top_k, const at::Tensor& top_p, const at::Tensor& min_p,
                                                const at::Tensor& seed, const at::Tensor& step,
                                                const at::Tensor& position) {
  const RowSettings settings = check_token_sample(logits_in, temperature, top_k, top_p, min_p);
  const int64_t num_rows = logits_in.size(0);
  const RowKeys key = row_keys("token_sample", logits_in, seed, step, position);
  const c10::cuda::CUDAGuard guard(logits_in.device());
  const at::Tensor logits = with_unit_column_stride(logits_in);
  at::Tensor token = at::empty({num_rows}, logits.options().dtype(at::kLong));
  at::Tensor logprob = at::empty({num_rows}, logits.options().dtype(at::kFloat));
  with_storage_type("token_sample", logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const TokenSampleArguments<T> args{storage<T>(logits),
                                       logits.stride(0),
                                       logits.size(1),
                                       0.0f,
                                       settings,
                                       key,
                                       token.mutable_data_ptr<int64_t>(),
                                       logprob.mutable_data_ptr<float>()};
    check_launch("token_sample", launch_token_sample(args, num_rows, at::cuda::getCurrentCUDAStream()));
  });
  return {token, logprob};
}

}  // namespace

TORCH_LIBRARY_IMPL(hermesflow, CUDA, library) { library.impl("token_sample", &token_sample); }

}  // namespace hermesflow
