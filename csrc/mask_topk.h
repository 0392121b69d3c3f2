// What mask_topk works on, for host and device: the rows' pointers and strides, and the order of the scores. No torch headers.
#pragma once

#include "philox.h"

namespace hermesflow {

struct MaskTopkArguments {
  const float* logprob;         // [B, N], columns side by side
  const bool* known;            // [B, N], columns side by side
  const int64_t* num_masked;    // [B]
  const float* temperatures;    // [B], or null: `temperature` for every row
  int64_t logprob_stride, known_stride, num_masked_stride, temperatures_stride;
  float temperature;
  RowKeys key;
  int64_t num_tokens;           // N, below 2^31: counts and indices are 32-bit
  bool* masked;                 // [B, N], contiguous

  HERMESFLOW_HOST_DEVICE float temperature_of(int64_t row) const {
    return temperatures == nullptr ? temperature : temperatures[row * temperatures_stride];
  }
};

}  // namespace hermesflow
