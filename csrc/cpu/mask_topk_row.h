// One row of mask_topk, included once for each instruction set (vector_math.h says what that asks for).
//
// Keys are int32 in the order of the scores. The row's threshold is found bit by bit, each by counting the keys below it: 32
// passes over keys that lie in the nearest cache, every one a vector loop, which no branch on a score slows down. Indices are
// 64-bit: Python's -fwrapv makes the compiler prove that 32-bit ones do not wrap, which costs a third of the speed.

constexpr int32_t kKnownKey = std::numeric_limits<int32_t>::max();  // above every score's key, +inf's included
constexpr int kChunk = 64;  // tokens whose noise is drawn at a time

// Order-preserving bits of a score; NaN is the lowest, -0 equals 0.
static inline int32_t order_key(float score) {
  const float ordered = std::isnan(score) ? -INFINITY : score + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &ordered, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Gumbel noise of kChunk tokens from `first` on: philox() of ../philox.h, a lane a block.
static void gumbel_noise(int64_t seed, uint32_t first, int64_t step, float* __restrict__ noise) {
  const uint64_t seed_bits = static_cast<uint64_t>(seed);
  uint32_t key0 = static_cast<uint32_t>(seed_bits), key1 = static_cast<uint32_t>(seed_bits >> 32);
  uint32_t c0[kChunk], c1[kChunk], c2[kChunk], c3[kChunk];
  for (int l = 0; l < kChunk; ++l) {
    c0[l] = first + l;
    c1[l] = static_cast<uint32_t>(step);
    c2[l] = 0;
    c3[l] = kMaskStream;
  }
  for (int round = 0; round < 10; ++round) {
    for (int l = 0; l < kChunk; ++l) {
      const uint64_t product0 = static_cast<uint64_t>(c0[l]) * 0xD2511F53u;
      const uint64_t product1 = static_cast<uint64_t>(c2[l]) * 0xCD9E8D57u;
      c0[l] = static_cast<uint32_t>(product1 >> 32) ^ c1[l] ^ key0;
      c1[l] = static_cast<uint32_t>(product1);
      c2[l] = static_cast<uint32_t>(product0 >> 32) ^ c3[l] ^ key1;
      c3[l] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int l = 0; l < kChunk; ++l) noise[l] = -natural_log(-natural_log(uniform(c0[l])));
}

// Keys of the row's scores, kKnownKey for known tokens; returns the number of unknown tokens.
static int32_t write_keys(const float* __restrict__ logprob, const uint8_t* __restrict__ known, int32_t num_tokens,
                          float temperature, int64_t seed, int64_t step, int32_t* __restrict__ keys) {
  int32_t num_unknown = 0;
  float noise[kChunk] = {};
  for (int64_t first = 0; first < num_tokens; first += kChunk) {
    if (temperature != 0) gumbel_noise(seed, static_cast<uint32_t>(first), step, noise);
    const int64_t count = std::min<int64_t>(kChunk, num_tokens - first);
    for (int64_t l = 0; l < count; ++l) {
      const int32_t key = order_key(logprob[first + l] + temperature * noise[l]);
      keys[first + l] = known[first + l] ? kKnownKey : key;
      num_unknown += !known[first + l];
    }
  }
  return num_unknown;
}

static inline int32_t count_below(const int32_t* keys, int32_t num_tokens, int32_t bound) {
  int32_t count = 0;
  for (int64_t n = 0; n < num_tokens; ++n) count += keys[n] < bound;
  return count;
}

static void mask_row(const MaskTopkArguments& args, int64_t row, int32_t* __restrict__ keys) {
  const int32_t num_tokens = static_cast<int32_t>(args.num_tokens);
  bool* __restrict__ masked = args.masked + row * args.num_tokens;
  const uint8_t* known = reinterpret_cast<const uint8_t*>(args.known) + row * args.known_stride;
  const int32_t num_unknown = write_keys(args.logprob + row * args.logprob_stride, known, num_tokens, args.temperature_of(row),
                                         args.key.seed(row), args.key.step(row), keys);
  const int64_t wanted = args.num_masked[row * args.num_masked_stride];
  const int32_t count = static_cast<int32_t>(std::clamp<int64_t>(wanted, 0, num_unknown));

  // The largest bound that at most count - 1 keys are below: the count-th lowest key. Its bits are found as those of an
  // unsigned number, highest first; flipping the highest one makes it signed.
  uint32_t threshold_bits = 0;
  for (uint32_t bit = 1u << 31; bit != 0 && count > 0; bit >>= 1) {
    const uint32_t higher = threshold_bits | bit;
    if (count_below(keys, num_tokens, static_cast<int32_t>(higher ^ (1u << 31))) < count) threshold_bits = higher;
  }
  const int32_t threshold = static_cast<int32_t>(threshold_bits ^ (1u << 31));
  for (int64_t n = 0; n < num_tokens; ++n) masked[n] = keys[n] < threshold;
  int32_t left = count - count_below(keys, num_tokens, threshold);
  for (int64_t n = 0; left > 0; ++n) {
    if (keys[n] == threshold) {
      masked[n] = true;
      --left;
    }
  }
}
