// Launches every kernel of csrc/cuda once on small random inputs, for compute-sanitizer: no torch, so that memcheck and racecheck
// take seconds. It checks launches, not values.
// Build and run: nvcc -std=c++20 -lineinfo -gencode=arch=compute_90a,code=sm_90a tests/csrc/sanitize_main.cu -o sanitize_main
//                compute-sanitizer --tool racecheck --error-exitcode 1 ./sanitize_main
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/cuda/guided_sample.cuh"
#include "../../csrc/cuda/mask_topk.cuh"
#include "../../csrc/cuda/token_logprob.cuh"
#include "../../csrc/cuda/token_sample.cuh"

using namespace hermesflow;

void check(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

void finish(const char* name, cudaError_t launched) {
  check(name, launched);
  check(name, cudaDeviceSynchronize());
  std::printf("%s: launched\n", name);
}

// An allocation of its own for each tensor, so that an access beyond it is seen.
template <typename T>
T* on_device(const std::vector<T>& values) {
  T* copy = nullptr;
  check("cudaMalloc", cudaMalloc(&copy, values.size() * sizeof(T)));
  check("cudaMemcpy", cudaMemcpy(copy, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return copy;
}

template <typename T>
T* empty(int64_t size) {
  T* memory = nullptr;
  check("cudaMalloc", cudaMalloc(&memory, size * sizeof(T)));
  return memory;
}

std::mt19937 generator(0);

float cast(float value, float) { return value; }
Bf16 cast(float value, Bf16) {
  uint32_t bits;
  static_assert(sizeof bits == sizeof value);
  __builtin_memcpy(&bits, &value, sizeof bits);
  return {static_cast<uint16_t>(bits >> 16)};
}
Fp16 cast(float value, Fp16) {  // of 0.5 to 1 in size, which random mantissas are
  const uint32_t mantissa = static_cast<uint32_t>((value < 0 ? -value : value) * 100) & 0x3ffu;
  return {static_cast<uint16_t>((value < 0 ? 0x8000u : 0u) | 0x3800u | mantissa)};
}

template <typename T>
T* random_values(int64_t size) {
  std::normal_distribution<float> normal(0, 3);
  std::vector<T> values;
  for (int64_t i = 0; i < size; ++i) values.push_back(cast(normal(generator), T{}));
  return on_device(values);
}

template <typename T>
T* filled(int64_t size, T value) {
  return on_device(std::vector<T>(size, value));
}

// Row by row: 0, 1, 2, ... times a step.
int64_t* counted(int64_t size, int64_t step) {
  std::vector<int64_t> values;
  for (int64_t i = 0; i < size; ++i) values.push_back(i * step);
  return on_device(values);
}

RowKeys keys(int64_t num_rows) { return {counted(num_rows, 977), counted(num_rows, 1), counted(num_rows, 3), 1, 1, 1}; }

template <typename T>
void sample_and_score(int64_t num_rows, int64_t vocab_size) {
  const T *cond = random_values<T>(num_rows * vocab_size), *uncond = random_values<T>(num_rows * vocab_size);
  const T* bias = random_values<T>(vocab_size);
  int64_t* token = empty<int64_t>(num_rows);
  float* logprob = empty<float>(num_rows);
  const RowKeys key = keys(num_rows);
  const int num_ids = static_cast<int>(vocab_size);
  for (const Second kind : {Second::kNone, Second::kUncond, Second::kBias}) {
    if (kind == Second::kBias && sizeof(T) != sizeof(float)) continue;  // a bias is added to fp32 logits alone
    const T* second = kind == Second::kNone ? nullptr : kind == Second::kUncond ? uncond : bias;
    for (const bool greedy : {false, true}) {
      const GuidedSampleArguments<T> args{cond, second, vocab_size, kind == Second::kUncond ? vocab_size : 0, num_ids, 5.0f,
                                          1.0f, key, token, logprob};
      finish("guided_sample", launch_guided_sample(args, kind, num_rows, greedy, nullptr));
    }
  }

  for (const float temperature : {0.8f, 0.0f}) {
    const RowSettings settings{filled(num_rows, temperature), filled<int64_t>(num_rows, 50), filled(num_rows, 0.9f),
                               filled(num_rows, 0.01f), 1, 1, 1, 1};
    const TokenSampleArguments<T> args{cond, vocab_size, vocab_size, 0.0f, settings, key, token, logprob};
    finish("token_sample", launch_token_sample(args, num_rows, nullptr));
  }

  const TokenLogprobRows<T> rows{cond, vocab_size, counted(num_rows, 7), 1, num_rows, vocab_size, 7};
  float *largest = empty<float>(num_rows), *total = empty<float>(num_rows), *entropy = empty<float>(num_rows);
  for (float* wanted : {entropy, static_cast<float*>(nullptr)})
    finish("token_logprob", launch_token_logprob(rows, {logprob, largest, total, wanted}, nullptr));
  const TokenLogprobGradient<T> gradient{largest, total, random_values<float>(num_rows), 1, empty<T>(num_rows * vocab_size)};
  finish("token_logprob_backward", launch_token_logprob_backward(rows, gradient, nullptr));
}

void mask(int64_t num_rows, int64_t num_tokens) {
  std::vector<uint8_t> known;
  for (int64_t i = 0; i < num_rows * num_tokens; ++i) known.push_back(generator() % 3 == 0);
  const MaskTopkArguments args{random_values<float>(num_rows * num_tokens),
                               reinterpret_cast<const bool*>(on_device(known)),
                               filled<int64_t>(num_rows, num_tokens / 2),
                               nullptr,
                               num_tokens,
                               num_tokens,
                               1,
                               0,
                               1.0f,
                               keys(num_rows),
                               num_tokens,
                               empty<bool>(num_rows * num_tokens)};
  finish("mask_topk", launch_mask_topk(args, num_rows, nullptr));
}

int main() {
  for (const int64_t vocab_size : {301, 8192}) {  // rows of odd alignment, and image codes
    sample_and_score<float>(5, vocab_size);
    sample_and_score<Bf16>(5, vocab_size);
    sample_and_score<Fp16>(5, vocab_size);
  }
  mask(3, 1024);
  mask(2, kKeptKeys + 5);  // keys that shared memory does not hold
  std::printf("every kernel was launched\n");
  return 0;
}
