// One row of guided_sample, included once for each instruction set (vector_math.h says what that asks for).
//
// A row is read once, tile by tile. Of each tile only its maximum and mass stay; of the winner so far also its logits and
// its masses, so nothing of the row's length is ever stored.

#include "tile_sampling.h"

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
