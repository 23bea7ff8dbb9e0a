// Attention of prompt chunks over the paged KV cache: out = softmax(cap(q · Kᵀ · scale)) · V, causal, on tensor cores.
//
// Work: the query heads that share a KV head are stacked, so a request has num_tokens · heads_per_kv rows for each KV head;
// a block of threads takes kRows of them and walks over the keys they see, kKeys at a time, with an online softmax
// (Dao, "FlashAttention-2", 2023): scores and output stay in registers, 16 rows a warp. The next keys and values come to
// shared memory in the background (two stages). Bound by FLOPs once the chunk is longer than a few tokens.
//
// From an e4m3 cache, the next keys and values come as they are, and are widened when their turn comes.
//
// Built with SCALAR (bf16 or f16), CACHED (the cache's type: SCALAR, or e4m3), HEAD_DIM (a multiple of 16), WARPS and KEYS (keys
// in a stage).
#include "types.cuh"
#include "prefill.cuh"

using Scalar = SCALAR;
using Cached = CACHED;
constexpr bool kIsNarrow = sizeof(Cached) < sizeof(Scalar);
constexpr int kHeadDim = HEAD_DIM;
constexpr int kThreads = WARPS * 32;
constexpr int kRows = WARPS * 16;
constexpr int kKeys = KEYS;
constexpr bool kIsWide = kHeadDim > 128;  // output fills the registers of wide heads: their queries stay in shared memory
// Eight numbers of room after each row: the eight rows that one ldmatrix reads then lie in different banks.
constexpr int kStride = kHeadDim + 8;
constexpr int kVecs = kHeadDim / 8;
constexpr int kSteps = kHeadDim / 16;  // tensor core steps along the head

// Requests stand in a list of pieces; request i begins at (rows before it + i · (kRows - 1)) / kRows: so each has room for its
// pieces, and no sum over the requests is needed. Called by whole warps.
struct Pieces {
  const int* starts;
  int num_requests, heads_per_kv;
  __device__ Pieces(const Batch& batch)
      : starts(batch.query_start + batch.first_request), num_requests(0), heads_per_kv(batch.heads_per_kv()) {
    const int end = starts[batch.num_requests];
    for (int first = 0; first < batch.num_requests; first += 32) {
      const int i = first + threadIdx.x % 32;
      num_requests += __popc(__ballot_sync(kAllLanes, i < batch.num_requests && starts[i] < end));
    }
  }
  __device__ int first(int request) const {
    return ((starts[request] - starts[0]) * heads_per_kv + request * (kRows - 1)) / kRows;
  }
  __device__ int total() const { return first(num_requests); }
  // The request whose room holds a piece; lanes look at 32 requests at a time.
  __device__ int request_of(int piece) const {
    int after = 1;
    for (int seen = 32; seen == 32 && after < num_requests; after += seen) {
      const int i = after + threadIdx.x % 32;
      seen = __popc(__ballot_sync(kAllLanes, i < num_requests && first(i) <= piece));
    }
    return after - 1;
  }
};

// Items go from the end of the list: of a request, the pieces with the longest context come first. Neighbours are the KV heads
// of one piece. Without rows of its own, an item is room that was not needed.
__device__ inline Item find_item(const Pieces& pieces, int index, const Batch& batch) {
  const int piece = pieces.total() - 1 - index / batch.num_kv_heads, i = pieces.request_of(piece);
  return item_of<kRows>(batch, batch.first_request + i, index % batch.num_kv_heads, piece - pieces.first(i));
}

struct Tile { Scalar rows[kKeys * kStride]; };
struct Stage { Tile keys, values; };
struct Narrow { Cached keys[kKeys * kHeadDim], values[kKeys * kHeadDim]; };  // a stage before it is widened

struct Softmax {  // of this lane's rows, lane / 4 and lane / 4 + 8; sums are over the lane's own columns until the end
  float peak[2], sum[2], out[kHeadDim / 8][4];
};

struct Context {  // where the keys and values of one request and KV head lie, and which of them the block sees
  const Cached *k_cache, *v_cache;
  const int* table;
  i64 block_stride;
  int begin, end;
};

// Bring keys [first, first + kKeys) and their values, rows `stride` numbers apart; zeros where there are none, since
// 0 · (what lies there) may be NaN.
__device__ inline void load_stage(void* keys, void* values, int stride, const Context& context, int first) {
  constexpr int kWidth = 16 / sizeof(Cached), kPieces = kHeadDim / kWidth;
  for (int i = threadIdx.x; i < kKeys * kPieces; i += kThreads) {
    const int row = i / kPieces, at = i % kPieces * kWidth, key = first + row;
    const bool exists = key >= context.begin && key < context.end;
    const i64 block = exists ? context.table[key / kBlockSize] : 0;
    const i64 source = block * context.block_stride + key % kBlockSize * kHeadDim + at;
    cp_async_16(static_cast<Cached*>(keys) + row * stride + at, context.k_cache + source, exists);
    cp_async_16(static_cast<Cached*>(values) + row * stride + at, context.v_cache + source, exists);
  }
  cp_async_commit();
}
__device__ inline void load_stage(Stage& stage, const Context& context, int first) {
  load_stage(stage.keys.rows, stage.values.rows, kStride, context, first);
}
__device__ inline void load_stage(Narrow& stage, const Context& context, int first) {
  load_stage(stage.keys, stage.values, kHeadDim, context, first);
}

__device__ inline void widen_stage(Stage& wide, const Narrow& narrow) {
  const auto widen_piece = [](Scalar* target, const Cached* source) {
    widen_bits<Scalar>(*reinterpret_cast<uint4(*)[2]>(target), load_bits(source));
  };
  for (int i = threadIdx.x; i < kKeys * kSteps; i += kThreads) {
    const int place = i / kSteps * kStride + i % kSteps * 16;
    widen_piece(&wide.keys.rows[place], &narrow.keys[i * 16]);
    widen_piece(&wide.values.rows[place], &narrow.values[i * 16]);
  }
}

__device__ inline void load_queries(Scalar* queries, const Scalar* q, const Item& item, const Batch& batch) {
  for (int i = threadIdx.x; i < kRows * kVecs; i += kThreads) {
    const int at = i % kVecs * 8;
    const bool exists = i / kVecs < item.num_own_rows();
    const i64 head = item.head_of(exists ? item.first_row + i / kVecs : 0, batch);
    cp_async_16(&queries[i / kVecs * kStride + at], q + head * kHeadDim + at, exists);
  }
  cp_async_commit();
}

// The A operand: 16 query rows, 16 numbers of the head.
__device__ inline void query_fragment(u32 (&fragment)[4], const Scalar* queries, int step) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  ldmatrix(fragment, &queries[(warp * 16 + lane % 16) * kStride + step * 16 + lane / 16 * 8]);
}

__device__ inline void scores_of(float (&scores)[kKeys / 8][4], const u32 (&query)[4], const Tile& keys, int step) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int pair = 0; pair < kKeys / 16; ++pair) {
    u32 fragment[4];  // of 16 keys: two B operands
    const int key = pair * 16 + lane / 16 * 8 + lane % 8;
    ldmatrix(fragment, &keys.rows[key * kStride + step * 16 + lane / 8 % 2 * 8]);
    mma_16x8x16<Scalar>(scores[2 * pair], query, fragment[0], fragment[1]);
    mma_16x8x16<Scalar>(scores[2 * pair + 1], query, fragment[2], fragment[3]);
  }
}

// Scores become weights 2^(score - peak), and what was summed before fades to the new peak. `factor` brings scores to base 2.
__device__ inline void add_scores(Softmax& state, float (&scores)[kKeys / 8][4], float factor) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float peak = state.peak[half];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) peak = fmaxf(peak, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    peak = team_max<4>(peak);
    const float base = finite_or_zero(peak) * factor;
    const float fade = exp2_fast((state.peak[half] - finite_or_zero(peak)) * factor);  // 1 if the peak has not moved
    state.peak[half] = peak;
    state.sum[half] *= fade;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        scores[n][i] = exp2_fast(scores[n][i] * factor - base);
        state.sum[half] += scores[n][i];
      }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      state.out[n][2 * half] *= fade;
      state.out[n][2 * half + 1] *= fade;
    }
  }
}

__device__ inline void add_values(Softmax& state, const float (&weights)[kKeys / 8][4], const Tile& values) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    // What a lane holds of two products C is just what it must bring of one operand A.
    const u32 weight[4] = {pack<Scalar>(weights[2 * step][0], weights[2 * step][1]),
                           pack<Scalar>(weights[2 * step][2], weights[2 * step][3]),
                           pack<Scalar>(weights[2 * step + 1][0], weights[2 * step + 1][1]),
                           pack<Scalar>(weights[2 * step + 1][2], weights[2 * step + 1][3])};
#pragma unroll
    for (int pair = 0; pair < kHeadDim / 16; ++pair) {
      u32 fragment[4];
      const int key = step * 16 + lane % 16;
      ldmatrix_transposed(fragment, &values.rows[key * kStride + pair * 16 + lane / 16 * 8]);
      mma_16x8x16<Scalar>(state.out[2 * pair], weight, fragment[0], fragment[1]);
      mma_16x8x16<Scalar>(state.out[2 * pair + 1], weight, fragment[2], fragment[3]);
    }
  }
}

// Grid: x = room for the items of all requests (prefill.cuh); what of it is not needed leaves at once.
extern "C" __global__ void __launch_bounds__(kThreads)
prefill(const Cached* k_cache, const Cached* v_cache, Scalar* out, const Scalar* q, const int* query_start,
        const int* context_lens, const int* rows, const int* block_table, int first_request, int num_requests, int table_width,
        int num_heads, int num_kv_heads, float scale, int window, float softcap) {
  static_assert(kIsWide || kRows <= 2 * kKeys, "queries fit in a stage");
  extern __shared__ uint4 shared[];
  Stage* stages = reinterpret_cast<Stage*>(shared);
  // Queries go to registers and leave their place to the second stage, or stay in a place of their own.
  Scalar* queries = reinterpret_cast<Scalar*>(stages + (kIsWide && !kIsNarrow ? 2 : 1));
  Narrow& narrow = *reinterpret_cast<Narrow*>(queries + kRows * kStride);

  const Batch batch = {query_start, context_lens, rows, block_table, first_request, num_requests, table_width, num_heads,
                       num_kv_heads, window};
  const Pieces pieces(batch);
  if (blockIdx.x >= pieces.total() * num_kv_heads) return;
  const Item item = find_item(pieces, blockIdx.x, batch);
  if (item.num_own_rows() <= 0) return;

  const i64 head_offset = static_cast<i64>(item.kv_head) * kBlockSize * kHeadDim;
  const Context context = {k_cache + head_offset, v_cache + head_offset,
                           block_table + static_cast<i64>(item.table_row) * table_width,
                           static_cast<i64>(num_kv_heads) * kBlockSize * kHeadDim, item.begin, item.end};
  const int first_key = item.begin / kKeys * kKeys, first_position = item.position_of(item.first_row, batch);

  load_queries(queries, q, item, batch);
  if constexpr (kIsNarrow) load_stage(narrow, context, first_key);
  else load_stage(stages[0], context, first_key);
  u32 query[kIsWide ? 1 : kSteps][4];
  if constexpr (!kIsWide) {
    cp_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) query_fragment(query[step], queries, step);
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int positions[2];  // of this lane's rows
#pragma unroll
  for (int half = 0; half < 2; ++half)
    positions[half] = item.position_of(item.first_row + warp * 16 + half * 8 + lane / 4, batch);

  Softmax state = {{-kInfinity, -kInfinity}, {0.0f, 0.0f}, {}};
  int now = 0;
  for (int first = first_key; first < context.end; first += kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // this stage has come for all, and all have left the last one
    const bool is_last = first + kKeys >= context.end;
    if constexpr (kIsNarrow) {
      widen_stage(stages[0], narrow);
      __syncthreads();
      if (!is_last) load_stage(narrow, context, first + kKeys);
    } else {
      now = (first - first_key) / kKeys % 2;
      if (!is_last) load_stage(stages[now ^ 1], context, first + kKeys);
    }

    float scores[kKeys / 8][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (kIsWide) query_fragment(query[0], queries, step);
      scores_of(scores, query[kIsWide ? 0 : step], stages[now].keys, step);
    }
    if (softcap > 0.0f)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] = capped(scores[n][i] * scale, softcap);
    const bool all_visible = first + kKeys - 1 <= first_position && (window == 0 || context.end - 1 - first < window);
    if (!all_visible)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int distance = positions[i / 2] - (first + n * 8 + lane % 4 * 2 + i % 2);
          if (distance < 0 || (window > 0 && distance >= window)) scores[n][i] = -kInfinity;
        }
    add_scores(state, scores, softcap > 0.0f ? kLog2e : scale * kLog2e);
    add_values(state, scores, stages[now].values);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = team_sum<4>(state.sum[half]);
    const float share = sum > 0.0f ? 1.0f / sum : 0.0f;
    const int at = warp * 16 + half * 8 + lane / 4;
    if (at >= item.num_own_rows()) continue;
    Scalar* target = out + item.head_of(item.first_row + at, batch) * kHeadDim;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n)
      *reinterpret_cast<u32*>(target + n * 8 + lane % 4 * 2) =
          pack<Scalar>(state.out[n][2 * half] * share, state.out[n][2 * half + 1] * share);
  }
}
