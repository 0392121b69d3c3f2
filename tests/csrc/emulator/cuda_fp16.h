// The conversion of fp16 that csrc/cuda needs, in arithmetic.
#pragma once

#include <cuda_runtime.h>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  // The multiplication moves the exponent's bias and makes subnormals right; infinity and NaN need their exponent set.
  const float scaled = __uint_as_float(magnitude << 13) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : __float_as_uint(scaled);
  return __uint_as_float(bits | (static_cast<uint32_t>(value.bits & 0x8000u) << 16));
}
