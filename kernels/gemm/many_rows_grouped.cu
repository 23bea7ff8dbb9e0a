// y = x · weightᵀ + bias on Hopper for more rows than few_rows_grouped.cu takes, the weight made of grouped integers
// (grouped.cuh). x [rows, in], bias [out], y [rows, out] of the same type, or of float. Or gated (forms.cuh).
//
// Work: a tile is kParts times `height` outputs and kRows rows of x. To the tensor cores the weight is operand A, in
// registers: a warpgroup takes packed numbers of 64 outputs from shared memory, makes numbers of x's type of them, and starts
// their product with x in shared memory; while the tensor cores are at it, it widens the next ones into other registers.
// One thread brings all of it with the copy engine, as many stages ahead as shared memory holds and over the ends of tiles.
// Where tiles are few, the blocks of a cluster share out the inputs of one, and add up their sums through each other's shared
// memory, always in the same order. Bound by bytes (the weight, once) up to about 40 rows, then by FLOPs.
// As no kernel of a step writes the weight, its copies start before x is waited for.
//
// Built with SCALAR (bf16 or f16), BITS (4 or 8), GROUPS (in 64 inputs: 1 or 2), ROWS (of x in a tile: 16, 32, 64 or 128) and
// BLOCK_BYTES (of shared memory).
#include "grouped.cuh"
#include "forms.cuh"
#include "ptx_sm90.cuh"

constexpr int kRows = ROWS;
constexpr int kOctets = kRows / 8;
constexpr int kGroupsOfChunk = GROUPS;
constexpr int kProducts = kChunk / 16;  // of a chunk
constexpr int kRowTilesAtOnce = 8;      // walked for each tile of outputs: they stay in the L2 cache

struct Problem {
  const TensorMap &weight_map, &grid_map, &x_map;
  void* y;
  const Scalar* bias;
  Form form;
  int rows, in, out;    // out: columns of y
  int height;           // outputs of a part of a tile, sixteens, at most 64 a warpgroup
  int num_output_tiles;
  u32 inverse;          // for group_of
};

// A tile has kParts times kGroups times 64 outputs. Gated: part 0 holds gates, part 1 the ups for them. A stage holds kPanels
// chunks of each output, and each of its kWarpgroups pieces is one warpgroup's.
template <int kGroups, int kParts> struct Multiplication {
  static constexpr int kPanels = 4 / (kGroups * kParts);  // of 64 inputs, 128 bytes of x
  static constexpr int kWarpgroups = kGroups * kParts * kPanels;
  static constexpr int kTakers = kParts * kPanels;  // that write the outputs of a group
  static constexpr int kSixteens = 4 * kGroups;
  static constexpr int kStagedOctets = kOctets < 4 ? kOctets : 4;

  struct alignas(1024) Stage {
    Scalar x[kPanels][kRows][64];
    uint4 weight[kParts * kPanels][kPiecesOfChunk][kSixteens][32];
    u32 grid[kParts * kPanels][kSixteens * kGroupsOfChunk * 16];
  };
  using Partial = float4[kWarpgroups][kStagedOctets][128];
  static constexpr int kStages = (BLOCK_BYTES - 2048 - static_cast<int>(sizeof(Partial))) / static_cast<int>(sizeof(Stage));
  struct Shared {
    Stage stages[kStages];
    Partial partial;  // sums of a block alone
    Barrier came[kStages], left[kStages];
  };
  static_assert(sizeof(Shared) + 1024 <= BLOCK_BYTES);
  static_assert(kWarpgroups * kOctets * 128 * sizeof(float4) <= sizeof(Shared::stages));

  struct Place {  // which stage is next, and the parity of its phase
    int stage = 0;
    u32 parity = 0;
    __device__ void advance() {
      if (++stage < kStages) return;
      stage = 0;
      parity ^= 1;
    }
  };

  // The tiles of this block, and its share of the inputs in each. Blocks of a cluster have one tile. Divisions would take
  // longer than the first copies.
  struct Walk {
    int num_row_tiles, num_tiles, first_step, end_step;
    int tile, row, output_tile;  // row: the tile's first
    __device__ explicit Walk(const Problem& problem) {
      const int num_steps = ceil_div(problem.in, kChunk * kPanels), split = __ffs(cluster_size()) - 1;
      num_row_tiles = ceil_div(problem.rows, kRows);
      num_tiles = num_row_tiles * problem.num_output_tiles;
      first_step = num_steps * cluster_rank() >> split;
      end_step = num_steps * (cluster_rank() + 1) >> split;
      go_to(blockIdx.x >> split);
    }
    __device__ bool is_over() const { return tile >= num_tiles; }
    __device__ void advance() { go_to(cluster_size() > 1 ? num_tiles : tile + gridDim.x); }

   private:
    __device__ void go_to(int next) {
      tile = output_tile = next;
      row = 0;
      if (num_row_tiles == 1) return;
      const int num_output_tiles = num_tiles / num_row_tiles;
      const int first_row_tile = tile / (kRowTilesAtOnce * num_output_tiles) * kRowTilesAtOnce;
      const int row_tiles_here = min(kRowTilesAtOnce, num_row_tiles - first_row_tile);
      const int within = tile - first_row_tile * num_output_tiles;
      row = (first_row_tile + within % row_tiles_here) * kRows;
      output_tile = within / row_tiles_here;
    }
  };

  // The first column of y, or the first row of the weight, of a part of a tile.
  __device__ static int first_column(const Problem& problem, int output_tile, int part) {
    return (is_gated(problem.form) ? output_tile : output_tile * kParts + part) * problem.height;
  }
  __device__ static int first_output(const Problem& problem, int output_tile, int part) {
    return first_column(problem, output_tile, part) + (is_gated(problem.form) ? part * problem.out : 0);
  }

  // Brings the operands: as many lanes as a stage has pieces of the weight, each a piece of its own, and panels of x.
  static constexpr int kProducers = kParts * kPanels;
  struct Producer {
    Shared& shared;
    const Problem& problem;
    Walk walk;
    int step, piece;

    __device__ Producer(Shared& shared, const Problem& problem)
        : shared(shared), problem(problem), walk(problem), step(walk.first_step), piece(threadIdx.x) {}
    __device__ void copy_weight(int stage) {
      constexpr int kBytes = kPiecesOfChunk * 512 + kGroupsOfChunk * 64;  // of a chunk of 16 outputs
      Stage& target = shared.stages[stage];
      Barrier& came = shared.came[stage];
      if (piece == 0)
        barrier_arrive_expecting(came, kProducers * (problem.height / 16) * kBytes + static_cast<int>(sizeof(target.x)));
      const int chunk = step * kPanels + piece % kPanels, sixteen = first_output(problem, walk.output_tile, piece / kPanels) / 16;
      const int group = kGroupsOfChunk == 1 ? group_of(chunk, problem.inverse) : chunk * kGroupsOfChunk;
#pragma unroll
      for (int i = 0; i < kPiecesOfChunk; ++i)  // columns: of 16 bits
        copy_box(target.weight[piece][i], problem.weight_map, sixteen, (chunk * kPiecesOfChunk + i) * 256, came);
      copy_box(target.grid[piece], problem.grid_map, sixteen, group * 32, came);
    }
    __device__ void copy_x(int stage) {
      if (piece < kPanels)
        copy_box(shared.stages[stage].x[piece], problem.x_map, walk.row, (step * kPanels + piece) * 64, shared.came[stage]);
    }
    __device__ void advance() {
      if (++step < walk.end_step) return;
      step = walk.first_step;
      walk.advance();
    }
    // A block without inputs brings nothing: what nobody waits for could still come while sums are added up there.
    __device__ bool is_over() const { return walk.is_over() || walk.first_step == walk.end_step; }
  };

  __device__ static void produce(Shared& shared, const Problem& problem) {
    Producer early(shared, problem), late(shared, problem);
    for (int stage = 0; stage < kStages && !early.is_over(); ++stage, early.advance()) early.copy_weight(stage);
    wait_for_inputs();
    for (int stage = 0; stage < kStages && !late.is_over(); ++stage, late.advance()) late.copy_x(stage);
    Place place;
    for (; !late.is_over(); late.advance(), place.advance()) {
      barrier_wait(shared.left[place.stage], place.parity);
      late.copy_weight(place.stage);
      late.copy_x(place.stage);
    }
  }

  // A product waits for the last that adds to the same numbers: of few rows, longer than it takes.
  static constexpr int kChains = kRows < 64 ? 4 : kRows < 128 ? 2 : 1;
  using Sums = float[kChains][kRows / 2];
  using Operand = u32[kProducts][4];

  // This lane's share of a chunk of the weight, packed.
  struct Packed {
    uint4 pieces[kPiecesOfChunk];
    u32 grid[kGroupsOfChunk][2];  // of outputs lane / 4 and lane / 4 + 8
    __device__ Packed(const Stage& stage, int chunk, int group) {
      const int lane = threadIdx.x % 32, sixteen = group * 4 + threadIdx.x / 32 % 4;
#pragma unroll
      for (int i = 0; i < kPiecesOfChunk; ++i) pieces[i] = stage.weight[chunk][i][sixteen][lane];
#pragma unroll
      for (int i = 0; i < kGroupsOfChunk; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          grid[i][half] = stage.grid[chunk][(sixteen * kGroupsOfChunk + i) * 16 + half * 8 + lane / 4];
    }
    // The same as numbers, scaled.
    __device__ void widen(Operand& a, const Masks& masks) const {
#pragma unroll
      for (int i = 0; i < kGroupsOfChunk; ++i) {
        u32 zeros[2], scales[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float scale = scale_of(grid[i][half]);
          zeros[half] = minus_zeros(grid[i][half], masks), scales[half] = pack<Scalar>(scale, scale);
        }
#pragma unroll
        for (int k = i * (kProducts / kGroupsOfChunk); k < (i + 1) * (kProducts / kGroupsOfChunk); ++k) {
          widen_integers(a[k], pieces[k / kProductsOfPiece], k % kProductsOfPiece, masks);
#pragma unroll
          for (int j = 0; j < 4; ++j) a[k][j] = fma_pair<Scalar>(fma_pair<Scalar>(a[k][j], kOne, zeros[j % 2]), scales[j % 2], kSigns);
        }
      }
    }
  };

  // This warpgroup's sums of a tile.
  __device__ static void multiply(Sums& sums, Shared& shared, const Walk& walk, int in, Place& place, int warpgroup) {
    const int group = warpgroup % kGroups, chunk = warpgroup / kGroups % kParts * kPanels + warpgroup / (kGroups * kParts);
    const Masks masks(in);
    int last = 0;
    const auto leave = [&] {  // a warp has read the last stage
      if (threadIdx.x % 32 == 0) barrier_arrive(shared.left[last]);
    };
    Operand operand;
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain)
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) sums[chain][i] = 0.0f;
    for (int step = walk.first_step; step < walk.end_step; ++step, place.advance()) {
      const Stage& stage = shared.stages[place.stage];
      barrier_wait(shared.came[place.stage], place.parity);
      const Packed packed(stage, chunk, group);
      warpgroup_wait<0>();
#pragma unroll
      for (int k = 0; k < kProducts; ++k) pin(operand[k]);
      if (step > walk.first_step) leave();
      packed.widen(operand, masks);
      const u64 x = panel_descriptor(&stage.x[chunk % kPanels], 16);
      warpgroup_begin();
#pragma unroll
      for (int k = 0; k < kProducts; ++k) multiply_rows<Scalar, kRows>(sums[k % kChains], operand[k], further(x, k * 32));
      warpgroup_commit();
      last = place.stage;
    }
    warpgroup_wait<0>();
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain) pin(sums[chain]);
#pragma unroll
    for (int chain = 1; chain < kChains; ++chain)
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) sums[0][i] += sums[chain][i];
    if (walk.first_step < walk.end_step) leave();
  }

  // Add up the sums of a tile and write them. Warpgroups, and those of all blocks of a cluster, share out the octets of rows.
  // Of an octet a lane holds, as for mma_16x8x16, outputs lane / 4 and lane / 4 + 8 of its warp's 16, and rows 2 (lane % 4) and
  // the next.
  __device__ static void write(const Sums& sums, Shared& shared, const Problem& problem, const Walk& walk, int warpgroup) {
    const bool is_alone = cluster_size() == 1;
    const int at_once = is_alone ? kStagedOctets : kOctets, num_octets = min(kOctets, ceil_div(problem.rows - walk.row, 8));
    float4* partial = (is_alone ? &shared.partial[0][0][0] : reinterpret_cast<float4*>(shared.stages)) + threadIdx.x % 128;
    if (!is_alone) meet_threads(1, kWarpgroups * 128);  // tensor cores have read all stages
#pragma unroll 1
    for (int first = 0; first < num_octets; first += at_once) {
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet) {
        const float* own = &sums[0][octet * 4];
        if (first <= octet && octet < first + at_once)
          partial[(warpgroup * at_once + octet - first) * 128] = make_float4(own[0], own[1], own[2], own[3]);
      }
      if (is_alone) meet_threads(1, kWarpgroups * 128);
      else meet_cluster();

      const int group = kGroups == 1 ? 0 : warpgroup % kGroups, octets_here = min(at_once, num_octets - first);
      const auto total = [&](int part, int octet) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int rank = 0; rank < cluster_size(); ++rank)
#pragma unroll 1
          for (int panel = 0; panel < kPanels; ++panel) {
            const float4* place = &partial[(((panel * kParts + part) * kGroups + group) * at_once + octet) * 128];
            const float4 other = *in_block(place, rank);
            sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
          }
        return sum;
      };
      const int num_items = octets_here * (is_gated(problem.form) ? 1 : kParts);
#pragma unroll 1
      for (int item = cluster_rank() * kTakers + warpgroup / kGroups; item < num_items; item += kTakers * cluster_size()) {
        const int part = kParts == 1 || item < octets_here ? 0 : 1, octet = item - part * octets_here;
        write_octet(problem, walk, group, part, walk.row + (first + octet) * 8, total(part, octet),
                    is_gated(problem.form) ? total(kParts - 1, octet) : make_float4(0.0f, 0.0f, 0.0f, 0.0f));
      }
      if (is_alone) meet_threads(1, kWarpgroups * 128);  // before the next sums
    }
  }

  __device__ static void write_octet(const Problem& problem, const Walk& walk, int group, int part, int first_row, float4 y,
                                     float4 up) {
    const int lane = threadIdx.x % 32, out = problem.out, begin = first_column(problem, walk.output_tile, part);
    const int end = min(out, begin + problem.height);
    const int warp_column = begin + group * 64 + threadIdx.x / 32 % 4 * 16, column = warp_column + lane / 4;
    const auto add_bias = [&](float4& sum, int offset) {
      const Scalar* bias = problem.bias + offset + column;
      const float low = problem.bias && column < end ? to_float(bias[0]) : 0.0f;
      const float high = problem.bias && column + 8 < end ? to_float(bias[8]) : 0.0f;
      sum.x += low, sum.y += low, sum.z += high, sum.w += high;
    };
    add_bias(y, 0);
    if (is_gated(problem.form)) {
      add_bias(up, out);
      y = make_float4(gated(problem.form, y.x, up.x), gated(problem.form, y.y, up.y), gated(problem.form, y.z, up.z),
                      gated(problem.form, y.w, up.w));
    }
    if (problem.form == kFloat) {
      const int row = first_row + lane % 4 * 2;
      float* target = static_cast<float*>(problem.y) + static_cast<i64>(row) * out + column;
      if (row < problem.rows && column < end) target[0] = y.x;
      if (row < problem.rows && column + 8 < end) target[8] = y.z;
      if (row + 1 < problem.rows && column < end) target[out] = y.y;
      if (row + 1 < problem.rows && column + 8 < end) target[out + 8] = y.w;
    } else {  // a lane gets two neighbouring outputs of one row
      const u32 words[2] = {transpose(pack<Scalar>(y.x, y.y)), transpose(pack<Scalar>(y.z, y.w))};
      const int row = first_row + lane / 4, own_column = warp_column + lane % 4 * 2;
      Scalar* target = static_cast<Scalar*>(problem.y) + static_cast<i64>(row) * out + own_column;
#pragma unroll
      for (int eight = 0; eight < 2; ++eight)
        if (row < problem.rows && own_column + eight * 8 < end) *reinterpret_cast<u32*>(target + eight * 8) = words[eight];
    }
  }

  __device__ static void consume(Shared& shared, const Problem& problem, int warpgroup) {
    wait_for_inputs();  // the last kernel may still read what y replaces
    Place place;
    Sums sums;
    for (Walk walk(problem); !walk.is_over(); walk.advance()) {
      multiply(sums, shared, walk, problem.in, place, warpgroup);
      write(sums, shared, problem, walk, warpgroup);
    }
  }

  __device__ static void run(const Problem& problem) {
    extern __shared__ uint4 dynamic[];
    // So that the compiler knows it for shared memory.
    Shared& shared = *reinterpret_cast<Shared*>(reinterpret_cast<char*>(dynamic) + (-shared_address(dynamic) & 1023));
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(shared.came[stage], 1);
        barrier_init(shared.left[stage], 4 * kWarpgroups);  // one for each warp that reads it
      }
      barrier_init_fence();
    }
    __syncthreads();
    start_dependents();

    // Together no more registers than the block had at its launch: who asks for more waits for ever.
    const int role = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // the same for a warp, as the compiler can see
    if (role == 0) {
      shrink_registers<32>();
      if (threadIdx.x < kProducers) produce(shared, problem);
      else wait_for_inputs();
      __syncwarp();
      if (cluster_size() > 1) meet_cluster();  // as in write
    } else {
      grow_registers<112>();
      consume(shared, problem, role - 1);
      __syncwarp();
    }
    if (cluster_size() > 1) meet_cluster();  // before a block ends, the others have read its sums
  }
};

// Grid: the blocks of a cluster side by side, one cluster for each tile; blocks alone take the tiles in turns.
extern "C" __global__ void __launch_bounds__(640, 1)
many_rows_grouped_1x1(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap grid_map,
                      const __grid_constant__ TensorMap x_map, void* y, const Scalar* bias, int form, int rows, int in, int out,
                      int height, int num_output_tiles, int inverse) {
  Multiplication<1, 1>::run({weight_map, grid_map, x_map, y, bias, static_cast<Form>(form), rows, in, out, height,
                             num_output_tiles, static_cast<u32>(inverse)});
}
extern "C" __global__ void __launch_bounds__(640, 1)
many_rows_grouped_1x2(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap grid_map,
                      const __grid_constant__ TensorMap x_map, void* y, const Scalar* bias, int form, int rows, int in, int out,
                      int height, int num_output_tiles, int inverse) {
  Multiplication<1, 2>::run({weight_map, grid_map, x_map, y, bias, static_cast<Form>(form), rows, in, out, height,
                             num_output_tiles, static_cast<u32>(inverse)});
}
extern "C" __global__ void __launch_bounds__(640, 1)
many_rows_grouped_2x1(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap grid_map,
                      const __grid_constant__ TensorMap x_map, void* y, const Scalar* bias, int form, int rows, int in, int out,
                      int height, int num_output_tiles, int inverse) {
  Multiplication<2, 1>::run({weight_map, grid_map, x_map, y, bias, static_cast<Form>(form), rows, in, out, height,
                             num_output_tiles, static_cast<u32>(inverse)});
}
extern "C" __global__ void __launch_bounds__(640, 1)
many_rows_grouped_2x2(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap grid_map,
                      const __grid_constant__ TensorMap x_map, void* y, const Scalar* bias, int form, int rows, int in, int out,
                      int height, int num_output_tiles, int inverse) {
  Multiplication<2, 2>::run({weight_map, grid_map, x_map, y, bias, static_cast<Form>(form), rows, in, out, height,
                             num_output_tiles, static_cast<u32>(inverse)});
}
