// y = x · weightᵀ + bias for the few rows of a decode step.   x [rows, in], weight [out, in] of one type, bias [out],
// y [rows, out] of 16 bits, or of float. Or gated (forms.cuh). Numbers of 8 bits (rounded.cuh) have scales.
//
// Work: a block takes tiles of kOctets times eight outputs (gated: half of them gates), all inputs of each. Its eight warps
// take turns at chunks of 128 bytes of inputs; their sums are added in shared memory, always in the same order. Copies of the
// weight and of x go to a ring in shared memory, far ahead and over the ends of tiles; each warp multiplies what it copied
// itself, so warps meet only where a tile ends. The tensor cores see two octets of outputs as A and eight rows of x as B. They
// may add up the inputs in any order: a lane reads 16 bytes at a time, inputs that stand at the places which the fragments of
// two products give it.
// Bound by bytes: the weight, once. As no kernel of a step writes it, its copies start before x is waited for.
//
// Built with SCALAR (bf16 or f16: of y and bias), STORED (of x and weight: the same, e4m3 or s8), ROWS (8, 16 or 32: the most
// it takes) and RING_BYTES (of shared memory).
#pragma once

#include "forms.cuh"
#include "rounded.cuh"

using Scalar = SCALAR;
using Stored = STORED;
using Sum = SumOf<Stored>;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kHalves = ROWS / 8;  // eights of rows
constexpr int kPieces = 8;         // of 16 bytes in a warp's step: a line of the caches, in each of eight rows
constexpr int kChunk = kPieces * kVec<Stored>;  // inputs
template <int kOctets> constexpr int kStagesThatFit = RING_BYTES / ((kOctets + kHalves) * kWarps * 8 * kPieces * 16);
// Where not even one fits, or the sums of all warps do not, the kernel is not launched, but compiled.
template <int kOctets> constexpr int kStages = kStagesThatFit<kOctets> > 0 ? kStagesThatFit<kOctets> : 1;

// The first row of the weight of an octet of a tile.
template <int kOctets> __device__ inline int first_output(int tile, int octet, bool is_gated, int out) {
  constexpr int kHalf = kOctets / 2;
  if (!is_gated) return (tile * kOctets + octet) * 8;
  return (tile * kHalf + octet % kHalf) * 8 + (octet < kHalf ? 0 : out / 2);
}

// What is copied next, and where a warp's copies lie.
template <int kOctets> struct Ring {
  uint4* shared;  // [kStages][kOctets + kHalves][kWarps][8 rows][kPieces]
  const Stored *weight, *x;
  int rows, in, out, num_steps, num_tiles;  // out: rows of the weight
  bool is_gated;
  int tile, step;

  __device__ void copy_weight(int stage) const {
    if (tile >= num_tiles) return;
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet)
      copy_eight_rows(at(stage, octet), weight, first_output<kOctets>(tile, octet, is_gated, out), out);
  }
  __device__ void copy_x(int stage) const {
    if (tile >= num_tiles) return;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) copy_eight_rows(at(stage, kOctets + half), x, half * 8, rows);
  }
  __device__ void advance() {
    if (++step == num_steps) step = 0, tile += gridDim.x;
  }

  // The 16 bytes that lane l needs of row l / 4 of an octet of outputs or of a half of x (`part` kOctets and on).
  __device__ uint4 piece(int stage, int part, int half_chunk) const {
    const int lane = threadIdx.x % 32;
    return at(stage, part)[place(lane / 4, half_chunk * 4 + lane % 4)];
  }

 private:
  __device__ uint4* at(int stage, int part) const {
    return shared + ((stage * (kOctets + kHalves) + part) * kWarps + threadIdx.x / 32) * 8 * kPieces;
  }
  // The halves of odd rows are exchanged: the lanes that read at a time, four in each of two rows, then meet in no bank.
  __device__ static int place(int row, int piece) { return row * kPieces + (piece ^ (row % 2) * 4); }

  __device__ void copy_eight_rows(uint4* to, const Stored* matrix, int first_row, int num_rows) const {
    const int lane = threadIdx.x % 32, piece = lane % kPieces;
    const int column = (step * kWarps + threadIdx.x / 32) * kChunk + piece * kVec<Stored>;
#pragma unroll
    for (int i = 0; i < 8 * kPieces / 32; ++i) {
      const int row = i * (32 / kPieces) + lane / kPieces;
      const bool exists = first_row + row < num_rows && column < in;
      cp_async_16(to + place(row, piece), matrix + static_cast<i64>(first_row + row) * in + column, exists);
    }
  }
};

// Of an octet of rows a lane holds, as for mma_16x8x16, rows 2 (lane % 4) and the next, and output lane / 4 of two octets.
template <int kOctets> using Sums = Sum[kOctets / 2][kHalves][4];

// The scales of a panel of inputs, of what a lane holds of a tile. They are loaded well before they are needed.
template <int kOctets> struct PanelScales {
  float2 of_rows[kHalves];
  float of_octets[kOctets];

  // out: rows of the weight
  __device__ PanelScales(Scales scales, bool is_gated, int rows, int in, int out, int tile, int panel) {
    const bool exists = panel * kPanel < in;
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
      of_rows[half] = exists ? *scales.of_two_rows(panel, half * 8 + threadIdx.x % 4 * 2, rows) : make_float2(0.0f, 0.0f);
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const int output = first_output<kOctets>(tile, octet, is_gated, out);
      of_octets[octet] = exists && output < out ? scales.of_square(output, panel, in) : 0.0f;
    }
  }
  __device__ void add(Sums<kOctets>& sums, const Sums<kOctets>& partial) const {
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet)
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const Sum* from = &partial[octet / 2][half][octet % 2 * 2];
        Sum* to = &sums[octet / 2][half][octet % 2 * 2];
        to[0] += from[0] * (of_rows[half].x * of_octets[octet]);
        to[1] += from[1] * (of_rows[half].y * of_octets[octet]);
      }
  }
};

// Add the warps' sums of a tile and write them.   out: columns of y
template <int kOctets>
__device__ inline void write_tile(const Sums<kOctets>& sums, void* y, Form form, const Scalar* bias, Scales scales, int rows,
                                  int out, int tile) {
  __shared__ float2 parts[kWarps][kOctets * kHalves * 32];  // an octet of outputs and one of rows: 8 rows of 8 outputs
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int octet = 0; octet < kOctets; ++octet)
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const Sum* own = &sums[octet / 2][half][octet % 2 * 2];
      float* rows_of = reinterpret_cast<float*>(&parts[threadIdx.x / 32][(octet * kHalves + half) * 32]);
      rows_of[lane % 4 * 16 + lane / 4] = own[0];
      rows_of[lane % 4 * 16 + 8 + lane / 4] = own[1];
    }
  __syncthreads();
  const auto total = [&](int at, int row, int output) {
    const float2 start = bias ? unpack<Scalar>(*reinterpret_cast<const u32*>(bias + output)) : make_float2(0.0f, 0.0f);
    float2 sum = kIsRounded<Stored> && !kHasPanels ? make_float2(0.0f, 0.0f) : start;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      sum.x += parts[warp][at].x;
      sum.y += parts[warp][at].y;
    }
    if constexpr (kIsRounded<Stored> && !kHasPanels) {
      const float scale = scales.of_rows[row];
      sum.x = sum.x * (scale * scales.of_outputs[output]) + start.x;
      sum.y = sum.y * (scale * scales.of_outputs[output + 1]) + start.y;
    }
    return sum;
  };
  const int octets = is_gated(form) ? kOctets / 2 : kOctets;
  for (int at = threadIdx.x; at < octets * kHalves * 32; at += kThreads) {
    const int row = at / 32 % kHalves * 8 + at % 32 / 4, column = (tile * octets + at / (32 * kHalves)) * 8 + at % 4 * 2;
    if (row >= rows || column >= out) continue;
    float2 sum = total(at, row, column);
    if (is_gated(form)) {
      const float2 up = total(at + octets * kHalves * 32, row, out + column);
      sum = make_float2(gated(form, sum.x, up.x), gated(form, sum.y, up.y));
    }
    const i64 target = static_cast<i64>(row) * out + column;
    if (form == kFloat) *reinterpret_cast<float2*>(static_cast<float*>(y) + target) = sum;
    else *reinterpret_cast<u32*>(static_cast<Scalar*>(y) + target) = pack<Scalar>(sum.x, sum.y);
  }
  __syncthreads();  // before the next tile's sums
}

// Add to a warp's sums the products of its chunk of inputs, which has come.
template <int kOctets> __device__ inline void multiply_chunk(Sums<kOctets>& sums, const Ring<kOctets>& ring, int stage) {
  __syncwarp();
#pragma unroll
  for (int half_chunk = 0; half_chunk < 2; ++half_chunk) {
    u32 x[kHalves][Operand<Stored>::kWords];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const Operand<Stored> piece(ring.piece(stage, kOctets + half, half_chunk));
#pragma unroll
      for (int i = 0; i < Operand<Stored>::kWords; ++i) x[half][i] = piece.words[i];
    }
#pragma unroll
    for (int pair = 0; pair < kOctets / 2; ++pair) {
      const Operand<Stored> low(ring.piece(stage, 2 * pair, half_chunk)), high(ring.piece(stage, 2 * pair + 1, half_chunk));
#pragma unroll
      for (int i = 0; i < Operand<Stored>::kWords; i += 2) {
        const u32 weight[4] = {low.words[i], high.words[i], low.words[i + 1], high.words[i + 1]};
#pragma unroll
        for (int half = 0; half < kHalves; ++half) multiply_16x8<Stored>(sums[pair][half], weight, x[half][i], x[half][i + 1]);
      }
    }
  }
}

// What `write_tile` reads of the scales is to wait for no memory then.   out: rows of the weight
template <int kOctets>
__device__ inline void prefetch_scales(Scales scales, bool is_gated, int rows, int out, int tile) {
  if constexpr (kIsRounded<Stored> && !kHasPanels) {
    const int at = threadIdx.x, outputs = is_gated ? kOctets * 4 : kOctets * 8;
    const int output = tile * outputs + (at < outputs ? at : at - outputs + out / 2);
    if (at < kOctets * 8 && output < out) prefetch(scales.of_outputs + output);
    if (at < rows) prefetch(scales.of_rows + at);
  }
}

// Grid: as many blocks as run at once; they take the tiles in turns.
template <int kOctets>
__device__ inline void multiply(void* y, const Stored* x, const Stored* weight, const Scalar* bias, Scales scales, Form form,
                                int rows, int in, int out) {
  extern __shared__ uint4 shared[];
  // Stages filled before x is waited for. The rest is asked for after x, and keeps the memory busy until x has come.
  constexpr int kEarly = kStages<kOctets> * 7 / 8;
  const int num_steps = ceil_div(in, kWarps * kChunk), num_tiles = ceil_div(out, 8 * kOctets), first_tile = blockIdx.x;
  Ring<kOctets> ring{shared, weight, x, rows, in, out, num_steps, num_tiles, is_gated(form), first_tile, 0};
#pragma unroll 1
  for (int stage = 0; stage < kEarly; ++stage, ring.advance()) ring.copy_weight(stage);
  start_dependents();
  wait_for_inputs();
  ring.tile = first_tile, ring.step = 0;
#pragma unroll 1
  for (int stage = 0; stage < kEarly; ++stage, ring.advance()) ring.copy_x(stage);
#pragma unroll
  for (int stage = 0; stage < kEarly; ++stage) cp_async_commit();  // the first group holds them all, the others nothing
#pragma unroll 1
  for (int stage = kEarly; stage < kStages<kOctets>; ++stage, ring.advance()) {
    ring.copy_weight(stage);
    ring.copy_x(stage);
    cp_async_commit();
  }

  int stage = 0;
  for (int tile = first_tile; tile < num_tiles; tile += gridDim.x) {
    prefetch_scales<kOctets>(scales, is_gated(form), rows, out, tile);
    Sums<kOctets> sums = {};
    for (int step = 0; step < num_steps; ++step) {
      if constexpr (kHasPanels) {
        const PanelScales<kOctets> of_panel(scales, is_gated(form), rows, in, out, tile, step * kWarps + threadIdx.x / 32);
        Sums<kOctets> partial = {};
        cp_async_wait<kStages<kOctets> - 1>();
        multiply_chunk<kOctets>(partial, ring, stage);
        of_panel.add(sums, partial);
      } else {
        cp_async_wait<kStages<kOctets> - 1>();
        multiply_chunk<kOctets>(sums, ring, stage);
      }
      __syncwarp();
      ring.copy_weight(stage);
      ring.copy_x(stage);
      cp_async_commit();
      ring.advance();
      stage = stage + 1 < kStages<kOctets> ? stage + 1 : 0;
    }
    write_tile<kOctets>(sums, y, form, bias, scales, rows, is_gated(form) ? out / 2 : out, tile);
  }
}
