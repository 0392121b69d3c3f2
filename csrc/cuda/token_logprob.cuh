// token_logprob, forward and backward. Bound by memory: each logit is read once a pass, in 16-byte packs, and no probability is
// stored. Rows need not be aligned (58,498 bf16 logits are not): the few logits before a row's first 16-byte boundary and after
// its last are read one by one.
#pragma once

#include "running_softmax.cuh"

namespace hermesflow {

constexpr int kTokenLogprobThreads = 256;
constexpr int kForwardPacks = 2;   // packs a thread reads before it needs them
constexpr int kBackwardPacks = 4;  // packs a thread takes of a row: a block takes 256 * 4 * 16 bytes of it

template <typename T>
struct TokenLogprobRows {
  const T* logits;
  int64_t logits_stride;  // between rows
  const int64_t* target;
  int64_t target_stride;
  int64_t num_rows, vocab_size, ignore_index;
};

struct TokenLogprobResults {
  float *logprob, *largest, *total, *entropy;  // total: sum of exp(logit - largest); entropy may be null
};

template <typename T>
struct TokenLogprobGradient {
  const float *largest, *total, *grad_logprob;
  int64_t grad_logprob_stride;
  T* grad_logits;  // rows without gaps
};

// A row as `head` single values, `num_packs` packs from a 16-byte boundary on, and single values up to its end.
template <typename T>
struct PackedRow {
  int64_t head, num_packs, num_singles, size;

  __device__ __forceinline__ PackedRow(const T* row, int64_t size) : size(size) {
    constexpr int kSize = Pack<T>::kSize;
    const int64_t to_boundary = (16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T);
    head = min(to_boundary, size);
    num_packs = (size - head) / kSize;
    num_singles = size - num_packs * kSize;
  }

  // Position of the n-th single value: first those of the head.
  __device__ __forceinline__ int64_t single(int64_t n) const { return n < head ? n : size - num_singles + n; }
  // Position of a pack's first value.
  __device__ __forceinline__ int64_t pack(int64_t n) const { return head + n * Pack<T>::kSize; }
};

// A block a row.
template <typename T, bool kEntropy>
__global__ void __launch_bounds__(kTokenLogprobThreads) token_logprob_kernel(TokenLogprobRows<T> args, TokenLogprobResults out) {
  constexpr int kWarps = kTokenLogprobThreads / kWarpSize, kSize = Pack<T>::kSize;
  __shared__ float warp_largest[kWarps], warp_total[kWarps], warp_weighted[kWarps];

  const int64_t row = blockIdx.x;
  const int thread = threadIdx.x;
  const int64_t target = args.target[row * args.target_stride];
  if (target == args.ignore_index) {
    if (thread == 0) {
      out.logprob[row] = out.largest[row] = out.total[row] = 0.0f;
      if (kEntropy) out.entropy[row] = 0.0f;
    }
    return;
  }
  const T* logits = args.logits + row * args.logits_stride;
  const PackedRow<T> packed(logits, args.vocab_size);

  RunningSoftmax<kEntropy> softmax;
  if (thread < packed.num_singles) {
    const float single[1] = {to_float(logits[packed.single(thread)])};
    softmax.add(single);
  }
  int64_t pack = thread;
  for (; pack + (kForwardPacks - 1) * kTokenLogprobThreads < packed.num_packs; pack += kForwardPacks * kTokenLogprobThreads) {
    float values[kForwardPacks * kSize];
    Pack<T> loaded[kForwardPacks];
#pragma unroll
    for (int p = 0; p < kForwardPacks; ++p) loaded[p] = load_pack(logits + packed.pack(pack + p * kTokenLogprobThreads));
#pragma unroll
    for (int p = 0; p < kForwardPacks; ++p)
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[p * kSize + i] = to_float(loaded[p].values[i]);
    softmax.add(values);
  }
  for (; pack < packed.num_packs; pack += kTokenLogprobThreads) {
    float values[kSize];
    const Pack<T> loaded = load_pack(logits + packed.pack(pack));
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = to_float(loaded.values[i]);
    softmax.add(values);
  }

  softmax.merge_warp();
  if (thread % kWarpSize == 0) {
    warp_largest[thread / kWarpSize] = softmax.largest;
    warp_total[thread / kWarpSize] = softmax.total;
    warp_weighted[thread / kWarpSize] = softmax.weighted;
  }
  __syncthreads();
  if (thread != 0) return;
  for (int w = 1; w < kWarps; ++w) softmax.merge({warp_largest[w], warp_total[w], warp_weighted[w]});
  const bool in_range = target >= 0 && target < args.vocab_size;
  const float chosen = in_range ? to_float(logits[target]) : NAN, log_total = logf(softmax.total);
  out.logprob[row] = (chosen - softmax.largest) - log_total;
  out.largest[row] = softmax.largest;
  out.total[row] = softmax.total;
  if (kEntropy) out.entropy[row] = log_total - softmax.weighted / softmax.total;
}

// grad_logits = grad * (one_hot(target) - softmax): a block takes kBackwardPacks packs a thread of one row.
template <typename T>
__global__ void __launch_bounds__(kTokenLogprobThreads)
    token_logprob_backward_kernel(TokenLogprobRows<T> args, TokenLogprobGradient<T> in, unsigned blocks_a_row) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t row = blockIdx.x / blocks_a_row;
  const int64_t first_pack = int64_t{blockIdx.x % blocks_a_row} * kBackwardPacks * kTokenLogprobThreads + threadIdx.x;
  const int64_t target = args.target[row * args.target_stride];
  const T* logits = args.logits + row * args.logits_stride;
  T* grads = in.grad_logits + row * args.vocab_size;
  const PackedRow<T> packed(grads, args.vocab_size);
  const bool has_single = first_pack < packed.num_singles;  // singles go to the threads of the row's first packs

  if (target == args.ignore_index) {
    if (has_single) grads[packed.single(first_pack)] = from_float<T>(0.0f);
#pragma unroll
    for (int p = 0; p < kBackwardPacks; ++p) {
      const int64_t pack = first_pack + p * kTokenLogprobThreads;
      if (pack < packed.num_packs) *reinterpret_cast<Pack<T>*>(grads + packed.pack(pack)) = Pack<T>{};
    }
    return;
  }

  const float largest = in.largest[row], grad = in.grad_logprob[row * in.grad_logprob_stride], scale = -grad / in.total[row];
  if (has_single) {
    const int64_t id = packed.single(first_pack);
    grads[id] = from_float<T>(scale * __expf(to_float(logits[id]) - largest) + (id == target ? grad : 0.0f));
  }
  // Logits and gradient lie alike in memory, unless the logits are a view.
  const bool alike = reinterpret_cast<uintptr_t>(logits + packed.head) % 16 == 0;
  Pack<T> loaded[kBackwardPacks];
#pragma unroll
  for (int p = 0; p < kBackwardPacks; ++p) {
    const int64_t pack = first_pack + p * kTokenLogprobThreads;
    if (pack >= packed.num_packs) continue;
    if (alike) {
      loaded[p] = load_pack(logits + packed.pack(pack));
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) loaded[p].values[i] = logits[packed.pack(pack) + i];
    }
  }
#pragma unroll
  for (int p = 0; p < kBackwardPacks; ++p) {
    const int64_t pack = first_pack + p * kTokenLogprobThreads;
    if (pack >= packed.num_packs) continue;
    const int64_t from_target = packed.pack(pack) - target;
    float values[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = scale * __expf(to_float(loaded[p].values[i]) - largest);
    if (from_target <= 0 && from_target > -kSize) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[i] += from_target == -i ? grad : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) loaded[p].values[i] = from_float<T>(values[i]);
    *reinterpret_cast<Pack<T>*>(grads + packed.pack(pack)) = loaded[p];
  }
}

template <typename T>
inline cudaError_t launch_token_logprob(const TokenLogprobRows<T>& args, const TokenLogprobResults& out, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  return launch(out.entropy != nullptr ? token_logprob_kernel<T, true> : token_logprob_kernel<T, false>,
                dim3(static_cast<unsigned>(args.num_rows)), dim3(kTokenLogprobThreads), stream, args, out);
}

template <typename T>
inline cudaError_t launch_token_logprob_backward(const TokenLogprobRows<T>& args, const TokenLogprobGradient<T>& in,
                                                 cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  constexpr int64_t kIds = int64_t{kTokenLogprobThreads} * kBackwardPacks * Pack<T>::kSize;
  const int64_t blocks_a_row = (args.vocab_size + kIds - 1) / kIds;
  return launch(token_logprob_backward_kernel<T>, dim3(static_cast<unsigned>(args.num_rows * blocks_a_row)),
                dim3(kTokenLogprobThreads), stream, args, in, static_cast<unsigned>(blocks_a_row));
}

template cudaError_t launch_token_logprob(const TokenLogprobRows<float>&, const TokenLogprobResults&, cudaStream_t);
template cudaError_t launch_token_logprob(const TokenLogprobRows<Bf16>&, const TokenLogprobResults&, cudaStream_t);
template cudaError_t launch_token_logprob(const TokenLogprobRows<Fp16>&, const TokenLogprobResults&, cudaStream_t);
template cudaError_t launch_token_logprob_backward(const TokenLogprobRows<float>&, const TokenLogprobGradient<float>&, cudaStream_t);
template cudaError_t launch_token_logprob_backward(const TokenLogprobRows<Bf16>&, const TokenLogprobGradient<Bf16>&, cudaStream_t);
template cudaError_t launch_token_logprob_backward(const TokenLogprobRows<Fp16>&, const TokenLogprobGradient<Fp16>&, cudaStream_t);

}  // namespace hermesflow
