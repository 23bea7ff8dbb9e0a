// A weight of grouped integers (grouped.cuh) as numbers of x's type, row by row: y [out, in] = (q - zero) · scale.
//
// A warp makes a chunk of 64 inputs of 16 outputs, and puts it in order in shared memory, to be written in whole lines.
// Bound by bytes: what it reads and, four times as much, what it writes.
// Built with SCALAR (bf16 or f16), BITS (4 or 8) and GROUPS (in a chunk: 1 or 2).
#include "grouped.cuh"

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kProducts = kChunk / 16;

// Grid: x = eights of chunks, y = sixteens of outputs.
extern "C" __global__ void __launch_bounds__(kThreads)
widen_grouped(Scalar* y, const uint4* weight, const u32* grid, int out, int in, int num_groups, int inverse) {
  __shared__ uint4 staging[kWarps][16][8];  // piece p of row r lies at p ^ (r % 8)
  start_dependents();
  wait_for_inputs();  // the last kernel may still read what y replaces
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_chunks = ceil_div(in, kChunk);
  const int chunk = blockIdx.x * kWarps + warp, sixteen = blockIdx.y;
  if (chunk >= num_chunks) return;
  const Masks masks(in);
  const uint4* source = weight + (static_cast<i64>(sixteen) * num_chunks + chunk) * (kPiecesOfChunk * 32) + lane;
  uint4 pieces[kPiecesOfChunk];
#pragma unroll
  for (int i = 0; i < kPiecesOfChunk; ++i) pieces[i] = source[i * 32];
#pragma unroll
  for (int i = 0; i < GROUPS; ++i) {
    const int group = GROUPS == 1 ? group_of(chunk, inverse) : chunk * GROUPS + i;
    const u32* words = grid + (static_cast<i64>(sixteen) * num_groups + group) * 16 + lane / 4;
    const u32 zeros[2] = {minus_zeros(words[0], masks), minus_zeros(words[8], masks)};
#pragma unroll
    for (int k = i * (kProducts / GROUPS); k < (i + 1) * (kProducts / GROUPS); ++k) {
      u32 a[4];
      widen_integers(a, pieces[k / kProductsOfPiece], k % kProductsOfPiece, masks);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float scale = scale_of(words[j % 2 * 8]);
        const float2 pair = unpack<Scalar>(fma_pair<Scalar>(a[j], kOne, zeros[j % 2]));
        const int row = lane / 4 + j % 2 * 8, piece = k * 2 + j / 2;
        reinterpret_cast<u32*>(&staging[warp][row][piece ^ row % 8])[lane % 4] = pack<Scalar>(pair.x * scale, pair.y * scale);
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = i * 4 + lane / 8, row = sixteen * 16 + at, column = chunk * kChunk + lane % 8 * kVec<Scalar>;
    if (row < out && column < in)
      store_bits(y + static_cast<i64>(row) * in + column, staging[warp][at][(lane % 8) ^ at % 8]);
  }
}
