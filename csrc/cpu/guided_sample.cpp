// guided_sample on the CPU: rows in parallel, each in one fused pass (guided_sample_row.h), compiled for three instruction
// sets of which the machine's best is chosen at run time.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "../philox.h"

namespace hermesflow {
namespace {

constexpr int kTile = 128;  // SAMPLE_TILE of kernels/sampling.py
constexpr int kLanes = 16;
constexpr int64_t kParallelGrain = 32768;  // logits a task, so that a thread's start is paid back

enum class Dtype { kFloat, kBFloat16, kHalf };

struct Options {
  int64_t vocab_size;
  float guidance_scale;
  float inverse_temperature;
  bool greedy;
  Dtype dtype;
};

namespace portable {
#include "guided_sample_row.h"
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HERMESFLOW_X86_VARIANTS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "guided_sample_row.h"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include "guided_sample_row.h"
}
#pragma GCC pop_options
#endif

struct Variant {
  const char* name;
  decltype(&portable::sample_row) sample_row;
};

// torch's own choice of instruction set, which ATEN_CPU_CAPABILITY overrides.
const Variant& variant() {
  static const Variant chosen = []() -> Variant {
#ifdef HERMESFLOW_X86_VARIANTS
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return {"avx512", avx512::sample_row};
    if (capability == "AVX2") return {"avx2", avx2::sample_row};
#endif
    return {"portable", portable::sample_row};
  }();
  return chosen;
}

Dtype to_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Dtype::kFloat;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kHalf: return Dtype::kHalf;
    default: TORCH_CHECK_VALUE(false, "guided_sample: expected fp32, bf16 or fp16 logits, got ", type);
  }
}

at::Tensor with_unit_column_stride(const at::Tensor& logits) {
  return logits.stride(1) == 1 ? logits : logits.contiguous();
}

const char* row_pointer(const at::Tensor& logits, int64_t row) {
  return static_cast<const char*>(logits.const_data_ptr()) + row * logits.stride(0) * logits.element_size();
}

std::tuple<at::Tensor, at::Tensor> guided_sample(const at::Tensor& cond_in, const std::optional<at::Tensor>& uncond_in,
                                                 double guidance_scale, double temperature, const at::Tensor& seed,
                                                 const at::Tensor& step, const at::Tensor& position) {
  TORCH_CHECK_VALUE(cond_in.dim() == 2, "guided_sample: expected cond [R, V], got ", cond_in.sizes());
  const int64_t num_rows = cond_in.size(0), vocab_size = cond_in.size(1);
  TORCH_CHECK_VALUE(vocab_size > 0, "guided_sample: expected at least one token id, got cond ", cond_in.sizes());
  if (uncond_in) {
    TORCH_CHECK_VALUE(uncond_in->sizes() == cond_in.sizes() && uncond_in->scalar_type() == cond_in.scalar_type(),
                      "guided_sample: expected uncond like cond ", cond_in.sizes(), " ", cond_in.scalar_type(), ", got ",
                      uncond_in->sizes(), " ", uncond_in->scalar_type());
  }
  for (const at::Tensor& part : {seed, position, step.dim() ? step : seed}) {
    TORCH_CHECK_VALUE(part.dim() == 1 && part.size(0) == num_rows && part.scalar_type() == at::kLong,
                      "guided_sample: expected int64 seed, step and position [", num_rows, "], got ", part.sizes(), " ",
                      part.scalar_type());
  }
  TORCH_CHECK_VALUE(step.scalar_type() == at::kLong, "guided_sample: expected int64 step, got ", step.scalar_type());

  const at::Tensor cond = with_unit_column_stride(cond_in);
  const at::Tensor uncond = uncond_in ? with_unit_column_stride(*uncond_in) : at::Tensor();
  at::Tensor token = at::empty({num_rows}, cond.options().dtype(at::kLong));
  at::Tensor logprob = at::empty({num_rows}, cond.options().dtype(at::kFloat));
  const bool greedy = temperature == 0;
  const Options options{vocab_size, static_cast<float>(guidance_scale), greedy ? 1.0f : static_cast<float>(1 / temperature),
                        greedy, to_dtype(cond.scalar_type())};
  const int64_t* seeds = seed.const_data_ptr<int64_t>();
  const int64_t* steps = step.const_data_ptr<int64_t>();
  const int64_t* positions = position.const_data_ptr<int64_t>();
  const int64_t seed_stride = seed.stride(0), step_stride = step.dim() ? step.stride(0) : 0;
  const int64_t position_stride = position.stride(0);
  int64_t* tokens = token.mutable_data_ptr<int64_t>();
  float* logprobs = logprob.mutable_data_ptr<float>();
  const auto sample_row = variant().sample_row;

  at::parallel_for(0, num_rows, std::max<int64_t>(1, kParallelGrain / vocab_size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      sample_row(row_pointer(cond, row), uncond.defined() ? row_pointer(uncond, row) : nullptr, options,
                 seeds[row * seed_stride], steps[row * step_stride], positions[row * position_stride], tokens + row,
                 logprobs + row);
    }
  });
  return {token, logprob};
}

}  // namespace

const char* row_instructions() { return variant().name; }

TORCH_LIBRARY_IMPL(hermesflow, CPU, library) { library.impl("guided_sample", &guided_sample); }

}  // namespace hermesflow
