// y = x · weightᵀ + bias of 16-bit numbers on Hopper (many_rows.cuh). Built with SCALAR, ROWS and BLOCK_BYTES.
#define STORED SCALAR
#include "many_rows.cuh"

// Grid: the blocks of a cluster side by side; clusters take the units in turns.
extern "C" __global__ void __launch_bounds__(384, 1)
many_rows_1x1(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map, void* y, const Scalar* bias,
              int form, int rows, int in, int out, int height, int output_tiles, int row_units, int stages, int sharers,
              int split, int share) {
  Multiplication<1, 1, kRows < 128 ? 2 : 1>::run({weight_map, x_map, y, bias, {}, static_cast<Form>(form), rows, in, out, height,
                                output_tiles, row_units, stages, sharers, split, share});
}
extern "C" __global__ void __launch_bounds__(384, 1)
many_rows_1x2(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map, void* y, const Scalar* bias,
              int form, int rows, int in, int out, int height, int output_tiles, int row_units, int stages, int sharers,
              int split, int share) {
  Multiplication<1, 2, 1>::run({weight_map, x_map, y, bias, {}, static_cast<Form>(form), rows, in, out, height,
                                output_tiles, row_units, stages, sharers, split, share});
}
extern "C" __global__ void __launch_bounds__(384, 1)
many_rows_2x1(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map, void* y, const Scalar* bias,
              int form, int rows, int in, int out, int height, int output_tiles, int row_units, int stages, int sharers,
              int split, int share) {
  Multiplication<2, 1, 1>::run({weight_map, x_map, y, bias, {}, static_cast<Form>(form), rows, in, out, height,
                                output_tiles, row_units, stages, sharers, split, share});
}
extern "C" __global__ void __launch_bounds__(384, 1)
many_rows_2x2(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map, void* y, const Scalar* bias,
              int form, int rows, int in, int out, int height, int output_tiles, int row_units, int stages, int sharers,
              int split, int share) {
  Multiplication<2, 2, 1>::run({weight_map, x_map, y, bias, {}, static_cast<Form>(form), rows, in, out, height,
                                output_tiles, row_units, stages, sharers, split, share});
}
