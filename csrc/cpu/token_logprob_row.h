// One row of token_logprob and of its gradient, included once for each instruction set (vector_math.h says what that asks for).
//
// Forward: a block of kBlock logits at a time, which its second reading (after that for the maximum) finds in the first-level
// cache. A block's sums are fp32 lanes of few terms; the row's are fp64, once a block. Backward: one reading, one writing.

// `count` logits from `first` on as fp32, filled up with -inf to whole lanes: the row itself where it needs neither, else in buffer.
static inline const float* load_block(const void* row, Dtype dtype, int64_t first, int count, float* buffer) {
  if (dtype == Dtype::kFloat && count % kLanes == 0) return static_cast<const float*>(row) + first;
  load_floats(row, dtype, first, count, buffer);
  for (int i = count; i % kLanes != 0; ++i) buffer[i] = -INFINITY;
  return buffer;
}

// Adds exp(y) to total and, for the entropy, y exp(y) to weighted, over y = logits - shift.
static inline void add_block(const float* logits, int count, float shift, bool with_entropy, double* total, double* weighted) {
  float totals[kLanes] = {}, weights[kLanes] = {};
  for (const float* next = logits; next < logits + count; next += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float y = next[l] - shift, mass = exp_nonpositive(y);
      totals[l] += mass;
      if (with_entropy) weights[l] += mass * (y < -100.0f ? -100.0f : y);  // there mass is 0, and 0 * -inf would be NaN
    }
  for (int l = 0; l < kLanes; ++l) {
    *total += totals[l];
    *weighted += weights[l];
  }
}

static void forward_row(const void* row, const Options& options, RowSoftmax* out) {
  alignas(64) float buffer[kBlock];
  float largest = -INFINITY;
  double total = 0, weighted = 0;
  for (int64_t first = 0; first < options.vocab_size; first += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, options.vocab_size - first));
    const float* logits = load_block(row, options.dtype, first, count, buffer);
    const float block_largest = max_of(logits, count);
    if (block_largest > largest) {
      if (total != 0) {  // rescaled to the new maximum; from nothing, -inf, there is nothing to rescale
        const double by = static_cast<double>(largest) - block_largest, scale = std::exp(by);
        weighted = scale * (weighted + by * total);
        total *= scale;
      }
      largest = block_largest;
    }
    const float shift = largest == -INFINITY ? 0.0f : largest;  // -inf - -inf would be NaN
    if (options.with_entropy) {
      add_block(logits, count, shift, true, &total, &weighted);
    } else {
      add_block(logits, count, shift, false, &total, &weighted);
    }
  }
  *out = {largest, static_cast<float>(total), static_cast<float>(std::log(total)), static_cast<float>(weighted / total)};
}

// grad * (one_hot(target) - softmax) in the logits' dtype; a target outside the row has no entry.
static void backward_row(const void* row, const Options& options, float largest, float total, float grad, int64_t target,
                         void* grad_row) {
  alignas(64) float buffer[kBlock], grad_buffer[kBlock];
  const float scale = -grad / total;
  for (int64_t first = 0; first < options.vocab_size; first += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, options.vocab_size - first));
    const float* __restrict__ logits = load_block(row, options.dtype, first, count, buffer);
    const bool direct = options.dtype == Dtype::kFloat;
    float* __restrict__ grads = direct ? static_cast<float*>(grad_row) + first : grad_buffer;
    for (int i = 0; i < count; ++i) grads[i] = scale * exp_or_zero(logits[i] - largest);
    if (target >= first && target < first + count) grads[target - first] += grad;
    if (!direct) store_floats(grads, count, grad_row, options.dtype, first);
  }
}
