// y = x · weightᵀ + bias of numbers rounded to 8 bits, on Hopper (many_rows.cuh). x_scales [rows], scales [out]:
// y = sum · x_scale · scale + bias. Or with scales of panels (rounded.cuh). Built with SCALAR, STORED, ROWS, BLOCK_BYTES and
// HAS_PANELS.
#include "many_rows.cuh"

// Grid: the blocks of a cluster side by side; clusters take the units in turns. in: pairs of inputs.
extern "C" __global__ void __launch_bounds__(384, 1)
many_rows_rounded_1x1(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map, void* y,
                      const Scalar* bias, const float* x_scales, const float* scales, int form, int rows, int in, int out,
                      int height, int output_tiles, int row_units, int stages, int sharers, int split, int share) {
  Multiplication<1, 1, kRows < 128 ? 2 : 1>::run({weight_map, x_map, y, bias, {x_scales, scales}, static_cast<Form>(form), rows, in, out,
                                height, output_tiles, row_units, stages, sharers, split, share});
}
extern "C" __global__ void __launch_bounds__(384, 1)
many_rows_rounded_1x2(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map, void* y,
                      const Scalar* bias, const float* x_scales, const float* scales, int form, int rows, int in, int out,
                      int height, int output_tiles, int row_units, int stages, int sharers, int split, int share) {
  Multiplication<1, 2, 1>::run({weight_map, x_map, y, bias, {x_scales, scales}, static_cast<Form>(form), rows, in, out,
                                height, output_tiles, row_units, stages, sharers, split, share});
}
extern "C" __global__ void __launch_bounds__(384, 1)
many_rows_rounded_2x1(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map, void* y,
                      const Scalar* bias, const float* x_scales, const float* scales, int form, int rows, int in, int out,
                      int height, int output_tiles, int row_units, int stages, int sharers, int split, int share) {
  Multiplication<2, 1, 1>::run({weight_map, x_map, y, bias, {x_scales, scales}, static_cast<Form>(form), rows, in, out,
                                height, output_tiles, row_units, stages, sharers, split, share});
}
extern "C" __global__ void __launch_bounds__(384, 1)
many_rows_rounded_2x2(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map, void* y,
                      const Scalar* bias, const float* x_scales, const float* scales, int form, int rows, int in, int out,
                      int height, int output_tiles, int row_units, int stages, int sharers, int split, int share) {
  Multiplication<2, 2, 1>::run({weight_map, x_map, y, bias, {x_scales, scales}, static_cast<Form>(form), rows, in, out,
                                height, output_tiles, row_units, stages, sharers, split, share});
}
