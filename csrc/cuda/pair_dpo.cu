// pair_dpo on CUDA: checks, dtype switch, launch.
#include "pair_dpo.cuh"

#include "entry.h"

namespace hermesflow {
namespace {

using PairDPOTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <typename T>
PairDPOTensors run_pair_dpo(const at::Tensor& policy, const at::Tensor& reference, const at::Tensor& segment,
                            int64_t num_pairs, const PairLossSettings& settings, const std::optional<at::Tensor>& weight) {
  const auto empty = [&](at::IntArrayRef sizes) { return at::empty(sizes, policy.options()); };
  const at::Tensor loss = empty({}), accuracy = empty({}), win_reward = empty({num_pairs}), lose_reward = empty({num_pairs});
  const at::Tensor margin = empty({num_pairs}), grad = empty({policy.size(0)});
  const at::Tensor num_arrived = at::zeros({1}, policy.options().dtype(at::kInt));
  const at::Tensor pair_loss = at::empty({num_pairs}, policy.options().dtype(at::kDouble));
  const PairDPOArguments<T> args{policy.const_data_ptr<T>(),
                                 reference.const_data_ptr<T>(),
                                 segment.const_data_ptr<int64_t>(),
                                 weight ? weight->const_data_ptr<T>() : nullptr,
                                 policy.stride(0),
                                 reference.stride(0),
                                 segment.stride(0),
                                 weight ? weight->stride(0) : 0,
                                 policy.size(0),
                                 num_pairs,
                                 settings,
                                 num_arrived.mutable_data_ptr<int>(),
                                 pair_loss.mutable_data_ptr<double>(),
                                 loss.mutable_data_ptr<T>(),
                                 accuracy.mutable_data_ptr<T>(),
                                 win_reward.mutable_data_ptr<T>(),
                                 lose_reward.mutable_data_ptr<T>(),
                                 margin.mutable_data_ptr<T>(),
                                 grad.mutable_data_ptr<T>()};
  check_launch("pair_dpo", launch_pair_dpo(args, at::cuda::getCurrentCUDAStream()));
  return {loss, win_reward, lose_reward, margin, accuracy, grad};
}

PairDPOTensors pair_dpo(const at::Tensor& policy, const at::Tensor& reference, const at::Tensor& segment, int64_t num_pairs,
                        double beta, c10::string_view loss_type, double label_smoothing, bool length_normalize,
                        const std::optional<at::Tensor>& pair_weight) {
  const PairLossSettings settings =
      check_pair_dpo(policy, reference, segment, num_pairs, beta, loss_type, label_smoothing, length_normalize, pair_weight);
  const c10::cuda::CUDAGuard guard(policy.device());
  const auto run = policy.scalar_type() == at::kFloat ? run_pair_dpo<float> : run_pair_dpo<double>;
  return run(policy, reference, segment, num_pairs, settings, pair_weight);
}

}  // namespace

TORCH_LIBRARY_IMPL(hermesflow, CUDA, library) { library.impl("pair_dpo", &pair_dpo); }

}  // namespace hermesflow
