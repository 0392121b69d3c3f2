// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the random stream of every op,
// the same as kernels/philox.py. One header for host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HERMESFLOW_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HERMESFLOW_HOST_DEVICE inline
#endif

namespace hermesflow {

constexpr uint32_t kTokenStream = 0;
constexpr uint32_t kMaskStream = 1;

struct Words {
  uint32_t w[4];
};

// Block `block` of the stream of (seed, step, position); int64 arguments are cut to the words that the counter holds.
HERMESFLOW_HOST_DEVICE Words philox(int64_t seed, uint32_t block, int64_t step, int64_t position, uint32_t stream) {
  const uint64_t seed_bits = static_cast<uint64_t>(seed);
  uint32_t key0 = static_cast<uint32_t>(seed_bits), key1 = static_cast<uint32_t>(seed_bits >> 32);
  uint32_t c0 = block, c1 = static_cast<uint32_t>(step), c2 = static_cast<uint32_t>(position), c3 = stream;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// In the open interval (0, 1): 23 bits and a half fit a float's significand exactly; 24 bits would round up to 1.
HERMESFLOW_HOST_DEVICE float uniform(uint32_t word) {
  return (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
}

// Where the key of each row lies: int64 seed, step and position with strides in elements (0 for a shared step).
struct RowKeys {
  const int64_t *seeds, *steps, *positions;
  int64_t seed_stride, step_stride, position_stride;

  HERMESFLOW_HOST_DEVICE int64_t seed(int64_t row) const { return seeds[row * seed_stride]; }
  HERMESFLOW_HOST_DEVICE int64_t step(int64_t row) const { return steps[row * step_stride]; }
  HERMESFLOW_HOST_DEVICE int64_t position(int64_t row) const { return positions[row * position_stride]; }
};

}  // namespace hermesflow
