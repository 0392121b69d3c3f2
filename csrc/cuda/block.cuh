// What the CUDA kernels share: launches, loads of fp32, bf16 and fp16, reductions over a warp and a block. No torch headers.
// Written in CUDA's plain subset: static shared memory, full warps, cudaLaunchKernelEx; so the tests can also run the
// kernels on a CPU (tests/csrc/emulator).
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../philox.h"

namespace hermesflow {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// Storage types of bf16 and fp16: bits alone.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Bf16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
__device__ __forceinline__ float to_float(Fp16 value) { return __half2float(__ushort_as_half(value.bits)); }

// Rounded to nearest, ties to even; NaN stays NaN.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ Bf16 from_float<Bf16>(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return {static_cast<uint16_t>((bits >> 16) | 0x0040u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
__device__ __forceinline__ Fp16 from_float<Fp16>(float value) {
  const uint32_t bits = __float_as_uint(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded value in the low bits
    const uint32_t rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | rounded)};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

// Four neighboring values at once; `aligned` says that the address is a multiple of the four values' size.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
};

template <typename T>
__device__ __forceinline__ void load_four(const T* source, bool aligned, int count, float missing, float (&out)[4]) {
  if (aligned && count >= 4) {
    const Four<T> loaded = *reinterpret_cast<const Four<T>*>(source);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = to_float(loaded.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = i < count ? to_float(source[i]) : missing;
  }
}

template <typename T>
__device__ __forceinline__ void store_four(T* target, bool aligned, int count, const float (&values)[4]) {
  if (aligned && count >= 4) {
    Four<T> stored;
#pragma unroll
    for (int i = 0; i < 4; ++i) stored.values[i] = from_float<T>(values[i]);
    *reinterpret_cast<Four<T>*>(target) = stored;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) target[i] = from_float<T>(values[i]);
  }
}

template <typename T>
__device__ __forceinline__ bool is_aligned_for_four(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % (4 * sizeof(T)) == 0;
}

// Neighboring values of 16 bytes, the widest load.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <typename T>
__device__ __forceinline__ bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Pack<T>) == 0;
}

template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* source) {
  return *reinterpret_cast<const Pack<T>*>(source);
}

// 16 bytes as words and value i of them. Of a Pack<Bf16> the compiler takes two instructions for a word's upper value.
template <typename T>
__device__ __forceinline__ Pack<uint32_t> load_words(const T* source) {
  return load_pack(reinterpret_cast<const uint32_t*>(source));
}
template <typename T>
__device__ __forceinline__ T value_of(const Pack<uint32_t>& words, int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(words.values[i]);
  } else {
    return {static_cast<uint16_t>(words.values[i / 2] >> (16 * (i % 2)))};
  }
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, step));
  return value;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

// Sum of the values of this lane and of those before it.
template <typename T>
__device__ __forceinline__ T warp_inclusive_sum(T value, int lane) {
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const T before = __shfl_up_sync(kFullWarp, value, step);
    if (lane >= step) value += before;
  }
  return value;
}

// A maximum and the sum of exp(x - maximum): the running state of a log-sum-exp. max_of_nothing is -inf, its shift 0.
struct LogSumExp {
  float largest = -INFINITY, total = 0.0f;

  static __device__ __forceinline__ float shift(float largest) { return largest == -INFINITY ? 0.0f : largest; }

  __device__ __forceinline__ void merge(float other_largest, float other_total) {
    const float merged = fmaxf(largest, other_largest), by = shift(merged);
    // A side without mass adds nothing; NaN totals go through.
    const float mine = total == 0.0f ? 0.0f : total * expf(largest - by);
    const float others = other_total == 0.0f ? 0.0f : other_total * expf(other_largest - by);
    largest = merged;
    total = mine + others;
  }

  __device__ __forceinline__ void merge_warp() {
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      const float other_largest = __shfl_xor_sync(kFullWarp, largest, step);
      const float other_total = __shfl_xor_sync(kFullWarp, total, step);
      merge(other_largest, other_total);
    }
  }

  __device__ __forceinline__ float value() const { return shift(largest) + logf(total); }
};

}  // namespace hermesflow
