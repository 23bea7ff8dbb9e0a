// Weights of grouped integers: W = (q - zero) · scale, where the inputs of a group share scale and zero.
//
// They lie as engine/ops/cuda/grouped_weight.py packs them. For each 16 outputs and 64 inputs (a chunk) each lane of a warp has its
// share of operand A of four products (mma_16x8x16), in pieces of 16 bytes, the lanes side by side: one piece of 4-bit
// numbers, two of 8-bit ones. Beside them lies a grid: for each 16 outputs and each group 16 words, a float scale whose lowest
// 8 bits are the zero.
//
// Needs SCALAR (bf16 or f16: the numbers that the tensor cores get) and BITS (4 or 8).
#pragma once

#include "types.cuh"

using Scalar = SCALAR;
constexpr int kBits = BITS;
constexpr int kChunk = 64;                // inputs
constexpr int kPiecesOfChunk = kBits / 4; // of a lane
constexpr int kProductsOfPiece = 16 / kBits;

// In which group a chunk lies, where groups hold whole chunks: division by how many, of which `inverse` is 2^30 / that, upwards.
__device__ inline int group_of(int chunk, u32 inverse) { return __umulhi(4 * chunk + 2, inverse); }

// Pairs of numbers of Scalar. From kUnit on, 2^7 or 2^10, the last bit counts 1: integers that are put there are added. 4-bit
// numbers are put kPlace bits further up, into kOver: kOffset is added.
template <class T> struct Pairs;
template <> struct Pairs<bf16> {
  static constexpr u32 kOne = 0x3f803f80, kUnit = 0x43004300, kOver = 0x43004300;
  static constexpr int kPlace = 0, kOffset = 128;
};
template <> struct Pairs<f16> {  // sums of such numbers stay exact longer, the less is added
  static constexpr u32 kOne = 0x3c003c00, kUnit = 0x64006400, kOver = 0x54005400;
  static constexpr int kPlace = 4, kOffset = 64;
};
constexpr u32 kOne = Pairs<Scalar>::kOne, kUnit = Pairs<Scalar>::kUnit, kOver = Pairs<Scalar>::kOver, kSigns = 0x80008000;
constexpr int kPlace = Pairs<Scalar>::kPlace;
constexpr int kOffset = kBits == 4 ? Pairs<Scalar>::kOffset : 0;  // what numbers come with

// What takes integers out of a word. Constants, which the compiler would make anew for each of them if it knew: `in`, which is
// not negative, hides them.
struct Masks {
  u32 low, high;  // 4 bits: digits 0 and 4, at their place; 8 bits: of bytes 0 and 2, all but the highest bit, and that
  __device__ explicit Masks(int in) : low(in >> 31 | (kBits == 4 ? 0x000f000f << kPlace : 0x007f007f)), high(in >> 31 | 0x00800080) {}
};

// Two bytes of a word, 0 and 2, as signed numbers: what their low bits are, less 128 where the highest is set.
__device__ inline u32 widen_bytes(u32 word, const Masks& masks) {
  return fma_pair<Scalar>((word & masks.high) | kUnit, kOne | kSigns, (word & masks.low) | kUnit);
}

// q + kOffset, exact, of a lane's share of operand A: product `which` of a piece's.
__device__ inline void widen_integers(u32 (&a)[4], uint4 piece, int which, const Masks& masks) {
  const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kBits == 4) {
      const int shift = 4 * i - kPlace;
      a[i] = ((shift < 0 ? words[which] << -shift : words[which] >> shift) & masks.low) | kOver;
    } else a[i] = widen_bytes(words[2 * which + i / 2] >> 8 * (i % 2), masks);
  }
}

// Of a word of the grid: the scale, and -(zero + kOffset) as a float and as a pair.
__device__ inline float scale_of(u32 word) { return __uint_as_float(word & ~0xffu); }
__device__ inline float minus_zero(u32 word) {
  constexpr u32 kSign = kBits == 4 ? 0 : 0x80, kMillions = 0x4b000000;  // 2^23, where the last bit counts 1
  return 8388608.0f + kSign - kOffset - __uint_as_float((word & 0xff ^ kSign) | kMillions);
}
__device__ inline u32 minus_zeros(u32 word, const Masks& masks) {
  const u32 zeros = (word & 0xff) * 0x10001u;
  return kBits == 4 ? zeros << kPlace | kOver | kSigns : widen_bytes(zeros, masks) ^ kSigns;
}
