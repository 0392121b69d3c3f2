// mask_topk on the CPU: rows in parallel, each by counting its keys (mask_topk_row.h).
#include "row_kernels.h"

namespace hermesflow {
namespace {

constexpr int64_t kParallelGrain = 2048;  // tokens a task, so that a thread's start is paid back

#define HERMESFLOW_ROW "mask_topk_row.h"
#include "each_instruction_set.h"

at::Tensor mask_topk(at::Tensor logprob, at::Tensor known, const at::Tensor& num_masked, double temperature,
                     const std::optional<at::Tensor>& temperatures, const at::Tensor& seed, const at::Tensor& step) {
  at::Tensor masked;
  const MaskTopkArguments args = mask_topk_arguments(logprob, known, num_masked, temperature, temperatures, seed, step, masked);
  const auto mask_row = HERMESFLOW_PICK(mask_row);
  const int64_t num_rows = logprob.size(0), grain = kParallelGrain / std::max<int64_t>(1, args.num_tokens) + 1;
  at::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> keys(args.num_tokens);
    for (int64_t row = begin; row < end; ++row) mask_row(args, row, keys.data());
  });
  return masked;
}

}  // namespace

TORCH_LIBRARY_IMPL(hermesflow, CPU, library) { library.impl("mask_topk", &mask_topk); }

}  // namespace hermesflow
