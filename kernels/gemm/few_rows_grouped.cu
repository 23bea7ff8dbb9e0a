// y = x · weightᵀ + bias for the few rows of a decode step, the weight made of grouped integers (grouped.cuh).
// x [rows, in], bias [out], y [rows, out] of the same type, or of float. Or gated (forms.cuh).
//
// Work: a block takes tiles of kTiles times 16 outputs (gated: gates and ups in turns), all inputs of each. Its eight warps take
// turns at chunks of 64 inputs; their sums are added in shared memory, always in the same order. Copies go to a ring in shared
// memory, far ahead and over the ends of tiles; each warp multiplies what it copied itself, so warps meet only where a tile
// ends. To the tensor cores the weight is operand A (16 outputs), eight rows of x are B. They multiply integers, which are
// exact in 16 bits; the scale of a group is a factor of its sums.
// Bound by bytes: the weight, once. As no kernel of a step writes it, its copies start before x is waited for.
//
// Built with SCALAR (bf16 or f16), BITS (4 or 8), GROUPS (in a chunk: 1 or 2), ROWS (8 or 16: the most it takes) and
// RING_BYTES (of shared memory).
#include "grouped.cuh"
#include "forms.cuh"

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kHalves = ROWS / 8;        // eights of rows
constexpr int kGroups = GROUPS;
constexpr int kTilesAtOnce = 4;          // whose sums shared memory holds
constexpr int kProducts = kChunk / 16;   // of a chunk

struct Problem {
  void* y;
  const Scalar *x, *bias;
  const uint4 *weight, *grid;
  Form form;
  int rows, in, out;      // out: columns of y
  int num_groups, chunks_of_group;
  __device__ int num_sixteens() const { return ceil_div(is_gated(form) ? 2 * out : out, 16); }  // of outputs of the weight
};

// What a warp copies at a time: a chunk of a tile.
template <int kTiles> struct Stage {
  uint4 weight[kTiles][kPiecesOfChunk][32];
  uint4 x[kHalves][8][kChunk / kVec<Scalar>];  // piece p of row r lies at p ^ r
  uint4 grid[kTiles][kGroups][4];
};
template <int kTiles> constexpr int kStagesThatFit = RING_BYTES / (kWarps * static_cast<int>(sizeof(Stage<kTiles>)));
// Where not even one fits, the kernel is not launched, but compiled.
template <int kTiles> constexpr int kStages = kStagesThatFit<kTiles> > 0 ? kStagesThatFit<kTiles> : 1;

// What a warp copies next.
template <int kTiles> struct Copies {
  const Problem& problem;
  int num_steps, num_chunks, num_sixteens, num_tiles;
  int tile, step;

  __device__ explicit Copies(const Problem& problem) : problem(problem), tile(blockIdx.x), step(0) {
    num_chunks = ceil_div(problem.in, kChunk);
    num_steps = ceil_div(num_chunks, kWarps);
    num_sixteens = problem.num_sixteens();
    num_tiles = ceil_div(num_sixteens, kTiles);
  }
  __device__ void copy_weight(Stage<kTiles>& stage) const {
    if (tile >= num_tiles) return;
    const int lane = threadIdx.x % 32;
    const bool exists = chunk() < num_chunks;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint4* source = problem.weight + (static_cast<i64>(sixteen(i)) * num_chunks + chunk()) * (kPiecesOfChunk * 32);
#pragma unroll
      for (int piece = 0; piece < kPiecesOfChunk; ++piece)
        cp_async_16(&stage.weight[i][piece][lane], source + piece * 32 + lane, exists && sixteen(i) < num_sixteens);
    }
    const int group = kGroups == 1 ? chunk() / problem.chunks_of_group : chunk() * kGroups;
#pragma unroll
    for (int at = lane; at < kTiles * kGroups * 4; at += 32) {
      const int i = at / (kGroups * 4);
      const uint4* source = problem.grid + (static_cast<i64>(sixteen(i)) * problem.num_groups + group) * 4;
      cp_async_16(&stage.grid[i][0][0] + at % (kGroups * 4), source + at % (kGroups * 4), exists && sixteen(i) < num_sixteens);
    }
  }
  __device__ void copy_x(Stage<kTiles>& stage) const {
    if (tile >= num_tiles) return;
    const int lane = threadIdx.x % 32, piece = lane % 8, column = chunk() * kChunk + piece * kVec<Scalar>;
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = i * 4 + lane / 8;
        const bool exists = half * 8 + row < problem.rows && column < problem.in;
        cp_async_16(&stage.x[half][row][piece ^ row], problem.x + static_cast<i64>(half * 8 + row) * problem.in + column, exists);
      }
  }
  __device__ void advance() {
    if (++step == num_steps) step = 0, tile += gridDim.x;
  }
  // Which sixteen outputs of the weight are number i of the tile.
  __device__ static int sixteen_of(const Problem& problem, int tile, int i) {
    if (!is_gated(problem.form)) return tile * kTiles + i;
    return tile * (kTiles / 2) + i / 2 + (i % 2) * (problem.num_sixteens() / 2);
  }

 private:
  __device__ int chunk() const { return step * kWarps + threadIdx.x / 32; }
  __device__ int sixteen(int i) const { return sixteen_of(problem, tile, i); }
};

// A warp's products of a chunk, added to its sums: outputs lane / 4 (first two) and that + 8 of each sixteen, rows
// 2 (lane % 4) and the next of each half.
template <int kTiles> using Sums = float[kTiles][kHalves][4];

template <int kTiles> __device__ inline void multiply_chunk(Sums<kTiles>& sums, const Stage<kTiles>& stage, const Masks& masks) {
  const int lane = threadIdx.x % 32;
  u32 x[kHalves][kProducts / 2][4];
#pragma unroll
  for (int half = 0; half < kHalves; ++half)
#pragma unroll
    for (int i = 0; i < kProducts / 2; ++i) ldmatrix(x[half][i], &stage.x[half][lane % 8][(i * 4 + lane / 8) ^ lane % 8]);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    uint4 pieces[kPiecesOfChunk];
#pragma unroll
    for (int i = 0; i < kPiecesOfChunk; ++i) pieces[i] = stage.weight[tile][i][lane];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const u32* words = reinterpret_cast<const u32*>(stage.grid[tile][group]);
      const Group low(words[lane / 4], masks), high(words[lane / 4 + 8], masks);
      float products[kHalves][4] = {};
#pragma unroll
      for (int i = group * (kProducts / kGroups); i < (group + 1) * (kProducts / kGroups); ++i) {
        u32 a[4];
        widen_integers(a, pieces[i / kProductsOfPiece], i % kProductsOfPiece, low, high, masks);
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
          mma_16x8x16<Scalar>(products[half], a, x[half][i / 2][i % 2 * 2], x[half][i / 2][i % 2 * 2 + 1]);
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[tile][half][i] += (i < 2 ? low : high).scale * products[half][i];
    }
  }
}

// Add the warps' sums of a tile and write them.
template <int kTiles> __device__ inline void write_tile(const Sums<kTiles>& sums, const Problem& problem, int tile) {
  __shared__ float4 parts[kWarps][kTilesAtOnce * kHalves][32];
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
      const int sixteen = Copies<kTiles>::sixteen_of(problem, tile, i), column = sixteen * 16 + lane / 4;
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
  copies.tile = blockIdx.x, copies.step = 0;
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
    for (int step = 0; step < copies.num_steps; ++step) {
      cp_async_wait<kStages<kTiles> - 1>();
      __syncwarp();
      multiply_chunk<kTiles>(sums, stages[stage], masks);
      __syncwarp();
      copies.copy_weight(stages[stage]);
      copies.copy_x(stages[stage]);
      cp_async_commit();
      copies.advance();
      stage = stage + 1 < kStages<kTiles> ? stage + 1 : 0;
    }
    write_tile<kTiles>(sums, problem, tile);
  }
}

// out: columns of y. chunks_of_group: where groups have whole chunks.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
few_rows_grouped_1(void* y, const Scalar* x, const uint4* weight, const uint4* grid, const Scalar* bias, int form, int rows,
                   int in, int out, int num_groups, int chunks_of_group) {
  multiply<1>({y, x, bias, weight, grid, static_cast<Form>(form), rows, in, out, num_groups, chunks_of_group});
}
extern "C" __global__ void __launch_bounds__(kThreads, 1)
few_rows_grouped_2(void* y, const Scalar* x, const uint4* weight, const uint4* grid, const Scalar* bias, int form, int rows,
                   int in, int out, int num_groups, int chunks_of_group) {
  multiply<2>({y, x, bias, weight, grid, static_cast<Form>(form), rows, in, out, num_groups, chunks_of_group});
}
extern "C" __global__ void __launch_bounds__(kThreads, 1)
few_rows_grouped_3(void* y, const Scalar* x, const uint4* weight, const uint4* grid, const Scalar* bias, int form, int rows,
                   int in, int out, int num_groups, int chunks_of_group) {
  multiply<3>({y, x, bias, weight, grid, static_cast<Form>(form), rows, in, out, num_groups, chunks_of_group});
}
extern "C" __global__ void __launch_bounds__(kThreads, 1)
few_rows_grouped_4(void* y, const Scalar* x, const uint4* weight, const uint4* grid, const Scalar* bias, int form, int rows,
                   int in, int out, int num_groups, int chunks_of_group) {
  multiply<4>({y, x, bias, weight, grid, static_cast<Form>(form), rows, in, out, num_groups, chunks_of_group});
}
extern "C" __global__ void __launch_bounds__(kThreads, 1)
few_rows_grouped_6(void* y, const Scalar* x, const uint4* weight, const uint4* grid, const Scalar* bias, int form, int rows,
                   int in, int out, int num_groups, int chunks_of_group) {
  multiply<6>({y, x, bias, weight, grid, static_cast<Form>(form), rows, in, out, num_groups, chunks_of_group});
}
extern "C" __global__ void __launch_bounds__(kThreads, 1)
few_rows_grouped_8(void* y, const Scalar* x, const uint4* weight, const uint4* grid, const Scalar* bias, int form, int rows,
                   int in, int out, int num_groups, int chunks_of_group) {
  multiply<8>({y, x, bias, weight, grid, static_cast<Form>(form), rows, in, out, num_groups, chunks_of_group});
}
