// Arguments that the ops' C++ entry points share, on every device: the random key of each row, row strides, dtypes.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <tuple>

#include "mask_topk.h"
#include "pair_dpo.h"
#include "philox.h"
#include "sampling_settings.h"

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

// Kernels read raw pointers, so that a tensor on another device would be read as memory of this one.
template <typename... Tensors>
void check_on_one_device(const char* op, const at::Tensor& first, const Tensors&... others) {
  const auto check = [&](const std::optional<at::Tensor>& other) {
    TORCH_CHECK_VALUE(!other || other->device() == first.device(), op, ": expected all tensors on ", first.device(),
                      ", got one on ", other->device());
  };
  (check(others), ...);
}

// The random key of each row of `rows`, from int64 tensors of any stride; step may be 0-dim.
inline RowKeys row_keys(const char* op, const at::Tensor& rows, const at::Tensor& seed, const at::Tensor& step,
                        const at::Tensor& position) {
  const int64_t num_rows = rows.size(0);
  check_on_one_device(op, rows, seed, step, position);
  for (const at::Tensor& part : {seed, position, step.dim() ? step : seed}) {
    TORCH_CHECK_VALUE(part.dim() == 1 && part.size(0) == num_rows && part.scalar_type() == at::kLong, op,
                      ": expected int64 seed, step and position [", num_rows, "], got ", part.sizes(), " ",
                      part.scalar_type());
  }
  TORCH_CHECK_VALUE(step.scalar_type() == at::kLong, op, ": expected int64 step, got ", step.scalar_type());
  return {seed.const_data_ptr<int64_t>(), step.const_data_ptr<int64_t>(), position.const_data_ptr<int64_t>(),
          seed.stride(0), step.dim() ? step.stride(0) : 0, position.stride(0)};
}

// Number of rows of guided_sample's logits. The bias, fp32 [V] added to cond, is for logits that come from a head without it.
inline int64_t check_guided_sample(const at::Tensor& cond, const std::optional<at::Tensor>& uncond,
                                   const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(cond.dim() == 2, "guided_sample: expected cond [R, V], got ", cond.sizes());
  TORCH_CHECK_VALUE(cond.size(1) > 0, "guided_sample: expected at least one token id, got cond ", cond.sizes());
  if (uncond) {
    TORCH_CHECK_VALUE(uncond->sizes() == cond.sizes() && uncond->scalar_type() == cond.scalar_type(),
                      "guided_sample: expected uncond like cond ", cond.sizes(), " ", cond.scalar_type(), ", got ",
                      uncond->sizes(), " ", uncond->scalar_type());
  }
  check_on_one_device("guided_sample", cond, uncond, bias);
  if (bias) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == cond.size(1) && bias->scalar_type() == at::kFloat,
                      "guided_sample: expected bias fp32 [", cond.size(1), "], got ", bias->sizes(), " ", bias->scalar_type());
  }
  return cond.size(0);
}

// Number of rows of token_logprob's logits.
inline int64_t check_token_logprob(const at::Tensor& logits, const at::Tensor& target) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0, "token_logprob: expected logits [T, V] of at least one token id, got ",
                    logits.sizes());
  TORCH_CHECK_VALUE(target.dim() == 1 && target.size(0) == logits.size(0) && target.scalar_type() == at::kLong &&
                        target.device() == logits.device(),
                    "token_logprob: expected target int64 [", logits.size(0), "] on ", logits.device(), ", got ",
                    target.scalar_type(), " ", target.sizes(), " on ", target.device());
  return logits.size(0);
}

// The same for token_logprob_backward, with its fp32 values of each row.
inline int64_t check_token_logprob_backward(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& largest,
                                            const at::Tensor& total, const at::Tensor& grad_logprob) {
  for (const at::Tensor& part : {largest, total, grad_logprob}) {
    TORCH_CHECK_VALUE(part.sizes() == target.sizes() && part.scalar_type() == at::kFloat && part.device() == logits.device(),
                      "token_logprob_backward: expected fp32 largest, total and grad_logprob ", target.sizes(), " on ",
                      logits.device(), ", got ", part.scalar_type(), " ", part.sizes(), " on ", part.device());
  }
  return check_token_logprob(logits, target);
}

// Settings of token_sample's rows, from tensors of any stride.
inline RowSettings check_token_sample(const at::Tensor& logits, const at::Tensor& temperature, const at::Tensor& top_k,
                                      const at::Tensor& top_p, const at::Tensor& min_p) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "token_sample: expected logits [R, V], got ", logits.sizes());
  TORCH_CHECK_VALUE(logits.size(1) > 0, "token_sample: expected at least one token id, got logits ", logits.sizes());
  const auto check = [&](const char* name, const at::Tensor& setting, at::ScalarType type) {
    TORCH_CHECK_VALUE(setting.dim() == 1 && setting.size(0) == logits.size(0) && setting.scalar_type() == type,
                      "token_sample: expected ", name, " ", type, " [", logits.size(0), "], got ", setting.sizes(), " ",
                      setting.scalar_type());
  };
  check("temperature", temperature, at::kFloat);
  check("top_k", top_k, at::kLong);
  check("top_p", top_p, at::kFloat);
  check("min_p", min_p, at::kFloat);
  check_on_one_device("token_sample", logits, temperature, top_k, top_p, min_p);
  return {temperature.const_data_ptr<float>(), top_k.const_data_ptr<int64_t>(), top_p.const_data_ptr<float>(),
          min_p.const_data_ptr<float>(), temperature.stride(0), top_k.stride(0), top_p.stride(0), min_p.stride(0)};
}

// Checks mask_topk's arguments; makes the columns of logprob and known lie side by side, and the result.
inline MaskTopkArguments mask_topk_arguments(at::Tensor& logprob, at::Tensor& known, const at::Tensor& num_masked,
                                             double temperature, const std::optional<at::Tensor>& temperatures,
                                             const at::Tensor& seed, const at::Tensor& step, at::Tensor& masked) {
  TORCH_CHECK_VALUE(logprob.dim() == 2 && logprob.scalar_type() == at::kFloat,
                    "mask_topk: expected logprob fp32 [B, N], got ", logprob.sizes(), " ", logprob.scalar_type());
  const int64_t num_rows = logprob.size(0), num_tokens = logprob.size(1);
  TORCH_CHECK_VALUE(num_tokens <= int64_t{1} << 30, "mask_topk: expected N of at most 2^30, got ", num_tokens);
  check_on_one_device("mask_topk", logprob, known, num_masked, temperatures);
  TORCH_CHECK_VALUE(known.sizes() == logprob.sizes() && known.scalar_type() == at::kBool,
                    "mask_topk: expected known bool ", logprob.sizes(), ", got ", known.sizes(), " ", known.scalar_type());
  TORCH_CHECK_VALUE(num_masked.scalar_type() == at::kLong, "mask_topk: expected int64 num_masked, got ",
                    num_masked.scalar_type());
  TORCH_CHECK_VALUE(!temperatures || temperatures->scalar_type() == at::kFloat,
                    "mask_topk: expected temperatures fp32 [B], got ", temperatures->scalar_type());
  for (const at::Tensor& part : {num_masked, temperatures ? *temperatures : num_masked})
    TORCH_CHECK_VALUE(part.dim() == 1 && part.size(0) == num_rows, "mask_topk: expected [", num_rows,
                      "] per-row values, got ", part.sizes());
  const RowKeys key = row_keys("mask_topk", logprob, seed, step, seed);  // the position is not used
  logprob = with_unit_column_stride(logprob);
  known = with_unit_column_stride(known);
  masked = at::empty({num_rows, num_tokens}, known.options());
  return {logprob.const_data_ptr<float>(),
          known.const_data_ptr<bool>(),
          num_masked.const_data_ptr<int64_t>(),
          temperatures ? temperatures->const_data_ptr<float>() : nullptr,
          logprob.stride(0),
          known.stride(0),
          num_masked.stride(0),
          temperatures ? temperatures->stride(0) : 0,
          static_cast<float>(temperature),
          key,
          num_tokens,
          masked.mutable_data_ptr<bool>()};
}

// Checks the shapes, dtypes and settings of pair_dpo; segments and weights are read by the kernels alone.
inline PairLossSettings check_pair_dpo(const at::Tensor& policy, const at::Tensor& reference, const at::Tensor& segment,
                                       int64_t num_pairs, double beta, c10::string_view loss_type, double label_smoothing,
                                       bool length_normalize, const std::optional<at::Tensor>& pair_weight) {
  const at::ScalarType type = policy.scalar_type();
  TORCH_CHECK_VALUE(policy.dim() == 1 && (type == at::kFloat || type == at::kDouble),
                    "pair_dpo: expected policy_logprob fp32 or fp64 [T], got ", policy.sizes(), " ", type);
  TORCH_CHECK_VALUE(reference.sizes() == policy.sizes() && reference.scalar_type() == type,
                    "pair_dpo: expected reference_logprob like policy_logprob ", policy.sizes(), " ", type, ", got ",
                    reference.sizes(), " ", reference.scalar_type());
  TORCH_CHECK_VALUE(segment.sizes() == policy.sizes() && segment.scalar_type() == at::kLong,
                    "pair_dpo: expected segment int64 ", policy.sizes(), ", got ", segment.sizes(), " ",
                    segment.scalar_type());
  TORCH_CHECK_VALUE(num_pairs >= 0, "pair_dpo: expected num_pairs of at least 0, got ", num_pairs);
  check_on_one_device("pair_dpo", policy, reference, segment, pair_weight);
  if (pair_weight) {
    TORCH_CHECK_VALUE(pair_weight->dim() == 1 && pair_weight->size(0) == num_pairs && pair_weight->scalar_type() == type,
                      "pair_dpo: expected pair_weight [", num_pairs, "] ", type, ", got ", pair_weight->sizes(), " ",
                      pair_weight->scalar_type());
  }
  const auto* name = std::find(std::begin(kPairLossNames), std::end(kPairLossNames), loss_type);
  TORCH_CHECK_VALUE(name != std::end(kPairLossNames), 
                    "pair_dpo: expected loss_type to be one of" HERMESFLOW_PAIR_LOSSES(HERMESFLOW_PAIR_LOSS_TOLD) ", got ", loss_type);
  return {static_cast<PairLoss>(name - kPairLossNames), beta, label_smoothing, length_normalize};
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
  check_on_one_device("linear_logprob_block", logits, bias, target);
}

inline void check_linear_logprob_state(const at::Tensor& logits, const at::Tensor& state) {
  TORCH_CHECK_VALUE(state.dim() == 2 && state.size(0) == 4 && state.size(1) == logits.size(0) &&
                        state.scalar_type() == at::kFloat && (state.stride(1) == 1 || state.size(1) <= 1),
                    "linear_logprob_block: expected fp32 state [4, ", logits.size(0), "] with unit column stride, got ",
                    state.sizes(), " ", state.scalar_type());
  check_on_one_device("linear_logprob_block", logits, state);
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
  check_on_one_device("linear_logprob_block_backward", logits, lse, grad_logprob, grad_logits);
}

}  // namespace hermesflow
