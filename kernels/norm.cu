// RMS norms of `rows` rows (norm.cuh). Built with SCALAR.
//
// Where there are many rows, a block takes some, one after the other, a piece a thread: the next one is on its way while a row
// is summed up.
#include "norm.cuh"

template <class Weight, bool kAdds>
__device__ inline void write_norm(Scalar* y, const Scalar* x, Scalar* residual, const Weight* weight, int dim, float eps) {
  uint4 own[kNormVecs];
  norm_row<Weight, kAdds>(own, x, residual, weight, dim, eps);
#pragma unroll
  for (int i = 0; i < kNormVecs; ++i)
    if (place(i) < dim) store_bits(y + static_cast<i64>(blockIdx.x) * dim + place(i), own[i]);
}

template <class Weight, bool kAdds>
__device__ inline void write_norms(Scalar* y, const Scalar* x, Scalar* residual, const Weight* weight, int dim, float eps,
                                   int num_rows) {
  start_dependents();
  const int at = place(0);
  const bool exists = at < dim;
  float scale[kWidth];
  if (exists) load(weight + at, scale);
  wait_for_inputs();
  uint4 next, next_residual;
  const auto fetch = [&](int row) {
    if (!exists || row >= num_rows) return;
    next = load_bits(x + static_cast<i64>(row) * dim + at);
    if constexpr (kAdds) next_residual = load_bits(residual + static_cast<i64>(row) * dim + at);
  };
  fetch(blockIdx.x);
  for (int row = blockIdx.x, turn = 0; row < num_rows; row += gridDim.x, turn ^= 1) {
    const i64 own_place = static_cast<i64>(row) * dim + at;
    float own[kWidth], sum[1] = {};
    if (exists) sum[0] = add_row<kAdds>(own, next, next_residual, residual + own_place);
    fetch(row + gridDim.x);
    const float factor = rsqrtf(norm_sum(sum, dim, turn) / dim + eps);
    if (!exists) continue;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) own[j] *= factor * scale[j];
    store_bits(y + own_place, pack_vec<Scalar>(own));
  }
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

// Grid: x = blocks that share out the rows.
extern "C" __global__ void __launch_bounds__(512, 3)
many_rms_norms(Scalar* y, const Scalar* x, const Scalar* weight, int dim, float eps, int num_rows) {
  write_norms<Scalar, false>(y, x, nullptr, weight, dim, eps, num_rows);
}
extern "C" __global__ void __launch_bounds__(512, 3)
many_rms_norms_float_weight(Scalar* y, const Scalar* x, const float* weight, int dim, float eps, int num_rows) {
  write_norms<float, false>(y, x, nullptr, weight, dim, eps, num_rows);
}
extern "C" __global__ void __launch_bounds__(512, 3)
many_add_rms_norms(Scalar* y, const Scalar* x, Scalar* residual, const Scalar* weight, int dim, float eps, int num_rows) {
  write_norms<Scalar, true>(y, x, residual, weight, dim, eps, num_rows);
}
extern "C" __global__ void __launch_bounds__(512, 3)
many_add_rms_norms_float_weight(Scalar* y, const Scalar* x, Scalar* residual, const float* weight, int dim, float eps,
                                int num_rows) {
  write_norms<float, true>(y, x, residual, weight, dim, eps, num_rows);
}
