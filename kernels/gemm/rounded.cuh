// Products of numbers that are stored in 16 bits, or rounded to 8: e4m3 or s8, with a float scale for each row.
#pragma once

#include "types.cuh"

struct Scales { const float *of_rows, *of_outputs; };  // of x, of the weight

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
