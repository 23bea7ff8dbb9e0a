// Each of `rows` rows of `dim` numbers rounded to 8 bits, e4m3 or s8, by a scale of its own: its largest number becomes the
// largest there is. x ≈ y · scale. Rows that are there already, or as a norm (norm.cuh) or a gated activation makes them:
// the same numbers as from two kernels, one after the other, but nothing of 16 bits is written.
//
// Or each of its panels of 128 numbers by a scale of its own.
//
// One block a row, which is read once and stays in registers. Bound by bytes: what it is made of, and y.
// Built with SCALAR (bf16 or f16: of what comes in) and STORED (e4m3 or s8: y).
#include "activations.cuh"
#include "norm.cuh"

using Stored = STORED;
constexpr int kVecs = 4;  // of a thread, so dim is at most 32,768

template <class T> struct Rounding;
template <> struct Rounding<e4m3> {
  static constexpr float kLargest = 448.0f;
  __device__ static u32 four(const float* x) {
    return pack_e4m3(x[0], x[1]) | static_cast<u32>(pack_e4m3(x[2], x[3])) << 16;
  }
};
template <> struct Rounding<s8> {
  static constexpr float kLargest = 127.0f;
  __device__ static u32 four(const float* x) {
    const auto byte = [](float x) { return static_cast<u32>(static_cast<int>(rintf(x))) & 0xff; };
    return byte(x[0]) | byte(x[1]) << 8 | byte(x[2]) << 16 | byte(x[3]) << 24;
  }
};

// Zeros have a scale too, the smallest normal number. That of a row with a NaN is NaN, as are the products with it then: integers
// have none of their own.
__device__ inline float scale_of(float largest) { return max_or_nan(largest / Rounding<Stored>::kLargest, 1.17549435e-38f); }
// x / scale as IEEE 754 rounds it (Markstein 1990), in fewer instructions.
__device__ inline float divide(float x, float scale, float inverse) {
  const float quotient = x * inverse;
  return fmaf(fmaf(-quotient, scale, x), inverse, quotient);
}

// Write the block's row, of which each thread holds some pieces.
template <int kCount> __device__ inline void write_rounded(Stored* y, float* scales, const uint4 (&held)[kCount], int dim) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (place(i) >= dim) continue;
    float own[kWidth];
    unpack_vec<Scalar>(held[i], own);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) largest = max_or_nan(largest, fabsf(own[j]));
  }
  const float scale = scale_of(block_max(largest)), inverse = 1.0f / scale;
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (place(i) >= dim) continue;
    float own[kWidth];
    unpack_vec<Scalar>(held[i], own);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) own[j] = divide(own[j], scale, inverse);
    *reinterpret_cast<uint2*>(y + static_cast<i64>(blockIdx.x) * dim + place(i)) =
        make_uint2(Rounding<Stored>::four(own), Rounding<Stored>::four(own + 4));
  }
}

extern "C" __global__ void __launch_bounds__(1024)
round_rows(Stored* y, float* scales, const Scalar* x, int dim) {
  start_dependents();
  wait_for_inputs();
  uint4 held[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i)
    if (place(i) < dim) held[i] = load_bits(x + static_cast<i64>(blockIdx.x) * dim + place(i));
  write_rounded(y, scales, held, dim);
}

// Sixteen lanes a panel. Grid: x = rows, y = the pieces of a row.   scales [panels][stride]: one for each row
extern "C" __global__ void __launch_bounds__(256)
round_panels(Stored* y, float* scales, const Scalar* x, int dim, int stride) {
  start_dependents();
  wait_for_inputs();
  const int at = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kWidth;
  const i64 first = static_cast<i64>(blockIdx.x) * dim + at;
  float own[kWidth] = {};
  if (at < dim) unpack_vec<Scalar>(load_bits(x + first), own);
  float largest = 0.0f;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) largest = max_or_nan(largest, fabsf(own[j]));
  const float scale = scale_of(team_max<16>(largest)), inverse = 1.0f / scale;
  if (at >= dim) return;
  if (threadIdx.x % 16 == 0) scales[static_cast<i64>(at / 128) * stride + blockIdx.x] = scale;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) own[j] = divide(own[j], scale, inverse);
  *reinterpret_cast<uint2*>(y + first) = make_uint2(Rounding<Stored>::four(own), Rounding<Stored>::four(own + 4));
}

template <class Weight>
__device__ inline void round_norm(Stored* y, float* scales, const Scalar* x, Scalar* residual, const Weight* weight, int dim,
                                  float eps) {
  uint4 held[kNormVecs];
  norm_row<Weight, true>(held, x, residual, weight, dim, eps);
  write_rounded(y, scales, held, dim);
}
extern "C" __global__ void __launch_bounds__(1024)
add_rms_norm_rounded(Stored* y, float* scales, const Scalar* x, Scalar* residual, const Scalar* weight, int dim, float eps) {
  round_norm(y, scales, x, residual, weight, dim, eps);
}
extern "C" __global__ void __launch_bounds__(1024)
add_rms_norm_rounded_float_weight(Stored* y, float* scales, const Scalar* x, Scalar* residual, const float* weight, int dim,
                                  float eps) {
  round_norm(y, scales, x, residual, weight, dim, eps);
}

// gate_up: rows of dim gates and dim ups.
template <float (&activate)(float)>
__device__ inline void round_gated(Stored* y, float* scales, const Scalar* gate_up, int dim) {
  start_dependents();
  wait_for_inputs();
  const Scalar* row = gate_up + static_cast<i64>(blockIdx.x) * 2 * dim;
  uint4 held[kVecs], ups[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (place(i) >= dim) continue;
    held[i] = load_bits(row + place(i));
    ups[i] = load_bits(row + dim + place(i));
  }
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (place(i) >= dim) continue;
    float gate[kWidth], up[kWidth];
    unpack_vec<Scalar>(held[i], gate);
    unpack_vec<Scalar>(ups[i], up);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) gate[j] = activate(gate[j]) * up[j];
    held[i] = pack_vec<Scalar>(gate);
  }
  write_rounded(y, scales, held, dim);
}
extern "C" __global__ void __launch_bounds__(1024)
gated_silu_rounded(Stored* y, float* scales, const Scalar* gate_up, int dim) { round_gated<silu>(y, scales, gate_up, dim); }
extern "C" __global__ void __launch_bounds__(1024)
gated_gelu_tanh_rounded(Stored* y, float* scales, const Scalar* gate_up, int dim) {
  round_gated<gelu_tanh>(y, scales, gate_up, dim);
}
