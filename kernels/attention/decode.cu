// Attention of single queries over the paged KV cache, on tensor cores: out = softmax(cap(q · Kᵀ · scale)) · V for each
// decoding token of a batch.
//
// Work: every token and KV head has a list of KV blocks to read. Long lists are cut into pieces, and the blocks of threads of
// a grid that just fills the GPU take pieces until there are no more: the first ones by their index, then whoever is done
// takes the next, as some multiprocessors get more of the memory's bandwidth than others. So any mix of contexts is in
// balance, and the grid depends on nothing. Who finishes the last piece of a list joins them all.
//
// Inside, each warp takes every kWarps-th KV block of a piece through a pipeline of its own (kStages, filled in the
// background). Keys and values are the left operand of the products and the up to 8 query heads that share them the right
// one: scores are [16 keys, 8 heads], and the output [kHeadDim, 8 heads] stays in registers.
// Bound by bytes: the keys and values of the context, once. What counts is bytes in flight: at least 48 KiB on each
// multiprocessor at any time, while some of its blocks of threads begin or end a piece.
//
// Built with SCALAR (bf16 or f16), HEAD_DIM (a multiple of 16), GROUP (query heads a block takes, up to 16; with more of
// them to a KV head, several blocks share it), WARPS and STAGES.
#include "types.cuh"
#include "reduce.cuh"
#include "attention.cuh"

using Scalar = SCALAR;
constexpr int kHeadDim = HEAD_DIM;
constexpr int kGroup = GROUP;
constexpr int kWarps = WARPS;
constexpr int kStages = STAGES;
constexpr int kThreads = kWarps * 32;
constexpr int kTiles = ceil_div(kGroup, 8);  // a tensor core takes 8 query heads
constexpr int kSteps = kHeadDim / 16;        // tensor core steps along the head
// Room after each row: the rows that are read or written together then lie in different banks.
constexpr int kStride = kHeadDim + 8;
constexpr int kOutStride = kHeadDim + 4;
constexpr int kMinPiece = kWarps;  // KV blocks: one for each warp
constexpr int kMaxPieces = 1 << 18;

struct Tile { Scalar rows[kBlockSize * kStride]; };
struct Stage { Tile keys, values; };
static_assert(kGroup * kOutStride * sizeof(float) <= sizeof(Stage), "a warp's output fits in one of its stages");

// Zero between launches:
__device__ int num_taken;                    // pieces that were taken after the first ones
__device__ int finished_pieces[kMaxPieces];  // at the first piece of each list

// The plan.

struct Contexts {
  const int* lens;
  int num_tokens, window;
};
__device__ inline int first_key(int context, int window) { return window > 0 ? max(0, context - window) : 0; }
__device__ inline int num_kv_blocks(const Contexts& contexts, int token) {
  const int context = contexts.lens[token];
  return max(1, ceil_div(context, kBlockSize) - first_key(context, contexts.window) / kBlockSize);
}

// Pieces of the lists of one KV head, if none is longer than this.
__device__ inline int count_pieces(const Contexts& contexts, int length) {
  int num = 0;
  for (int token = threadIdx.x % 32; token < contexts.num_tokens; token += 32)
    num += ceil_div(num_kv_blocks(contexts, token), length);
  return __reduce_add_sync(kAllLanes, num);
}

struct Plan {
  int length, num_pieces;  // KV blocks of a piece at most; pieces of all lists
};

// A cut costs time (some 5 us until the pieces are joined and the next ones stream), so the fewest pieces are best that give
// work to all: one for each block of threads, at most twice as long as if all were even (short ones leave their bandwidth to
// long ones), or else pieces up to the even length, which are taken in turns.
__device__ inline Plan make_plan(const Contexts& contexts, int num_heads) {
  const int num_thread_blocks = gridDim.x, total = count_pieces(contexts, 1) * num_heads;
  const int even = max(ceil_div(total, num_thread_blocks), kMinPiece);
  if (contexts.num_tokens * num_heads <= num_thread_blocks) {
    for (int length = even; length <= 2 * even; length += ceil_div(even, 8)) {
      const int num_pieces = count_pieces(contexts, length) * num_heads;
      if (num_pieces <= num_thread_blocks) return {length, num_pieces};
    }
  }
  return {even, count_pieces(contexts, even) * num_heads};
}

struct Position {
  int token, piece;  // a token and the first piece of its lists
};

// The token that a piece belongs to, from an earlier position on.
__device__ inline Position find_token(const Contexts& contexts, int num_heads, const Plan& plan, int piece, Position from) {
  const int lane = threadIdx.x % 32;
  while (true) {
    const int token = from.token + lane;
    const int own = token < contexts.num_tokens ? ceil_div(num_kv_blocks(contexts, token), plan.length) * num_heads : 0;
    int up_to_own = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(kAllLanes, up_to_own, distance);
      if (lane >= distance) up_to_own += below;
    }
    const u32 ends_later = __ballot_sync(kAllLanes, from.piece + up_to_own > piece);
    if (ends_later) {
      const int found = __ffs(ends_later) - 1;
      return {from.token + found, from.piece + __shfl_sync(kAllLanes, up_to_own - own, found)};
    }
    from = {from.token + 32, from.piece + __shfl_sync(kAllLanes, up_to_own, 31)};
  }
}

// One piece.

struct Piece {
  const Scalar *k_cache, *v_cache;  // of its KV head
  const int* table;
  i64 block_stride;
  int begin, end;    // the keys that its token sees
  int first, last;   // the KV blocks of the piece, in the table
};

struct Softmax {  // of a warp. A lane's columns are heads 2 (lane % 4) + {0, 1} of each tile; sums are over its own keys
  float peak[kTiles][2], sum[kTiles][2], out[kSteps][kTiles][4];
};

// Zeros where there is no key, since 0 · (what lies there) may be NaN.
__device__ inline void load_stage(Stage& stage, const Piece& piece, int block, int block_id) {
  const i64 source = block_id * piece.block_stride;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int at = (step * 32 + threadIdx.x % 32) * 8, row = at / kHeadDim, key = block * kBlockSize + row;
    const int target = row * kStride + at % kHeadDim;
    const bool exists = key >= piece.begin && key < piece.end;
    cp_async_16(&stage.keys.rows[target], piece.k_cache + source + at, exists);
    cp_async_16(&stage.values.rows[target], piece.v_cache + source + at, exists);
  }
}

// The right operand of the scores: 16 numbers of each of 8 heads, zeros for heads that do not exist.
__device__ inline void load_queries(u32 (&query)[kSteps][kTiles][2], const Scalar* q, int num_group_heads) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int head = tile * 8 + lane / 4;
    const u32* words = reinterpret_cast<const u32*>(q + head * kHeadDim) + lane % 4;
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        query[step][tile][half] = head < num_group_heads ? words[step * 8 + half * 4] : 0;
  }
}

// Over the lanes that hold the same columns.
__device__ inline float column_max(float x) {
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}
__device__ inline float column_sum(float x) {
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// Scores of 16 keys become weights 2^(score - peak), and what was summed before fades to the new peaks.
__device__ inline void add_scores(Softmax& state, u32 (&weights)[2], const float (&scores)[4], int tile) {
  float weight[4], fade[2];
#pragma unroll
  for (int column = 0; column < 2; ++column) {
    float& peak = state.peak[tile][column];
    const float new_peak = column_max(fmaxf(peak, fmaxf(scores[column], scores[column + 2])));
    const float base = finite_or_zero(new_peak);
    fade[column] = exp2_fast(peak - base);
    peak = new_peak;
    weight[column] = exp2_fast(scores[column] - base);
    weight[column + 2] = exp2_fast(scores[column + 2] - base);
    state.sum[tile][column] = state.sum[tile][column] * fade[column] + weight[column] + weight[column + 2];
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) state.out[step][tile][i] *= fade[i % 2];
  // A lane holds weights of one key for two heads, and must bring those of two keys for one head.
  weights[0] = transpose(pack<Scalar>(weight[0], weight[1]));
  weights[1] = transpose(pack<Scalar>(weight[2], weight[3]));
}

__device__ inline void add_block(Softmax& state, const Stage& stage, const u32 (&query)[kSteps][kTiles][2], const Piece& piece,
                                 int block, float scale, float softcap) {
  const int lane = threadIdx.x % 32;
  float sums[2][kTiles][4] = {};  // two chains of products: half the time until the last is done
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    u32 keys[4];
    ldmatrix(keys, &stage.keys.rows[lane % 16 * kStride + step * 16 + lane / 16 * 8]);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      mma_16x8x16<Scalar>(sums[step % 2][tile], keys, query[step][tile][0], query[step][tile][1]);
  }
  u32 weights[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    float scores[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = block * kBlockSize + lane / 4 + i / 2 * 8;
      const float score = capped((sums[0][tile][i] + sums[1][tile][i]) * scale, softcap) * kLog2e;
      scores[i] = key >= piece.begin && key < piece.end ? score : -kInfinity;
    }
    add_scores(state, weights[tile], scores, tile);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    u32 values[4];
    ldmatrix_transposed(values, &stage.values.rows[(lane / 16 * 8 + lane % 8) * kStride + step * 16 + lane / 8 % 2 * 8]);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      mma_16x8x16<Scalar>(state.out[step][tile], values, weights[tile][0], weights[tile][1]);
  }
}

// Bring a warp's first KV blocks of a piece to the L2 cache: not further, as the newest key may still have to be written.
__device__ inline void prefetch_stages(const Piece& piece) {
  constexpr int kLine = 64;  // numbers in the 128 bytes of a cache line
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    const int block = piece.first + threadIdx.x / 32 + i * kWarps;
    if (block >= piece.last) return;
    const i64 source = piece.table[block] * piece.block_stride;
    for (int at = threadIdx.x % 32 * kLine; at < kBlockSize * kHeadDim; at += 32 * kLine) {
      prefetch_l2(piece.k_cache + source + at);
      prefetch_l2(piece.v_cache + source + at);
    }
  }
}

// Walk over the warp's KV blocks of a piece.
__device__ inline void attend(Softmax& state, Stage* stages, const Piece& piece, const Scalar* q, int num_group_heads,
                              float scale, float softcap) {
  const int first = piece.first + threadIdx.x / 32;
  int ids[kStages];
#pragma unroll
  for (int i = 0; i < kStages; ++i) ids[i] = first + i * kWarps < piece.last ? piece.table[first + i * kWarps] : 0;
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    if (first + i * kWarps < piece.last) load_stage(stages[i], piece, first + i * kWarps, ids[i]);
    cp_async_commit();
  }
  u32 query[kSteps][kTiles][2];
  load_queries(query, q, num_group_heads);
  int now = 0;
  for (int block = first; block < piece.last; block += kWarps) {
    const int later = block + kStages * kWarps;
    const int later_id = later < piece.last ? piece.table[later] : 0;  // looked up behind the arithmetic
    cp_async_wait<kStages - 1>();
    __syncwarp();  // this stage has come for all lanes
    add_block(state, stages[now], query, piece, block, scale, softcap);
    __syncwarp();  // and all have left it
    if (later < piece.last) load_stage(stages[now], piece, later, later_id);
    cp_async_commit();
    now = now + 1 < kStages ? now + 1 : 0;
  }
  cp_async_wait<0>();
  __syncwarp();
}

// Results of parts of a context for four numbers of a head, joined: an online softmax over parts.
struct Joined {
  float peak = -kInfinity, sum = 0.0f, total[4] = {};

  __device__ void fade_to(float new_peak) {
    const float fade = exp2_fast(peak - finite_or_zero(new_peak));
    peak = new_peak;
    sum *= fade;
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] *= fade;
  }
  __device__ void add(float part_peak, float part_sum, const float (&part)[4]) {
    const float share = exp2_fast(part_peak - finite_or_zero(peak));
    sum += share * part_sum;
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] += share * part[i];
  }
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] = sum > 0.0f ? total[i] / sum : 0.0f;
  }
};

__device__ inline void store_scalars(Scalar* target, const float (&x)[4]) {
  u32* words = reinterpret_cast<u32*>(target);
  words[0] = pack<Scalar>(x[0], x[1]);
  words[1] = pack<Scalar>(x[2], x[3]);
}

struct Parts {  // results of pieces
  float *outs, *weights;  // [piece, kGroup, kHeadDim] and [piece, kGroup]; a weight is peak + log2(sum)
};

// Join the warps' softmaxes of a piece: into the output if it is a whole list, or else into its part.
__device__ inline void join_warps(const Softmax& state, Stage* shared, Scalar* out, const Parts& parts, int piece,
                                  bool is_whole, int num_group_heads) {
  __shared__ float peaks[kWarps][kTiles * 8], sums[kWarps][kTiles * 8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* own_out = reinterpret_cast<float*>(shared + warp * kStages);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int head = tile * 8 + lane % 4 * 2 + column;
      const float sum = column_sum(state.sum[tile][column]);
      if (lane < 4) {
        peaks[warp][head] = state.peak[tile][column];
        sums[warp][head] = sum;
      }
      if (head < kGroup)
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            own_out[head * kOutStride + step * 16 + half * 8 + lane / 4] = state.out[step][tile][half * 2 + column];
    }
  }
  __syncthreads();
  for (int at = threadIdx.x * 4; at < num_group_heads * kHeadDim; at += kThreads * 4) {
    const int head = at / kHeadDim, i = at % kHeadDim;
    Joined joined;
#pragma unroll
    for (int each = 0; each < kWarps; ++each) joined.peak = fmaxf(joined.peak, peaks[each][head]);
#pragma unroll
    for (int each = 0; each < kWarps; ++each) {
      float numbers[4];
      load(reinterpret_cast<const float*>(shared + each * kStages) + head * kOutStride + i, numbers);
      joined.add(peaks[each][head], sums[each][head], numbers);
    }
    joined.finish();
    if (is_whole) {
      store_scalars(out + at, joined.total);
    } else {
      store(parts.outs + piece * kGroup * kHeadDim + at, joined.total);
      if (i == 0) parts.weights[piece * kGroup + head] = joined.sum > 0.0f ? joined.peak + log2f(joined.sum) : -kInfinity;
    }
  }
}

// Of the blocks of threads that share a list, say to the last one that it is, and that it sees the others' parts.
__device__ inline bool is_last_of(int* finished, int num) {
  __shared__ bool is_last;
  __syncthreads();  // all threads have written their share of the part
  if (threadIdx.x == 0) {
    is_last = arrive(finished) == num - 1;
    if (is_last) *finished = 0;
  }
  __syncthreads();
  return is_last;
}

// Join the pieces of a list.
__device__ inline void join_parts(Scalar* out, const Parts& parts, int first_piece, int num_pieces, int num_group_heads) {
  constexpr int kBatch = 16;  // parts whose numbers are on their way at once
  for (int at = threadIdx.x * 4; at < num_group_heads * kHeadDim; at += kThreads * 4) {
    Joined joined;
    for (int first = 0; first < num_pieces; first += kBatch) {
      float weights[kBatch], numbers[kBatch][4] = {};
      float peak = joined.peak;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int piece = first_piece + first + i;
        weights[i] = -kInfinity;
        if (first + i < num_pieces) {
          weights[i] = parts.weights[piece * kGroup + at / kHeadDim];
          load(parts.outs + piece * kGroup * kHeadDim + at, numbers[i]);
        }
        peak = fmaxf(peak, weights[i]);
      }
      joined.fade_to(peak);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) joined.add(weights[i], 1.0f, numbers[i]);
    }
    joined.finish();
    store_scalars(out + at, joined.total);
  }
}

// Grid: x = as many as run at once; what of them is not needed leaves at once.
extern "C" __global__ void __launch_bounds__(kThreads)
decode(Scalar* out, float* part_outs, float* part_weights, const Scalar* q, const Scalar* k_cache, const Scalar* v_cache,
       const int* context_lens, const int* rows, const int* block_table, int num_tokens, int table_width, int num_heads,
       int num_kv_heads, float scale, int window, float softcap) {
  extern __shared__ uint4 shared[];
  __shared__ int next_piece;
  start_dependents();
  Stage* stages = reinterpret_cast<Stage*>(shared);
  const int heads_per_kv = num_heads / num_kv_heads, shares_of_kv = ceil_div(heads_per_kv, kGroup);
  const int num_lists = num_kv_heads * shares_of_kv;  // of a token
  const Contexts contexts = {context_lens, num_tokens, window};
  const Parts parts = {part_outs, part_weights};
  const Plan plan = make_plan(contexts, num_lists);
  const int num_thread_blocks = gridDim.x, own_first = blockIdx.x;
  if (own_first >= plan.num_pieces) return wait_for_inputs();

  Position position = {0, 0};
  for (int index = own_first; index < plan.num_pieces;) {
    position = find_token(contexts, num_lists, plan, index, position);
    const int context = context_lens[position.token], num_blocks = num_kv_blocks(contexts, position.token);
    const int num_pieces = ceil_div(num_blocks, plan.length), length = ceil_div(num_blocks, num_pieces);
    const int list = (index - position.piece) / num_pieces, piece_of_list = (index - position.piece) % num_pieces;

    const int kv_head = list / shares_of_kv, first_of_group = list % shares_of_kv * kGroup;
    const int num_group_heads = min(kGroup, heads_per_kv - first_of_group);
    const int begin = first_key(context, window), first_block = begin / kBlockSize + piece_of_list * length;
    const i64 head_offset = static_cast<i64>(kv_head) * kBlockSize * kHeadDim;
    const Piece piece = {k_cache + head_offset, v_cache + head_offset,
                         block_table + static_cast<i64>(rows[position.token]) * table_width,
                         static_cast<i64>(num_kv_heads) * kBlockSize * kHeadDim, begin, context,
                         first_block, min(first_block + length, begin / kBlockSize + num_blocks)};
    if (index == own_first) {
      // Until here all depends on what the step began with, not on the kernel before this one, which may still be running.
      prefetch_stages(piece);
      wait_for_inputs();
    }
    Softmax state = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) state.peak[tile][0] = state.peak[tile][1] = -kInfinity;
    const i64 first_head = static_cast<i64>(position.token) * num_heads + kv_head * heads_per_kv + first_of_group;
    attend(state, stages + threadIdx.x / 32 * kStages, piece, q + first_head * kHeadDim, num_group_heads, scale, softcap);

    int taken = 0;  // looked at later: it takes its time
    if (threadIdx.x == 0 && plan.num_pieces > num_thread_blocks) taken = atomicAdd(&num_taken, 1);
    Scalar* target = out + first_head * kHeadDim;
    join_warps(state, stages, target, parts, index, num_pieces == 1, num_group_heads);
    const int first_piece = index - piece_of_list;
    if (num_pieces > 1 && is_last_of(&finished_pieces[first_piece], num_pieces))
      join_parts(target, parts, first_piece, num_pieces, num_group_heads);
    if (threadIdx.x == 0) {
      next_piece = num_thread_blocks + taken;
      if (taken == plan.num_pieces - 1) num_taken = 0;  // one was taken after each piece: this was the last
    }
    __syncthreads();  // and all have read what the next piece overwrites
    index = next_piece;
  }
}
