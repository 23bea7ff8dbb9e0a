// y = x · weightᵀ + bias for the few rows of a decode step, the weight made of grouped integers (grouped.cuh).
// x [rows, in], bias [out], y [rows, out] of the same type, or of float. Or gated (forms.cuh).
//
// Work: a block takes tiles of kTiles times 16 outputs (gated: gates and ups in turns), all inputs of each. Its eight warps take
// turns at steps of some chunks of 64 inputs; their sums are added in shared memory, always in the same order. Copies go
// to a ring in shared memory, far ahead and over the ends of tiles; each warp multiplies what it copied itself, so warps meet
// only where a tile ends. To the tensor cores the weight is operand A (16 outputs), eight rows of x are B. They multiply
// integers as they come out of their words, with an offset and their zero; what these add up to is the sum of x, from one more
// product for all outputs, times both. The scale of a group is a factor of its sums.
// Bound by what it takes to widen the numbers, a little above the bytes of the weight. As no kernel of a step writes it, its
// copies start before x is waited for.
//
// Built with SCALAR (bf16 or f16), BITS (4 or 8), GROUPS (in two chunks: 1, 2 or 4), ROWS (1, 8 or 16: the most it takes) and
// RING_BYTES (of shared memory).
#include "grouped.cuh"
#include "forms.cuh"

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kHalves = ROWS > 8 ? 2 : 1;  // eights of rows
constexpr int kRowsOfHalf = ROWS > 8 ? 8 : ROWS;
constexpr int kTilesAtOnce = 2;            // whose sums shared memory holds
// Of all warps: a chunk of a tile and of x, where groups are smallest.
template <int kTiles> constexpr int kBytesOfChunk = kWarps * (kTiles * (kPiecesOfChunk * 512 + 128) + ROWS * 128);
// Of a step: as many as leave room for two steps in the ring.
template <int kTiles>
constexpr int kChunks = 8 * kBytesOfChunk<kTiles> <= RING_BYTES ? 4 : 4 * kBytesOfChunk<kTiles> <= RING_BYTES ? 2 : 1;
template <int kTiles> constexpr int kGroups = GROUPS * kChunks<kTiles> < 2 ? 1 : GROUPS * kChunks<kTiles> / 2;
template <int kTiles> constexpr int kProducts = kChunks<kTiles> * kChunk / 16;
template <int kTiles> constexpr int kPieces = kChunks<kTiles> * kPiecesOfChunk;

struct Problem {
  void* y;
  const Scalar *x, *bias;
  const uint4 *weight, *grid;
  Form form;
  int rows, in, out;      // out: columns of y
  int num_groups;
  u32 inverse;  // for group_of
  __device__ int num_sixteens() const { return ceil_div(is_gated(form) ? 2 * out : out, 16); }  // of outputs of the weight
};

// What a warp copies at a time, for a step.
template <int kTiles> struct Stage {
  uint4 weight[kTiles][kPieces<kTiles>][32];
  uint4 x[kChunks<kTiles>][kHalves][kRowsOfHalf][8];  // piece p of row r lies at p ^ r
  uint4 grid[kTiles][kGroups<kTiles>][4];
};
template <int kTiles> constexpr int kStagesThatFit = RING_BYTES / (kWarps * static_cast<int>(sizeof(Stage<kTiles>)));
// Where not even one fits, the kernel is not launched, but compiled.
template <int kTiles> constexpr int kStages = kStagesThatFit<kTiles> > 0 ? kStagesThatFit<kTiles> : 1;

// What a warp copies next. Places are counted in pieces of 16 bytes.
template <int kTiles> struct Copies {
  const Problem& problem;
  int num_chunks, num_sixteens, num_tiles;
  int tile, chunk;                  // the step's first
  int weight_at;                    // of the tile's first sixteen, this lane's
  int pair_stride, second_stride;   // of sixteens: from one pair to the next, from the first of a pair to the second

  __device__ explicit Copies(const Problem& problem) : problem(problem) {
    num_chunks = ceil_div(problem.in, kChunk);
    num_sixteens = problem.num_sixteens();
    num_tiles = ceil_div(num_sixteens, kTiles);
    pair_stride = is_gated(problem.form) ? 1 : 2;
    second_stride = is_gated(problem.form) ? num_sixteens / 2 : 1;
    begin();
  }
  __device__ void begin() {
    tile = blockIdx.x;
    begin_tile();
  }
  __device__ void copy_weight(Stage<kTiles>& stage) const {
    if (tile >= num_tiles) return;
    const int lane = threadIdx.x % 32, row_length = num_chunks * (kPiecesOfChunk * 32);
    const int at = weight_at + chunk * (kPiecesOfChunk * 32);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint4* source = problem.weight + static_cast<u32>(at + (i / 2 * pair_stride + i % 2 * second_stride) * row_length);
      const bool exists = sixteen_of(i) < num_sixteens;
#pragma unroll
      for (int piece = 0; piece < kPieces<kTiles>; ++piece)
        cp_async_16(&stage.weight[i][piece][lane], source + piece * 32, exists && chunk + piece / kPiecesOfChunk < num_chunks);
    }
#pragma unroll
    for (int first = 0; first < kTiles * kGroups<kTiles> * 4; first += 32) {
      const int piece = first + lane, i = piece / (kGroups<kTiles> * 4), group = piece / 4 % kGroups<kTiles>;
      const int place = sixteen_of(i) * problem.num_groups + number_of(group);
      if (piece < kTiles * kGroups<kTiles> * 4)
        cp_async_16(&stage.grid[i][group][piece % 4], problem.grid + static_cast<u32>(place * 4 + piece % 4),
                    sixteen_of(i) < num_sixteens && chunk + group * kChunks<kTiles> / kGroups<kTiles> < num_chunks);
    }
  }
  __device__ void copy_x(Stage<kTiles>& stage) const {
    if (tile >= num_tiles) return;
#pragma unroll
    for (int first = 0; first < kChunks<kTiles> * kHalves * kRowsOfHalf * 8; first += 32) {
      const int at = first + threadIdx.x % 32, piece = at % 8, row = at / 8 % kRowsOfHalf;
      const int half = at / (8 * kRowsOfHalf) % kHalves, c = at / (8 * kRowsOfHalf * kHalves);
      const int column = (chunk + c) * kChunk + piece * kVec<Scalar>;
      const bool exists = half * 8 + row < problem.rows && column < problem.in;
      if (c < kChunks<kTiles>)
        cp_async_16(&stage.x[c][half][row][piece ^ row], problem.x + static_cast<u32>((half * 8 + row) * problem.in + column), exists);
    }
  }
  __device__ void advance() {
    chunk += kWarps * kChunks<kTiles>;
    if (chunk - threadIdx.x / 32 * kChunks<kTiles> >= num_chunks) {
      tile += gridDim.x;
      begin_tile();
    }
  }
  // Which sixteen outputs of the weight are number i of a tile.
  __device__ int sixteen_of(int tile, int i) const {
    return tile * (is_gated(problem.form) ? kTiles / 2 : kTiles) + i / 2 * pair_stride + i % 2 * second_stride;
  }

 private:
  __device__ int sixteen_of(int i) const { return sixteen_of(tile, i); }
  __device__ int number_of(int group) const {
    if constexpr (kGroups<kTiles> == 2 * kChunks<kTiles>) return chunk * 2 + group;
    else return group_of(chunk + group * (kChunks<kTiles> / kGroups<kTiles>), problem.inverse);
  }
  __device__ void begin_tile() {
    chunk = threadIdx.x / 32 * kChunks<kTiles>;
    weight_at = sixteen_of(0) * num_chunks * (kPiecesOfChunk * 32) + threadIdx.x % 32;
  }
};

// A warp's products of a step, added to its sums: outputs lane / 4 (first two) and that + 8 of each sixteen, rows
// 2 (lane % 4) and the next of each half.
template <int kTiles> using Sums = float[kTiles][kHalves][4];

template <int kTiles> __device__ inline void multiply_step(Sums<kTiles>& sums, const Stage<kTiles>& stage, const Masks& masks) {
  constexpr int kProductsOfGroup = kProducts<kTiles> / kGroups<kTiles>;
  const int lane = threadIdx.x % 32, row = lane % kRowsOfHalf;  // rows that are not there are like others, and not written
  u32 x[kHalves][kProducts<kTiles> / 2][4];
  float x_sums[kGroups<kTiles>][kHalves][4] = {};  // of rows 2 (lane % 4) and the next
#pragma unroll
  for (int half = 0; half < kHalves; ++half)
#pragma unroll
    for (int i = 0; i < kProducts<kTiles> / 2; ++i) {
      ldmatrix(x[half][i], &stage.x[i / 2][half][row][(i % 2 * 4 + lane / 8) ^ row]);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        mma_16x8x16<Scalar>(x_sums[(i * 2 + j) / kProductsOfGroup][half], {kOne, kOne, kOne, kOne}, x[half][i][j * 2], x[half][i][j * 2 + 1]);
    }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    uint4 pieces[kPieces<kTiles>];
#pragma unroll
    for (int i = 0; i < kPieces<kTiles>; ++i) pieces[i] = stage.weight[tile][i][lane];
#pragma unroll
    for (int group = 0; group < kGroups<kTiles>; ++group) {
      const u32* words = reinterpret_cast<const u32*>(stage.grid[tile][group]);
      const u32 low = words[lane / 4], high = words[lane / 4 + 8];
      float products[kHalves][4] = {};
#pragma unroll
      for (int i = group * kProductsOfGroup; i < (group + 1) * kProductsOfGroup; ++i) {
        u32 a[4];
        widen_integers(a, pieces[i / kProductsOfPiece], i % kProductsOfPiece, masks);
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
          mma_16x8x16<Scalar>(products[half], a, x[half][i / 2][i % 2 * 2], x[half][i / 2][i % 2 * 2 + 1]);
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const u32 word = i < 2 ? low : high;
          sums[tile][half][i] += scale_of(word) * (products[half][i] + minus_zero(word) * x_sums[group][half][i % 2]);
        }
    }
  }
}

// Add the warps' sums of a tile and write them.
template <int kTiles>
__device__ inline void write_tile(const Sums<kTiles>& sums, const Problem& problem, const Copies<kTiles>& copies, int tile) {
  __shared__ float4 parts[kWarps][(kTiles < kTilesAtOnce ? kTiles : kTilesAtOnce) * kHalves][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, out = problem.out;
  const bool gates = is_gated(problem.form);
#pragma unroll
  for (int first = 0; first < kTiles; first += kTilesAtOnce) {
    const int last = min(first + kTilesAtOnce, kTiles);
#pragma unroll
    for (int i = first; i < last; ++i)
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const float(&own)[4] = sums[i][half];
        parts[warp][(i - first) * kHalves + half][lane] = make_float4(own[0], own[1], own[2], own[3]);
      }
    __syncthreads();
    const auto total = [&](int at, int column, int bias_offset) {
      const auto bias = [&](int i) {
        return problem.bias && column + i < out ? to_float(problem.bias[bias_offset + column + i]) : 0.0f;
      };
      float4 sum = make_float4(bias(0), bias(0), bias(8), bias(8));
#pragma unroll
      for (int other = 0; other < kWarps; ++other) {
        const float4 part = parts[other][at][lane];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      return sum;
    };
    const int step = gates ? 2 : 1;
    for (int at = warp; at < (last - first) / step * kHalves; at += kWarps) {  // the same for a warp
      const int i = first + at / kHalves * step, half = at % kHalves, slot = (i - first) * kHalves + half;
      const int sixteen = copies.sixteen_of(tile, i), column = sixteen * 16 + lane / 4;
      float4 sum = total(slot, column, 0);
      if (gates) {
        const float4 up = total(slot + kHalves, column, out);
        sum = make_float4(gated(problem.form, sum.x, up.x), gated(problem.form, sum.y, up.y), gated(problem.form, sum.z, up.z),
                          gated(problem.form, sum.w, up.w));
      }
      if (problem.form == kFloat) {
        const int row = half * 8 + lane % 4 * 2;
        float* target = static_cast<float*>(problem.y) + static_cast<i64>(row) * out + column;
        if (row < problem.rows && column < out) target[0] = sum.x;
        if (row < problem.rows && column + 8 < out) target[8] = sum.z;
        if (row + 1 < problem.rows && column < out) target[out] = sum.y;
        if (row + 1 < problem.rows && column + 8 < out) target[out + 8] = sum.w;
      } else {  // a lane gets two neighbouring outputs of one row
        const u32 words[2] = {transpose(pack<Scalar>(sum.x, sum.y)), transpose(pack<Scalar>(sum.z, sum.w))};
        const int row = half * 8 + lane / 4, first_column = sixteen * 16 + lane % 4 * 2;
#pragma unroll
        for (int eight = 0; eight < 2; ++eight)
          if (row < problem.rows && first_column + eight * 8 < out)
            *reinterpret_cast<u32*>(static_cast<Scalar*>(problem.y) + static_cast<i64>(row) * out + first_column + eight * 8) =
                words[eight];
      }
    }
    __syncthreads();  // before the next sums
  }
}

// Grid: as many blocks as run at once; they take the tiles in turns.
template <int kTiles> __device__ inline void multiply(const Problem& problem) {
  extern __shared__ uint4 shared[];
  Stage<kTiles>* stages = reinterpret_cast<Stage<kTiles>*>(shared) + threadIdx.x / 32 * kStages<kTiles>;  // this warp's
  // Stages filled before x is waited for. The rest is asked for after x, and keeps the memory busy until x has come.
  constexpr int kEarly = kStages<kTiles> * 7 / 8;
  Copies<kTiles> copies(problem);
#pragma unroll 1
  for (int stage = 0; stage < kEarly; ++stage, copies.advance()) copies.copy_weight(stages[stage]);
  start_dependents();
  wait_for_inputs();
  copies.begin();
#pragma unroll 1
  for (int stage = 0; stage < kEarly; ++stage, copies.advance()) copies.copy_x(stages[stage]);
#pragma unroll
  for (int stage = 0; stage < kEarly; ++stage) cp_async_commit();  // the first group holds them all, the others nothing
#pragma unroll 1
  for (int stage = kEarly; stage < kStages<kTiles>; ++stage, copies.advance()) {
    copies.copy_weight(stages[stage]);
    copies.copy_x(stages[stage]);
    cp_async_commit();
  }

  const Masks masks(problem.in);
  int stage = 0;
  for (int tile = blockIdx.x; tile < copies.num_tiles; tile += gridDim.x) {
    Sums<kTiles> sums = {};
#pragma unroll 1
    for (int chunk = 0; chunk < copies.num_chunks; chunk += kWarps * kChunks<kTiles>) {
      cp_async_wait<kStages<kTiles> - 1>();
      __syncwarp();
      multiply_step<kTiles>(sums, stages[stage], masks);
      __syncwarp();
      copies.copy_weight(stages[stage]);
      copies.copy_x(stages[stage]);
      cp_async_commit();
      copies.advance();
      stage = stage + 1 < kStages<kTiles> ? stage + 1 : 0;
    }
    write_tile<kTiles>(sums, problem, copies, tile);
  }
}

// out: columns of y. inverse: for group_of, where groups have whole chunks.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
few_rows_grouped_1(void* y, const Scalar* x, const uint4* weight, const uint4* grid, const Scalar* bias, int form, int rows,
                   int in, int out, int num_groups, int inverse) {
  multiply<1>({y, x, bias, weight, grid, static_cast<Form>(form), rows, in, out, num_groups, static_cast<u32>(inverse)});
}
extern "C" __global__ void __launch_bounds__(kThreads, 1)
few_rows_grouped_2(void* y, const Scalar* x, const uint4* weight, const uint4* grid, const Scalar* bias, int form, int rows,
                   int in, int out, int num_groups, int inverse) {
  multiply<2>({y, x, bias, weight, grid, static_cast<Form>(form), rows, in, out, num_groups, static_cast<u32>(inverse)});
}
extern "C" __global__ void __launch_bounds__(kThreads, 1)
few_rows_grouped_3(void* y, const Scalar* x, const uint4* weight, const uint4* grid, const Scalar* bias, int form, int rows,
                   int in, int out, int num_groups, int inverse) {
  multiply<3>({y, x, bias, weight, grid, static_cast<Form>(form), rows, in, out, num_groups, static_cast<u32>(inverse)});
}
extern "C" __global__ void __launch_bounds__(kThreads, 1)
few_rows_grouped_4(void* y, const Scalar* x, const uint4* weight, const uint4* grid, const Scalar* bias, int form, int rows,
                   int in, int out, int num_groups, int inverse) {
  multiply<4>({y, x, bias, weight, grid, static_cast<Form>(form), rows, in, out, num_groups, static_cast<u32>(inverse)});
}
extern "C" __global__ void __launch_bounds__(kThreads, 1)
few_rows_grouped_14(void* y, const Scalar* x, const uint4* weight, const uint4* grid, const Scalar* bias, int form, int rows,
                   int in, int out, int num_groups, int inverse) {
  if constexpr (ROWS <= 8)  // the sums of more do not fit the registers
    multiply<14>({y, x, bias, weight, grid, static_cast<Form>(form), rows, in, out, num_groups, static_cast<u32>(inverse)});
}
extern "C" __global__ void __launch_bounds__(kThreads, 1)
few_rows_grouped_8(void* y, const Scalar* x, const uint4* weight, const uint4* grid, const Scalar* bias, int form, int rows,
                   int in, int out, int num_groups, int inverse) {
  multiply<8>({y, x, bias, weight, grid, static_cast<Form>(form), rows, in, out, num_groups, static_cast<u32>(inverse)});
}
