// guided_sample: a block a row, one pass over its logits by the rule of tile_sampling.cuh, so nothing of the row's length is
// stored. Bound by memory: each logit is read once. A warp loads 1,024 logits of both rows before it uses the first; a row
// that is not aligned to 16 bytes, and the end of the vocabulary, go through shared memory value by value.
#pragma once

#include "tile_sampling.cuh"

namespace hermesflow {

constexpr int kGuidedSampleThreads = 256;
constexpr int64_t kMaxVocabSize = int64_t{1} << 30;  // ids are int32

// What is read beside cond: nothing, uncond, or the bias [V] that all rows share.
enum class Second { kNone, kUncond, kBias };

template <typename T>
struct GuidedSampleArguments {
  const T *cond, *second;
  int64_t cond_stride, second_stride;
  int vocab_size;
  float guidance_scale, inverse_temperature;
  RowKeys key;
  int64_t* token;
  float* logprob;
};

// A row's logits, untempered.
template <typename T, Second kSecond>
struct GuidedRow {
  static constexpr int kPack = Pack<T>::kSize, kPacks = kIdsALane / kPack;
  const T *cond, *second;
  int vocab_size;
  float guidance_scale;
  bool aligned;  // to 16 bytes

  __device__ __forceinline__ GuidedRow(const GuidedSampleArguments<T>& args, int64_t row)
      : cond(args.cond + row * args.cond_stride),
        second(kSecond == Second::kNone ? nullptr : args.second + row * args.second_stride),
        vocab_size(args.vocab_size),
        guidance_scale(args.guidance_scale),
        aligned(is_aligned(cond) && is_aligned(second)) {}

  __device__ __forceinline__ float combine(T from_cond, T from_second) const {
    const float logit = to_float(from_cond), other = to_float(from_second);
    if constexpr (kSecond == Second::kNone) return logit;
    if constexpr (kSecond == Second::kBias) return logit + other;
    const float guided = (1 + guidance_scale) * logit - guidance_scale * other;
    // -inf - -inf is NaN; what the condition forbids stays forbidden.
    return logit == -INFINITY ? logit : guided;
  }

  // -inf past the vocabulary.
  __device__ __forceinline__ float load(int id) const {
    const bool inside = id < vocab_size;
    const T from_cond = inside ? cond[id] : T{}, from_second = kSecond != Second::kNone && inside ? second[id] : T{};
    const float logit = combine(from_cond, from_second);
    return inside ? logit : -INFINITY;
  }

  // This lane's logits of the turn that starts with the id `first`; `staged` is the warp's.
  __device__ __forceinline__ void load_turn(int first, float (&staged)[kWarpSize * kPack], float (&logits)[kIdsALane]) const {
    const int lane = threadIdx.x % kWarpSize;
    if (aligned && first + kIdsATurn <= vocab_size) {
      Pack<uint32_t> from_cond[kPacks], from_second[kPacks];
#pragma unroll
      for (int p = 0; p < kPacks; ++p) from_cond[p] = load_words(cond + first + TileSampler::place<kPack>(p * kPack));
      if constexpr (kSecond != Second::kNone) {
#pragma unroll
        for (int p = 0; p < kPacks; ++p) from_second[p] = load_words(second + first + TileSampler::place<kPack>(p * kPack));
      }
#pragma unroll
      for (int i = 0; i < kIdsALane; ++i)
        logits[i] = combine(value_of<T>(from_cond[i / kPack], i % kPack), value_of<T>(from_second[i / kPack], i % kPack));
    } else {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        __syncwarp();
#pragma unroll 4
        for (int i = lane; i < kWarpSize * kPack; i += kWarpSize) staged[i] = load(first + p * kWarpSize * kPack + i);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kPack; ++i) logits[p * kPack + i] = staged[TileSampler::place<kPack>(i)];
      }
    }
  }
};

// Four blocks share a multiprocessor, so that loads of one hide behind the arithmetic of the others.
template <typename T, Second kSecond, bool kGreedy>
__global__ void __launch_bounds__(kGuidedSampleThreads, 4) guided_sample_kernel(GuidedSampleArguments<T> args) {
  using Row = GuidedRow<T, kSecond>;
  constexpr int kWarps = kGuidedSampleThreads / kWarpSize;
  __shared__ TileSamplerShared<kWarps> shared;
  alignas(16) __shared__ float staged[kWarps][kWarpSize * Row::kPack];

  const int64_t index = blockIdx.x;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Row row(args, index);
  TileSampler sampler(args.key, index, args.inverse_temperature, kGreedy);
  for (int first = warp * kIdsATurn; first < args.vocab_size; first += kWarps * kIdsATurn) {
    float logits[kIdsALane];
    row.load_turn(first, staged[warp], logits);
    sampler.add<Row::kPack>(first / kSampleTile, logits);
  }
  sampler.publish(shared);
  __syncthreads();
  if (warp != 0) return;

  sampler.collect(shared);
  if (sampler.has_distribution()) {
    float logits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      logits[i] = row.load(sampler.best_tile * kSampleTile + 4 * lane + i) * args.inverse_temperature;
    sampler.write(logits, args.token + index, args.logprob + index);
  } else if (lane == 0) {
    args.token[index] = -1;
    args.logprob[index] = NAN;
  }
}

template <typename T, Second kSecond>
inline cudaError_t launch_guided_sample(const GuidedSampleArguments<T>& args, int64_t num_rows, bool greedy, cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  return launch(greedy ? guided_sample_kernel<T, kSecond, true> : guided_sample_kernel<T, kSecond, false>,
                dim3(static_cast<unsigned>(num_rows)), dim3(kGuidedSampleThreads), stream, args);
}

template <typename T>
inline cudaError_t launch_guided_sample(const GuidedSampleArguments<T>& args, Second second, int64_t num_rows, bool greedy,
                                        cudaStream_t stream) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (second == Second::kBias) return launch_guided_sample<T, Second::kBias>(args, num_rows, greedy, stream);
  }
  if (second == Second::kUncond) return launch_guided_sample<T, Second::kUncond>(args, num_rows, greedy, stream);
  return launch_guided_sample<T, Second::kNone>(args, num_rows, greedy, stream);
}

template cudaError_t launch_guided_sample(const GuidedSampleArguments<float>&, Second, int64_t, bool, cudaStream_t);
template cudaError_t launch_guided_sample(const GuidedSampleArguments<Bf16>&, Second, int64_t, bool, cudaStream_t);
template cudaError_t launch_guided_sample(const GuidedSampleArguments<Fp16>&, Second, int64_t, bool, cudaStream_t);

}  // namespace hermesflow
