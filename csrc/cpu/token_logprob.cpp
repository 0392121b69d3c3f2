// token_logprob on the CPU, forward and backward: rows in parallel, each in one pass (token_logprob_row.h).
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "row_kernels.h"

namespace hermesflow {
namespace {

constexpr int64_t kParallelGrain = 32768;  // logits a task, so that a thread's start is paid back
constexpr int kBlock = 1024;               // logits at a time: 4 KiB, a whole number of lanes

struct Options {
  int64_t vocab_size;
  Dtype dtype;
  bool with_entropy;
};

// Of one row: its maximum, the sum of exp(y) over y = logit - maximum, its logarithm, and the mean of y under the softmax.
struct RowSoftmax {
  float largest, total, log_total, mean;
};

#define HERMESFLOW_ROW "token_logprob_row.h"
#include "each_instruction_set.h"

template <typename Run>
void for_each_row(int64_t num_rows, int64_t vocab_size, Run&& run) {
  at::parallel_for(0, num_rows, std::max<int64_t>(1, kParallelGrain / vocab_size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) run(row);
  });
}

float float_at(const void* row, Dtype dtype, int64_t index) {
  float value;
  portable::load_floats(row, dtype, index, 1, &value);
  return value;
}

// Asks for large pages behind a large new tensor: its page faults, 4 KiB at a time, take most of the backward pass's time. From
// 32 MiB on glibc gives it a mapping of its own, so that the advice ends with the tensor.
void advise_large_pages(const at::Tensor& fresh) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (fresh.nbytes() < 16 * kPage) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(fresh.const_data_ptr()), end = (start + fresh.nbytes()) / kPage * kPage;
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // where it is refused, small pages serve
#endif
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> token_logprob(const at::Tensor& logits_in, const at::Tensor& target,
                                                                         int64_t ignore_index, bool return_entropy) {
  const int64_t num_rows = check_token_logprob(logits_in, target);
  const Options options{logits_in.size(1), to_dtype("token_logprob", logits_in.scalar_type()), return_entropy};
  const at::Tensor logits = with_unit_column_stride(logits_in);
  const auto row_values = [&](int64_t length) { return at::zeros({length}, logits.options().dtype(at::kFloat)); };
  at::Tensor logprob = row_values(num_rows), largest = row_values(num_rows), total = row_values(num_rows);
  at::Tensor entropy = row_values(return_entropy ? num_rows : 0);
  const int64_t* targets = target.const_data_ptr<int64_t>();
  float *logprobs = logprob.mutable_data_ptr<float>(), *largests = largest.mutable_data_ptr<float>();
  float *totals = total.mutable_data_ptr<float>(), *entropies = entropy.mutable_data_ptr<float>();
  const auto forward_row = HERMESFLOW_PICK(forward_row);

  for_each_row(num_rows, options.vocab_size, [&](int64_t row) {
    const int64_t id = targets[row * target.stride(0)];
    if (id == ignore_index) return;
    RowSoftmax softmax;
    forward_row(row_pointer(logits, row), options, &softmax);
    const bool in_range = id >= 0 && id < options.vocab_size;
    const float chosen = in_range ? float_at(row_pointer(logits, row), options.dtype, id) : NAN;
    logprobs[row] = (chosen - softmax.largest) - softmax.log_total;
    largests[row] = softmax.largest;
    totals[row] = softmax.total;
    if (return_entropy) entropies[row] = softmax.log_total - softmax.mean;
  });
  return {logprob, largest, total, entropy};
}

at::Tensor token_logprob_backward(const at::Tensor& logits_in, const at::Tensor& target, const at::Tensor& largest,
                                  const at::Tensor& total, const at::Tensor& grad_logprob, int64_t ignore_index) {
  const int64_t num_rows = check_token_logprob_backward(logits_in, target, largest, total, grad_logprob);
  const Options options{logits_in.size(1), to_dtype("token_logprob", logits_in.scalar_type()), false};
  const at::Tensor logits = with_unit_column_stride(logits_in);
  at::Tensor grad_logits = at::empty(logits.sizes(), logits.options());
  advise_large_pages(grad_logits);
  const int64_t row_bytes = options.vocab_size * grad_logits.element_size();
  char* grad_rows = static_cast<char*>(grad_logits.mutable_data_ptr());
  const int64_t* targets = target.const_data_ptr<int64_t>();
  const float *largests = largest.const_data_ptr<float>(), *totals = total.const_data_ptr<float>();
  const float* grads = grad_logprob.const_data_ptr<float>();
  const auto backward_row = HERMESFLOW_PICK(backward_row);

  for_each_row(num_rows, options.vocab_size, [&](int64_t row) {
    char* grad_row = grad_rows + row * row_bytes;
    const int64_t id = targets[row * target.stride(0)];
    if (id == ignore_index) {
      std::memset(grad_row, 0, row_bytes);
    } else {
      backward_row(row_pointer(logits, row), options, largests[row * largest.stride(0)], totals[row * total.stride(0)],
                   grads[row * grad_logprob.stride(0)], id, grad_row);
    }
  });
  return grad_logits;
}

}  // namespace

TORCH_LIBRARY_IMPL(hermesflow, CPU, library) {
  library.impl("token_logprob", &token_logprob);
  library.impl("token_logprob_backward", &token_logprob_backward);
}

}  // namespace hermesflow
