// guided_sample on CUDA: checks, dtype switch, launch.
#include "guided_sample.cuh"

#include "entry.h"

namespace hermesflow {
namespace {

std::tuple<at::Tensor, at::Tensor> guided_sample(const at::Tensor& cond_in, const std::optional<at::Tensor>& uncond_in,
                                                 const std::optional<at::Tensor>& bias_in, double guidance_scale,
                                                 double temperature, const at::Tensor& seed, const at::Tensor& step,
                                                 const at::Tensor& position) {
  const int64_t num_rows = check_guided_sample(cond_in, uncond_in, bias_in);
  const RowKeys key = row_keys("guided_sample", cond_in, seed, step, position);
  const c10::cuda::CUDAGuard guard(cond_in.device());
  const at::Tensor cond = with_unit_column_stride(cond_in);
  const at::Tensor uncond = uncond_in ? with_unit_column_stride(*uncond_in) : at::Tensor();
  const at::Tensor bias = bias_in ? bias_in->contiguous() : at::Tensor();
  at::Tensor token = at::empty({num_rows}, cond.options().dtype(at::kLong));
  at::Tensor logprob = at::empty({num_rows}, cond.options().dtype(at::kFloat));
  const bool greedy = temperature == 0;
  with_storage_type("guided_sample", cond.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    GuidedSampleArguments<T> args{storage<T>(cond),
                                  uncond.defined() ? storage<T>(uncond) : nullptr,
                                  bias.defined() ? bias.const_data_ptr<float>() : nullptr,
                                  cond.stride(0),
                                  uncond.defined() ? uncond.stride(0) : 0,
                                  cond.size(1),
                                  static_cast<float>(guidance_scale),
                                  greedy ? 1.0f : static_cast<float>(1 / temperature),
                                  key,
                                  token.mutable_data_ptr<int64_t>(),
                                  logprob.mutable_data_ptr<float>()};
    check_launch("guided_sample", launch_guided_sample(args, num_rows, greedy, at::cuda::getCurrentCUDAStream()));
  });
  return {token, logprob};
}

}  // namespace

TORCH_LIBRARY_IMPL(hermesflow, CUDA, library) { library.impl("guided_sample", &guided_sample); }

}  // namespace hermesflow
