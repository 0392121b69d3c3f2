// Arguments that the ops' C++ entry points share, on every device: the random key of each row, row strides, dtypes.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "philox.h"

namespace hermesflow {

enum class Dtype { kFloat, kBFloat16, kHalf };

inline Dtype to_dtype(const char* op, at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Dtype::kFloat;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kHalf: return Dtype::kHalf;
    default: TORCH_CHECK_VALUE(false, op, ": expected fp32, bf16 or fp16, got ", type);
  }
}

inline at::Tensor with_unit_column_stride(const at::Tensor& matrix) {
  return matrix.stride(1) == 1 || matrix.size(1) == 1 ? matrix : matrix.contiguous();
}

// The random key of each row, from int64 tensors of any stride; step may be 0-dim.
inline RowKeys row_keys(const char* op, int64_t num_rows, const at::Tensor& seed, const at::Tensor& step,
                        const at::Tensor& position) {
  for (const at::Tensor& part : {seed, position, step.dim() ? step : seed}) {
    TORCH_CHECK_VALUE(part.dim() == 1 && part.size(0) == num_rows && part.scalar_type() == at::kLong, op,
                      ": expected int64 seed, step and position [", num_rows, "], got ", part.sizes(), " ",
                      part.scalar_type());
  }
  TORCH_CHECK_VALUE(step.scalar_type() == at::kLong, op, ": expected int64 step, got ", step.scalar_type());
  return {seed.const_data_ptr<int64_t>(), step.const_data_ptr<int64_t>(), position.const_data_ptr<int64_t>(),
          seed.stride(0), step.dim() ? step.stride(0) : 0, position.stride(0)};
}

// Number of rows of guided_sample's logits.
inline int64_t check_guided_sample(const at::Tensor& cond, const std::optional<at::Tensor>& uncond) {
  TORCH_CHECK_VALUE(cond.dim() == 2, "guided_sample: expected cond [R, V], got ", cond.sizes());
  TORCH_CHECK_VALUE(cond.size(1) > 0, "guided_sample: expected at least one token id, got cond ", cond.sizes());
  if (uncond) {
    TORCH_CHECK_VALUE(uncond->sizes() == cond.sizes() && uncond->scalar_type() == cond.scalar_type(),
                      "guided_sample: expected uncond like cond ", cond.sizes(), " ", cond.scalar_type(), ", got ",
                      uncond->sizes(), " ", uncond->scalar_type());
  }
  return cond.size(0);
}

// A block of linear_logprob: fp32 logits [R, C] with unit column stride, fp32 bias [C], target [R].
inline void check_linear_logprob_block(const at::Tensor& logits, const std::optional<at::Tensor>& bias,
                                       const at::Tensor& target) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.scalar_type() == at::kFloat && (logits.stride(1) == 1 || logits.size(1) <= 1),
                    "linear_logprob_block: expected fp32 logits [R, C] with unit column stride, got ", logits.sizes(), " ",
                    logits.scalar_type());
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == logits.size(1) && bias->scalar_type() == at::kFloat &&
                              bias->is_contiguous()),
                    "linear_logprob_block: expected contiguous fp32 bias [", logits.size(1), "], got ", bias->sizes(), " ",
                    bias->scalar_type());
  TORCH_CHECK_VALUE(target.dim() == 1 && target.size(0) == logits.size(0) && target.scalar_type() == at::kLong &&
                        target.is_contiguous(),
                    "linear_logprob_block: expected contiguous int64 target [", logits.size(0), "], got ", target.sizes(), " ",
                    target.scalar_type());
}

inline void check_linear_logprob_state(const at::Tensor& logits, const at::Tensor& state) {
  TORCH_CHECK_VALUE(state.dim() == 2 && state.size(0) == 4 && state.size(1) == logits.size(0) &&
                        state.scalar_type() == at::kFloat && (state.stride(1) == 1 || state.size(1) <= 1),
                    "linear_logprob_block: expected fp32 state [4, ", logits.size(0), "] with unit column stride, got ",
                    state.sizes(), " ", state.scalar_type());
}

inline void check_linear_logprob_gradient(const at::Tensor& logits, const at::Tensor& lse, const at::Tensor& grad_logprob,
                                          const at::Tensor& grad_logits) {
  for (const at::Tensor& part : {lse, grad_logprob}) {
    TORCH_CHECK_VALUE(part.dim() == 1 && part.size(0) == logits.size(0) && part.scalar_type() == at::kFloat &&
                          part.is_contiguous(),
                      "linear_logprob_block_backward: expected contiguous fp32 lse and grad_logprob [", logits.size(0),
                      "], got ", part.sizes(), " ", part.scalar_type());
  }
  TORCH_CHECK_VALUE(grad_logits.sizes() == logits.sizes() && (grad_logits.stride(1) == 1 || logits.size(1) <= 1),
                    "linear_logprob_block_backward: expected grad_logits ", logits.sizes(), " with unit column stride, got ",
                    grad_logits.sizes());
}

}  // namespace hermesflow
