// mask_topk: a block a row. Scores become uint32 keys of the same order, and a radix select finds the highest key that is
// masked, eight bits at a time: a histogram of the keys that share the bits found so far, then the digit in which the wanted
// rank falls. Rows of up to kKeptKeys keep their keys in shared memory; longer ones compute them anew for each digit. Bound by
// latency: two barriers a digit.
#pragma once

#include "block.cuh"
#include "../mask_topk.h"

namespace hermesflow {

constexpr int kMaskTopkThreads = 512;
constexpr int kKeptKeys = 8192;
constexpr int kDigits = 256;
constexpr uint32_t kKnownKey = 0xffffffffu;  // above every score's key, +inf's included

// Order-preserving key of a token's score; NaN is the lowest, -0 equals 0.
__device__ __forceinline__ uint32_t mask_key(const MaskTopkArguments& args, int64_t row, int token, float temperature,
                                             int64_t seed, int64_t step) {
  if (args.known[row * args.known_stride + token]) return kKnownKey;
  float score = args.logprob[row * args.logprob_stride + token];
  if (temperature != 0.0f) {
    const Words words = philox(seed, static_cast<uint32_t>(token), step, 0, kMaskStream);
    score -= temperature * logf(-logf(uniform(words.w[0])));
  }
  const uint32_t bits = __float_as_uint(isnan(score) ? -INFINITY : score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// By one warp: the digit in whose bin the rank-th key (from 1) falls, and the rank inside that bin.
__device__ __forceinline__ void find_digit(const int* histogram, int rank, int lane, int* digit, int* rank_inside) {
  constexpr int kBins = kDigits / kWarpSize;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kBins; ++i) sum += histogram[lane * kBins + i];
  int before = warp_inclusive_sum(sum, lane) - sum;
  if (before < rank && rank <= before + sum) {
    int bin = lane * kBins;
    while (before + histogram[bin] < rank) before += histogram[bin++];
    *digit = bin;
    *rank_inside = rank - before;
  }
}

template <bool kKeep>
__global__ void __launch_bounds__(kMaskTopkThreads, 1) mask_topk_kernel(MaskTopkArguments args) {
  __shared__ uint32_t kept[kKeep ? kKeptKeys : 1];
  __shared__ int histograms[4][kDigits];
  __shared__ int num_unknown, digit, rank_inside, end_of_ties;

  const int64_t row = blockIdx.x;
  const int num_tokens = static_cast<int>(args.num_tokens), lane = threadIdx.x % kWarpSize;
  const float temperature = args.temperature_of(row);
  const int64_t seed = args.key.seed(row), step = args.key.step(row);
  const auto key_of = [&](int token) { return kKeep ? kept[token] : mask_key(args, row, token, temperature, seed, step); };

  for (int i = threadIdx.x; i < 4 * kDigits; i += kMaskTopkThreads) histograms[i / kDigits][i % kDigits] = 0;
  if (threadIdx.x == 0) {
    num_unknown = 0;
    end_of_ties = num_tokens;
  }
  __syncthreads();
  int unknown = 0;
  for (int token = threadIdx.x; token < num_tokens; token += kMaskTopkThreads) {
    const uint32_t key = mask_key(args, row, token, temperature, seed, step);
    if (kKeep) kept[token] = key;
    unknown += key != kKnownKey;
    atomicAdd(&histograms[0][key >> 24], 1);
  }
  unknown = warp_sum(unknown);
  if (lane == 0) atomicAdd(&num_unknown, unknown);
  __syncthreads();

  bool* masked = args.masked + row * args.num_tokens;
  const int64_t wanted = args.num_masked[row * args.num_masked_stride];
  const int count = static_cast<int>(wanted < num_unknown ? (wanted > 0 ? wanted : 0) : num_unknown);
  if (count == 0) {
    for (int token = threadIdx.x; token < num_tokens; token += kMaskTopkThreads) masked[token] = false;
    return;
  }

  // The count-th lowest key, from its highest digit down; rank is its rank among the keys that share the digits found.
  uint32_t threshold = 0;
  int rank = count;
#pragma unroll
  for (int d = 0; d < 4; ++d) {
    const int shift = 24 - 8 * d;
    if (d > 0) {
      for (int token = threadIdx.x; token < num_tokens; token += kMaskTopkThreads) {
        const uint32_t key = key_of(token);
        if (key >> (shift + 8) == threshold) atomicAdd(&histograms[d][(key >> shift) & 0xffu], 1);
      }
      __syncthreads();
    }
    if (threadIdx.x < kWarpSize) find_digit(histograms[d], rank, lane, &digit, &rank_inside);
    __syncthreads();
    threshold = threshold << 8 | static_cast<uint32_t>(digit);
    rank = rank_inside;
  }

  // Of the keys equal to the threshold, the first `rank` are masked; where there are more, one warp finds their end.
  const int num_tied = histograms[3][threshold & 0xffu];
  if (num_tied > rank && threadIdx.x < kWarpSize) {
    int left = rank;
    for (int first = 0; left > 0; first += kWarpSize) {
      const int token = first + lane;
      const bool tied = token < num_tokens && key_of(token) == threshold;
      const unsigned votes = __ballot_sync(kFullWarp, tied);
      const int before = __popc(votes & ((1u << lane) - 1u));
      if (tied && before == left - 1) end_of_ties = token + 1;
      left -= __popc(votes);
    }
  }
  __syncthreads();
  for (int token = threadIdx.x; token < num_tokens; token += kMaskTopkThreads) {
    const uint32_t key = key_of(token);
    masked[token] = key < threshold || (key == threshold && token < end_of_ties);
  }
}

inline cudaError_t launch_mask_topk(const MaskTopkArguments& args, int64_t num_rows, cudaStream_t stream) {
  if (num_rows == 0 || args.num_tokens == 0) return cudaSuccess;
  return launch(args.num_tokens <= kKeptKeys ? mask_topk_kernel<true> : mask_topk_kernel<false>,
                dim3(static_cast<unsigned>(num_rows)), dim3(kMaskTopkThreads), stream, args);
}

template __global__ void mask_topk_kernel<true>(MaskTopkArguments);
template __global__ void mask_topk_kernel<false>(MaskTopkArguments);

}  // namespace hermesflow
