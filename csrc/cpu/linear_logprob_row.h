// One row of a block of linear_logprob's logits, included once for each instruction set (vector_math.h says what that asks
// for). Tiles of kRowTile logits stay in the first-level cache between their two readings.

// Logits of one tile with the bias; -inf past its end.
static inline void load_biased(const float* logits, const float* bias, int count, float* out) {
  if (bias != nullptr) {
    for (int i = 0; i < count; ++i) out[i] = logits[i] + bias[i];
  } else {
    for (int i = 0; i < count; ++i) out[i] = logits[i];
  }
  for (int i = count; i % kLanes != 0; ++i) out[i] = -INFINITY;
}

static void update_row(const float* logits, const float* bias, int64_t num_ids, RowState* state) {
  float tile[kRowTile];
  for (int64_t first = 0; first < num_ids; first += kRowTile) {
    const int count = static_cast<int>(std::min<int64_t>(kRowTile, num_ids - first));
    load_biased(logits + first, bias == nullptr ? nullptr : bias + first, count, tile);
    const float tile_largest = max_of(tile, count);
    const float largest = tile_largest > state->largest ? tile_largest : state->largest;
    const float shift = largest == -INFINITY ? 0.0f : largest;  // -inf - -inf is NaN
    float totals[kLanes] = {}, weights[kLanes] = {};
    for (int i = 0; i < count; i += kLanes)
      for (int l = 0; l < kLanes; ++l) {
        const float y = tile[i + l] - shift, mass = exp_nonpositive(y);
        totals[l] += mass;
        weights[l] += mass * (y < -100.0f ? -100.0f : y);  // the mass is 0 there, and 0 * -inf is NaN
      }
    if (state->total != 0) {  // what has no mass, its maximum -inf, has nothing to move to the new maximum; NaN has
      const float by = state->largest - shift, scale = std::exp(by);
      // Below -100 the scale is 0; a by near -3e38 would make the product -inf, and 0 * -inf is NaN.
      state->weighted = scale * (state->weighted + std::max(by, -1000.0f) * state->total);
      state->total *= scale;
    }
    for (int l = 0; l < kLanes; ++l) {
      state->total += totals[l];
      state->weighted += weights[l];
    }
    state->largest = largest;
  }
}

// out = grad * (one_hot - exp(logits - lse)); out may be logits. target counts from the block's first id and may lie outside.
static void gradient_row(const float* logits, const float* bias, int64_t num_ids, float lse, float grad, int64_t target,
                         float* out) {
  alignas(64) float tile[kRowTile], masses[kRowTile];
  for (int64_t first = 0; first < num_ids; first += kRowTile) {
    const int count = static_cast<int>(std::min<int64_t>(kRowTile, num_ids - first));
    load_biased(logits + first, bias == nullptr ? nullptr : bias + first, count, tile);
    for (int i = 0; i < count; ++i) masses[i] = -grad * exp_or_zero(tile[i] - lse);
    std::memcpy(out + first, masses, count * sizeof(float));
  }
  if (target >= 0 && target < num_ids) out[target] += grad;
}
