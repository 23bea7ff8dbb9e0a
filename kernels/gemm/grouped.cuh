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

// Pairs of numbers of Scalar. The unit is 2^7 or 2^10, the numbers from which on the last bit counts 1: integers that are put
// there are added.
template <class T> struct Pairs;
template <> struct Pairs<bf16> { static constexpr u32 kUnit = 0x43004300, kOne = 0x3f803f80; };
template <> struct Pairs<f16> { static constexpr u32 kUnit = 0x64006400, kOne = 0x3c003c00; };
constexpr u32 kUnit = Pairs<Scalar>::kUnit, kOne = Pairs<Scalar>::kOne, kSigns = 0x80008000;

// What takes integers out of a word. Constants, which the compiler would make anew for each of them if it knew: `in`, which is
// not negative, hides them.
struct Masks {
  u32 low, high;  // 4 bits: digits 0 and 4; 8 bits: of bytes 0 and 2, all but the highest bit, and that
  __device__ explicit Masks(int in) : low(in >> 31 | (kBits == 4 ? 0x000f000f : 0x007f007f)), high(in >> 31 | 0x00800080) {}
};

// Two bytes of a word, 0 and 2, as signed numbers: what their low bits are, less 128 where the highest is set.
__device__ inline u32 widen_bytes(u32 word, const Masks& masks) {
  return fma_pair<Scalar>((word & masks.high) | kUnit, kOne | kSigns, (word & masks.low) | kUnit);
}

// Scale and zero of an output's group.
struct Group {
  float scale;
  u32 minus_zero;  // as a pair; of 4-bit numbers less the unit that they come with
  __device__ Group(u32 word, const Masks& masks) : scale(__uint_as_float(word & ~0xffu)) {
    const u32 pair = (word & 0xff) * 0x10001u;
    if constexpr (kBits == 4) minus_zero = pair | kUnit | kSigns;
    else minus_zero = widen_bytes(pair, masks) ^ kSigns;
  }
};

// q - zero, exact, of a lane's share of operand A: product `which` of a piece's. `low` is of output lane / 4, `high` of the
// one 8 further.
__device__ inline void widen_integers(u32 (&a)[4], uint4 piece, int which, const Group& low, const Group& high,
                                      const Masks& masks) {
  const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 wide;
    if constexpr (kBits == 4) wide = (words[which] >> 4 * i & masks.low) | kUnit;
    else wide = widen_bytes(words[2 * which + i / 2] >> 8 * (i % 2), masks);
    a[i] = fma_pair<Scalar>(wide, kOne, (i % 2 ? high : low).minus_zero);
  }
}
