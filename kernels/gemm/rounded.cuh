// Products of numbers that are stored in 16 bits, or rounded to 8: e4m3 or s8, with a float scale for each row, or for each
// panel of 128 inputs of a row of x and each square of 128 outputs and 128 inputs of the weight (HAS_PANELS).
#pragma once

#include "types.cuh"

#ifndef HAS_PANELS
#define HAS_PANELS 0
#endif
constexpr bool kHasPanels = HAS_PANELS;
constexpr int kPanel = 128;  // inputs

// Of x and of the weight: [rows] and [out]; or [panels][rows, up to a multiple of 128] and [squares of out][panels].
struct Scales {
  const float *of_rows, *of_outputs;

  // Of this row of x, an even one, and the next.
  __device__ const float2* of_two_rows(int panel, int row, int rows) const {
    return reinterpret_cast<const float2*>(of_rows + static_cast<i64>(panel) * (ceil_div(rows, 128) * 128) + row);
  }
  __device__ float of_square(int output, int panel, int in) const {
    return of_outputs[static_cast<i64>(output / 128) * ceil_div(in, kPanel) + panel];
  }
};

template <class T> constexpr bool kIsRounded = sizeof(T) == 1;

template <class T> struct SumType { using Type = float; };
template <> struct SumType<s8> { using Type = int; };  // exact
template <class T> using SumOf = typename SumType<T>::Type;
template <class T> constexpr bool kHasShortSums = false;  // on Hopper's tensor cores
template <> constexpr bool kHasShortSums<e4m3> = true;

// 16 bytes of a row as words of operands. They stand for other inputs than the words of a plain load would, in the same order
// for x and weight.
template <class T> struct Operand {
  static constexpr int kWords = 4;
  u32 words[kWords];
  __device__ explicit Operand(uint4 piece) : words{piece.x, piece.y, piece.z, piece.w} {}
};
template <> struct Operand<e4m3> {  // as f16: exact
  static constexpr int kWords = 8;
  u32 words[kWords];
  __device__ explicit Operand(uint4 piece)
      : words{unpack_e4m3(piece.x), unpack_e4m3(piece.x >> 16), unpack_e4m3(piece.y), unpack_e4m3(piece.y >> 16),
              unpack_e4m3(piece.z), unpack_e4m3(piece.z >> 16), unpack_e4m3(piece.w), unpack_e4m3(piece.w >> 16)} {}
};

// C [16, 8] += A · B of what such words hold.
template <class T> __device__ inline void multiply_16x8(SumOf<T> (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (kIsRounded<T>) mma_16x8x16<f16>(c, a, b0, b1);
  else mma_16x8x16<T>(c, a, b0, b1);
}
template <> __device__ inline void multiply_16x8<s8>(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_16x8x32(c, a, b0, b1); }
