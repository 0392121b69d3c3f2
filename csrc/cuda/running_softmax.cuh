// The running state of a row's softmax, for the kernels of log-probabilities.
#pragma once

#include "block.cuh"

namespace hermesflow {

// Running softmax of a row's logits: their maximum, and over y = logit - maximum the sums of exp(y) and y exp(y). __expf has a
// relative error of at most 2 + 1.173 |y| ulp (CUDA C++ Programming Guide, intrinsic functions): the more, the less exp(y) is.
template <bool kEntropy>
struct RunningSoftmax {
  float largest = -INFINITY, total = 0.0f, weighted = 0.0f;

  __device__ __forceinline__ void rescale(float new_largest) {
    // From nothing there is nothing to rescale; a NaN total stays.
    if (total != 0.0f) {
      const float by = largest - new_largest, scale = __expf(by);
      // Below -100 the scale is 0; a by near -3e38 would make the product -inf, and 0 * -inf is NaN.
      if (kEntropy) weighted = scale * (weighted + fmaxf(by, -1000.0f) * total);
      total *= scale;
    }
    largest = new_largest;
  }

  template <int kCount>
  __device__ __forceinline__ void add(const float (&logits)[kCount]) {
    float new_largest = largest;
#pragma unroll
    for (int i = 0; i < kCount; ++i) new_largest = fmaxf(new_largest, logits[i]);
    if (new_largest > largest) rescale(new_largest);
    const float shift = LogSumExp::shift(largest);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float y = logits[i] - shift, mass = __expf(y);
      total += mass;
      if (kEntropy) weighted += mass * (y < -100.0f ? -100.0f : y);  // there mass is 0, and 0 * -inf would be NaN
    }
  }

  __device__ __forceinline__ void merge(RunningSoftmax other) {
    const float merged = fmaxf(largest, other.largest);
    rescale(merged);
    other.rescale(merged);
    total += other.total;
    weighted += other.weighted;
  }

  __device__ __forceinline__ void merge_warp() {
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      RunningSoftmax other;
      other.largest = __shfl_xor_sync(kFullWarp, largest, step);
      other.total = __shfl_xor_sync(kFullWarp, total, step);
      if (kEntropy) other.weighted = __shfl_xor_sync(kFullWarp, weighted, step);
      merge(other);
    }
  }
};

}  // namespace hermesflow
