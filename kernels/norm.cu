// RMS norms of `rows` rows (norm.cuh). Built with SCALAR.
#include "norm.cuh"

template <class Weight, bool kAdds>
__device__ inline void write_norm(Scalar* y, const Scalar* x, Scalar* residual, const Weight* weight, int dim, float eps) {
  uint4 own[kNormVecs];
  norm_row<Weight, kAdds>(own, x, residual, weight, dim, eps);
#pragma unroll
  for (int i = 0; i < kNormVecs; ++i)
    if (place(i) < dim) store_bits(y + static_cast<i64>(blockIdx.x) * dim + place(i), own[i]);
}

extern "C" __global__ void __launch_bounds__(1024)
rms_norm(Scalar* y, const Scalar* x, const Scalar* weight, int dim, float eps) {
  write_norm<Scalar, false>(y, x, nullptr, weight, dim, eps);
}
extern "C" __global__ void __launch_bounds__(1024)
rms_norm_float_weight(Scalar* y, const Scalar* x, const float* weight, int dim, float eps) {
  write_norm<float, false>(y, x, nullptr, weight, dim, eps);
}
extern "C" __global__ void __launch_bounds__(1024)
add_rms_norm(Scalar* y, const Scalar* x, Scalar* residual, const Scalar* weight, int dim, float eps) {
  write_norm<Scalar, true>(y, x, residual, weight, dim, eps);
}
extern "C" __global__ void __launch_bounds__(1024)
add_rms_norm_float_weight(Scalar* y, const Scalar* x, Scalar* residual, const float* weight, int dim, float eps) {
  write_norm<float, true>(y, x, residual, weight, dim, eps);
}
