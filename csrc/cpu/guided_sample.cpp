// guided_sample on the CPU: rows in parallel, each in one fused pass (guided_sample_row.h).
#include "row_kernels.h"

namespace hermesflow {
namespace {

constexpr int64_t kParallelGrain = 32768;  // logits a task, so that a thread's start is paid back

struct Options {
  int64_t vocab_size;
  const float* bias;  // null: none
  float guidance_scale;
  float inverse_temperature;
  bool greedy;
  Dtype dtype;
};

#define HERMESFLOW_ROW "guided_sample_row.h"
#include "each_instruction_set.h"

std::tuple<at::Tensor, at::Tensor> guided_sample(const at::Tensor& cond_in, const std::optional<at::Tensor>& uncond_in,
                                                 const std::optional<at::Tensor>& bias_in, double guidance_scale,
                                                 double temperature, const at::Tensor& seed, const at::Tensor& step,
                                                 const at::Tensor& position) {
  const int64_t num_rows = check_guided_sample(cond_in, uncond_in, bias_in), vocab_size = cond_in.size(1);
  const RowKeys keys = row_keys("guided_sample", cond_in, seed, step, position);

  const at::Tensor cond = with_unit_column_stride(cond_in);
  const at::Tensor uncond = uncond_in ? with_unit_column_stride(*uncond_in) : at::Tensor();
  const at::Tensor bias = bias_in ? bias_in->contiguous() : at::Tensor();
  at::Tensor token = at::empty({num_rows}, cond.options().dtype(at::kLong));
  at::Tensor logprob = at::empty({num_rows}, cond.options().dtype(at::kFloat));
  const bool greedy = temperature == 0;
  const Options options{vocab_size,
                        bias.defined() ? bias.const_data_ptr<float>() : nullptr,
                        static_cast<float>(guidance_scale),
                        greedy ? 1.0f : static_cast<float>(1 / temperature),
                        greedy,
                        to_dtype("guided_sample", cond.scalar_type())};
  int64_t* tokens = token.mutable_data_ptr<int64_t>();
  float* logprobs = logprob.mutable_data_ptr<float>();
  const auto sample_row = HERMESFLOW_PICK(sample_row);

  at::parallel_for(0, num_rows, std::max<int64_t>(1, kParallelGrain / vocab_size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      sample_row(row_pointer(cond, row), uncond.defined() ? row_pointer(uncond, row) : nullptr, options,
                 keys.seed(row), keys.step(row), keys.position(row), tokens + row, logprobs + row);
    }
  });
  return {token, logprob};
}

}  // namespace

TORCH_LIBRARY_IMPL(hermesflow, CPU, library) { library.impl("guided_sample", &guided_sample); }

}  // namespace hermesflow
