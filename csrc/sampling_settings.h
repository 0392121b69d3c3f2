// Settings of token_sample, a set a row. One header for host and device.
#pragma once

#include "philox.h"

namespace hermesflow {

struct SamplingSettings {
  float temperature;  // 0: argmax, no filter
  int64_t top_k;      // 0: off
  float top_p;        // 1: off
  float min_p;        // 0: off
};

// Where the settings of each row lie, with strides in elements (0 for shared settings).
struct RowSettings {
  const float* temperatures;
  const int64_t* top_ks;
  const float *top_ps, *min_ps;
  int64_t temperature_stride, top_k_stride, top_p_stride, min_p_stride;

  HERMESFLOW_HOST_DEVICE SamplingSettings row(int64_t row) const {
    return {temperatures[row * temperature_stride], top_ks[row * top_k_stride], top_ps[row * top_p_stride],
            min_ps[row * min_p_stride]};
  }
};

}  // namespace hermesflow
