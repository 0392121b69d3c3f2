// token_sample on the CPU: rows in parallel, each without a sort (token_sample_row.h).
#include <functional>
#include <memory>

#include "row_kernels.h"

namespace hermesflow {
namespace {

constexpr int64_t kParallelGrain = 32768;  // logits a task, so that a thread's start is paid back

struct Options {
  int64_t vocab_size, num_tiles;
  Dtype dtype;
};

// A thread's working memory, fp32.
struct Scratch {
  float* tempered;          // [num_tiles, kTile]: logits / temperature, -inf past the vocabulary
  float* tile_max;          // [num_tiles]
  float *candidate, *mass;  // each [num_tiles, kTile], filled as far as a filter needs
};

// k-th largest of n values without NaN, 1 <= k <= n; reorders them. Outside the row kernels, for no template may be compiled
// for an instruction set of its own.
float kth_largest(float* values, int64_t n, int64_t k) {
  std::nth_element(values, values + (k - 1), values + n, std::greater<float>());
  return values[k - 1];
}

#define HERMESFLOW_ROW "token_sample_row.h"
#include "each_instruction_set.h"

std::tuple<at::Tensor, at::Tensor> token_sample(const at::Tensor& logits_in, const at::Tensor& temperature,
                                                const at::Tensor& top_k, const at::Tensor& top_p, const at::Tensor& min_p,
                                                const at::Tensor& seed, const at::Tensor& step,
                                                const at::Tensor& position) {
  const RowSettings settings = check_token_sample(logits_in, temperature, top_k, top_p, min_p);
  const int64_t num_rows = logits_in.size(0), vocab_size = logits_in.size(1);
  const RowKeys keys = row_keys("token_sample", logits_in, seed, step, position);

  const at::Tensor logits = with_unit_column_stride(logits_in);
  at::Tensor token = at::empty({num_rows}, logits.options().dtype(at::kLong));
  at::Tensor logprob = at::empty({num_rows}, logits.options().dtype(at::kFloat));
  const Options options{vocab_size, (vocab_size + kTile - 1) / kTile, to_dtype("token_sample", logits.scalar_type())};
  int64_t* tokens = token.mutable_data_ptr<int64_t>();
  float* logprobs = logprob.mutable_data_ptr<float>();
  const auto sample_row = HERMESFLOW_PICK(sample_row);

  at::parallel_for(0, num_rows, std::max<int64_t>(1, kParallelGrain / vocab_size), [&](int64_t begin, int64_t end) {
    const int64_t padded = options.num_tiles * kTile;
    const std::unique_ptr<float[]> memory(new float[3 * padded + options.num_tiles]);
    const Scratch scratch{memory.get(), memory.get() + 3 * padded, memory.get() + padded, memory.get() + 2 * padded};
    for (int64_t row = begin; row < end; ++row) {
      sample_row(row_pointer(logits, row), options, settings.row(row), scratch, keys.seed(row), keys.step(row),
                 keys.position(row), tokens + row, logprobs + row);
    }
  });
  return {token, logprob};
}

}  // namespace

TORCH_LIBRARY_IMPL(hermesflow, CPU, library) { library.impl("token_sample", &token_sample); }

}  // namespace hermesflow
