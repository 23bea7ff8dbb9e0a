// y = x · weightᵀ + bias of 16-bit numbers, for the few rows of a decode step (few_rows.cuh).
// Built with SCALAR, ROWS and RING_BYTES.
#define STORED SCALAR
#include "few_rows.cuh"

extern "C" __global__ void __launch_bounds__(kThreads)
few_rows_2(void* y, const Scalar* x, const Scalar* weight, const Scalar* bias, int form, int rows, int in, int out) {
  multiply<2>(y, x, weight, bias, {}, static_cast<Form>(form), rows, in, out);
}
extern "C" __global__ void __launch_bounds__(kThreads)
few_rows_4(void* y, const Scalar* x, const Scalar* weight, const Scalar* bias, int form, int rows, int in, int out) {
  multiply<4>(y, x, weight, bias, {}, static_cast<Form>(form), rows, in, out);
}
// Of more than 16 rows, the sums of larger tiles do not fit: no such kernel is launched, but both are compiled.
extern "C" __global__ void __launch_bounds__(kThreads)
few_rows_6(void* y, const Scalar* x, const Scalar* weight, const Scalar* bias, int form, int rows, int in, int out) {
  if constexpr (kHalves <= 2) multiply<6>(y, x, weight, bias, {}, static_cast<Form>(form), rows, in, out);
}
extern "C" __global__ void __launch_bounds__(kThreads)
few_rows_8(void* y, const Scalar* x, const Scalar* weight, const Scalar* bias, int form, int rows, int in, int out) {
  if constexpr (kHalves <= 2) multiply<8>(y, x, weight, bias, {}, static_cast<Form>(form), rows, in, out);
}
