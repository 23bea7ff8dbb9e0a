// Attention of prompt chunks over the paged KV cache on Hopper: what prefill.cu computes, at the tensor cores' full rate.
//
// Work: the query heads that share a KV head are stacked (num_tokens · heads_per_kv rows a request and KV head); a block of
// threads takes kRows of them, 64 to a warpgroup, and walks back over the keys they see, kKeys at a time, from the diagonal.
// One warp of another warpgroup brings keys and values with the copy engine, a KV block of 16 tokens at a time, kStages
// tiles ahead. Bound by FLOPs; beside the tensor cores, exponentials take half of their time, so the two must overlap
// (Shah et al., "FlashAttention-3", 2024): a warpgroup starts the scores of the next tile before it takes weights from those
// it has, and the warpgroups start their products in turns, so that one is at its softmax while another multiplies.
//
// Shared memory: tiles in panels of 64 numbers of the head, as tensor cores read them (ptx_sm90.cuh).
// Built with SCALAR (bf16 or f16), HEAD_DIM (64 or 128), CONSUMERS (warpgroups that compute), KEYS (64 or 128), STAGES.
#include "types.cuh"
#include "reduce.cuh"
#include "attention.cuh"
#include "ptx_sm90.cuh"

using Scalar = SCALAR;
constexpr int kHeadDim = HEAD_DIM;
constexpr int kConsumers = CONSUMERS;
constexpr int kKeys = KEYS;
constexpr int kStages = STAGES;
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kRows = 64 * kConsumers;
constexpr int kPanels = kHeadDim / 64;
constexpr int kVecs = kHeadDim / 8;
constexpr int kSteps = kHeadDim / 16;  // tensor core steps along the head
constexpr int kBlocks = kKeys / kBlockSize;
// Together no more than the block had at its launch (a multiple of 8 for each thread): who asks for more waits for ever.
constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (65536 / kThreads / 8 * 8) * (kConsumers + 1));

struct Tile { Scalar numbers[kKeys / 8][kPanels][8][64]; };

struct Context {  // the keys that some rows see, [begin, end), and the tiles that hold them
  int begin, end;
  __device__ int first_tile() const { return begin / kKeys; }
  __device__ int last_tile() const { return (end - 1) / kKeys; }
};

struct Item {  // a block's work: kRows stacked rows of a request and KV head, from first_row on
  int request, kv_head, first_token, first_row, num_rows;  // num_rows: of the whole request
  int before;                                              // tokens of the context that came before this chunk
  Context context;
};

struct Shared {
  Scalar queries[kRows / 8][kPanels][8][64];
  Tile keys[kStages], values[kStages];
  Barrier keys_came[kStages], keys_left[kStages], values_came[kStages], values_left[kStages];
};

struct Ring {  // which stage is next, and the parity of its phase
  int stage = 0;
  u32 parity = 0;
  __device__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

struct Batch {
  const int *query_start, *context_lens, *rows, *block_table;
  int first_request, num_requests, table_width, num_heads, num_kv_heads, window;
  __device__ int heads_per_kv() const { return num_heads / num_kv_heads; }
};

struct Softmax {  // of this lane's rows, lane / 4 and lane / 4 + 8 of its warp; sums are over the lane's own columns until the end
  float peak[2], sum[2], fade[2];
};

// Where a stacked row, a query head of a token, lies in q and out.
__device__ inline i64 offset_of(int row, const Item& item, const Batch& batch) {
  const int heads_per_kv = batch.heads_per_kv();
  const i64 token = item.first_token + row / heads_per_kv;
  return (token * batch.num_heads + item.kv_head * heads_per_kv + row % heads_per_kv) * kHeadDim;
}

// One warp: lane i brings block i of each tile. Blocks that hold no visible key are not touched.
__device__ inline void copy_tile(Tile& tile, Barrier& came, Barrier& left, u32 parity, const TensorMap& map, int num_blocks,
                                 bool is_mine, int octet) {
  barrier_wait(left, parity ^ 1);
  if (threadIdx.x % 32 == 0) barrier_arrive_expecting(came, num_blocks * kBlockSize * kHeadDim * 2);
  __syncwarp();
  if (is_mine) copy_octets(&tile.numbers[threadIdx.x % 32 * (kBlockSize / 8)], map, octet, came);
}

// The block's item. Requests stand in a list of pieces; request i begins at (rows before it + i · (kRows - 1)) / kRows: so each
// has room for its pieces, and no sum over the requests is needed. Blocks walk the list from its end: of a request, the pieces
// with the longest context come first.
__device__ inline Item find_item(const Batch& batch) {
  const int lane = threadIdx.x % 32, heads_per_kv = batch.heads_per_kv();
  const int* starts = batch.query_start + batch.first_request;
  const int piece = gridDim.y - 1 - blockIdx.y;
  const auto first_piece = [&](int i) { return ((starts[i] - starts[0]) * heads_per_kv + i * (kRows - 1)) / kRows; };
  // Requests that begin at or before this piece; lanes look at 32 at a time, and one alone needs no look.
  int after = batch.num_requests == 1;
  for (int seen = 32; seen == 32 && after < batch.num_requests; after += seen) {
    const bool begins = after + lane < batch.num_requests && first_piece(after + lane) <= piece;
    seen = __popc(__ballot_sync(kAllLanes, begins));
  }
  const int i = after - 1, request = batch.first_request + i;
  const int num_tokens = starts[i + 1] - starts[i], before = batch.context_lens[request] - num_tokens;
  const int first_row = (piece - first_piece(i)) * kRows, num_rows = num_tokens * heads_per_kv;
  const int first_position = before + first_row / heads_per_kv;
  const int last_position = before + min(first_row + kRows - 1, num_rows - 1) / heads_per_kv;
  const Context context = {batch.window > 0 ? max(0, first_position - batch.window + 1) : 0, last_position + 1};
  return {request, static_cast<int>(blockIdx.x), starts[i], first_row, num_rows, before, context};
}

// Bring the tiles one after the other, from the last.
__device__ inline void produce(Shared& shared, const TensorMap& k_map, const TensorMap& v_map, const Item& item,
                               const Batch& batch) {
  const int* table = batch.block_table + static_cast<i64>(batch.rows[item.request]) * batch.table_width;
  Ring ring;
  for (int tile = item.context.last_tile(); tile >= item.context.first_tile(); --tile, ring.advance()) {
    const int first = max(tile * kKeys, item.context.begin) / kBlockSize;
    const int end = min(ceil_div(item.context.end, kBlockSize), (tile + 1) * kBlocks);
    const int block = tile * kBlocks + threadIdx.x % 32, at = ring.stage;
    const bool is_mine = block >= first && block < end;
    const int octet = is_mine ? (table[block] * batch.num_kv_heads + item.kv_head) * (kBlockSize / 8) : 0;
    copy_tile(shared.keys[at], shared.keys_came[at], shared.keys_left[at], ring.parity, k_map, end - first, is_mine, octet);
    copy_tile(shared.values[at], shared.values_came[at], shared.values_left[at], ring.parity, v_map, end - first, is_mine, octet);
  }
}

// This warp's 16 rows of queries, to where tensor cores find them; zeros past the last.
__device__ inline void load_queries(Shared& shared, const Scalar* q, const Item& item, int warp_row, const Batch& batch) {
  for (int i = threadIdx.x % 32; i < 16 * kVecs; i += 32) {
    const int at = warp_row + i / kVecs, piece = i % kVecs;
    const bool exists = item.first_row + at < item.num_rows;
    cp_async_16(&shared.queries[at / 8][piece / 8][at % 8][(piece % 8 ^ at % 8) * 8],
                q + offset_of(exists ? item.first_row + at : 0, item, batch) + piece * 8, exists);
  }
  cp_async_commit();
  cp_async_wait<0>();
  publish_shared_writes();
}

// Values outside [begin, end) become zero: their weights are zero, but 0 · (what lies there) may be NaN.
__device__ inline void clear_unseen(Tile& values, int first_key, const Context& context, int warpgroup) {
  for (int i = threadIdx.x % 128; i < kKeys * kVecs; i += 128) {
    const int at = i / kVecs, piece = i % kVecs, key = first_key + at;
    if (key < context.begin || key >= context.end)
      *reinterpret_cast<uint4*>(&values.numbers[at / 8][piece / 8][at % 8][piece % 8 * 8]) = make_uint4(0, 0, 0, 0);
  }
  publish_shared_writes();
  meet_threads(1 + warpgroup, 128);
}

// Start the scores of this warpgroup's rows.
__device__ inline void start_scores(float (&scores)[kKeys / 2], u64 queries, const Tile& keys) {
  const u64 tile = octet_descriptor(&keys, kPanels);
  pin(scores);
  warpgroup_begin();
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    multiply_keys<Scalar, kKeys>(scores, further(queries, step / 4 * 1024 + step % 4 * 32),
                                 further(tile, step / 4 * 1024 + step % 4 * 32), step > 0);
  warpgroup_commit();
}

// Start out += weights · values.
__device__ inline void start_values(float (&out)[kHeadDim / 2], const u32 (&weights)[kKeys / 16][4], const Tile& values) {
  const u64 tile = octet_descriptor(&values, kPanels);
  pin(out);
  warpgroup_begin();
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step)
    multiply_values<Scalar, kHeadDim>(out, weights[step], further(tile, step * 2 * kPanels * 1024));
  warpgroup_commit();
}

// Scores of keys that a row does not see become -infinity. positions: of this lane's rows.
__device__ inline void hide_unseen(float (&scores)[kKeys / 2], const int (&positions)[2], int first_key, int window) {
  const int first_column = first_key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int distance = positions[i / 2] - (first_column + n * 8 + i % 2);
      if (distance < 0 || (window > 0 && distance >= window)) scores[n * 4 + i] = -kInfinity;
    }
}

// Scores become weights 2^(score - peak); `fade` is what becomes of all that was summed before. `factor` brings scores to base 2.
__device__ inline void add_scores(Softmax& state, float (&scores)[kKeys / 2], float factor) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float peak = state.peak[half];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) peak = fmaxf(peak, fmaxf(scores[n * 4 + 2 * half], scores[n * 4 + 2 * half + 1]));
    peak = team_max<4>(peak);
    const float base = finite_or_zero(peak) * factor;
    state.fade[half] = exp2_fast(state.peak[half] * factor - base);
    state.peak[half] = peak;
    state.sum[half] *= state.fade[half];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = n * 4 + 2 * half; i < n * 4 + 2 * half + 2; ++i) {
        scores[i] = exp2_fast(scores[i] * factor - base);
        state.sum[half] += scores[i];
      }
  }
}

// What a lane holds of two products C is just what it must bring of one operand A.
__device__ inline void round_weights(u32 (&weights)[kKeys / 16][4], const float (&scores)[kKeys / 2]) {
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[step][i] = pack<Scalar>(scores[step * 8 + 2 * i], scores[step * 8 + 2 * i + 1]);
}

__device__ inline void fade_out(float (&out)[kHeadDim / 2], const Softmax& state) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= state.fade[i / 2 % 2];
}

// The 16 rows of this warp, by way of the place of its queries: so 16 bytes go to device memory at a time, rows whole.
__device__ inline void write_out(Scalar* out, Shared& shared, const float (&sums)[kHeadDim / 2], const Softmax& state,
                                 const Item& item, int warp_row, const Batch& batch) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = team_sum<4>(state.sum[half]);
    const float share = sum > 0.0f ? 1.0f / sum : 0.0f;
    const int at = warp_row + half * 8 + lane / 4;
#pragma unroll
    for (int n = 0; n < kVecs; ++n)
      *reinterpret_cast<u32*>(&shared.queries[at / 8][n / 8][at % 8][(n % 8 ^ at % 8) * 8 + lane % 4 * 2]) =
          pack<Scalar>(sums[n * 4 + 2 * half] * share, sums[n * 4 + 2 * half + 1] * share);
  }
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < 16 * kVecs; i += 32) {
    const int at = warp_row + i / kVecs, piece = i % kVecs;
    if (item.first_row + at < item.num_rows)
      *reinterpret_cast<uint4*>(out + offset_of(item.first_row + at, item, batch) + piece * 8) =
          load_bits(&shared.queries[at / 8][piece / 8][at % 8][(piece % 8 ^ at % 8) * 8]);
  }
}

// One warpgroup: its 64 rows.
__device__ inline void consume(Shared& shared, Scalar* out, const Scalar* q, const Item& item, const Batch& batch, int warpgroup,
                               float scale, float softcap) {
  const int lane = threadIdx.x % 32, warp_row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16;
  const int own_turn = 1 + kConsumers + warpgroup, next_turn = 1 + kConsumers + (warpgroup + 1) % kConsumers;
  const bool is_first_lane = lane == 0;
  const u64 queries = octet_descriptor(&shared.queries[warpgroup * 8], kPanels);
  const float factor = softcap > 0.0f ? kLog2e : scale * kLog2e;
  load_queries(shared, q, item, warp_row, batch);
  meet_threads(1 + warpgroup, 128);

  const Context& context = item.context;
  const int heads_per_kv = batch.heads_per_kv(), window = batch.window;
  const int first_position = item.before + item.first_row / heads_per_kv, last_position = context.end - 1;
  const int own_row = item.first_row + warp_row + lane / 4;
  const int positions[2] = {item.before + own_row / heads_per_kv, item.before + (own_row + 8) / heads_per_kv};
  Softmax state = {{-kInfinity, -kInfinity}, {0.0f, 0.0f}, {1.0f, 1.0f}};
  float sums[kHeadDim / 2] = {};
  float scores[kKeys / 2];
  u32 weights[kKeys / 16][4];

  // Of the tile at `first_key`: scores as the tensor cores left them become weights.
  const auto take_weights = [&](int first_key) {
    if (softcap > 0.0f)
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) scores[i] = capped(scores[i] * scale, softcap);
    if (first_key + kKeys - 1 > first_position || (window > 0 && last_position - first_key >= window))
      hide_unseen(scores, positions, first_key, window);
    add_scores(state, scores, factor);
    pin(scores);  // now, while the tensor cores are at the last tile's values
    pin(state.sum);
  };

  Ring keys, values;
  int tile = context.last_tile();
  barrier_wait(shared.keys_came[keys.stage], keys.parity);
  start_scores(scores, queries, shared.keys[keys.stage]);
  warpgroup_wait<0>();
  pin(scores);
  if (is_first_lane) barrier_arrive(shared.keys_left[keys.stage]);
  keys.advance();
  take_weights(tile * kKeys);
  round_weights(weights, scores);
  if (context.end % kKeys != 0) {
    barrier_wait(shared.values_came[values.stage], values.parity);
    clear_unseen(shared.values[values.stage], tile * kKeys, context, warpgroup);
  }

  if (tile > context.first_tile()) {
    barrier_wait(shared.keys_came[keys.stage], keys.parity);
    if (warpgroup == kConsumers - 1) pass_threads(next_turn, 256);
  }
  for (--tile; tile >= context.first_tile(); --tile) {
    const bool is_last = tile == context.first_tile();
    meet_threads(own_turn, 256);
    start_scores(scores, queries, shared.keys[keys.stage]);
    barrier_wait(shared.values_came[values.stage], values.parity);
    start_values(sums, weights, shared.values[values.stage]);
    if (!is_last || warpgroup != kConsumers - 1) pass_threads(next_turn, 256);
    warpgroup_wait<1>();
    pin(scores);
    if (is_first_lane) barrier_arrive(shared.keys_left[keys.stage]);
    keys.advance();
    take_weights(tile * kKeys);
    // Waiting here for the next keys, the compiler moves no part of the softmax behind the wait for the values.
    if (!is_last) barrier_wait(shared.keys_came[keys.stage], keys.parity);
    warpgroup_wait<0>();
    pin(sums);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) pin(weights[step]);
    if (is_first_lane) barrier_arrive(shared.values_left[values.stage]);
    values.advance();
    fade_out(sums, state);
    round_weights(weights, scores);
  }

  barrier_wait(shared.values_came[values.stage], values.parity);
  if (context.begin % kKeys != 0)
    clear_unseen(shared.values[values.stage], context.first_tile() * kKeys, context, warpgroup);
  start_values(sums, weights, shared.values[values.stage]);
  warpgroup_wait<0>();
  pin(sums);
  meet_threads(1 + warpgroup, 128);  // tensor cores have read all queries
  write_out(out, shared, sums, state, item, warp_row, batch);
}

// Grid: x = KV heads, y = room for the pieces of all requests (find_item). Blocks that run at the same time share keys through
// the L2 cache, and short blocks fill the gaps at the end.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
prefill(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, Scalar* out, const Scalar* q,
        const int* query_start, const int* context_lens, const int* rows, const int* block_table, int first_request,
        int num_requests, int table_width, int num_heads, int num_kv_heads, float scale, int window, float softcap) {
  extern __shared__ uint4 dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>((reinterpret_cast<u64>(dynamic) + 1023) / 1024 * 1024);
  const Batch batch = {query_start, context_lens, rows, block_table, first_request, num_requests, table_width, num_heads,
                       num_kv_heads, window};
  const Item item = find_item(batch);
  if (item.first_row >= item.num_rows) return;  // room that was not needed
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(shared.keys_came[stage], 1);
      barrier_init(shared.values_came[stage], 1);
      barrier_init(shared.keys_left[stage], 4 * kConsumers);  // one for each warp
      barrier_init(shared.values_left[stage], 4 * kConsumers);
    }
    barrier_init_fence();
  }
  __syncthreads();

  const int role = __shfl_sync(kAllLanes, threadIdx.x / 128, 0);  // the same for a warp, as the compiler can see
  if (role == 0) {
    shrink_registers<kProducerRegisters>();
    if (threadIdx.x < 32) produce(shared, k_map, v_map, item, batch);
  } else {
    grow_registers<kConsumerRegisters>();
    consume(shared, out, q, item, batch, role - 1, scale, softcap);
  }
}
