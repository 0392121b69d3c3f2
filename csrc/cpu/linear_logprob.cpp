// linear_logprob on the CPU: what follows a block's matmul, rows in parallel (linear_logprob_row.h).
#include "row_kernels.h"

namespace hermesflow {
namespace {

constexpr int64_t kParallelGrain = 16384;  // logits a task, so that a thread's start is paid back
constexpr int kRowTile = 512;

struct RowState {
  float largest, total, weighted, chosen;
};

#define HERMESFLOW_ROW "linear_logprob_row.h"
#include "each_instruction_set.h"

template <typename Run>
void for_each_row(const at::Tensor& logits, Run&& run) {
  const int64_t grain = std::max<int64_t>(1, kParallelGrain / std::max<int64_t>(1, logits.size(1)));
  at::parallel_for(0, logits.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) run(row);
  });
}

void block(const at::Tensor& logits, const std::optional<at::Tensor>& bias, const at::Tensor& target, int64_t first_id,
           at::Tensor& state) {
  check_linear_logprob_block(logits, bias, target);
  check_linear_logprob_state(logits, state);
  const float* biases = bias ? bias->const_data_ptr<float>() : nullptr;
  const int64_t *targets = target.const_data_ptr<int64_t>(), num_ids = logits.size(1);
  float* states = state.mutable_data_ptr<float>();
  const int64_t next = state.stride(0);
  const auto update_row = HERMESFLOW_PICK(update_row);

  for_each_row(logits, [&](int64_t row) {
    const auto* values = reinterpret_cast<const float*>(row_pointer(logits, row));
    float* mine = states + row;
    RowState now{mine[0], mine[next], mine[2 * next], mine[3 * next]};
    update_row(values, biases, num_ids, &now);
    const int64_t chosen = targets[row] - first_id;
    if (chosen >= 0 && chosen < num_ids) now.chosen = values[chosen] + (biases ? biases[chosen] : 0.0f);
    mine[0] = now.largest;
    mine[next] = now.total;
    mine[2 * next] = now.weighted;
    mine[3 * next] = now.chosen;
  });
}

void block_backward(const at::Tensor& logits, const std::optional<at::Tensor>& bias, const at::Tensor& target,
                    const at::Tensor& lse, const at::Tensor& grad_logprob, int64_t first_id, at::Tensor& grad_logits) {
  check_linear_logprob_block(logits, bias, target);
  check_linear_logprob_gradient(logits, lse, grad_logprob, grad_logits);
  TORCH_CHECK_VALUE(grad_logits.scalar_type() == at::kFloat, "linear_logprob_block_backward: expected fp32 grad_logits, got ",
                    grad_logits.scalar_type());
  const float* biases = bias ? bias->const_data_ptr<float>() : nullptr;
  const int64_t* targets = target.const_data_ptr<int64_t>();
  const float *lses = lse.const_data_ptr<float>(), *grads = grad_logprob.const_data_ptr<float>();
  float* out = grad_logits.mutable_data_ptr<float>();
  const auto gradient_row = HERMESFLOW_PICK(gradient_row);

  for_each_row(logits, [&](int64_t row) {
    gradient_row(reinterpret_cast<const float*>(row_pointer(logits, row)), biases, logits.size(1), lses[row], grads[row],
                 targets[row] - first_id, out + row * grad_logits.stride(0));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hermesflow, CPU, library) {
  library.impl("linear_logprob_block", &block);
  library.impl("linear_logprob_block_backward", &block_backward);
}

}  // namespace hermesflow
