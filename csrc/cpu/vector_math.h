// fp32 building blocks of the row kernels: plain C++ that the compiler vectorises. each_instruction_set.h includes this file
// once for each instruction set, inside a namespace of that name. So: no include guard, no includes, no templates, static
// functions only.

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// exp of x <= 0 (or NaN) to about 1 ulp, 0 below the normal range. Polynomial of degree 6 on [-ln2 / 2, ln2 / 2].
static inline float exp_nonpositive(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 leaves the rounded quotient in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const float value = p * bits_to_float((bits + 127u) << 23);
  return x < -87.0f ? 0.0f : value;
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

// Largest of n values; NaN is passed over.
static inline float max_of(const float* values, int n) {
  float lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = -INFINITY;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] = values[i + l] > lanes[l] ? values[i + l] : lanes[l];
  float value = -INFINITY;
  for (; i < n; ++i) value = values[i] > value ? values[i] : value;
  for (int l = 0; l < kLanes; ++l) value = lanes[l] > value ? lanes[l] : value;
  return value;
}
