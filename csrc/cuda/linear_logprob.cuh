// linear_logprob: what follows the matmul of a block of logits, fp32 [R, C]. Forward: a block of threads a row takes its
// logits into the row's running state in one pass. Backward: a thread turns four logits into their gradient. Bound by memory:
// each logit is read once and its gradient written once.
#pragma once

#include "running_softmax.cuh"

namespace hermesflow {

constexpr int kLinearLogprobThreads = 256;

struct LogitsBlock {
  const float* logits;
  int64_t stride;  // from row to row
  const float* bias;  // or null
  const int64_t* target;
  int64_t num_ids, first_id;
};

// state: largest, total, weighted and the target's logit, `state_stride` apart.
__global__ void __launch_bounds__(kLinearLogprobThreads)
    linear_logprob_block_kernel(LogitsBlock block, float* state, int64_t state_stride) {
  constexpr int kWarps = kLinearLogprobThreads / kWarpSize;
  __shared__ float warp_largest[kWarps], warp_total[kWarps], warp_weighted[kWarps];
  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const float* logits_row = block.logits + row * block.stride;
  RunningSoftmax<true> softmax;
  for (int64_t first = 4 * threadIdx.x; first < block.num_ids; first += 4 * kLinearLogprobThreads) {
    float logits[4];
    load_four_biased(logits_row, block.bias, block.num_ids, first, logits);
    softmax.add(logits);
  }
  softmax.merge_warp();
  if (lane == 0) {
    warp_largest[warp] = softmax.largest;
    warp_total[warp] = softmax.total;
    warp_weighted[warp] = softmax.weighted;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;

  float* mine = state + row;
  softmax = {mine[0], mine[state_stride], mine[2 * state_stride]};
  for (int w = 0; w < kWarps; ++w) softmax.merge({warp_largest[w], warp_total[w], warp_weighted[w]});
  mine[0] = softmax.largest;
  mine[state_stride] = softmax.total;
  mine[2 * state_stride] = softmax.weighted;
  const int64_t chosen = block.target[row] - block.first_id;
  if (chosen >= 0 && chosen < block.num_ids)
    mine[3 * state_stride] = logits_row[chosen] + (block.bias == nullptr ? 0.0f : block.bias[chosen]);
}

// grad_logits may be logits itself: a thread reads its four before it writes them.
template <typename T>
__global__ void __launch_bounds__(kLinearLogprobThreads)
    linear_logprob_block_backward_kernel(LogitsBlock block, const float* lse, const float* grad_logprob, T* grad_logits,
                                         int64_t grad_stride) {
  const int64_t row = blockIdx.x, first = 4 * (static_cast<int64_t>(blockIdx.y) * kLinearLogprobThreads + threadIdx.x);
  if (first >= block.num_ids) return;
  float values[4];
  load_four_biased(block.logits + row * block.stride, block.bias, block.num_ids, first, values);
  const float row_lse = lse[row], grad = grad_logprob[row];
  const int64_t chosen = block.target[row] - block.first_id - first;
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = grad * ((i == chosen ? 1.0f : 0.0f) - expf(values[i] - row_lse));
  T* out = grad_logits + row * grad_stride + first;
  const int64_t left = block.num_ids - first;
  store_four(out, is_aligned_for_four(out), left > 4 ? 4 : static_cast<int>(left), values);
}

inline cudaError_t launch_linear_logprob_block(const LogitsBlock& block, int64_t num_rows, float* state, int64_t state_stride,
                                               cudaStream_t stream) {
  if (num_rows == 0 || block.num_ids == 0) return cudaSuccess;
  return launch(linear_logprob_block_kernel, dim3(static_cast<unsigned>(num_rows)), dim3(kLinearLogprobThreads), stream, block,
                state, state_stride);
}

template <typename T>
inline cudaError_t launch_linear_logprob_block_backward(const LogitsBlock& block, int64_t num_rows, const float* lse,
                                                        const float* grad_logprob, T* grad_logits, int64_t grad_stride,
                                                        cudaStream_t stream) {
  constexpr int64_t kIdsPerBlock = 4 * kLinearLogprobThreads;
  if (num_rows == 0 || block.num_ids == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(num_rows), static_cast<unsigned>((block.num_ids + kIdsPerBlock - 1) / kIdsPerBlock));
  return launch(linear_logprob_block_backward_kernel<T>, grid, dim3(kLinearLogprobThreads), stream, block, lse, grad_logprob,
                grad_logits, grad_stride);
}

template cudaError_t launch_linear_logprob_block_backward(const LogitsBlock&, int64_t, const float*, const float*, float*,
                                                          int64_t, cudaStream_t);
template cudaError_t launch_linear_logprob_block_backward(const LogitsBlock&, int64_t, const float*, const float*, Bf16*,
                                                          int64_t, cudaStream_t);
template cudaError_t launch_linear_logprob_block_backward(const LogitsBlock&, int64_t, const float*, const float*, Fp16*,
                                                          int64_t, cudaStream_t);

}  // namespace hermesflow
