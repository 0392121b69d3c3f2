// The steps of kernels/sampling.py's rule inside one tile, for the row kernels of the sampling ops: included after
// vector_math.h, under the same terms.

// Logits of one tile to fp32; ids past the row's end become -inf.
static inline void load_tile(const void* row, Dtype dtype, int64_t first, int count, float* out) {
  load_floats(row, dtype, first, count, out);
  for (int i = count; i < kTile; ++i) out[i] = -INFINITY;
}

// mass[i] = exp(logits[i] - shift); returns the sum.
static inline float tile_mass(const float* logits, float shift, float* mass) {
  float lanes[kLanes] = {};
  for (int i = 0; i < kTile; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float value = exp_nonpositive(logits[i + l] - shift);
      mass[i + l] = value;
      lanes[l] += value;
    }
  float sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// First id whose cumulative mass exceeds target; the last id that has mass if rounding leaves none.
static inline int inverse_cdf(const float* mass, float target) {
  float cumulative = 0;
  int last = 0;
  for (int i = 0; i < kTile; ++i) {
    cumulative += mass[i];
    if (cumulative > target) return i;
    if (mass[i] > 0) last = i;
  }
  return last;
}

static inline int first_equal(const float* logits, float value) {
  for (int i = 0; i < kTile; ++i)
    if (logits[i] == value) return i;
  return 0;
}
