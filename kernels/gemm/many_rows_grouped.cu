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
  int chunks_of_group;  // where groups have whole ones
};

// kGroups warpgroups that compute, each with kParts times 64 outputs. Gated: part 0 holds gates, part 1 the ups for them.
// A stage holds two chunks of each output: of two parts, or two of one.
template <int kGroups, int kParts> struct Multiplication {
  static constexpr int kPanels = 2 / kParts;  // of 64 inputs, 128 bytes of x
  static constexpr int kSixteens = 4 * kGroups;

  struct alignas(1024) Stage {
    Scalar x[kPanels][kRows][64];
    uint4 weight[2][kPiecesOfChunk][kSixteens][32];  // of chunks: [kParts][kPanels]
    u32 grid[2][kSixteens * kGroupsOfChunk * 16];
  };
  // Of the sums of a block that works with others: [kGroups][kParts][kOctets][threads of a group]
  static constexpr int kPartialBytes = kGroups * kParts * kOctets * 128 * static_cast<int>(sizeof(float4));
  static constexpr int kStages = (BLOCK_BYTES - 2048) / static_cast<int>(sizeof(Stage));
  struct Shared {
    Stage stages[kStages];
    Barrier came[kStages], left[kStages];
  };
  static_assert(sizeof(Shared) + 1024 <= BLOCK_BYTES && kPartialBytes <= static_cast<int>(sizeof(Shared::stages)));

  struct Place {  // which stage is next, and the parity of its phase
    int stage = 0;
    u32 parity = 0;
    __device__ void advance() {
      if (++stage < kStages) return;
      stage = 0;
      parity ^= 1;
    }
  };

  // The tiles of this block, and its share of the inputs in each. Blocks of a cluster have one tile.
  struct Walk {
    int num_row_tiles, num_tiles, first_step, end_step;
    int tile, row, output_tile;  // row: the tile's first
    __device__ explicit Walk(const Problem& problem) {
      const int outputs = problem.height * (is_gated(problem.form) ? 1 : kParts);
      const int num_steps = ceil_div(problem.in, kChunk * kPanels);
      num_row_tiles = ceil_div(problem.rows, kRows);
      num_tiles = num_row_tiles * ceil_div(problem.out, outputs);
      first_step = num_steps * cluster_rank() / cluster_size();
      end_step = num_steps * (cluster_rank() + 1) / cluster_size();
      go_to(blockIdx.x / cluster_size());
    }
    __device__ bool is_over() const { return tile >= num_tiles; }
    __device__ void advance() { go_to(tile + gridDim.x / cluster_size()); }

   private:
    __device__ void go_to(int next) {
      tile = next;
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

  // Brings the operands.
  struct Producer {
    Shared& shared;
    const Problem& problem;
    Walk walk;
    int step;

    __device__ Producer(Shared& shared, const Problem& problem)
        : shared(shared), problem(problem), walk(problem), step(walk.first_step) {}
    __device__ void copy_weight(int stage) {
      constexpr int kBytes = kPiecesOfChunk * 512 + kGroupsOfChunk * 64;  // of a chunk of 16 outputs
      Stage& target = shared.stages[stage];
      Barrier& came = shared.came[stage];
      barrier_arrive_expecting(came, 2 * (problem.height / 16) * kBytes + static_cast<int>(sizeof(target.x)));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int chunk = step * kPanels + i % kPanels, sixteen = first_output(problem, walk.output_tile, i / kPanels) / 16;
        const int group = kGroupsOfChunk == 1 ? chunk / problem.chunks_of_group : chunk * kGroupsOfChunk;
#pragma unroll
        for (int piece = 0; piece < kPiecesOfChunk; ++piece)  // columns: of 16 bits
          copy_box(target.weight[i][piece], problem.weight_map, sixteen, (chunk * kPiecesOfChunk + piece) * 256, came);
        copy_box(target.grid[i], problem.grid_map, sixteen, group * 32, came);
      }
    }
    __device__ void copy_x(int stage) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel)
        copy_box(shared.stages[stage].x[panel], problem.x_map, walk.row, (step * kPanels + panel) * 64, shared.came[stage]);
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

  using Sums = float[kParts][kRows / 2];
  using Operand = u32[kProducts][4];

  // This lane's share of a chunk of the weight as numbers, scaled.
  __device__ static void widen(Operand& a, const Stage& stage, int chunk, int group, const Masks& masks) {
    const int lane = threadIdx.x % 32, sixteen = group * 4 + threadIdx.x / 32 % 4;
    uint4 pieces[kPiecesOfChunk];
#pragma unroll
    for (int i = 0; i < kPiecesOfChunk; ++i) pieces[i] = stage.weight[chunk][i][sixteen][lane];
#pragma unroll
    for (int i = 0; i < kGroupsOfChunk; ++i) {
      const u32* words = &stage.grid[chunk][(sixteen * kGroupsOfChunk + i) * 16 + lane / 4];
      const Group low(words[0], masks), high(words[8], masks);
      const u32 scales[2] = {pack<Scalar>(low.scale, low.scale), pack<Scalar>(high.scale, high.scale)};
#pragma unroll
      for (int k = i * (kProducts / kGroupsOfChunk); k < (i + 1) * (kProducts / kGroupsOfChunk); ++k) {
        widen_integers(a[k], pieces[k / kProductsOfPiece], k % kProductsOfPiece, low, high, masks);
#pragma unroll
        for (int j = 0; j < 4; ++j) a[k][j] = fma_pair<Scalar>(a[k][j], scales[j % 2], kSigns);
      }
    }
  }

  // This warpgroup's sums of a tile. Products read one of two operands in registers while the other is made.
  __device__ static void multiply(Sums& sums, Shared& shared, const Walk& walk, int in, Place& place, int group) {
    const auto leave = [&](int stage) {  // a warp has read it
      if (threadIdx.x % 32 == 0) barrier_arrive(shared.left[stage]);
    };
    const Masks masks(in);
    int last = 0;
    Operand operands[2];
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) sums[part][i] = 0.0f;
    for (int step = walk.first_step; step < walk.end_step; ++step, place.advance()) {
      const Stage& stage = shared.stages[place.stage];
      barrier_wait(shared.came[place.stage], place.parity);
      const u64 x = panel_descriptor(&stage.x, 16);
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        warpgroup_wait<1>();  // the products before the last ones are over: those that read this operand
#pragma unroll
        for (int k = 0; k < kProducts; ++k) pin(operands[chunk][k]);
        if (chunk == 1 && step > walk.first_step) leave(last);
        widen(operands[chunk], stage, chunk, group, masks);
        warpgroup_begin();
#pragma unroll
        for (int k = 0; k < kProducts; ++k)
          multiply_rows<Scalar, kRows>(sums[chunk / kPanels], operands[chunk][k], further(x, chunk % kPanels * kRows * 128 + k * 32));
        warpgroup_commit();
      }
      last = place.stage;
    }
    warpgroup_wait<0>();
#pragma unroll
    for (int part = 0; part < kParts; ++part) pin(sums[part]);
    if (walk.first_step < walk.end_step) leave(last);
  }

  // Add up the sums of the cluster's blocks. Each gets its share of the octets of rows, as the first ones of `sums`.
  // Returns their number, and in `first` which is the first.
  __device__ static int add_up(Sums& sums, Shared& shared, int group, int& first) {
    float4* partial = reinterpret_cast<float4*>(shared.stages) + group * kParts * kOctets * 128 + threadIdx.x % 128;
    const auto place = [](int part, int octet) { return (part * kOctets + octet) * 128; };
    meet_threads(1, kGroups * 128);  // tensor cores have read all stages
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet) {
        const float* own = &sums[part][octet * 4];
        partial[place(part, octet)] = make_float4(own[0], own[1], own[2], own[3]);
      }
    meet_cluster();
    const int share = ceil_div(kOctets, cluster_size());
    first = min(cluster_rank() * share, kOctets);
    const int count = min(share, kOctets - first);
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        if (i >= count) break;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int rank = 0; rank < cluster_size(); ++rank) {
          const float4 other = *in_block(&partial[place(part, first + i)], rank);
          sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
        }
        float* own = &sums[part][i * 4];
        own[0] = sum.x, own[1] = sum.y, own[2] = sum.z, own[3] = sum.w;
      }
    return count;
  }

  // Write `num_octets` octets of rows of a tile to y, from octet `first` on. Of an octet a lane holds, as for mma_16x8x16,
  // outputs lane / 4 and lane / 4 + 8 of its warp's 16, and rows 2 (lane % 4) and the next.
  template <Form kForm>
  __device__ static void write(const Sums& sums, const Problem& problem, const Walk& walk, int group, int first, int num_octets) {
    constexpr bool kIsGated = is_gated(kForm);
    const int lane = threadIdx.x % 32, out = problem.out;
#pragma unroll
    for (int part = 0; part < (kIsGated ? 1 : kParts); ++part) {
      const int begin = first_column(problem, walk.output_tile, part), end = min(out, begin + problem.height);
      const int warp_column = begin + group * 64 + threadIdx.x / 32 % 4 * 16, column = warp_column + lane / 4;
      const auto bias_of = [&](int offset) {
        const Scalar* bias = problem.bias + offset + column;
        return make_float2(problem.bias && column < end ? to_float(bias[0]) : 0.0f,
                           problem.bias && column + 8 < end ? to_float(bias[8]) : 0.0f);
      };
      const float2 bias = bias_of(0), up_bias = kIsGated ? bias_of(out) : make_float2(0.0f, 0.0f);
      const auto sums_of = [&](int part, int octet, float2 bias) {
        const float* numbers = &sums[part][octet * 4];
        return make_float4(numbers[0] + bias.x, numbers[1] + bias.x, numbers[2] + bias.y, numbers[3] + bias.y);
      };
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet) {
        const int first_row = walk.row + (first + octet) * 8;
        if (octet >= num_octets || first_row >= problem.rows) break;
        float4 y = sums_of(part, octet, bias);
        if constexpr (kIsGated) {
          const float4 up = sums_of(kParts - 1, octet, up_bias);
          y = make_float4(gated(kForm, y.x, up.x), gated(kForm, y.y, up.y), gated(kForm, y.z, up.z), gated(kForm, y.w, up.w));
        }
        if constexpr (kForm == kFloat) {
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
    }
  }

  __device__ static void write(const Sums& sums, const Problem& problem, const Walk& walk, int group, int first, int num_octets) {
    if (problem.form == kPlain) write<kPlain>(sums, problem, walk, group, first, num_octets);
    if (problem.form == kFloat) write<kFloat>(sums, problem, walk, group, first, num_octets);
    if constexpr (kParts == 2) {
      if (problem.form == kSilu) write<kSilu>(sums, problem, walk, group, first, num_octets);
      if (problem.form == kGeluTanh) write<kGeluTanh>(sums, problem, walk, group, first, num_octets);
    }
  }

  __device__ static void consume(Shared& shared, const Problem& problem, int group) {
    wait_for_inputs();  // the last kernel may still read what y replaces
    Place place;
    Sums sums;
    for (Walk walk(problem); !walk.is_over(); walk.advance()) {
      int first = 0, num_octets = kOctets;
      multiply(sums, shared, walk, problem.in, place, group);
      if (cluster_size() > 1) num_octets = add_up(sums, shared, group, first);
      write(sums, problem, walk, group, first, num_octets);
    }
  }

  __device__ static void run(const Problem& problem) {
    extern __shared__ uint4 dynamic[];
    // So that the compiler knows it for shared memory.
    Shared& shared = *reinterpret_cast<Shared*>(reinterpret_cast<char*>(dynamic) + (-shared_address(dynamic) & 1023));
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(shared.came[stage], 1);
        barrier_init(shared.left[stage], 4 * kGroups);  // one for each warp that reads it
      }
      barrier_init_fence();
    }
    __syncthreads();
    start_dependents();

    // Together no more registers than the block had at its launch: who asks for more waits for ever.
    const int role = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // the same for a warp, as the compiler can see
    if (role == 0) {
      if constexpr (kGroups == 2) shrink_registers<40>();
      if (threadIdx.x == 0) produce(shared, problem);
      else wait_for_inputs();
      __syncwarp();
      if (cluster_size() > 1) meet_cluster();  // as in add_up
    } else {
      if constexpr (kGroups == 2) grow_registers<232>();
      consume(shared, problem, role - 1);
      __syncwarp();
    }
    if (cluster_size() > 1) meet_cluster();  // before a block ends, the others have read its sums
  }
};

// Grid: the blocks of a cluster side by side, one cluster for each tile; blocks alone take the tiles in turns.
extern "C" __global__ void __launch_bounds__(256, 1)
many_rows_grouped_1x1(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap grid_map,
                      const __grid_constant__ TensorMap x_map, void* y, const Scalar* bias, int form, int rows, int in, int out,
                      int height, int chunks_of_group) {
  Multiplication<1, 1>::run({weight_map, grid_map, x_map, y, bias, static_cast<Form>(form), rows, in, out, height,
                             chunks_of_group});
}
extern "C" __global__ void __launch_bounds__(256, 1)
many_rows_grouped_1x2(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap grid_map,
                      const __grid_constant__ TensorMap x_map, void* y, const Scalar* bias, int form, int rows, int in, int out,
                      int height, int chunks_of_group) {
  Multiplication<1, 2>::run({weight_map, grid_map, x_map, y, bias, static_cast<Form>(form), rows, in, out, height,
                             chunks_of_group});
}
extern "C" __global__ void __launch_bounds__(384, 1)
many_rows_grouped_2x1(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap grid_map,
                      const __grid_constant__ TensorMap x_map, void* y, const Scalar* bias, int form, int rows, int in, int out,
                      int height, int chunks_of_group) {
  Multiplication<2, 1>::run({weight_map, grid_map, x_map, y, bias, static_cast<Form>(form), rows, in, out, height,
                             chunks_of_group});
}
extern "C" __global__ void __launch_bounds__(384, 1)
many_rows_grouped_2x2(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap grid_map,
                      const __grid_constant__ TensorMap x_map, void* y, const Scalar* bias, int form, int rows, int in, int out,
                      int height, int chunks_of_group) {
  Multiplication<2, 2>::run({weight_map, grid_map, x_map, y, bias, static_cast<Form>(form), rows, in, out, height,
                             chunks_of_group});
}
