// guided_sample: a block a row, one pass over its logits. A warp takes one tile of 128 ids at a time, four a lane; of a tile
// only maximum and mass are used, so nothing of the row's length is stored. The winning tile is read once more at the end.
// The rule is that of kernels/sampling.py. Bound by memory: each logit is read once.
#pragma once

#include "block.cuh"

namespace hermesflow {

constexpr int kSampleTile = 128;  // SAMPLE_TILE of kernels/sampling.py
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
  const int64_t left = args.vocab_size - first;
  const int count = left > 4 ? 4 : static_cast<int>(left);
  load_four(cond + first, is_aligned_for_four(cond + first), count, -INFINITY, logits);
  if (args.bias != nullptr) {
    float bias[4];
    load_four(args.bias + first, is_aligned_for_four(args.bias + first), count, 0.0f, bias);
#pragma unroll
    for (int i = 0; i < 4; ++i) logits[i] += bias[i];
  }
  if (uncond != nullptr) {
    float other[4];
    load_four(uncond + first, is_aligned_for_four(uncond + first), count, 0.0f, other);
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
  __shared__ float warp_best[kWarps], warp_largest[kWarps], warp_total[kWarps];
  __shared__ int64_t warp_tile[kWarps];

  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const T* cond = args.cond + row * args.cond_stride;
  const T* uncond = args.uncond == nullptr ? nullptr : args.uncond + row * args.uncond_stride;
  const int64_t seed = args.key.seed(row), step = args.key.step(row), position = args.key.position(row);
  const int64_t num_tiles = (args.vocab_size + kSampleTile - 1) / kSampleTile;

  float best = -INFINITY;
  int64_t best_tile = -1;
  LogSumExp lse;
  for (int64_t tile = warp; tile < num_tiles; tile += kWarps) {
    float logits[4];
    load_guided(cond, uncond, args, tile * kSampleTile + 4 * lane, logits);
    float largest = fmaxf(fmaxf(logits[0], logits[1]), fmaxf(logits[2], logits[3]));
    largest = warp_max(largest);
    const float shift = LogSumExp::shift(largest);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) total += expf(logits[i] - shift);
    total = warp_sum(total);
    float score = largest;
    if (!kGreedy) {
      const Words words = philox(seed, static_cast<uint32_t>(tile), step, position, kTokenStream);
      score = shift + logf(total) - logf(-logf(uniform(words.w[0])));
    }
    if (score > best) {  // a tile with NaN never wins; its row is invalid by its total
      best = score;
      best_tile = tile;
    }
    lse.merge(largest, total);
  }
  if (lane == 0) {
    warp_best[warp] = best;
    warp_tile[warp] = best_tile;
    warp_largest[warp] = lse.largest;
    warp_total[warp] = lse.total;
  }
  __syncthreads();
  if (warp != 0) return;

  best_tile = -1;
  best = -INFINITY;
  lse = LogSumExp();
  for (int w = 0; w < kWarps; ++w) {
    lse.merge(warp_largest[w], warp_total[w]);
    const bool wins = warp_best[w] > best || (warp_best[w] == best && warp_tile[w] >= 0 && warp_tile[w] < best_tile);
    best_tile = wins ? warp_tile[w] : best_tile;
    best = wins ? warp_best[w] : best;
  }
  const float row_lse = lse.value();
  if (!isfinite(row_lse) || best_tile < 0) {
    if (lane == 0) {
      args.token[row] = -1;
      args.logprob[row] = NAN;
    }
    return;
  }

  float logits[4];
  load_guided(cond, uncond, args, best_tile * kSampleTile + 4 * lane, logits);
  const float largest = warp_max(fmaxf(fmaxf(logits[0], logits[1]), fmaxf(logits[2], logits[3])));
  int inside = kSampleTile, last = 0;
  if (kGreedy) {
#pragma unroll
    for (int i = 3; i >= 0; --i)
      if (logits[i] == largest) inside = 4 * lane + i;
  } else {
    const float shift = LogSumExp::shift(largest);
    float mass[4], up_to[4], lane_mass = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mass[i] = expf(logits[i] - shift);
      lane_mass += mass[i];
      up_to[i] = lane_mass;
    }
    const float up_to_lane = warp_inclusive_sum(lane_mass, lane);
    const float total = __shfl_sync(kFullWarp, up_to_lane, kWarpSize - 1);
    const Words words = philox(seed, static_cast<uint32_t>(best_tile), step, position, kTokenStream);
    const float target = uniform(words.w[1]) * total;
#pragma unroll
    for (int i = 3; i >= 0; --i) {
      // A scan adds in another order for each id, so that rounding could let one without mass pass.
      if (mass[i] > 0 && up_to_lane - lane_mass + up_to[i] > target) inside = 4 * lane + i;
      if (mass[i] > 0) last = max(last, 4 * lane + i);
    }
  }
  // The first id that passes; rounding may leave none, then the last id that has mass.
#pragma unroll
  for (int step_size = kWarpSize / 2; step_size > 0; step_size /= 2) {
    inside = min(inside, __shfl_xor_sync(kFullWarp, inside, step_size));
    last = max(last, __shfl_xor_sync(kFullWarp, last, step_size));
  }
  inside = inside == kSampleTile ? last : inside;
  if (lane == inside / 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i == inside % 4) {
        args.token[row] = best_tile * kSampleTile + inside;
        args.logprob[row] = logits[i] - row_lse;
      }
    }
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
