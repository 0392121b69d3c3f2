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
  TORCH_CHECK_VALUE(cond_in.size(1) <= kMaxVocabSize, "guided_sample: expected at most ", kMaxVocabSize, " token ids, got ",
                    cond_in.size(1));
  at::Tensor cond = cond_in, second;
  Second kind = Second::kNone;
  if (uncond_in) {
    second = *uncond_in;
    kind = Second::kUncond;
  } else if (bias_in && cond.scalar_type() == at::kFloat) {
    second = bias_in->contiguous().expand_as(cond);
    kind = Second::kBias;
  }
  if (bias_in && kind != Second::kBias) {
    // The kernel adds a bias to fp32 logits without guidance alone, those of linear_sample.
    cond = cond.to(at::kFloat) + *bias_in;
    if (second.defined()) second = second.to(at::kFloat);
  }
  cond = with_unit_column_stride(cond);
  if (second.defined()) second = with_unit_column_stride(second);
  at::Tensor token = at::empty({num_rows}, cond.options().dtype(at::kLong));
  at::Tensor logprob = at::empty({num_rows}, cond.options().dtype(at::kFloat));
  const bool greedy = temperature == 0;
  with_storage_type("guided_sample", cond.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    GuidedSampleArguments<T> args{storage<T>(cond),
                                  second.defined() ? storage<T>(second) : nullptr,
                                  cond.stride(0),
                                  second.defined() ? second.stride(0) : 0,
                                  static_cast<int>(cond.size(1)),
                                  static_cast<float>(guidance_scale),
                                  greedy ? 1.0f : static_cast<float>(1 / temperature),
                                  key,
                                  token.mutable_data_ptr<int64_t>(),
                                  logprob.mutable_data_ptr<float>()};
    check_launch("guided_sample", launch_guided_sample(args, kind, num_rows, greedy, at::cuda::getCurrentCUDAStream()));
  });
  return {token, logprob};
}

}  // namespace

TORCH_LIBRARY_IMPL(hermesflow, CUDA, library) { library.impl("guided_sample", &guided_sample); }

}  // namespace hermesflow
