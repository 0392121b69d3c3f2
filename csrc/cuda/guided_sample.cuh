// guided_sample: a block a row, one pass over its logits by the rule of tile_sampling.cuh, so nothing of the row's length is
// stored. Bound by memory: each logit is read once.
#pragma once

#include "tile_sampling.cuh"

namespace hermesflow {

constexpr int kGuidedSampleThreads = 256;

template <typename T>
struct GuidedSampleArguments {
  const T *cond, *uncond;  // uncond: null without guidance
  const float* bias;       // [V] added to cond; null: none
  int64_t cond_stride, uncond_stride;
  int64_t vocab_size;
  float guidance_scale, inverse_temperature;
  RowKeys key;
  int64_t* token;
  float* logprob;
};

// Guided, tempered logits of this lane's four ids of a tile; -inf past the vocabulary.
template <typename T>
__device__ __forceinline__ void load_guided(const T* cond, const T* uncond, const GuidedSampleArguments<T>& args, int64_t first,
                                            float (&logits)[4]) {
  load_four_biased(cond, args.bias, args.vocab_size, first, logits);
  if (uncond != nullptr) {
    float other[4];
    load_four_biased(uncond, nullptr, args.vocab_size, first, other);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float guided = (1 + args.guidance_scale) * logits[i] - args.guidance_scale * other[i];
      // -inf - -inf is NaN; what the condition forbids stays forbidden.
      logits[i] = logits[i] == -INFINITY ? logits[i] : guided;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) logits[i] *= args.inverse_temperature;
}

template <typename T, bool kGreedy>
__global__ void __launch_bounds__(kGuidedSampleThreads) guided_sample_kernel(GuidedSampleArguments<T> args) {
  constexpr int kWarps = kGuidedSampleThreads / kWarpSize;
  __shared__ TileSamplerShared<kWarps> shared;

  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const T* cond = args.cond + row * args.cond_stride;
  const T* uncond = args.uncond == nullptr ? nullptr : args.uncond + row * args.uncond_stride;
  const int64_t num_tiles = (args.vocab_size + kSampleTile - 1) / kSampleTile;
  TileSampler sampler(args.key, row, kGreedy);
  float logits[4];
  for (int64_t tile = warp; tile < num_tiles; tile += kWarps) {
    load_guided(cond, uncond, args, tile * kSampleTile + 4 * lane, logits);
    sampler.add_tile(tile, logits);
  }
  sampler.publish(shared);
  __syncthreads();
  if (warp != 0) return;

  sampler.collect(shared);
  if (sampler.has_distribution()) {
    load_guided(cond, uncond, args, sampler.best_tile * kSampleTile + 4 * lane, logits);
    sampler.write(logits, args.token + row, args.logprob + row);
  } else if (lane == 0) {
    args.token[row] = -1;
    args.logprob[row] = NAN;
  }
}

template <typename T>
inline cudaError_t launch_guided_sample(const GuidedSampleArguments<T>& args, int64_t num_rows, bool greedy, cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  return launch(greedy ? guided_sample_kernel<T, true> : guided_sample_kernel<T, false>,
                dim3(static_cast<unsigned>(num_rows)), dim3(kGuidedSampleThreads), stream, args);
}

template cudaError_t launch_guided_sample(const GuidedSampleArguments<float>&, int64_t, bool, cudaStream_t);
template cudaError_t launch_guided_sample(const GuidedSampleArguments<Bf16>&, int64_t, bool, cudaStream_t);
template cudaError_t launch_guided_sample(const GuidedSampleArguments<Fp16>&, int64_t, bool, cudaStream_t);

}  // namespace hermesflow
