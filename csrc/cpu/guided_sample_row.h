// One row of guided_sample, included once for each instruction set (vector_math.h says what that asks for).
//
// A row is read once, tile by tile. Of each tile only its maximum and mass stay; of the winner so far also its logits and
// its masses, so nothing of the row's length is ever stored.

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

static void sample_row(const void* cond, const void* uncond, const Options& options, int64_t seed, int64_t step,
                       int64_t position, int64_t* token, float* logprob) {
  struct Tile {
    float logits[kTile], mass[kTile];
    float max, sum;
    int64_t index;
    uint32_t word;
  } tiles[2];
  Tile* tile = &tiles[0];
  Tile* winner = &tiles[1];
  winner->index = -1;
  float best = -INFINITY, running_max = -INFINITY, running_sum = 0;
  float other[kTile];

  for (int64_t index = 0; index * kTile < options.vocab_size; ++index) {
    const int64_t first = index * kTile;
    const int count = static_cast<int>(std::min<int64_t>(kTile, options.vocab_size - first));
    load_tile(cond, options.dtype, first, count, tile->logits);
    if (options.bias != nullptr)
      for (int i = 0; i < count; ++i) tile->logits[i] += options.bias[first + i];
    if (uncond != nullptr) {
      load_tile(uncond, options.dtype, first, count, other);
      for (int i = 0; i < kTile; ++i) {
        const float value = tile->logits[i];
        // -inf - -inf is NaN; what the condition forbids stays forbidden.
        const float guided = (1 + options.guidance_scale) * value - options.guidance_scale * other[i];
        tile->logits[i] = value == -INFINITY ? value : guided;
      }
    }
    for (int i = 0; i < kTile; ++i) tile->logits[i] *= options.inverse_temperature;

    tile->max = max_of(tile->logits, kTile);
    const float shift = tile->max == -INFINITY ? 0.0f : tile->max;
    tile->sum = tile_mass(tile->logits, shift, tile->mass);
    if (tile->sum == 0) continue;  // nothing but -inf; NaN goes on and makes the row's sum NaN
    if (shift > running_max) {
      running_sum = running_sum * exp_nonpositive(running_max - shift) + tile->sum;
      running_max = shift;
    } else {
      running_sum += tile->sum * exp_nonpositive(shift - running_max);
    }

    float score = shift;
    if (!options.greedy) {
      const Words words = philox(seed, static_cast<uint32_t>(index), step, position, kTokenStream);
      tile->word = words.w[1];
      score = shift + std::log(tile->sum) - std::log(-std::log(uniform(words.w[0])));
    }
    if (score > best) {
      best = score;
      tile->index = index;
      std::swap(tile, winner);
    }
  }

  const float lse = running_max + std::log(running_sum);
  if (!std::isfinite(lse) || winner->index < 0) {
    *token = -1;
    *logprob = NAN;
    return;
  }
  const int inside = options.greedy ? first_equal(winner->logits, winner->max)
                                    : inverse_cdf(winner->mass, uniform(winner->word) * winner->sum);
  *token = winner->index * kTile + inside;
  *logprob = winner->logits[inside] - lse;
}
