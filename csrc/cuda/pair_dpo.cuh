// pair_dpo: a block a pair, one launch, deterministic. A block reads all segment ids (they stay in the L2 cache), sums the
// differences of its two sides' tokens in fp64 and in a fixed order, computes loss and slope, then writes its tokens'
// gradient; block 0 also writes the zeros of skipped tokens. The last block to arrive adds the pairs' losses in their order.
#pragma once

#include "block.cuh"
#include "../pair_dpo.h"

namespace hermesflow {

constexpr int kPairThreads = 512;

template <typename T>
struct PairDPOArguments {
  const T *policy, *reference;   // [T]
  const int64_t* segment;        // [T]
  const T* weight;               // [P], or null: 1 each
  int64_t policy_stride, reference_stride, segment_stride, weight_stride;
  int64_t num_tokens, num_pairs;
  PairLossSettings settings;
  int* num_arrived;              // 0 before the launch
  double* pair_loss;             // [P], weighted
  T *loss, *accuracy;
  T *win_reward, *lose_reward, *margin;  // [P]
  T* grad;                       // [T], contiguous

  __device__ __forceinline__ double weight_of(int64_t pair) const {
    return weight == nullptr ? 1.0 : static_cast<double>(weight[pair * weight_stride]);
  }
};

// Replaces each value by its sum over the block, added in the same order in every run.
template <int kNum>
__device__ __forceinline__ void sum_over_block(double (&values)[kNum]) {
  constexpr int kWarps = kPairThreads / kWarpSize;
  __shared__ double warp_sums[kNum][kWarps];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kNum; ++i) {
    values[i] = warp_sum(values[i]);
    if (lane == 0) warp_sums[i][warp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kNum; ++i) {
    values[i] = 0;
    for (int w = 0; w < kWarps; ++w) values[i] += warp_sums[i][w];
  }
}

template <typename T>
__global__ void __launch_bounds__(kPairThreads, 1) pair_dpo_kernel(PairDPOArguments<T> args) {
  __shared__ T win_grad, lose_grad;  // of every token of a side
  __shared__ bool is_last;

  const int64_t pair = blockIdx.x;
  const bool exists = pair < args.num_pairs;  // without pairs there is one block, for the skipped tokens' zeros
  double sums[5] = {};
  auto& [win_sum, lose_sum, win_length, lose_length, total_weight] = sums;
  if (exists) {
    for (int64_t t = threadIdx.x; t < args.num_tokens; t += kPairThreads) {
      const int64_t side = args.segment[t * args.segment_stride] - 2 * pair;
      if (side != 0 && side != 1) continue;
      const double difference = static_cast<double>(args.policy[t * args.policy_stride]) -
                                static_cast<double>(args.reference[t * args.reference_stride]);
      (side == 0 ? win_sum : lose_sum) += difference;
      (side == 0 ? win_length : lose_length) += 1;
    }
  }
  for (int64_t p = threadIdx.x; p < args.num_pairs; p += kPairThreads) total_weight += args.weight_of(p);
  sum_over_block(sums);
  total_weight = total_weight > 0 ? total_weight : 1;

  if (threadIdx.x == 0 && exists) {
    const double beta = args.settings.beta, weight = args.weight_of(pair);
    const double win_divisor = args.settings.length_normalize && win_length > 1 ? win_length : 1;
    const double lose_divisor = args.settings.length_normalize && lose_length > 1 ? lose_length : 1;
    const double win_ratio = win_sum / win_divisor, lose_ratio = lose_sum / lose_divisor;
    const LossAndSlope result = pair_loss(win_ratio - lose_ratio, args.settings);
    args.win_reward[pair] = static_cast<T>(beta * win_ratio);
    args.lose_reward[pair] = static_cast<T>(beta * lose_ratio);
    args.margin[pair] = static_cast<T>(beta * win_ratio - beta * lose_ratio);
    args.pair_loss[pair] = weight * result.loss;
    win_grad = static_cast<T>(weight * result.slope / total_weight / win_divisor);
    lose_grad = static_cast<T>(-weight * result.slope / total_weight / lose_divisor);
  }
  __syncthreads();
  for (int64_t t = threadIdx.x; t < args.num_tokens; t += kPairThreads) {
    const int64_t segment = args.segment[t * args.segment_stride], side = segment - 2 * pair;
    if (exists && (side == 0 || side == 1)) {
      args.grad[t] = side == 0 ? win_grad : lose_grad;
    } else if (pair == 0 && (segment < 0 || segment >= 2 * args.num_pairs)) {
      args.grad[t] = 0;
    }
  }

  if (threadIdx.x == 0) {
    __threadfence();  // the pair's results are seen before its arrival
    is_last = atomicAdd(args.num_arrived, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  double means[2] = {};
  const volatile double* pair_loss = args.pair_loss;
  const volatile T* margin = args.margin;
  for (int64_t p = threadIdx.x; p < args.num_pairs; p += kPairThreads) {
    means[0] += pair_loss[p];
    means[1] += margin[p] > 0 ? args.weight_of(p) : 0.0;
  }
  sum_over_block(means);
  if (threadIdx.x == 0) {
    *args.loss = static_cast<T>(means[0] / total_weight);
    *args.accuracy = static_cast<T>(means[1] / total_weight);
  }
}

template <typename T>
inline cudaError_t launch_pair_dpo(const PairDPOArguments<T>& args, cudaStream_t stream) {
  const unsigned num_blocks = args.num_pairs > 0 ? static_cast<unsigned>(args.num_pairs) : 1u;
  return launch(pair_dpo_kernel<T>, dim3(num_blocks), dim3(kPairThreads), stream, args);
}

template cudaError_t launch_pair_dpo(const PairDPOArguments<float>&, cudaStream_t);
template cudaError_t launch_pair_dpo(const PairDPOArguments<double>&, cudaStream_t);

}  // namespace hermesflow
