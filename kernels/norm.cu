// y = x / sqrt(mean(x²) + eps) · weight, for each of `rows` rows of `dim` numbers; before it, perhaps, residual += x.
//
// One block a row. A row is read once, all of it before anything is written, and stays in registers between the sum and the
// product: the kernel is bound by bytes, x and y once each (and the residual twice).
// Built with SCALAR (the type of x, residual and y); the weight has the same type or is float.
#include "types.cuh"
#include "reduce.cuh"

using Scalar = SCALAR;
constexpr int kWidth = kVec<Scalar>;
constexpr int kVecsPerThread = sizeof(Scalar) == 4 ? 4 : 2;  // so dim is at most 16,384

template <class Weight, bool kAdds>
__device__ inline void norm_row(Scalar* y, const Scalar* x, Scalar* residual, const Weight* weight, int dim, float eps) {
  start_dependents();
  for (int at = threadIdx.x * kWidth; at < dim; at += blockDim.x * kWidth) prefetch(weight + at);
  wait_for_inputs();
  const i64 row = static_cast<i64>(blockIdx.x) * dim;
  const auto place = [](int i) { return static_cast<int>(i * blockDim.x + threadIdx.x) * kWidth; };
  uint4 held[kVecsPerThread], before[kVecsPerThread];
#pragma unroll
  for (int i = 0; i < kVecsPerThread; ++i) {
    if (place(i) >= dim) continue;
    held[i] = load_bits(x + row + place(i));
    if constexpr (kAdds) before[i] = load_bits(residual + row + place(i));
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVecsPerThread; ++i) {
    if (place(i) >= dim) continue;
    float own[kWidth];
    unpack_vec<Scalar>(held[i], own);
    if constexpr (kAdds) {
      float added[kWidth];
      unpack_vec<Scalar>(before[i], added);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) own[j] += added[j];
      held[i] = pack_vec<Scalar>(own);
      store_bits(residual + row + place(i), held[i]);
      unpack_vec<Scalar>(held[i], own);  // as rounded
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum += own[j] * own[j];
  }
  const float factor = rsqrtf(block_sum(sum) / dim + eps);
#pragma unroll
  for (int i = 0; i < kVecsPerThread; ++i) {
    if (place(i) >= dim) continue;
    float own[kWidth], scale[kWidth];
    unpack_vec<Scalar>(held[i], own);
    load(weight + place(i), scale);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) own[j] *= factor * scale[j];
    store(y + row + place(i), own);
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
