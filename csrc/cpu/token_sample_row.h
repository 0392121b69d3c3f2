// One row of token_sample, included once for each instruction set (vector_math.h says what that asks for).
//
// The row is tempered once into scratch, with the maximum of each tile. Each filter is a lowest kept logit: a cheap bound from
// below leaves few candidates, and a selection among them finds it. Tiles that lie below the bound are not looked at again.

#include "tile_sampling.h"

// A float's place in the order of all floats, and back; NaN aside.
static inline uint32_t to_key(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
static inline float from_key(uint32_t key) { return bits_to_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// Fills scratch.tempered and tile_max; returns the row's maximum, NaN if the row holds NaN.
static float temper_row(const void* logits, const Options& options, float temperature, const Scratch& scratch) {
  float largest = -INFINITY;
  int has_nan = 0;
  for (int64_t index = 0; index < options.num_tiles; ++index) {
    const int64_t first = index * kTile;
    float* tile = scratch.tempered + first;
    load_tile(logits, options.dtype, first, static_cast<int>(std::min<int64_t>(kTile, options.vocab_size - first)), tile);
    for (int i = 0; i < kTile; ++i) {
      tile[i] /= temperature;  // not times its inverse: ids may tie by this very rounding
      has_nan |= tile[i] != tile[i];
    }
    const float tile_max = max_of(tile, kTile);
    scratch.tile_max[index] = tile_max;
    largest = tile_max > largest ? tile_max : largest;
  }
  return has_nan ? NAN : largest;
}

// Copies the tempered logits of at least bound into scratch.candidate; returns their number.
static int64_t gather_candidates(const Options& options, float bound, const Scratch& scratch) {
  int64_t count = 0;
  for (int64_t index = 0; index < options.num_tiles; ++index) {
    if (scratch.tile_max[index] < bound) continue;
    const float* tile = scratch.tempered + index * kTile;
    for (int i = 0; i < kTile; ++i) {
      scratch.candidate[count] = tile[i];
      count += tile[i] >= bound;
    }
  }
  return count;
}

static float lowest_of_top_k(const Options& options, int64_t top_k, const Scratch& scratch) {
  float bound = -INFINITY;
  if (top_k <= options.num_tiles) {
    // As many tiles as top_k reach the top_k-th largest maximum, so the threshold lies no lower.
    std::memcpy(scratch.candidate, scratch.tile_max, options.num_tiles * sizeof(float));
    bound = kth_largest(scratch.candidate, options.num_tiles, top_k);
  }
  const int64_t count = gather_candidates(options, bound, scratch);
  return kth_largest(scratch.candidate, count, top_k);
}

// Sum of exp(logit - largest) over the logits of at least lowest. The masses that do not count are multiplied by 0: of a sum
// of doubles over `counts ? mass : 0` GCC 12.2 for AVX2 drops half.
static double mass_from(const Options& options, float lowest, float largest, const Scratch& scratch) {
  double lanes[kLanes] = {};
  for (int64_t index = 0; index < options.num_tiles; ++index) {
    if (scratch.tile_max[index] < lowest) continue;
    const float* tile = scratch.tempered + index * kTile;
    for (int i = 0; i < kTile; i += kLanes)
      for (int l = 0; l < kLanes; ++l)
        lanes[l] += exp_nonpositive(tile[i + l] - largest) * (tile[i + l] >= lowest ? 1.0f : 0.0f);
  }
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// Sum of the masses whose value lies above the threshold; count is a multiple of kLanes.
static double mass_above(const float* value, const float* mass, int64_t count, float threshold) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < count; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += mass[i + l] * (value[i + l] > threshold ? 1.0f : 0.0f);
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

static float lowest_of_top_p(const Options& options, float top_p, float lowest, float largest, const Scratch& scratch) {
  if (top_p <= 0) return largest;
  const double total = mass_from(options, lowest, largest, scratch);
  // The ids below this bound have less than half of 1 - top_p together, so the threshold lies no lower.
  float bound = largest + static_cast<float>(std::log((1 - top_p) / 2 * total / options.vocab_size));
  bound = lowest > bound ? lowest : bound;
  int64_t count = gather_candidates(options, bound, scratch);
  while (count % kLanes != 0) scratch.candidate[count++] = -INFINITY;
  for (int64_t i = 0; i < count; i += kLanes)
    for (int l = 0; l < kLanes; ++l) scratch.mass[i + l] = exp_nonpositive(scratch.candidate[i + l] - largest);

  // The lowest float above which less than top_p lies: one of the logits.
  uint32_t low = to_key(bound), high = to_key(largest);
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (mass_above(scratch.candidate, scratch.mass, count, from_key(middle)) < top_p * total) high = middle;
    else low = middle + 1;
  }
  return from_key(low);
}

// The lowest logit that the filters keep; largest is finite.
static float lowest_kept(const Options& options, const SamplingSettings& settings, float largest, const Scratch& scratch) {
  float lowest = -INFINITY;
  if (settings.top_k > 0 && settings.top_k < options.vocab_size) lowest = lowest_of_top_k(options, settings.top_k, scratch);
  if (settings.top_p < 1) lowest = lowest_of_top_p(options, settings.top_p, lowest, largest, scratch);
  const float floor = largest + std::log(settings.min_p);
  return floor > lowest ? floor : lowest;
}

static void sample_row(const void* logits, const Options& options, const SamplingSettings& settings, const Scratch& scratch,
                       int64_t seed, int64_t step, int64_t position, int64_t* token, float* logprob) {
  *token = -1;
  *logprob = NAN;
  const bool greedy = settings.temperature == 0;
  const float largest = temper_row(logits, options, greedy ? 1.0f : settings.temperature, scratch);
  if (!std::isfinite(largest)) return;
  const float lowest = greedy ? -INFINITY : lowest_kept(options, settings, largest, scratch);

  struct Tile {
    float kept[kTile], mass[kTile];
    float sum;
    int64_t index;
    uint32_t word;
  } tiles[2];
  Tile* tile = &tiles[0];
  Tile* winner = &tiles[1];
  winner->index = -1;
  float best = -INFINITY, total = 0;
  for (int64_t index = 0; index < options.num_tiles; ++index) {
    const float tile_max = scratch.tile_max[index];
    if (tile_max < lowest || tile_max == -INFINITY) continue;
    const float* tempered = scratch.tempered + index * kTile;
    for (int i = 0; i < kTile; ++i) tile->kept[i] = tempered[i] >= lowest ? tempered[i] : -INFINITY;
    tile->sum = tile_mass(tile->kept, tile_max, tile->mass);
    total += tile->sum * exp_nonpositive(tile_max - largest);

    float score = tile_max;
    if (!greedy) {
      const Words words = philox(seed, static_cast<uint32_t>(index), step, position, kTokenStream);
      tile->word = words.w[1];
      score = tile_max + std::log(tile->sum) - std::log(-std::log(uniform(words.w[0])));
    }
    if (score > best) {
      best = score;
      tile->index = index;
      std::swap(tile, winner);
    }
  }
  if (winner->index < 0) return;  // min_p above 1

  const int inside = greedy ? first_equal(winner->kept, largest)
                            : inverse_cdf(winner->mass, uniform(winner->word) * winner->sum);
  *token = winner->index * kTile + inside;
  *logprob = winner->kept[inside] - (largest + std::log(total));
}
