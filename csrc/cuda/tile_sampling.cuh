// The rule of kernels/sampling.py for a block that draws from one row. A warp takes 1,024 neighboring ids at a time, eight
// tiles, and holds their logits in registers: 32 a lane, in packs of kPack neighboring ids, 32 neighboring packs a warp. So
// one shift, one Philox and one logarithm serve eight tiles. The winning tile is read once more at the end.
#pragma once

#include "block.cuh"

namespace hermesflow {

constexpr int kSampleTile = 128;  // SAMPLE_TILE of kernels/sampling.py
constexpr int kIdsALane = 32, kIdsATurn = kIdsALane * kWarpSize;
constexpr int kNoTile = 0x7fffffff;

template <int kWarps>
struct TileSamplerShared {
  float best[kWarps], largest[kWarps], total[kWarps];
  int tile[kWarps];
};

struct TileSampler {
  int64_t seed, step, position;
  float inverse_temperature;
  bool greedy;  // the argmax
  // Of the tiles that this lane scored, until publish().
  float best = -INFINITY;
  int best_tile = kNoTile;
  // Until publish() `largest` is the warp's and untempered, and `total` belongs to the tiles that this lane scored.
  LogSumExp lse;

  __device__ __forceinline__ TileSampler(const RowKeys& key, int64_t row, float inverse_temperature, bool greedy)
      : seed(key.seed(row)),
        step(key.step(row)),
        position(key.position(row)),
        inverse_temperature(inverse_temperature),
        greedy(greedy) {}

  // The place in a turn of a lane's logit i.
  template <int kPack>
  static __device__ __forceinline__ int place(int i) {
    const int lane = threadIdx.x % kWarpSize;
    return i / kPack * kPack * kWarpSize + lane * kPack + i % kPack;
  }

  // Called by a whole warp with the untempered logits of eight tiles, which start with `first_tile`; -inf past the vocabulary.
  template <int kPack>
  __device__ __forceinline__ void add(int first_tile, const float (&logits)[kIdsALane]) {
    constexpr int kPacks = kIdsALane / kPack, kLanesATile = kSampleTile / kPack, kTilesAPack = kWarpSize / kLanesATile;
    const int lane = threadIdx.x % kWarpSize;
    float largest = lse.largest;
#pragma unroll
    for (int i = 0; i < kIdsALane; ++i) largest = fmaxf(largest, logits[i]);
    largest = warp_max(largest);

    const float shift = LogSumExp::shift(largest), to_log2 = inverse_temperature * 1.44269504f;
    float sums[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      sums[p] = exp2f((logits[p * kPack] - shift) * to_log2);
#pragma unroll
      for (int i = 1; i < kPack; ++i) sums[p] += exp2f((logits[p * kPack + i] - shift) * to_log2);
    }
    // Sums over a tile's lanes: with each step a lane keeps half of its sums and gives the other half to its partner, until
    // it has one. Four lanes then hold the same tile's sum.
#pragma unroll
    for (int distance = kLanesATile / 2, kept = kPacks / 2; kept > 0; distance /= 2, kept /= 2) {
      const bool upper = lane & distance;
#pragma unroll
      for (int k = 0; k < kept; ++k) {
        const float given = upper ? sums[k] : sums[k + kept];
        sums[k] = (upper ? sums[k + kept] : sums[k]) + __shfl_xor_sync(kFullWarp, given, distance);
      }
    }
    float total = sums[0];
    total += __shfl_xor_sync(kFullWarp, total, 2);
    total += __shfl_xor_sync(kFullWarp, total, 1);

    if (greedy) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        float pack_largest = logits[p * kPack];
#pragma unroll
        for (int i = 1; i < kPack; ++i) pack_largest = fmaxf(pack_largest, logits[p * kPack + i]);
        keep_better(pack_largest, first_tile + p * kTilesAPack + lane / kLanesATile);
      }
    } else {
      const int tile = first_tile + lane % kLanesATile / 4 * kTilesAPack + lane / kLanesATile;
      const Words words = philox(seed, static_cast<uint32_t>(tile), step, position, kTokenStream);
      // Not __logf: near 1 it is off by up to 2^-22, and the logarithm itself may be less.
      const float exponential = -logf(uniform(words.w[0]));
      keep_better(shift * inverse_temperature + __logf(__fdividef(total, exponential)), tile);
    }
    // A side without mass adds nothing; a NaN total stays.
    if (lse.total != 0.0f) lse.total *= exp2f((lse.largest - shift) * to_log2);
    lse.total += total;
    lse.largest = largest;
  }

  // What a warp found, for the block's first warp to collect after a __syncthreads().
  template <int kWarps>
  __device__ __forceinline__ void publish(TileSamplerShared<kWarps>& shared) {
#pragma unroll
    for (int distance = 4; distance < kWarpSize; distance *= 2)
      lse.total += __shfl_xor_sync(kFullWarp, lse.total, distance);
    merge_best(greedy ? 1 : 4);
    if (threadIdx.x % kWarpSize != 0) return;
    const int warp = threadIdx.x / kWarpSize;
    shared.best[warp] = best;
    shared.tile[warp] = best_tile;
    shared.largest[warp] = lse.largest * inverse_temperature;
    shared.total[warp] = lse.total;
  }

  template <int kWarps>
  __device__ __forceinline__ void collect(const TileSamplerShared<kWarps>& shared) {
    static_assert(kWarps <= kWarpSize);
    const int lane = threadIdx.x % kWarpSize;
    best = lane < kWarps ? shared.best[lane] : -INFINITY;
    best_tile = lane < kWarps ? shared.tile[lane] : kNoTile;
    lse.largest = lane < kWarps ? shared.largest[lane] : -INFINITY;
    lse.total = lane < kWarps ? shared.total[lane] : 0.0f;
    lse.merge_warp();
    merge_best(1);
  }

  __device__ __forceinline__ bool has_distribution() const { return isfinite(lse.value()) && best_tile != kNoTile; }

  // Called by one warp with its lanes' tempered logits of the winning tile, four neighboring ones a lane: draws inside it
  // and writes the result.
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
          *token = int64_t{best_tile} * kSampleTile + inside;
          *logprob = logits[i] - lse.value();
        }
      }
    }
  }

 private:
  // A tile with NaN never wins; its row is invalid by its total.
  __device__ __forceinline__ void keep_better(float score, int tile) {
    if (score > best) {
      best = score;
      best_tile = tile;
    }
  }

  // The best of all lanes, whose values repeat every `nearest` lanes; the lower tile on ties.
  __device__ __forceinline__ void merge_best(int nearest) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      if (distance < nearest) break;
      const float other = __shfl_xor_sync(kFullWarp, best, distance);
      const int tile = __shfl_xor_sync(kFullWarp, best_tile, distance);
      const bool wins = other > best || (other == best && tile < best_tile);
      best_tile = wins ? tile : best_tile;
      best = wins ? other : best;
    }
  }
};

}  // namespace hermesflow
