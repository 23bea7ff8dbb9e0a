// y = x / sqrt(mean(x²) + eps) · weight, for a row of `dim` numbers; before it, perhaps, residual += x.
//
// One block a row. A row is read once, all of it before anything is written, and stays in registers between the sum and the
// product: what uses this is bound by bytes, x and y once each (and the residual twice). Squares are summed up by groups of 32
// times 16 bytes, then the groups: so the sum does not depend on the number of threads.
// For sources built with SCALAR (the type of x, residual and y); the weight has the same type or is float.
#pragma once

#include "types.cuh"
#include "reduce.cuh"

using Scalar = SCALAR;
constexpr int kWidth = kVec<Scalar>;
constexpr int kNormVecs = 4;     // of a thread
constexpr int kMaxGroups = 128;  // so dim is at most 32,768, half of it in floats

// Where in its row a thread's piece i begins.
__device__ inline int place(int i) { return static_cast<int>(i * blockDim.x + threadIdx.x) * kWidth; }

// Every thread gets the sum over the block of what its threads have for each of their pieces. Of two calls one after the
// other, one is with `turn` 0 and one with 1.
template <int kVecs> __device__ inline float norm_sum(const float (&sums)[kVecs], int dim, int turn = 0) {
  __shared__ float of_groups[2][kMaxGroups];
  float(&of_group)[kMaxGroups] = of_groups[turn];
  const int lane = threadIdx.x % 32, num_groups = ceil_div(dim, 32 * kWidth);
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int group = static_cast<int>(i * blockDim.x + threadIdx.x) / 32;
    if (group >= num_groups) break;
    const float sum = team_sum<32>(sums[i]);
    if (lane == 0) of_group[group] = sum;
  }
  __syncthreads();
  float sum = 0.0f;
  for (int group = lane; group < num_groups; group += 32) sum += of_group[group];
  return team_sum<32>(sum);
}

// A piece of a row, the residual added where kAdds, and the sum of its squares. `residual` is where the new one goes.
template <bool kAdds>
__device__ inline float add_row(float (&own)[kWidth], uint4 x, uint4 before, Scalar* residual) {
  unpack_vec<Scalar>(x, own);
  if constexpr (kAdds) {
    float added[kWidth];
    unpack_vec<Scalar>(before, added);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) own[j] += added[j];
    const uint4 bits = pack_vec<Scalar>(own);
    store_bits(residual, bits);
    unpack_vec<Scalar>(bits, own);  // as rounded
  }
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) sum += own[j] * own[j];
  return sum;
}

// This thread's pieces of y.
template <class Weight, bool kAdds>
__device__ inline void norm_row(uint4 (&y)[kNormVecs], const Scalar* x, Scalar* residual, const Weight* weight, int dim,
                                float eps) {
  start_dependents();
  for (int at = threadIdx.x * kWidth; at < dim; at += blockDim.x * kWidth) prefetch(weight + at);
  wait_for_inputs();
  const i64 row = static_cast<i64>(blockIdx.x) * dim;
  uint4 before[kNormVecs];
#pragma unroll
  for (int i = 0; i < kNormVecs; ++i) {
    if (place(i) >= dim) continue;
    y[i] = load_bits(x + row + place(i));
    if constexpr (kAdds) before[i] = load_bits(residual + row + place(i));
  }
  float sums[kNormVecs] = {};
#pragma unroll
  for (int i = 0; i < kNormVecs; ++i) {
    if (place(i) >= dim) continue;
    float own[kWidth];
    sums[i] = add_row<kAdds>(own, y[i], before[i], residual + row + place(i));
    if constexpr (kAdds) y[i] = pack_vec<Scalar>(own);
  }
  const float factor = rsqrtf(norm_sum(sums, dim) / dim + eps);
#pragma unroll
  for (int i = 0; i < kNormVecs; ++i) {
    if (place(i) >= dim) continue;
    float own[kWidth], scale[kWidth];
    unpack_vec<Scalar>(y[i], own);
    load(weight + place(i), scale);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) own[j] *= factor * scale[j];
    y[i] = pack_vec<Scalar>(own);
  }
}
