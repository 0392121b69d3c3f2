// pair_dpo on the CPU: one pass over the tokens sums each side's differences in fp64, one over the pairs gives losses and
// slopes, and one over the tokens writes the gradient. O(T + P).
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../arguments.h"

namespace hermesflow {
namespace {

using PairDPOTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct Side {
  double sum = 0, length = 0;
};

// Neighboring tokens of one segment: a side's tokens mostly lie together.
struct Run {
  int64_t segment, begin, end;
};

std::vector<Run> find_runs(const int64_t* segments, int64_t num_tokens) {
  constexpr int kStep = 32;
  std::vector<Run> runs;
  for (int64_t begin = 0, end; begin < num_tokens; begin = end) {
    const int64_t segment = segments[begin];
    end = begin + 1;
    for (int64_t differs = 0; end + kStep <= num_tokens; end += kStep) {
      for (int i = 0; i < kStep; ++i) differs |= segments[end + i] ^ segment;
      if (differs != 0) break;
    }
    while (end < num_tokens && segments[end] == segment) ++end;
    runs.push_back({segment, begin, end});
  }
  return runs;
}

// Sum of policy - reference over n tokens; eight sums side by side, which do not wait for one another.
template <typename T>
double sum_differences(const T* policy, const T* reference, int64_t n) {
  constexpr int kSums = 8;
  double sums[kSums] = {};
  int64_t t = 0;
  for (; t + kSums <= n; t += kSums)
    for (int i = 0; i < kSums; ++i) sums[i] += static_cast<double>(policy[t + i]) - static_cast<double>(reference[t + i]);
  for (; t < n; ++t) sums[0] += static_cast<double>(policy[t]) - static_cast<double>(reference[t]);
  double sum = 0;
  for (const double part : sums) sum += part;
  return sum;
}

template <typename T>
std::vector<Side> sum_sides(const at::Tensor& policy, const at::Tensor& reference, const std::vector<Run>& runs,
                            int64_t num_pairs) {
  std::vector<Side> sides(2 * num_pairs);
  const T *policies = policy.const_data_ptr<T>(), *references = reference.const_data_ptr<T>();
  for (const auto& [s, begin, end] : runs) {
    if (s == -1) continue;
    TORCH_CHECK_VALUE(s >= 0 && s < 2 * num_pairs, "pair_dpo: expected segments in [-1, ", 2 * num_pairs, ") for ", num_pairs,
                      " pairs, got ", s);
    sides[s].sum += sum_differences(policies + begin, references + begin, end - begin);
    sides[s].length += static_cast<double>(end - begin);
  }
  return sides;
}

template <typename T>
void pair_dpo_rows(const at::Tensor& policy, const at::Tensor& reference, const at::Tensor& segment, int64_t num_pairs,
                   const PairLossSettings& settings, const at::Tensor& pair_weight, const PairDPOTensors& out) {
  const std::vector<Run> runs = find_runs(segment.const_data_ptr<int64_t>(), segment.size(0));
  const std::vector<Side> sides = sum_sides<T>(policy, reference, runs, num_pairs);
  const T* weights = pair_weight.defined() ? pair_weight.const_data_ptr<T>() : nullptr;
  double total = 0;
  for (int64_t p = 0; p < num_pairs; ++p) {
    const double weight = weights == nullptr ? 1 : weights[p];
    TORCH_CHECK_VALUE(weight >= 0, "pair_dpo: expected pair_weight of at least 0, got ", weight);
    total += weight;
  }
  total = total > 0 ? total : 1;

  const auto& [loss, win_reward, lose_reward, margin, accuracy, grad] = out;
  T *wins = win_reward.mutable_data_ptr<T>(), *loses = lose_reward.mutable_data_ptr<T>(), *margins = margin.mutable_data_ptr<T>();
  std::vector<T> token_grads(2 * num_pairs);  // of every token of a side
  double loss_sum = 0, correct_sum = 0;
  for (int64_t p = 0; p < num_pairs; ++p) {
    const Side &win = sides[2 * p], &lose = sides[2 * p + 1];
    const double win_divisor = settings.length_normalize ? std::max(win.length, 1.0) : 1;
    const double lose_divisor = settings.length_normalize ? std::max(lose.length, 1.0) : 1;
    const double win_ratio = win.sum / win_divisor, lose_ratio = lose.sum / lose_divisor;
    const LossAndSlope pair = pair_loss(win_ratio - lose_ratio, settings);
    const double weight = weights == nullptr ? 1 : weights[p];
    wins[p] = static_cast<T>(settings.beta * win_ratio);
    loses[p] = static_cast<T>(settings.beta * lose_ratio);
    margins[p] = static_cast<T>(settings.beta * win_ratio - settings.beta * lose_ratio);
    loss_sum += weight * pair.loss;
    correct_sum += margins[p] > 0 ? weight : 0;
    token_grads[2 * p] = static_cast<T>(weight * pair.slope / total / win_divisor);
    token_grads[2 * p + 1] = static_cast<T>(-weight * pair.slope / total / lose_divisor);
  }
  *loss.mutable_data_ptr<T>() = static_cast<T>(loss_sum / total);
  *accuracy.mutable_data_ptr<T>() = static_cast<T>(correct_sum / total);

  T* grads = grad.mutable_data_ptr<T>();
  for (const auto& [s, begin, end] : runs) std::fill(grads + begin, grads + end, s < 0 ? T{0} : token_grads[s]);
}

PairDPOTensors pair_dpo(const at::Tensor& policy_in, const at::Tensor& reference_in, const at::Tensor& segment_in,
                        int64_t num_pairs, double beta, c10::string_view loss_type, double label_smoothing,
                        bool length_normalize, const std::optional<at::Tensor>& pair_weight) {
  const PairLossSettings settings = check_pair_dpo(policy_in, reference_in, segment_in, num_pairs, beta, loss_type,
                                                   label_smoothing, length_normalize, pair_weight);
  const at::Tensor policy = policy_in.contiguous(), reference = reference_in.contiguous();
  const at::Tensor segment = segment_in.contiguous();
  const at::Tensor weight = pair_weight ? pair_weight->contiguous() : at::Tensor();
  const auto empty = [&](at::IntArrayRef sizes) { return at::empty(sizes, policy.options()); };
  PairDPOTensors out{empty({}), empty({num_pairs}), empty({num_pairs}), empty({num_pairs}), empty({}), empty({policy.size(0)})};
  const auto run = policy.scalar_type() == at::kFloat ? pair_dpo_rows<float> : pair_dpo_rows<double>;
  run(policy, reference, segment, num_pairs, settings, weight, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(hermesflow, CPU, library) { library.impl("pair_dpo", &pair_dpo); }

}  // namespace hermesflow
