// mask_topk on the CPU: rows in parallel; each row's noise is drawn for its unknown tokens only, and a selection (not a
// sort) finds the lowest scores.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../philox.h"

namespace hermesflow {
namespace {

constexpr int64_t kParallelGrain = 2048;  // tokens a task

struct Candidate {
  float score;
  int64_t index;
  bool operator<(const Candidate& other) const {
    return score < other.score || (score == other.score && index < other.index);
  }
};

void mask_row(const float* logprob, const bool* known, int64_t num_tokens, int64_t num_masked, float temperature,
              int64_t seed, int64_t step, std::vector<Candidate>& candidates, bool* masked) {
  candidates.clear();
  for (int64_t n = 0; n < num_tokens; ++n) {
    masked[n] = false;
    if (known[n]) continue;
    float score = logprob[n];
    if (temperature != 0) {
      const Words words = philox(seed, static_cast<uint32_t>(n), step, 0, kMaskStream);
      score += temperature * -std::log(-std::log(uniform(words.w[0])));
    }
    candidates.push_back({std::isnan(score) ? -std::numeric_limits<float>::infinity() : score, n});
  }
  const int64_t count = std::clamp<int64_t>(num_masked, 0, static_cast<int64_t>(candidates.size()));
  std::nth_element(candidates.begin(), candidates.begin() + count, candidates.end());
  for (int64_t i = 0; i < count; ++i) masked[candidates[i].index] = true;
}

at::Tensor mask_topk(const at::Tensor& logprob_in, const at::Tensor& known_in, const at::Tensor& num_masked_in,
                     const at::Tensor& temperature, const at::Tensor& seed_in, const at::Tensor& step) {
  TORCH_CHECK_VALUE(logprob_in.dim() == 2 && logprob_in.scalar_type() == at::kFloat,
                    "mask_topk: expected logprob fp32 [B, N], got ", logprob_in.sizes(), " ", logprob_in.scalar_type());
  const int64_t num_rows = logprob_in.size(0), num_tokens = logprob_in.size(1);
  TORCH_CHECK_VALUE(known_in.sizes() == logprob_in.sizes() && known_in.scalar_type() == at::kBool,
                    "mask_topk: expected known bool ", logprob_in.sizes(), ", got ", known_in.sizes(), " ",
                    known_in.scalar_type());
  TORCH_CHECK_VALUE(temperature.scalar_type() == at::kFloat && temperature.dim() <= 1,
                    "mask_topk: expected temperature fp32 [B] or 0-dim, got ", temperature.sizes(), " ",
                    temperature.scalar_type());
  for (const at::Tensor& part : {num_masked_in, seed_in, step.dim() ? step : seed_in, temperature.dim() ? temperature : seed_in})
    TORCH_CHECK_VALUE(part.dim() == 1 && part.size(0) == num_rows, "mask_topk: expected [", num_rows, "] per-row values, got ",
                      part.sizes());
  for (const at::Tensor& part : {num_masked_in, seed_in, step})
    TORCH_CHECK_VALUE(part.scalar_type() == at::kLong, "mask_topk: expected int64 num_masked, seed and step, got ",
                      part.scalar_type());

  const at::Tensor logprob = logprob_in.contiguous(), known = known_in.contiguous();
  const at::Tensor num_masked = num_masked_in.contiguous(), seed = seed_in.contiguous();
  const at::Tensor steps = step.contiguous(), temperatures = temperature.contiguous();
  const int64_t step_stride = step.dim(), temperature_stride = temperature.dim();
  at::Tensor masked = at::empty_like(known);
  const float* logprobs = logprob.const_data_ptr<float>();
  const bool* knowns = known.const_data_ptr<bool>();
  bool* maskeds = masked.mutable_data_ptr<bool>();

  at::parallel_for(0, num_rows, kParallelGrain / std::max<int64_t>(1, num_tokens) + 1, [&](int64_t begin, int64_t end) {
    std::vector<Candidate> candidates;
    candidates.reserve(num_tokens);
    for (int64_t row = begin; row < end; ++row) {
      mask_row(logprobs + row * num_tokens, knowns + row * num_tokens, num_tokens,
               num_masked.const_data_ptr<int64_t>()[row],
               temperatures.const_data_ptr<float>()[row * temperature_stride], seed.const_data_ptr<int64_t>()[row],
               steps.const_data_ptr<int64_t>()[row * step_stride], candidates, maskeds + row * num_tokens);
    }
  });
  return masked;
}

}  // namespace

TORCH_LIBRARY_IMPL(hermesflow, CPU, library) { library.impl("mask_topk", &mask_topk); }

}  // namespace hermesflow
