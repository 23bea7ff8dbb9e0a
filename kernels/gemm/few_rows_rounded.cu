// y = x · weightᵀ + bias of numbers rounded to 8 bits, for the few rows of a decode step (few_rows.cuh). x_scales [rows],
// scales [out]: y = sum · x_scale · scale + bias. Or with scales of panels (rounded.cuh).
// Built with SCALAR, STORED, ROWS, RING_BYTES and HAS_PANELS.
#include "few_rows.cuh"

extern "C" __global__ void __launch_bounds__(kThreads, 1)
few_rows_rounded_2(void* y, const Stored* x, const Stored* weight, const Scalar* bias, const float* x_scales,
                   const float* scales, int form, int rows, int in, int out) {
  multiply<2>(y, x, weight, bias, {x_scales, scales}, static_cast<Form>(form), rows, in, out);
}
extern "C" __global__ void __launch_bounds__(kThreads, 1)
few_rows_rounded_4(void* y, const Stored* x, const Stored* weight, const Scalar* bias, const float* x_scales,
                   const float* scales, int form, int rows, int in, int out) {
  multiply<4>(y, x, weight, bias, {x_scales, scales}, static_cast<Form>(form), rows, in, out);
}
extern "C" __global__ void __launch_bounds__(kThreads, 1)
few_rows_rounded_6(void* y, const Stored* x, const Stored* weight, const Scalar* bias, const float* x_scales,
                   const float* scales, int form, int rows, int in, int out) {
  multiply<6>(y, x, weight, bias, {x_scales, scales}, static_cast<Form>(form), rows, in, out);
}
extern "C" __global__ void __launch_bounds__(kThreads, 1)
few_rows_rounded_8(void* y, const Stored* x, const Stored* weight, const Scalar* bias, const float* x_scales,
                   const float* scales, int form, int rows, int in, int out) {
  multiply<8>(y, x, weight, bias, {x_scales, scales}, static_cast<Form>(form), rows, in, out);
}
