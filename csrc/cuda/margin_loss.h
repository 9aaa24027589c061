// The end of the head: one launch makes of each row's negative log-sum-exp and target cosine its loss and both
// derivatives.
#pragma once

#include "margin.h"
#include "runtime.h"

namespace fa::cuda {

constexpr int kMarginThreads = 128;
static __global__ void __launch_bounds__(kMarginThreads)
    margin_loss_kernel(const float* negative_lse, const float* target_cosine, int64_t count, float scale,
                       Margin<float> margin, float* loss, float* lse, float* d_lse, float* d_cosine) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMarginThreads + threadIdx.x;
  if (i >= count) return;
  const RowLoss<float> row = row_loss(negative_lse[i], target_cosine[i], scale, margin);
  loss[i] = row.loss;
  lse[i] = row.lse;
  d_lse[i] = row.d_lse;
  d_cosine[i] = row.d_cosine;
}

}  // namespace fa::cuda
