// y = f(gate) · up for each of `rows` rows, which hold dim gates and then dim ups; f is silu or gelu (tanh form).
//
// A thread makes 16 bytes of y. Bound by bytes: three rows of dim move once each.
// Built with SCALAR, the type of both tensors.
#include "types.cuh"
#include "activations.cuh"

using Scalar = SCALAR;
constexpr int kWidth = kVec<Scalar>;

// Grid: x = rows, y = the pieces of a row.
template <float (&activate)(float)> __device__ inline void gate_row(Scalar* y, const Scalar* gate_up, int dim) {
  start_dependents();
  wait_for_inputs();
  const i64 row = blockIdx.x;
  const int at = (blockIdx.y * blockDim.x + threadIdx.x) * kWidth;
  if (at >= dim) return;
  float gate[kWidth], up[kWidth];
  load(gate_up + row * 2 * dim + at, gate);
  load(gate_up + row * 2 * dim + dim + at, up);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) gate[i] = activate(gate[i]) * up[i];
  store(y + row * dim + at, gate);
}

extern "C" __global__ void gated_silu(Scalar* y, const Scalar* gate_up, int dim) { gate_row<silu>(y, gate_up, dim); }
extern "C" __global__ void gated_gelu_tanh(Scalar* y, const Scalar* gate_up, int dim) {
  gate_row<gelu_tanh>(y, gate_up, dim);
}
