// fp32 building blocks of the row kernels: plain C++ that the compiler vectorises. each_instruction_set.h includes this file
// once for each instruction set, inside a namespace of that name. So: no include guard, no includes, no templates, static
// functions only.

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// exp of x <= 0 to about 1 ulp; 0 for -inf and where the result lies below the normal range, NaN for NaN. On [-ln2 / 2, ln2 / 2]
// 1 + r and the terms from r^2 to r^6 that minimise the largest relative error, which is 3e-9.
static inline float exp_nonpositive(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 leaves the rounded quotient in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.38146132608e-3f;
  p = p * r + 8.36870982417e-3f;
  p = p * r + 4.16683873613e-2f;
  p = p * r + 1.66665206898e-1f;
  p = p * r + 0.499999934517f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const float value = p * bits_to_float((bits + 127u) << 23);
  return x < -87.3365402f ? 0.0f : value;  // the last float whose exp is at least 2^-126
}

// exp_nonpositive, 0 below 2^-100: its product with a gradient would be subnormal, which takes a hundred cycles.
static inline float exp_or_zero(float x) {
  const float value = exp_nonpositive(x);
  return x < -69.3147181f ? 0.0f : value;
}

// Natural logarithm within 1 ulp, subnormals included; -inf at 0, NaN below, inf and NaN as they are.
// x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); with s = f / (2 + f), log(1 + f) is 2 atanh(s) = 2 s + s R, where
// R = 2/3 s^2 + 2/5 s^4 + ..., and 2 s is f - f^2 / 2 + s f^2 / 2, of which the first term alone is large.
static inline float natural_log(float x) {
  const bool subnormal = x < 0x1p-126f;
  const float scaled = subnormal ? x * 0x1p23f : x;
  uint32_t bits;
  std::memcpy(&bits, &scaled, sizeof bits);
  bits += 0x3f800000u - 0x3f3504f3u;  // sqrt(1/2) and above carry into the exponent
  const int32_t exponent = static_cast<int32_t>(bits >> 23) - 127;
  const float n = static_cast<float>(subnormal ? exponent - 23 : exponent);
  const float f = bits_to_float((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float s = f / (2.0f + f), z = s * s, half_square = 0.5f * f * f;
  float p = 2.0f / 9;
  p = p * z + 2.0f / 7;
  p = p * z + 2.0f / 5;
  p = p * z + 2.0f / 3;
  // ln2 in two parts; n times the first, which has 16 bits, is exact.
  const float small = s * (half_square + p * z) + n * 9.0580006e-6f;
  const float value = n * 0.69313812f - ((half_square - small) - f);
  return x == INFINITY ? x : x > 0 ? value : x == 0 ? -INFINITY : NAN;
}

static inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  // The multiplication moves the exponent's bias and makes subnormals right; infinity and NaN need their exponent set.
  float value = bits_to_float(magnitude << 13) * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : bits;
  return bits_to_float(bits | (static_cast<uint32_t>(half & 0x8000u) << 16));
}

// n values of a row, from element `first` on, as fp32.
static inline void load_floats(const void* row, Dtype dtype, int64_t first, int n, float* __restrict__ out) {
  if (dtype == Dtype::kFloat) {
    const float* source = static_cast<const float*>(row) + first;
    for (int i = 0; i < n; ++i) out[i] = source[i];
  } else if (dtype == Dtype::kBFloat16) {
    const uint16_t* source = static_cast<const uint16_t*>(row) + first;
    for (int i = 0; i < n; ++i) out[i] = bits_to_float(static_cast<uint32_t>(source[i]) << 16);
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(row) + first;
    for (int i = 0; i < n; ++i) out[i] = half_to_float(source[i]);
  }
}

// Rounded to nearest, ties to even; NaN stays NaN.
static inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x0040u : rounded);
}

static inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below the normal range, adding 0.5 leaves the rounded value in the low bits.
  const float lifted = bits_to_float(magnitude) + 0.5f;
  uint32_t half;
  std::memcpy(&half, &lifted, sizeof half);
  half -= 0x3f000000u;
  half = magnitude >= 0x38800000u ? (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13 : half;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// n fp32 values to a row of dtype, from element `first` on.
static inline void store_floats(const float* __restrict__ values, int n, void* row, Dtype dtype, int64_t first) {
  if (dtype == Dtype::kFloat) {
    float* __restrict__ target = static_cast<float*>(row) + first;
    for (int i = 0; i < n; ++i) target[i] = values[i];
  } else if (dtype == Dtype::kBFloat16) {
    uint16_t* __restrict__ target = static_cast<uint16_t*>(row) + first;
    for (int i = 0; i < n; ++i) target[i] = float_to_bfloat16(values[i]);
  } else {
    uint16_t* __restrict__ target = static_cast<uint16_t*>(row) + first;
    for (int i = 0; i < n; ++i) target[i] = float_to_half(values[i]);
  }
}

// Largest of n values; NaN is passed over.
static inline float max_of(const float* values, int n) {
  float lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = -INFINITY;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const float* next = values + i;  // where int may wrap around (Python builds with -fwrapv), values[i + l] is no vector
#pragma GCC unroll 1  // unrolled, GCC takes the lanes for 16 scalars
    for (int l = 0; l < kLanes; ++l) lanes[l] = next[l] > lanes[l] ? next[l] : lanes[l];
  }
  float value = -INFINITY;
  for (; i < n; ++i) value = values[i] > value ? values[i] : value;
  for (int l = 0; l < kLanes; ++l) value = lanes[l] > value ? lanes[l] : value;
  return value;
}
