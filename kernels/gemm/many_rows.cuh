// y = x · weightᵀ + bias on Hopper, for decode batches and, whatever the number of rows, with the same bits for each row.
// x [rows, in], weight [out, in] of one type, bias [out], y [rows, out] of 16 bits, or of float. Or gated (forms.cuh). Numbers
// of 8 bits (rounded.cuh) have scales; to all but the tensor cores two of them are one number of 16.
//
// Work: a tile is kParts times `height` rows of the weight and kRows rows of x. To the tensor cores the weight is operand A,
// 64 outputs in each product of a warpgroup, so that few rows of x waste nothing. One thread brings the operands with the copy
// engine, as many stages ahead as shared memory holds and over the ends of tiles. Bound by bytes (the weight, once) up to
// about 160 rows, then by FLOPs. As no kernel of a step writes the weight, its copies start before x is waited for.
//
// The blocks of a cluster work together in one of two ways. They take neighbouring tiles of the same outputs, and each brings
// its share of the weight for all: without, what the L2 cache can deliver would bound large products. Or, where tiles are few,
// they share out the inputs of one tile (`split`) and add up their sums through each other's shared memory, always in the same
// order: lower tiles instead would bring x more often.
//
// An output is summed up in the order of the inputs, whatever the tile, where nothing is split and warpgroups take no turns:
// nothing else changes its bits. Sums of e4m3 have two levels, as tensor cores keep about 14 bits of them: those of 128 inputs
// are added in float32 (as DeepSeek-V3, arXiv 2412.19437, 3.3.2).
//
// Built with SCALAR (bf16 or f16: of y and bias), STORED (of x and weight: the same, e4m3 or s8), ROWS (of x in a tile: 16, 32,
// 64 or 128) and BLOCK_BYTES (of shared memory).
#pragma once

#include "forms.cuh"
#include "ptx_sm90.cuh"
#include "rounded.cuh"

using Scalar = SCALAR;
using Stored = STORED;
using Sum = SumOf<Stored>;
constexpr int kRows = ROWS;
constexpr int kOctets = kRows / 8;
constexpr int kStagingRows = kRows < 64 ? kRows : 64;  // rows of y that a warpgroup writes at a time
constexpr int kMostStages = 32;          // as in gemm.py
constexpr int kPanelRowBytes = 128;      // 64 inputs
constexpr int kRowUnitsAtOnce = 8;       // walked for each tile of outputs: they stay in the L2 cache

struct Problem {
  const TensorMap &weight_map, &x_map;
  void* y;
  const Scalar* bias;
  Scales scales;
  Form form;
  int rows, in, out;  // in: 16-bit numbers; out: columns of y
  int height;         // outputs of a part of a tile, at most 64 a warpgroup
  // What the host divides: here it would delay the first copy by a microsecond.
  int num_output_tiles, num_row_units, num_stages;
  int num_sharers;    // blocks of a cluster that bring the weight together, or 1
  int split;          // blocks of a cluster that share out the inputs of a tile, or 1
  int share;          // steps of such a block, at most
};

// Two warpgroups compute: kGroups with kParts times 64 outputs each. Where that is one, they take turns at its steps: a step
// takes longer from its beginning to its end than its products keep the tensor cores busy. The number of stages is even then,
// and four at least: a barrier's phases are told apart by parity, so one warpgroup has to wait for all of them.
//
// Gated: part 0 holds gates, part 1 the ups for them. kPanels: of 64 inputs, 128 bytes, in a stage.
template <int kGroups, int kParts, int kPanels> struct Multiplication {
  static constexpr int kDepth = 64 * kPanels;
  static constexpr int kTurns = 2 / kGroups;

  struct alignas(16) Four { Sum of[4]; };
  struct Staging { Scalar y[kStagingRows][64]; };
  struct alignas(1024) Front {
    Staging staging[kGroups];
    Four other_turn[kTurns > 1 ? kParts * kOctets * 128 : 1];  // [kParts][kOctets][threads of a warpgroup]
    Barrier came[kMostStages], left[kMostStages];
  };

  // The block's memory: behind the front, as many stages as there is room for. A stage holds panels of the weight, part by part,
  // each as high as `height`, then panels of x. A warpgroup multiplies 64 rows of a panel: those past its end, whatever lies
  // there, make sums that nobody writes.
  struct Shared {
    Front& front;
    Barrier *came, *left;
    unsigned char* stages;
    int height, stage_bytes, num_stages;

    __device__ Shared(unsigned char* begin, const Problem& problem)
        : front(*reinterpret_cast<Front*>(begin)), came(front.came), left(front.left), stages(begin + sizeof(Front)),
          height(problem.height), num_stages(problem.num_stages) {
      stage_bytes = kPanels * (kParts * height + kRows) * kPanelRowBytes;
    }
    __device__ unsigned char* weight(int stage, int part, int panel) const {
      return stages + stage * stage_bytes + (part * kPanels + panel) * height * kPanelRowBytes;
    }
    __device__ unsigned char* x(int stage, int panel) const { return weight(stage, kParts, 0) + panel * kRows * kPanelRowBytes; }
  };

  struct Place {  // which stage is next, and the parity of its phase
    int stage = 0;
    u32 parity = 0;
    __device__ void advance(int num_stages, int steps = kTurns) {
      for (; steps > 0; --steps) {
        if (++stage < num_stages) continue;
        stage = 0;
        parity ^= 1;
      }
    }
  };

  // The tiles of this block, and its steps in each. A unit is what its cluster does at a time.
  struct Walk {
    const Problem& problem;
    int first_step, end_step;
    int unit, row, output_tile;  // row: the tile's first
    __device__ explicit Walk(const Problem& problem) : problem(problem) {
      const int num_steps = ceil_div(problem.in, kDepth);
      first_step = problem.split > 1 ? min(cluster_rank() * problem.share, num_steps) : 0;
      end_step = problem.split > 1 ? min(first_step + problem.share, num_steps) : num_steps;
      go_to(is_alone() ? blockIdx.x : cluster_id());
    }
    __device__ bool is_over() const { return unit >= problem.num_row_units * problem.num_output_tiles; }
    __device__ void advance() { go_to(unit + (is_alone() ? gridDim.x : num_clusters())); }

   private:
    __device__ bool is_alone() const { return problem.num_sharers == 1 && problem.split == 1; }
    __device__ void go_to(int next) {
      unit = output_tile = next;
      row = problem.num_sharers > 1 ? cluster_rank() * kRows : 0;
      if (problem.num_row_units == 1) return;
      const int first_row_unit = unit / (kRowUnitsAtOnce * problem.num_output_tiles) * kRowUnitsAtOnce;
      const int row_units_here = min(kRowUnitsAtOnce, problem.num_row_units - first_row_unit);
      const int within = unit - first_row_unit * problem.num_output_tiles;
      row += (first_row_unit + within % row_units_here) * problem.num_sharers * kRows;
      output_tile = within / row_units_here;
    }
  };

  // The first row of the weight that a part of a tile holds.
  __device__ static int first_output(const Problem& problem, int output_tile, int part) {
    return is_gated(problem.form) ? output_tile * problem.height + part * problem.out
                                  : (output_tile * kParts + part) * problem.height;
  }

  // Brings the operands. As the copy engine is slow at small boxes, it gets large ones: all outputs of a part at once.
  struct Producer {
    Shared& shared;
    const Problem& problem;
    Walk walk;
    int step, own_outputs, weight_rows[kParts];  // own_outputs: from which on this block brings the weight

    __device__ Producer(Shared& shared, const Problem& problem)
        : shared(shared), problem(problem), walk(problem), step(walk.first_step) {
      own_outputs = problem.num_sharers > 1 ? cluster_rank() * problem.height / problem.num_sharers : 0;
      begin_tile();
    }
    __device__ void copy_weight(int stage) {
      barrier_arrive_expecting(shared.came[stage], shared.stage_bytes);
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          void* to = shared.weight(stage, part, panel) + own_outputs * kPanelRowBytes;
          const int column = step * kDepth + panel * 64;
          if (problem.num_sharers == 1) copy_box(to, problem.weight_map, weight_rows[part], column, shared.came[stage]);
          else copy_box_to_blocks(to, problem.weight_map, weight_rows[part], column, shared.came[stage], (1 << problem.num_sharers) - 1);
        }
    }
    __device__ void copy_x(int stage) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel)
        copy_box(shared.x(stage, panel), problem.x_map, walk.row, step * kDepth + panel * 64, shared.came[stage]);
    }
    __device__ void advance() {
      if (++step < walk.end_step) return;
      step = walk.first_step;
      walk.advance();
      begin_tile();
    }
    // A block without inputs brings nothing: what nobody waits for could still come while sums are added up there.
    __device__ bool is_over() const { return walk.is_over() || walk.first_step == walk.end_step; }

   private:
    __device__ void begin_tile() {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        weight_rows[part] = first_output(problem, walk.output_tile, part) + own_outputs;
    }
  };

  __device__ static void produce(Shared& shared, const Problem& problem) {
    Producer early(shared, problem), late(shared, problem);
    for (int stage = 0; stage < shared.num_stages && !early.is_over(); ++stage, early.advance()) early.copy_weight(stage);
    prefetch_map(problem.x_map);
    wait_for_inputs();
    for (int stage = 0; stage < shared.num_stages && !late.is_over(); ++stage, late.advance()) late.copy_x(stage);
    Place place;
    for (; !late.is_over(); late.advance(), place.advance(shared.num_stages, 1)) {
      barrier_wait(shared.left[place.stage], place.parity);
      late.copy_weight(place.stage);
      late.copy_x(place.stage);
    }
  }

  // A warp has read a stage.
  __device__ static void leave(Shared& shared, int num_sharers, int stage) {
    if (threadIdx.x % 32 != 0) return;
    if (num_sharers == 1) barrier_arrive(shared.left[stage]);
    else
#pragma unroll 1
      for (int rank = 0; rank < num_sharers; ++rank) barrier_arrive_in_block(shared.left[stage], rank);
  }

  using Sums = Sum[kParts][kRows / 2];

  // This warpgroup's sums of a tile, from its first step on.
  __device__ static void multiply(Sums& sums, Shared& shared, const Walk& walk, Place& place, int group, int& step) {
    const int weight_panel = shared.height * kPanelRowBytes, x_panel = kRows * kPanelRowBytes;
    int last = -1;
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) sums[part][i] = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) pin(sums[part]);
    if (kGroups > 1 && group * 64 >= shared.height) {  // no outputs are left for it
      for (; step < walk.end_step; step += kTurns, place.advance(shared.num_stages)) {
        barrier_wait(shared.came[place.stage], place.parity);
        leave(shared, walk.problem.num_sharers, place.stage);
      }
      return;
    }
    for (; step < walk.end_step; step += kTurns, place.advance(shared.num_stages)) {
      const u64 weight = panel_descriptor(shared.weight(place.stage, 0, 0) + group * 64 * kPanelRowBytes, 16);
      const u64 x = panel_descriptor(shared.x(place.stage, 0), 16);
      barrier_wait(shared.came[place.stage], place.parity);
      warpgroup_begin();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k)
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          multiply_keys<Stored, kRows>(sums[part], further(weight, (part * kPanels + k / 4) * weight_panel + k % 4 * 32),
                                       further(x, k / 4 * x_panel + k % 4 * 32), true);
      warpgroup_commit();
      warpgroup_wait<1>();
      if (last >= 0) leave(shared, walk.problem.num_sharers, last);
      last = place.stage;
    }
    warpgroup_wait<0>();
#pragma unroll
    for (int part = 0; part < kParts; ++part) pin(sums[part]);
    if (last >= 0) leave(shared, walk.problem.num_sharers, last);
  }

  // The same in two levels. While a warpgroup adds up, the other one has the tensor cores.
  __device__ static void multiply_in_levels(Sums& sums, Shared& shared, const Problem& problem, const Walk& walk, Place& place,
                                            int group, int& step) {
    constexpr int kPieces = kParts * kPanels;             // of a stage: a part and a panel, 128 inputs, each
    constexpr int kAtOnce = kRows < 128 ? kPieces : 1;    // of these, as registers allow
    const int weight_panel = shared.height * kPanelRowBytes, x_panel = kRows * kPanelRowBytes;
    Sum partial[kAtOnce][kRows / 2];
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) sums[part][i] = 0;
    for (; step < walk.end_step; step += kTurns, place.advance(shared.num_stages)) {
      const u64 weight = panel_descriptor(shared.weight(place.stage, 0, 0) + group * 64 * kPanelRowBytes, 16);
      const u64 x = panel_descriptor(shared.x(place.stage, 0), 16);
      prefetch_panels(problem, walk, step * kPanels);
      barrier_wait(shared.came[place.stage], place.parity);
#pragma unroll
      for (int first = 0; first < kPieces; first += kAtOnce) {
        warpgroup_begin();
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int piece = first; piece < first + kAtOnce; ++piece) {
            const int part = piece % kParts, panel = piece / kParts;
            multiply_keys<Stored, kRows>(partial[piece - first],
                                         further(weight, (part * kPanels + panel) * weight_panel + k * 32),
                                         further(x, panel * x_panel + k * 32), k > 0);
          }
        warpgroup_commit();
        warpgroup_wait<0>();
#pragma unroll
        for (int piece = first; piece < first + kAtOnce; ++piece) {
          pin(partial[piece - first]);
          add(sums[piece % kParts], partial[piece - first], problem, walk, piece % kParts, step * kPanels + piece / kParts, group);
        }
      }
      leave(shared, walk.problem.num_sharers, place.stage);
    }
  }

  // The scales of the rows of x in panels to come: what `add` reads is to wait for no memory.
  __device__ static void prefetch_panels(const Problem& problem, const Walk& walk, int panel) {
    constexpr int kAhead = 8, kPerLine = 32;
    const int at = threadIdx.x % 128, row = walk.row + at % kRows / kPerLine * kPerLine, ahead = panel + kAhead + at / kRows;
    if (kHasPanels && at % kRows % kPerLine == 0 && at / kRows < kPanels && row < problem.rows && ahead * kPanel < problem.in * 2)
      prefetch(problem.scales.of_two_rows(ahead, row, problem.rows));
  }

  // Add sums of a panel of inputs, times its scales where it has some.
  __device__ static void add(Sum (&sums)[kRows / 2], const Sum (&partial)[kRows / 2], const Problem& problem, const Walk& walk,
                             int part, int panel, int group) {
    if constexpr (kHasPanels) {
      const int in = problem.in * 2, last_output = (is_gated(problem.form) ? 2 : 1) * problem.out - 1;
      if (panel * kPanel >= in) return;
      const int own_output = group * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
      const int output = first_output(problem, walk.output_tile, part) + own_output;
      const float low = problem.scales.of_square(min(output, last_output), panel, in);
      const float high = problem.scales.of_square(min(output + 8, last_output), panel, in);
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet) {
        const int row = walk.row + octet * 8 + threadIdx.x % 4 * 2;
        if (row >= problem.rows) break;
        const float2 scale = *problem.scales.of_two_rows(panel, row, problem.rows);
        sums[octet * 4] += partial[octet * 4] * (scale.x * low);
        sums[octet * 4 + 1] += partial[octet * 4 + 1] * (scale.y * low);
        sums[octet * 4 + 2] += partial[octet * 4 + 2] * (scale.x * high);
        sums[octet * 4 + 3] += partial[octet * 4 + 3] * (scale.y * high);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) sums[i] += partial[i];
    }
  }

  // Of a block that shares out inputs with others: [kGroups][kParts][kOctets][threads of a group]
  static_assert(kGroups * kParts * kOctets * 128 * sizeof(Four) + sizeof(Front) + 1024 <= BLOCK_BYTES);

  // Add up the sums of blocks that share out the inputs of a tile. Each gets its share of the octets of rows, as the first ones
  // of `sums`: from row `row` to before `end_row` of x.
  __device__ static void add_up(Sums& sums, Shared& shared, int split, int group, int& row, int& end_row) {
    Four* partial = reinterpret_cast<Four*>(shared.stages) + group * kParts * kOctets * 128 + threadIdx.x % 128;
    const auto place = [](int part, int octet) { return (part * kOctets + octet) * 128; };
    meet_threads(1 + kGroups, kGroups * 128);  // tensor cores have read all stages
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet) {
        const Sum* own = &sums[part][octet * 4];
        partial[place(part, octet)] = {{own[0], own[1], own[2], own[3]}};
      }
    const int share = ceil_div(kOctets, split), first = min(cluster_rank() * share, kOctets);
    const int count = min(share, kOctets - first);
    meet_cluster();
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        if (i >= count) break;
        Sum* own = &sums[part][i * 4];
        own[0] = own[1] = own[2] = own[3] = 0;
#pragma unroll 1
        for (int rank = 0; rank < split; ++rank) {
          const Four other = *in_block(&partial[place(part, first + i)], rank);
#pragma unroll
          for (int j = 0; j < 4; ++j) own[j] += other.of[j];
        }
      }
    end_row = min(end_row, row + (first + count) * 8);
    row += first * 8;
  }

  // Bring the sums of the turns together, in those of the first.
  __device__ static void join_turns(Sums& sums, Shared& shared, int turn) {
    Four* other = shared.front.other_turn + threadIdx.x % 128;
    if (turn == 1) {
#pragma unroll
      for (int i = 0; i < kParts * kOctets; ++i) {
        const Sum* own = &sums[i / kOctets][i % kOctets * 4];
        other[i * 128] = {{own[0], own[1], own[2], own[3]}};
      }
    }
    meet_threads(4, 256);
    if (turn == 0) {
#pragma unroll
      for (int i = 0; i < kParts * kOctets; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i / kOctets][i % kOctets * 4 + j] += other[i * 128].of[j];
    }
    meet_threads(4, 256);
  }

  // Write the sums of rows `first_row` to before `end_row` to y. Of an octet of rows a lane holds, as for mma_16x8x16, outputs
  // lane / 4 and lane / 4 + 8 of its warp's 16, and rows 2 (lane % 4) and the next. 16-bit numbers are put in order in shared
  // memory, to be written in whole lines.
  template <Form kForm>
  __device__ static void write(const Sums& sums, const Problem& problem, Shared& shared, int output_tile, int first_row,
                               int end_row, int group) {
    constexpr bool kIsGated = is_gated(kForm);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    Staging& staging = shared.front.staging[group];
#pragma unroll
    for (int part = 0; part < (kIsGated ? 1 : kParts); ++part) {
      const int first_column = first_output(problem, output_tile, part) + group * 64;
      const int own_column = first_column + warp * 16 + lane / 4;
      const int end_column = min(problem.out, first_output(problem, output_tile, part) + problem.height);
      const bool exists[2] = {own_column < end_column, own_column + 8 < end_column};
      const auto bias_of = [&](int part) {
        const Scalar* bias = problem.bias + part * problem.out + own_column;
        return make_float2(problem.bias && exists[0] ? to_float(bias[0]) : 0.0f, problem.bias && exists[1] ? to_float(bias[8]) : 0.0f);
      };
      const auto scale_of = [&](int part) {  // of the outputs
        if (!kIsRounded<Stored> || kHasPanels) return make_float2(1.0f, 1.0f);
        const float* scales = problem.scales.of_outputs + part * problem.out + own_column;
        return make_float2(exists[0] ? scales[0] : 0.0f, exists[1] ? scales[8] : 0.0f);
      };
      const float2 bias = bias_of(0), up_bias = kIsGated ? bias_of(1) : make_float2(0.0f, 0.0f);
      const float2 scale = scale_of(0), up_scale = scale_of(kIsGated ? 1 : 0);
      const auto sums_of = [&](int part, int octet, float2 bias, float2 scale) {
        const Sum* numbers = &sums[part][octet * 4];
        float4 sum = make_float4(numbers[0], numbers[1], numbers[2], numbers[3]);
        if constexpr (kIsRounded<Stored> && !kHasPanels) {
          const int row = first_row + octet * 8 + lane % 4 * 2;
          const float first = row < end_row ? problem.scales.of_rows[row] : 0.0f;
          const float second = row + 1 < end_row ? problem.scales.of_rows[row + 1] : 0.0f;
          sum = make_float4(sum.x * (first * scale.x), sum.y * (second * scale.x), sum.z * (first * scale.y), sum.w * (second * scale.y));
        }
        return make_float4(sum.x + bias.x, sum.y + bias.x, sum.z + bias.y, sum.w + bias.y);
      };
#pragma unroll
      for (int first = 0; first < kOctets; first += kStagingRows / 8) {
        const int row = first_row + first * 8;
        if (row >= end_row) break;
#pragma unroll
        for (int at = 0; at < kStagingRows / 8; ++at) {
          if (row + at * 8 >= end_row) break;
          float4 y = sums_of(part, first + at, bias, scale);
          if constexpr (kIsGated) {
            const float4 up = sums_of(kParts - 1, first + at, up_bias, up_scale);
            y = make_float4(gated(kForm, y.x, up.x), gated(kForm, y.y, up.y), gated(kForm, y.z, up.z), gated(kForm, y.w, up.w));
          }
          if constexpr (kForm == kFloat) {
            const int own_row = row + at * 8 + lane % 4 * 2;
            float* target = static_cast<float*>(problem.y) + static_cast<i64>(own_row) * problem.out + own_column;
            if (own_row < end_row && exists[0]) target[0] = y.x;
            if (own_row < end_row && exists[1]) target[8] = y.z;
            if (own_row + 1 < end_row && exists[0]) target[problem.out] = y.y;
            if (own_row + 1 < end_row && exists[1]) target[problem.out + 8] = y.w;
          } else {
            const int own_row = at * 8 + lane / 4;
            const u32 words[2] = {transpose(pack<Scalar>(y.x, y.y)), transpose(pack<Scalar>(y.z, y.w))};
#pragma unroll
            for (int half = 0; half < 2; ++half)
              *reinterpret_cast<u32*>(&staging.y[own_row][(warp * 2 + half ^ own_row % 8) * 8 + lane % 4 * 2]) = words[half];
          }
        }
        if constexpr (kForm != kFloat) {
          meet_threads(1 + group, 128);
          const int column = first_column + threadIdx.x % 8 * 8;
#pragma unroll
          for (int i = 0; i < kStagingRows / 16; ++i) {
            const int at = i * 16 + threadIdx.x % 128 / 8;
            if (row + at < end_row && column < end_column)
              *reinterpret_cast<uint4*>(static_cast<Scalar*>(problem.y) + static_cast<i64>(row + at) * problem.out + column) =
                  load_bits(&staging.y[at][(threadIdx.x % 8 ^ at % 8) * 8]);
          }
          meet_threads(1 + group, 128);
        }
      }
    }
  }

  __device__ static void write(const Sums& sums, const Problem& problem, Shared& shared, int output_tile, int first_row,
                               int end_row, int group) {
    if (problem.form == kPlain) write<kPlain>(sums, problem, shared, output_tile, first_row, end_row, group);
    if (problem.form == kFloat) write<kFloat>(sums, problem, shared, output_tile, first_row, end_row, group);
    if constexpr (kParts == 2) {
      if (problem.form == kSilu) write<kSilu>(sums, problem, shared, output_tile, first_row, end_row, group);
      if (problem.form == kGeluTanh) write<kGeluTanh>(sums, problem, shared, output_tile, first_row, end_row, group);
    }
  }

  // What `write` reads of the scales is to wait for no memory then.
  __device__ static void prefetch_scales(const Problem& problem, const Walk& walk, int group) {
    if constexpr (kIsRounded<Stored> && !kHasPanels) {
      const int at = threadIdx.x % 128, row = walk.row + at;
      if (row < problem.rows && at < kRows) prefetch(problem.scales.of_rows + row);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int output = first_output(problem, walk.output_tile, part) + group * 64 + at;
        const int end = is_gated(problem.form) ? (part + 1) * problem.out : problem.out;
        if (at < 64 && output < end) prefetch(problem.scales.of_outputs + output);
      }
    }
  }

  __device__ static void consume(Shared& shared, const Problem& problem, int warpgroup) {
    const int group = kTurns == 1 ? warpgroup : 0, turn = kTurns == 1 ? 0 : warpgroup;
    wait_for_inputs();  // the last kernel may still read what y replaces
    Place place;
    place.advance(shared.num_stages, turn);
    Sums sums;
    int ahead = turn;  // of the first step of a tile
    for (Walk walk(problem); !walk.is_over(); walk.advance()) {
      prefetch_scales(problem, walk, group);
      int step = walk.first_step + ahead;
      if constexpr (kHasShortSums<Stored>) multiply_in_levels(sums, shared, problem, walk, place, group, step);
      else multiply(sums, shared, walk, place, group, step);
      ahead = step - walk.end_step;
      if constexpr (kTurns > 1) join_turns(sums, shared, turn);
      if (turn > 0) {
        if (problem.split > 1) meet_cluster();  // as in add_up
        continue;
      }
      int row = walk.row, end_row = problem.rows;
      if (problem.split > 1) add_up(sums, shared, problem.split, group, row, end_row);
      write(sums, problem, shared, walk.output_tile, row, end_row, group);
    }
  }

  __device__ static void run(const Problem& problem) {
    extern __shared__ uint4 dynamic[];
    Shared shared(reinterpret_cast<unsigned char*>(dynamic) + (-shared_address(dynamic) & 1023), problem);
    if (static_cast<int>(threadIdx.x) < shared.num_stages) {
      barrier_init(shared.came[threadIdx.x], 1);
      barrier_init(shared.left[threadIdx.x], 4 * kGroups * problem.num_sharers);  // one for each warp that reads it
      barrier_init_fence();
    }
    __syncthreads();
    if (problem.num_sharers > 1) meet_cluster();  // nobody uses the barriers of another block before
    start_dependents();

    // Together no more registers than the block had at its launch: who asks for more waits for ever.
    const int role = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // the same for a warp, as the compiler can see
    if (role == 0) {
      shrink_registers<40>();
      if (threadIdx.x == 0) produce(shared, problem);
      else wait_for_inputs();
      __syncwarp();
      if (problem.split > 1) meet_cluster();  // as in add_up
    } else {
      grow_registers<232>();
      consume(shared, problem, role - 1);
    }
    if (problem.num_sharers > 1 || problem.split > 1) {  // before a block ends, the others have ceased to write to it, and to read from it
      __syncwarp();
      meet_cluster();
    }
  }
};
