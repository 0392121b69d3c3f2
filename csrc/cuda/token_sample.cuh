// token_sample: a block a row, without a sort. Each filter is a lowest kept logit, found by radix selection: a histogram in
// shared memory over an interval of the floats' order names the bin that holds it, and that bin is the next interval; three
// passes at most. top_k adds 1 an id, top_p its mass in fixed point, whose sum does not depend on the order of the atomics.
// Then one pass by the rule of tile_sampling.cuh. The row is read up to eight times, all but the first from L2.
#pragma once

#include "../sampling_settings.h"
#include "tile_sampling.cuh"

namespace hermesflow {

constexpr int kTokenSampleThreads = 1024;
constexpr int kTokenSampleWarps = kTokenSampleThreads / kWarpSize;
static_assert(kTokenSampleWarps == kWarpSize);  // a value a warp is a value a lane
constexpr int kBinBits = 11, kNumBins = 1 << kBinBits;

template <typename T>
struct TokenSampleArguments {
  const T* logits;
  int64_t stride, vocab_size;
  float mass_scale;  // a power of 2: the masses of a whole row, each at most this, fit 63 bits
  RowSettings settings;
  RowKeys key;
  int64_t* token;
  float* logprob;
};

struct TokenSampleShared {
  // 64-bit sums as two words, for atomics on 32 bits are native in shared memory.
  uint32_t bin_low[kNumBins], bin_high[kNumBins];
  uint64_t warp_sum[kTokenSampleWarps];
  float warp_max[kTokenSampleWarps], warp_min[kTokenSampleWarps];
  uint32_t found_bin;
  uint64_t found_above;
  TileSamplerShared<kTokenSampleWarps> sampler;
};

// A float's place in the order of all floats, and back; NaN aside.
__device__ __forceinline__ uint32_t to_key(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 becomes 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

template <typename T>
struct TemperedRow {
  const T* logits;
  int64_t vocab_size;
  float temperature;

  // Four neighboring tempered logits; -inf past the vocabulary.
  __device__ __forceinline__ void load(int64_t first, float (&out)[4]) const {
    const int64_t left = vocab_size - first;
    const int count = left > 4 ? 4 : static_cast<int>(left);
    load_four(logits + first, is_aligned_for_four(logits + first), count, -INFINITY, out);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] /= temperature;  // not times its inverse: ids may tie by this very rounding
  }

  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit&& visit) const {
    for (int64_t first = 4 * threadIdx.x; first < vocab_size; first += 4 * kTokenSampleThreads) {
      float values[4];
      load(first, values);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (first + i < vocab_size) visit(values[i]);
    }
  }
};

// Largest and smallest logit of the row to every thread; NaN both if the row holds NaN.
template <typename T>
__device__ void find_range(const TemperedRow<T>& row, TokenSampleShared& shared, float& largest, float& smallest) {
  largest = -INFINITY;
  smallest = INFINITY;
  bool has_nan = false;
  row.for_each([&](float value) {
    largest = fmaxf(largest, value);
    smallest = fminf(smallest, value);
    has_nan = has_nan || value != value;
  });
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  largest = warp_max(largest);
  smallest = -warp_max(-smallest);
  if (lane == 0) {
    shared.warp_max[warp] = largest;
    shared.warp_min[warp] = smallest;
  }
  has_nan = __syncthreads_or(has_nan);
  largest = has_nan ? NAN : warp_max(shared.warp_max[lane]);
  smallest = has_nan ? NAN : -warp_max(-shared.warp_min[lane]);
}

// Sum of the values of all threads before this one; total is that of the block.
__device__ __forceinline__ uint64_t block_exclusive_sum(uint64_t value, TokenSampleShared& shared, uint64_t& total) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const uint64_t up_to = warp_inclusive_sum(value, lane);
  if (lane == kWarpSize - 1) shared.warp_sum[warp] = up_to;
  __syncthreads();
  const uint64_t warps_up_to = warp_inclusive_sum(shared.warp_sum[lane], lane);
  total = __shfl_sync(kFullWarp, warps_up_to, kWarpSize - 1);
  const uint64_t warps_before = __shfl_sync(kFullWarp, warps_up_to, warp == 0 ? 0 : warp - 1);
  return (warp == 0 ? 0 : warps_before) + up_to - value;
}

// The logit above which less than `target` lies and down to which at least that lies, among those from lowest to largest.
// By count, target is top_k; by mass, it is top_p of the mass of them all.
template <bool kByMass, typename T>
__device__ float select(const TemperedRow<T>& row, float lowest, float largest, int64_t top_k, float top_p, float mass_scale,
                        TokenSampleShared& shared) {
  constexpr int kBinsAThread = kNumBins / kTokenSampleThreads;
  uint32_t low = to_key(lowest), high = to_key(largest);
  uint64_t target = kByMass ? 0 : static_cast<uint64_t>(top_k);
  for (bool first = true;; first = false) {
    const int shift = max(0, 32 - __clz(static_cast<int>(high - low)) - kBinBits);
    __syncthreads();  // until all have read the last pass's result
    for (int bin = threadIdx.x; bin < kNumBins; bin += kTokenSampleThreads) shared.bin_low[bin] = shared.bin_high[bin] = 0;
    __syncthreads();
    row.for_each([&](float value) {
      const uint32_t key = to_key(value);
      if (key < low || key > high) return;
      const uint32_t bin = (key - low) >> shift;
      const uint64_t weight = kByMass ? static_cast<uint64_t>(expf(value - largest) * mass_scale + 0.5f) : 1;
      const uint32_t weight_low = static_cast<uint32_t>(weight);
      if (weight_low != 0) {
        const uint32_t before = atomicAdd(&shared.bin_low[bin], weight_low);
        const uint32_t carry = before + weight_low < before;
        if (carry != 0) atomicAdd(&shared.bin_high[bin], carry);
      }
      const uint32_t weight_high = static_cast<uint32_t>(weight >> 32);
      if (weight_high != 0) atomicAdd(&shared.bin_high[bin], weight_high);
    });
    __syncthreads();

    // Thread 0 takes the highest bins.
    const int top_bin = kNumBins - 1 - kBinsAThread * threadIdx.x;
    uint64_t sums[kBinsAThread], sum = 0, total;
#pragma unroll
    for (int i = 0; i < kBinsAThread; ++i) {
      sums[i] = static_cast<uint64_t>(shared.bin_high[top_bin - i]) << 32 | shared.bin_low[top_bin - i];
      sum += sums[i];
    }
    uint64_t above = block_exclusive_sum(sum, shared, total);
    if (kByMass && first) {
      const double wanted = ceil(static_cast<double>(top_p) * static_cast<double>(total));
      target = wanted > 1 ? static_cast<uint64_t>(wanted) : 1;
    }
#pragma unroll
    for (int i = 0; i < kBinsAThread; ++i) {
      if (above < target && target <= above + sums[i]) {
        shared.found_bin = top_bin - i;
        shared.found_above = above;
      }
      above += sums[i];
    }
    __syncthreads();
    low += shared.found_bin << shift;
    if (shift == 0) return from_key(low);
    high = min(high, low + ((1u << shift) - 1));
    target -= shared.found_above;
  }
}

template <typename T>
__global__ void __launch_bounds__(kTokenSampleThreads, 1) token_sample_kernel(TokenSampleArguments<T> args) {
  __shared__ TokenSampleShared shared;

  const int64_t index = blockIdx.x;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const SamplingSettings settings = args.settings.row(index);
  const bool greedy = settings.temperature == 0;
  const TemperedRow<T> row{args.logits + index * args.stride, args.vocab_size, greedy ? 1.0f : settings.temperature};

  float lowest = -INFINITY;
  if (!greedy) {
    float largest, smallest;
    find_range(row, shared, largest, smallest);
    if (isfinite(largest)) {  // else the row has no distribution, which the draw finds
      if (settings.top_k > 0 && settings.top_k < args.vocab_size)
        lowest = select<false>(row, smallest, largest, settings.top_k, 0.0f, 0.0f, shared);
      if (settings.top_p < 1)
        lowest = select<true>(row, fmaxf(lowest, smallest), largest, 0, settings.top_p, args.mass_scale, shared);
      lowest = fmaxf(lowest, largest + logf(settings.min_p));
    }
  }

  TileSampler sampler(args.key, index, 1.0f, greedy);
  const auto load_kept = [&](int64_t first, float* logits) {
    float loaded[4];
    row.load(first, loaded);
#pragma unroll
    for (int i = 0; i < 4; ++i) logits[i] = loaded[i] < lowest ? -INFINITY : loaded[i];  // NaN stays
  };
  for (int64_t first = warp * kIdsATurn; first < args.vocab_size; first += kTokenSampleWarps * kIdsATurn) {
    float logits[kIdsALane];
#pragma unroll
    for (int i = 0; i < kIdsALane; i += 4) load_kept(first + TileSampler::place<4>(i), logits + i);
    sampler.add<4>(static_cast<int>(first / kSampleTile), logits);
  }
  sampler.publish(shared.sampler);
  __syncthreads();
  if (warp != 0) return;

  sampler.collect(shared.sampler);
  if (sampler.has_distribution()) {
    float logits[4];
    load_kept(int64_t{sampler.best_tile} * kSampleTile + 4 * lane, logits);
    sampler.write(logits, args.token + index, args.logprob + index);
  } else if (lane == 0) {
    args.token[index] = -1;
    args.logprob[index] = NAN;
  }
}

template <typename T>
inline cudaError_t launch_token_sample(TokenSampleArguments<T> args, int64_t num_rows, cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  int vocab_bits = 0;
  while (args.vocab_size >> vocab_bits != 0) ++vocab_bits;
  args.mass_scale = ldexpf(1.0f, 62 - vocab_bits);
  return launch(token_sample_kernel<T>, dim3(static_cast<unsigned>(num_rows)), dim3(kTokenSampleThreads), stream, args);
}

template cudaError_t launch_token_sample(TokenSampleArguments<float>, int64_t, cudaStream_t);
template cudaError_t launch_token_sample(TokenSampleArguments<Bf16>, int64_t, cudaStream_t);
template cudaError_t launch_token_sample(TokenSampleArguments<Fp16>, int64_t, cudaStream_t);

}  // namespace hermesflow
