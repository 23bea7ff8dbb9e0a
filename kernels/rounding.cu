// Each of `rows` rows of `dim` numbers rounded to 8 bits, e4m3 or s8, by a scale of its own: its largest number becomes the
// largest there is. x ≈ y · scale.
//
// One block a row, which is read once and stays in registers. Bound by bytes: x and half as much y.
// Built with SCALAR (bf16 or f16: x) and STORED (e4m3 or s8: y).
#include "types.cuh"
#include "reduce.cuh"

using Scalar = SCALAR;
using Stored = STORED;
constexpr int kWidth = kVec<Scalar>;
constexpr int kVecsPerThread = 4;  // so dim is at most 32,768

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

extern "C" __global__ void __launch_bounds__(1024)
round_rows(Stored* y, float* scales, const Scalar* x, int dim) {
  start_dependents();
  wait_for_inputs();
  const i64 row = static_cast<i64>(blockIdx.x) * dim;
  const auto place = [](int i) { return static_cast<int>(i * blockDim.x + threadIdx.x) * kWidth; };
  uint4 held[kVecsPerThread];
#pragma unroll
  for (int i = 0; i < kVecsPerThread; ++i)
    if (place(i) < dim) held[i] = load_bits(x + row + place(i));
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kVecsPerThread; ++i) {
    if (place(i) >= dim) continue;
    float own[kWidth];
    unpack_vec<Scalar>(held[i], own);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) largest = fmaxf(largest, fabsf(own[j]));
  }
  // A row of zeros has a scale too, the smallest normal number.
  const float scale = fmaxf(block_max(largest) / Rounding<Stored>::kLargest, 1.17549435e-38f);
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
#pragma unroll
  for (int i = 0; i < kVecsPerThread; ++i) {
    if (place(i) >= dim) continue;
    float own[kWidth];
    unpack_vec<Scalar>(held[i], own);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) own[j] /= scale;
    *reinterpret_cast<uint2*>(y + row + place(i)) = make_uint2(Rounding<Stored>::four(own), Rounding<Stored>::four(own + 4));
  }
}
