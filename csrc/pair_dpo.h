// The loss of one (win, lose) pair and its slope, for host and device. No torch headers.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"

namespace hermesflow {

// In the order of LOSS_TYPES in kernels/__init__.py.
#define HERMESFLOW_PAIR_LOSSES(DO) DO(kSigmoid, "sigmoid") DO(kIpo, "ipo") DO(kHinge, "hinge") DO(kRobust, "robust")
#define HERMESFLOW_PAIR_LOSS_NUMBER(number, name) number,
#define HERMESFLOW_PAIR_LOSS_NAME(number, name) name,
#define HERMESFLOW_PAIR_LOSS_TOLD(number, name) " " name
enum class PairLoss { HERMESFLOW_PAIR_LOSSES(HERMESFLOW_PAIR_LOSS_NUMBER) };
constexpr const char* kPairLossNames[] = {HERMESFLOW_PAIR_LOSSES(HERMESFLOW_PAIR_LOSS_NAME)};

struct PairLossSettings {
  PairLoss type;
  double beta, label_smoothing;
  bool length_normalize;
};

struct LossAndSlope {
  double loss, slope;
};

// l(h) and dl/dh of kernels/pair_dpo.py, h the pair's difference of log-ratios.
HERMESFLOW_HOST_DEVICE LossAndSlope pair_loss(double h, const PairLossSettings& settings) {
  const double beta = settings.beta, z = beta * h;
  if (settings.type == PairLoss::kHinge) {
    const double below = 1 - z;  // NaN goes through
    return {below <= 0 ? 0 : below, below <= 0 ? 0 : -beta};
  }
  if (settings.type == PairLoss::kIpo) {
    const double apart = h - 1 / (2 * beta);
    return {apart * apart, 2 * apart};
  }
  // -logsigmoid(z) = max(-z, 0) + log(1 + exp(-|z|)), with no exponential that overflows.
  const double small = exp(-fabs(z)), rest = log1p(small);
  const double right = rest + (z < 0 ? -z : 0), wrong = rest + (z > 0 ? z : 0);
  const double sigmoid_below = small / (1 + small), sigmoid_above = 1 / (1 + small);  // of -|z| and |z|
  const double right_slope = -beta * (z > 0 ? sigmoid_below : sigmoid_above);
  const double wrong_slope = beta * (z > 0 ? sigmoid_above : sigmoid_below);
  const double s = settings.label_smoothing;
  const bool robust = settings.type == PairLoss::kRobust;
  const double right_share = robust ? (1 - s) / (1 - 2 * s) : 1 - s, wrong_share = robust ? -s / (1 - 2 * s) : s;
  return {right_share * right + wrong_share * wrong, right_share * right_slope + wrong_share * wrong_slope};
}

}  // namespace hermesflow
