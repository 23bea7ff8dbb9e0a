// y = x / sqrt(mean(x²) + eps) · weight, for each of `rows` rows of `dim` numbers; before it, perhaps, residual += x.
//
// One block a row. A row is read once and stays in registers between the sum and the product, so the kernel is bound by
// bytes: x and y once each (and the residual twice).
// Built with SCALAR (the type of x, residual and y); the weight has the same type or is float.
#include "types.cuh"
#include "reduce.cuh"

using Scalar = SCALAR;
constexpr int kWidth = kVec<Scalar>;
constexpr int kVecsPerThread = 4;  // so dim is at most 1024 · 4 · kWidth

template <class Weight, bool kAdds>
__device__ inline void norm_row(Scalar* y, const Scalar* x, Scalar* residual, const Weight* weight, int dim, float eps) {
  start_dependents();
  for (int at = threadIdx.x * kWidth; at < dim; at += blockDim.x * kWidth) prefetch(weight + at);
  wait_for_inputs();
  const i64 row = static_cast<i64>(blockIdx.x) * dim;
  float held[kVecsPerThread][kWidth];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVecsPerThread; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kWidth;
    if (at >= dim) continue;
    load(x + row + at, held[i]);
    if constexpr (kAdds) {
      float before[kWidth];
      load(residual + row + at, before);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) held[i][j] = rounded<Scalar>(held[i][j] + before[j]);
      store(residual + row + at, held[i]);
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum += held[i][j] * held[i][j];
  }
  const float factor = rsqrtf(block_sum(sum) / dim + eps);
#pragma unroll
  for (int i = 0; i < kVecsPerThread; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kWidth;
    if (at >= dim) continue;
    float scale[kWidth];
    load(weight + at, scale);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) held[i][j] *= factor * scale[j];
    store(y + row + at, held[i]);
  }
}

extern "C" __global__ void __launch_bounds__(1024)
rms_norm(Scalar* y, const Scalar* x, const Scalar* weight, int dim, float eps) {
  norm_row<Scalar, false>(y, x, nullptr, weight, dim, eps);
}
extern "C" __global__ void __launch_bounds__(1024)
rms_norm_float_weight(Scalar* y, const Scalar* x, const float* weight, int dim, float eps) {
  norm_row<float, false>(y, x, nullptr, weight, dim, eps);
}
extern "C" __global__ void __launch_bounds__(1024)
add_rms_norm(Scalar* y, const Scalar* x, Scalar* residual, const Scalar* weight, int dim, float eps) {
  norm_row<Scalar, true>(y, x, residual, weight, dim, eps);
}
extern "C" __global__ void __launch_bounds__(1024)
add_rms_norm_float_weight(Scalar* y, const Scalar* x, Scalar* residual, const float* weight, int dim, float eps) {
  norm_row<float, true>(y, x, residual, weight, dim, eps);
}
