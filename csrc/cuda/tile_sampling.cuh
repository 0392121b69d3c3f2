// The rule of kernels/sampling.py for a block that draws from one row: a warp takes one tile of 128 ids at a time, four
// neighboring ids a lane. Of a tile only maximum and mass are used; the winner is read once more at the end.
#pragma once

#include "block.cuh"

namespace hermesflow {

constexpr int kSampleTile = 128;  // SAMPLE_TILE of kernels/sampling.py

template <int kWarps>
struct TileSamplerShared {
  float best[kWarps], largest[kWarps], total[kWarps];
  int64_t tile[kWarps];
};

struct TileSampler {
  int64_t seed, step, position;
  bool greedy;  // the argmax
  float best = -INFINITY;
  int64_t best_tile = -1;
  LogSumExp lse;

  __device__ __forceinline__ TileSampler(const RowKeys& key, int64_t row, bool greedy)
      : seed(key.seed(row)), step(key.step(row)), position(key.position(row)), greedy(greedy) {}

  // Called by a whole warp with its lanes' logits of one tile; -inf past the vocabulary.
  __device__ __forceinline__ void add_tile(int64_t tile, const float (&logits)[4]) {
    const float largest = warp_max(fmaxf(fmaxf(logits[0], logits[1]), fmaxf(logits[2], logits[3])));
    const float shift = LogSumExp::shift(largest);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) total += expf(logits[i] - shift);
    total = warp_sum(total);
    float score = largest;
    if (!greedy) {
      const Words words = philox(seed, static_cast<uint32_t>(tile), step, position, kTokenStream);
      score = shift + logf(total) - logf(-logf(uniform(words.w[0])));
    }
    if (score > best) {  // a tile with NaN never wins; its row is invalid by its total
      best = score;
      best_tile = tile;
    }
    lse.merge(largest, total);
  }

  // What a warp found, for the block's first warp to collect after a __syncthreads().
  template <int kWarps>
  __device__ __forceinline__ void publish(TileSamplerShared<kWarps>& shared) const {
    if (threadIdx.x % kWarpSize != 0) return;
    const int warp = threadIdx.x / kWarpSize;
    shared.best[warp] = best;
    shared.tile[warp] = best_tile;
    shared.largest[warp] = lse.largest;
    shared.total[warp] = lse.total;
  }

  template <int kWarps>
  __device__ __forceinline__ void collect(const TileSamplerShared<kWarps>& shared) {
    static_assert(kWarps <= kWarpSize);
    const int lane = threadIdx.x % kWarpSize;
    best = lane < kWarps ? shared.best[lane] : -INFINITY;
    best_tile = lane < kWarps ? shared.tile[lane] : -1;
    lse.largest = lane < kWarps ? shared.largest[lane] : -INFINITY;
    lse.total = lane < kWarps ? shared.total[lane] : 0.0f;
    lse.merge_warp();
#pragma unroll
    for (int step_size = kWarpSize / 2; step_size > 0; step_size /= 2) {
      const float other = __shfl_xor_sync(kFullWarp, best, step_size);
      const int64_t tile = __shfl_xor_sync(kFullWarp, best_tile, step_size);
      const bool wins = other > best || (other == best && tile >= 0 && (tile < best_tile || best_tile < 0));
      best_tile = wins ? tile : best_tile;
      best = wins ? other : best;
    }
  }

  __device__ __forceinline__ bool has_distribution() const { return isfinite(lse.value()) && best_tile >= 0; }

  // Called by one warp with its lanes' logits of the winning tile: draws inside it and writes the result.
  __device__ __forceinline__ void write(const float (&logits)[4], int64_t* token, float* logprob) const {
    const int lane = threadIdx.x % kWarpSize;
    const float largest = warp_max(fmaxf(fmaxf(logits[0], logits[1]), fmaxf(logits[2], logits[3])));
    int inside = kSampleTile, last = 0;
    if (greedy) {
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
          *token = best_tile * kSampleTile + inside;
          *logprob = logits[i] - lse.value();
        }
      }
    }
  }
};

}  // namespace hermesflow
