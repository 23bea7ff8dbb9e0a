// Attention of single queries over the paged KV cache, on tensor cores: out = softmax(cap(q · Kᵀ · scale)) · V for each
// decoding token of a batch.
//
// Work: every token and KV head has a list of KV blocks to read. The lists, one after the other, are shared out evenly among
// the blocks of threads, one on each multiprocessor: so any mix of contexts is in balance, and the grid depends on nothing. A
// list that is cut is joined by whoever finishes its last piece; short lists, and the ends of long ones, are not cut off.
//
// Inside, some warps copy the blocks' keys and values to a ring in shared memory, as far ahead as it has room, over the ends
// of lists (one warp alone would not start copies fast enough); the other warps take blocks from it in turns, and meet where a
// piece of a list ends. Keys and values are the left operand of the products and the up to 8 query heads that share them the
// right one (twice, where there are more): scores are [16 keys, 8 heads], and the output [kHeadDim, 8 heads] stays in
// registers. Bound by bytes: the keys and values of the context, once.
//
// All keys but a token's newest were written before the step began (model_runner.py sees to it): they are copied while the
// kernel launched before this one may still run. The blocks with the newest keys, and the queries, wait for it.
//
// Built with SCALAR (bf16 or f16), CACHED (the cache's type: SCALAR, or e4m3), HEAD_DIM (a multiple of 16), GROUP (query heads
// a block of threads takes, up to 16; with more of them to a KV head, several share it), WARPS (that compute) and STAGES.
#include "types.cuh"
#include "reduce.cuh"
#include "attention.cuh"
#include "ptx_sm90.cuh"

template <class Scalar, class Cached> struct FactorOf { using Type = Scalar; };
template <class Scalar> struct FactorOf<Scalar, e4m3> { using Type = f16; };  // which holds every e4m3

using Scalar = SCALAR;
using Cached = CACHED;
using Factor = FactorOf<Scalar, Cached>::Type;  // what tensor cores multiply
constexpr bool kIsFp8 = sizeof(Cached) == 1;
constexpr int kHeadDim = HEAD_DIM;
constexpr int kGroup = GROUP;
constexpr int kWarps = WARPS;
constexpr int kStages = STAGES;
constexpr int kCopyWarps = 4;
constexpr int kThreads = (kWarps + kCopyWarps) * 32;
constexpr int kTiles = ceil_div(kGroup, 8);  // a tensor core takes 8 query heads

// Copies are fast where they begin at a multiple of 128 bytes (on an H200 with 64 bytes more they took a third longer), so
// rows lie as in memory, neither padded nor exchanged. Lanes read them in pieces of 16 bytes: the order of the numbers of a
// head within a product is free, and chosen so that a lane's pieces are used whole and few reads meet in a bank.
constexpr int kPieceDims = 16 / sizeof(Cached);
constexpr int kPieces = kHeadDim / kPieceDims;               // of a row
constexpr int kKeyPieces = ceil_div(kPieces, 4);             // of a row in a lane
constexpr int kKeySteps = kKeyPieces * (kPieceDims / 4);     // tensor core steps, each takes 4 numbers of a row from a lane
constexpr int kValuePieces = ceil_div(kPieces, 8);
constexpr int kValueSteps = kValuePieces * (kPieceDims / 2);  // each gives 2 numbers of the output to a lane
constexpr int kRowBytes = kHeadDim * sizeof(Cached);
constexpr int kOutStride = kHeadDim + 4;

constexpr int kShortList = 5 * kWarps;  // KV blocks: such lists stay whole
constexpr int kTolerance = 6;           // KV blocks: a cut takes as long
constexpr int kLeast = 12;              // KV blocks: a shorter list takes as long, for its end does (on an H200, 1.9 us)
constexpr int kMaxGrid = 1024;
static_assert(kLeast <= kShortList, "what is not as long as its blocks stays whole");
#if __CUDA_ARCH__ >= 900
constexpr int kCopyArrivals = 1;  // Hopper's copy engine copies for a whole warp
#else
constexpr int kCopyArrivals = 32;
#endif
constexpr float kSlack = 8.0f;          // a peak may be passed by so much (in powers of 2) before sums are scaled to a new one

struct alignas(128) Tile { unsigned char bytes[kBlockSize * kRowBytes]; };
static_assert(kStages % kWarps == 0 && kStages % kCopyWarps == 0, "each stage has its warps: they see all its phases");
struct Stage { Tile keys, values; };
struct Shared {
  Stage stages[kStages];
  float outs[kWarps][kGroup][kOutStride], peaks[kWarps][kTiles * 8], sums[kWarps][kTiles * 8];  // of a piece of a list
  Barrier came[kStages], left[kStages], outs_came, outs_left;
};

// Zero between launches: finished pieces of the list that begins in a block of threads and goes on in the next ones.
__device__ int finished_pieces[kMaxGrid][kWarps];

// The plan.

// Of the KV blocks that a token and KV head see. It lies at [begin, end) in the row of all lists, where a short list takes
// more than its blocks: shares are of time.
struct List {
  int token, row, index, context, begin, end;  // index: among the lists of the token

  __device__ int length() const { return end - begin; }
};

struct Batch {
  const int *context_lens, *rows, *block_table;
  int num_tokens, table_width, num_heads, num_kv_heads, window;

  __device__ int heads_per_kv() const { return num_heads / num_kv_heads; }
  __device__ int shares_of_kv() const { return ceil_div(heads_per_kv(), kGroup); }
  __device__ int lists_of_token() const { return num_kv_heads * shares_of_kv(); }
  __device__ int first_key(int context) const { return window > 0 ? max(0, context - window) : 0; }
  __device__ int num_blocks(int context) const {
    return max(1, ceil_div(context, kBlockSize) - first_key(context) / kBlockSize);
  }
  __device__ int list_length(int context) const { return max(num_blocks(context), kLeast); }
  __device__ int kv_head(const List& list) const { return list.index / shares_of_kv(); }
  // The query heads of a list.
  __device__ i64 first_head(const List& list) const {
    const int first_of_group = list.index % shares_of_kv() * kGroup;
    return static_cast<i64>(list.token) * num_heads + kv_head(list) * heads_per_kv() + first_of_group;
  }
  __device__ int num_heads_of(const List& list) const {
    return min(kGroup, heads_per_kv() - list.index % shares_of_kv() * kGroup);
  }
};

// The even share of a block of threads in all lists.
__device__ inline int even_share(const Batch& batch) {
  int total = 0;
  for (int token = threadIdx.x % 32; token < batch.num_tokens; token += 32) {
    prefetch(&batch.rows[token]);
    total += batch.list_length(batch.context_lens[token]);
  }
  total = __reduce_add_sync(kAllLanes, total) * batch.lists_of_token();
  return max(ceil_div(total, static_cast<int>(gridDim.x)), kWarps);
}

// The list that holds this place in the row of all lists; past their end, one of no token.
__device__ inline List find_list(const Batch& batch, int place) {
  const int lane = threadIdx.x % 32, num_lists = batch.lists_of_token();
  int before = 0;
  for (int first = 0; first < batch.num_tokens; first += 32) {
    const bool exists = first + lane < batch.num_tokens;
    const int context = exists ? batch.context_lens[first + lane] : 0, row = exists ? batch.rows[first + lane] : 0;
    const int own = exists ? batch.list_length(context) * num_lists : 0;
    int up_to_own = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(kAllLanes, up_to_own, distance);
      if (lane >= distance) up_to_own += below;
    }
    const u32 ends_later = __ballot_sync(kAllLanes, before + up_to_own > place);
    if (ends_later) {
      const int found = __ffs(ends_later) - 1, length = __shfl_sync(kAllLanes, own, found) / num_lists;
      const int token_begin = before + __shfl_sync(kAllLanes, up_to_own - own, found);
      const int index = (place - token_begin) / length, begin = token_begin + index * length;
      const int found_row = __shfl_sync(kAllLanes, row, found), found_context = __shfl_sync(kAllLanes, context, found);
      return {first + found, found_row, index, found_context, begin, begin + length};
    }
    before += __shfl_sync(kAllLanes, up_to_own, 31);
  }
  return {batch.num_tokens, 0, 0, 0, before, before};
}

__device__ inline List list_after(const Batch& batch, const List& list) {
  if (list.index + 1 < batch.lists_of_token())
    return {list.token, list.row, list.index + 1, list.context, list.end, list.end + list.length()};
  const int token = list.token + 1;
  if (token == batch.num_tokens) return {token, 0, 0, 0, list.end, list.end};
  const int context = batch.context_lens[token];
  return {token, batch.rows[token], 0, context, list.end, list.end + batch.list_length(context)};
}

// A share may end so far before or after its even end, if that is where a list begins or ends.
__device__ inline int tolerance(const List& list) { return list.length() <= kShortList ? kShortList : kTolerance; }

// Where shares are cut that would be cut evenly in this list, at `place`.
__device__ inline int cut_of(const List& list, int place) {
  const int before = place - list.begin, after = list.end - place, most = tolerance(list);
  if (before > most && after > most) return place;
  return before <= after ? list.begin : list.end;
}

struct Piece {
  List list;
  int first, last;                // KV blocks of the list
  int first_thread_block, parts;  // the one that takes the list's first piece; pieces of the list
};

struct Share {  // the pieces of a block of threads
  const Batch& batch;
  int share;
  Piece piece;

  // False if there is none.
  __device__ bool begin() {
    share = even_share(batch);
    const int place = blockIdx.x * share;
    piece.list = find_list(batch, place);
    if (piece.list.token == batch.num_tokens) return false;
    const int first = cut_of(piece.list, place);
    if (first == piece.list.end) piece.list = list_after(batch, piece.list);
    return cut(first);
  }
  __device__ bool next() {
    piece.list = list_after(batch, piece.list);
    return cut(piece.list.begin);
  }

 private:
  // The part of the list from its place `first` to this share's end.
  __device__ bool cut(int first) {
    const List& list = piece.list;
    const int place = (blockIdx.x + 1) * share;
    const int last = place < list.end ? cut_of(list, place) : list.end;
    if (list.token == batch.num_tokens || last <= first) return false;
    piece.first = first - list.begin;
    piece.last = min(last - list.begin, batch.num_blocks(list.context));
    // As cut_of: the even ends that lie in the list, far enough from its own.
    const int most = tolerance(list);
    const int first_cut = (list.begin + most) / share + 1, last_cut = (list.end - most - 1) / share;
    piece.parts = max(last_cut - first_cut + 1, 0) + 1;
    piece.first_thread_block = piece.parts > 1 ? first_cut - 1 : blockIdx.x;
    return true;
  }
};

struct Ring {  // a warp's stage, and the parity of its phase
  int stage;
  u32 parity = 0;
  __device__ void advance(int by) {
    stage += by;
    if (stage >= kStages) stage -= kStages, parity ^= 1;
  }
};

// The copying warps.

// Copy the keys or values of a block of one KV head.
__device__ inline void copy_tile(Tile& tile, const Cached* source, Barrier& came) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x % 32 == 0) copy_bytes(tile.bytes, source, sizeof(Tile), came);
#else
  for (int i = threadIdx.x % 32; i < kBlockSize * kPieces; i += 32)
    cp_async_16(&tile.bytes[i * 16], source + i * kPieceDims, true);
#endif
}

__device__ inline void copy_blocks(Shared& shared, const Batch& batch, const Cached* k_cache, const Cached* v_cache) {
  constexpr i64 kBlockNumbers = kBlockSize * kHeadDim;
  const int warp = threadIdx.x / 32 - kWarps, lane = threadIdx.x % 32;
  Share share = {batch};
  Ring ring = {warp};
  int ahead = warp;  // blocks from the piece's first to the next one of this warp
  bool has_waited = false;
  for (bool exists = share.begin(); exists; exists = share.next()) {
    const Piece& piece = share.piece;
    const int context = piece.list.context, first_block = batch.first_key(context) / kBlockSize + piece.first;
    const int* table = batch.block_table + static_cast<i64>(piece.list.row) * batch.table_width + first_block;
    const int num_blocks = piece.last - piece.first, num_copied = context > 0 ? num_blocks : 0;
    const i64 head_offset = batch.kv_head(piece.list) * kBlockNumbers;
    int ids = 0, turn = 0;  // of up to 32 of this warp's blocks, one in each lane
    for (; ahead < num_blocks; ahead += kCopyWarps, ring.advance(kCopyWarps), ++turn) {
      const int later = ahead + lane * kCopyWarps;
      if (turn % 32 == 0) ids = later < num_copied ? table[later] : 0;
      const i64 source = __shfl_sync(kAllLanes, ids, turn % 32) * (batch.num_kv_heads * kBlockNumbers) + head_offset;
      Stage& stage = shared.stages[ring.stage];
      Barrier& came = shared.came[ring.stage];
      if (!has_waited && piece.first + ahead == batch.num_blocks(context) - 1) {
        has_waited = true;
        wait_for_inputs();
      }
      barrier_wait(shared.left[ring.stage], ring.parity ^ 1);
      const bool is_copied = ahead < num_copied;
#if __CUDA_ARCH__ >= 900
      if (lane == 0) barrier_arrive_expecting(came, is_copied ? sizeof(Stage) : 0);
      __syncwarp();
#endif
      if (is_copied) {
        copy_tile(stage.keys, k_cache + source, came);
        copy_tile(stage.values, v_cache + source, came);
      }
#if __CUDA_ARCH__ < 900
      cp_async_arrive(came);
#endif
    }
    ahead -= num_blocks;
  }
  if (!has_waited) wait_for_inputs();
}

// The computing warps.

struct Softmax {  // of a warp. A lane's columns are heads 2 (lane % 4) + {0, 1} of each tile; sums are over its own keys
  float peak[kTiles][2], sum[kTiles][2], out[kValueSteps][kTiles][4];
};
using Query = u32[kKeySteps][kTiles][2];

__device__ inline uint4 piece_at(const Tile& tile, int key, int piece) {
  return *reinterpret_cast<const uint4*>(&tile.bytes[key * kRowBytes + piece * 16]);
}

__device__ inline void exchange_if(bool condition, uint4& x, uint4& y) {
  const uint4 old = x;
  if (condition) x = y, y = old;
}

// The pieces that a lane reads come in twos: half of the lanes read the second one first, from other banks.

// The right operand of the scores, zeros for heads and numbers that do not exist: a lane's pieces of a row of keys are
// lane % 4, lane % 4 + 4 and so on, and each gives 4 numbers to a step.
__device__ inline void load_queries(Query& query, const Scalar* q, const Batch& batch, const List& list) {
  const int lane = threadIdx.x % 32, num_group_heads = batch.num_heads_of(list);
  q += batch.first_head(list) * kHeadDim;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int head = tile * 8 + lane / 4;
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      constexpr int kStepsOfPiece = kPieceDims / 4;
      const int piece = step / kStepsOfPiece * 4 + lane % 4;
      const bool exists = head < num_group_heads && piece < kPieces;
      const u32* words = reinterpret_cast<const u32*>(q + head * kHeadDim + piece * kPieceDims + step % kStepsOfPiece * 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        u32 word = exists ? words[half] : 0;
        if constexpr (kIsFp8) {
          const float2 pair = unpack<Scalar>(word);
          word = pack<Factor>(pair.x, pair.y);
        }
        query[step][tile][half] = word;
      }
    }
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

// Products of 16 keys with the queries, in several chains: less time until the last is done.
constexpr int kChains = kTiles == 1 && kKeySteps >= 4 ? 4 : 2;
__device__ inline void multiply_keys(float (&scores)[kTiles][4], const Tile& tile, const Query& query) {
  const int lane = threadIdx.x % 32, key = lane / 4;
  float sums[kChains][kTiles][4] = {};
  uint4 pieces[kKeyPieces][2] = {};  // of rows lane / 4 and 8 further
#pragma unroll
  for (int i = 0; i < kKeyPieces; ++i) {
    const int piece = (kPieces % 8 == 0 ? i ^ key % 2 : i) * 4 + lane % 4;
    if (kPieces % 4 != 0 && piece >= kPieces) continue;
    pieces[i][0] = piece_at(tile, key, piece);
    pieces[i][1] = piece_at(tile, key + 8, piece);
  }
#pragma unroll
  for (int i = 0; i < kKeyPieces; ++i) {
    if (kPieces % 8 == 0 && i % 2 == 0)
#pragma unroll
      for (int row = 0; row < 2; ++row) exchange_if(key % 2 == 1, pieces[i][row], pieces[i + 1][row]);
    const uint4 &x = pieces[i][0], &y = pieces[i][1];
    const u32 low[4] = {x.x, x.y, x.z, x.w}, high[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int j = 0; j < kPieceDims / 4; ++j) {
      const int step = i * (kPieceDims / 4) + j;
      u32 keys[4];
      if constexpr (kIsFp8) {
        keys[0] = unpack_e4m3(low[j]), keys[1] = unpack_e4m3(high[j]);
        keys[2] = unpack_e4m3(low[j] >> 16), keys[3] = unpack_e4m3(high[j] >> 16);
      } else {
        keys[0] = low[2 * j], keys[1] = high[2 * j], keys[2] = low[2 * j + 1], keys[3] = high[2 * j + 1];
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) mma_16x8x16<Factor>(sums[step % kChains][t], keys, query[step][t][0], query[step][t][1]);
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[t][i] = sums[0][t][i] + sums[1][t][i];
      if constexpr (kChains == 4) scores[t][i] += sums[2][t][i] + sums[3][t][i];
    }
}

// Scores of 16 keys become weights 2^(score - peak), the right operand of the values.
__device__ inline void add_scores(Softmax& state, u32 (&weights)[2], const float (&scores)[4], int tile) {
  float(&peak)[2] = state.peak[tile];
  bool is_passed = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) is_passed |= scores[i] > peak[i % 2] + kSlack;
  if (__ballot_sync(kAllLanes, is_passed)) {  // seldom: then what was summed fades to the new peaks
    float fade[2];
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const float new_peak = fmaxf(peak[column], column_max(fmaxf(scores[column], scores[column + 2])));
      fade[column] = exp2_fast(peak[column] - new_peak);
      peak[column] = new_peak;
      state.sum[tile][column] *= fade[column];
    }
#pragma unroll
    for (int step = 0; step < kValueSteps; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) state.out[step][tile][i] *= fade[i % 2];
  }
  float weight[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) weight[i] = exp2_fast(scores[i] - peak[i % 2]);
#pragma unroll
  for (int column = 0; column < 2; ++column) state.sum[tile][column] += weight[column] + weight[column + 2];
  // A lane holds weights of one key for two heads, and must bring those of two keys for one head.
  weights[0] = transpose(pack<Factor>(weight[0], weight[1]));
  weights[1] = transpose(pack<Factor>(weight[2], weight[3]));
}

// A lane's pieces of a row of values.
__device__ inline int value_piece(int i) {
  const int row = threadIdx.x % 32 / 4;
  return kPieces % 16 == 0 ? i / 2 * 16 + row * 2 + i % 2 : i * 8 + row;
}

// The left operand, two numbers of the head in a step: from a lane's pieces of its four keys, 2 (lane % 4) + {0, 1} and 8
// further. Keys that are not `seen` are zero, since 0 · (what lies there) may be NaN.
__device__ inline void multiply_values(Softmax& state, const Tile& tile, const u32 (&weights)[kTiles][2], const u32 (&seen)[4],
                                       bool is_edge) {
  const int lane = threadIdx.x % 32;
  uint4 pieces[kValuePieces][4];
#pragma unroll
  for (int i = 0; i < kValuePieces; ++i) {
    const int own = value_piece(kPieces % 16 == 0 ? i ^ lane % 2 : i), piece = kPieces % 8 == 0 || own < kPieces ? own : 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) pieces[i][k] = piece_at(tile, lane % 4 * 2 + k % 2 + k / 2 * 8, piece);
  }
#pragma unroll
  for (int i = 0; i < kValuePieces; ++i) {
    if (kPieces % 16 == 0 && i % 2 == 0)
#pragma unroll
      for (int k = 0; k < 4; ++k) exchange_if(lane % 2 == 1, pieces[i][k], pieces[i + 1][k]);
    u32 words[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint4& vec = pieces[i][k];
      words[k][0] = vec.x, words[k][1] = vec.y, words[k][2] = vec.z, words[k][3] = vec.w;
    }
    if (is_edge)
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int word = 0; word < 4; ++word) words[k][word] &= seen[k];
#pragma unroll
    for (int j = 0; j < kPieceDims / 2; ++j) {
      const int step = i * (kPieceDims / 2) + j;
      u32 values[4];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {  // of keys
        const u32(&first)[4] = words[pair * 2], (&second)[4] = words[pair * 2 + 1];
        if constexpr (kIsFp8) {
          const u32 both = select_bytes(first[j / 2], second[j / 2], j % 2 == 0 ? 0x5140 : 0x7362);
          values[pair * 2] = unpack_e4m3(both), values[pair * 2 + 1] = unpack_e4m3(both >> 16);
        } else {
          values[pair * 2] = select_bytes(first[j], second[j], 0x5410);
          values[pair * 2 + 1] = select_bytes(first[j], second[j], 0x7632);
        }
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) mma_16x8x16<Factor>(state.out[step][t], values, weights[t][0], weights[t][1]);
    }
  }
}

struct Scale { float scale, softcap; };

// Keys [begin, end) are seen, and the block begins at key `first`.
__device__ inline void add_block(Softmax& state, const Stage& stage, const Query& query, int first, int begin, int end,
                                 const Scale& scale) {
  const int lane = threadIdx.x % 32;
  const bool is_edge = first < begin || first + kBlockSize > end;
  const auto is_seen = [&](int key) { return first + key >= begin && first + key < end; };
  float scores[kTiles][4];
  multiply_keys(scores, stage.keys, query);
  u32 weights[kTiles][2], seen[4];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& score = scores[t][i];
      score = scale.softcap > 0.0f ? capped(score * scale.scale, scale.softcap) * kLog2e : score * (scale.scale * kLog2e);
      if (is_edge && !is_seen(lane / 4 + i / 2 * 8)) score = -kInfinity;
    }
    add_scores(state, weights[t], scores[t], t);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) seen[k] = is_seen(lane % 4 * 2 + k % 2 + k / 2 * 8) ? ~0u : 0;
  multiply_values(state, stage.values, weights, seen, is_edge);
}

__device__ inline void store_scalars(Scalar* target, const float (&x)[4]) {
  u32* words = reinterpret_cast<u32*>(target);
  words[0] = pack<Scalar>(x[0], x[1]);
  words[1] = pack<Scalar>(x[2], x[3]);
}

// Write a warp's softmax of a piece to where the warps meet.
__device__ inline void publish(Shared& shared, const Softmax& state) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int head = t * 8 + lane % 4 * 2 + column;
      const float sum = column_sum(state.sum[t][column]);
      if (lane < 4) {
        shared.peaks[warp][head] = state.peak[t][column];
        shared.sums[warp][head] = sum;
      }
      if (head >= kGroup) continue;
#pragma unroll
      for (int i = 0; i < kValuePieces; ++i) {
        const int piece = value_piece(i);
        if (kPieces % 8 != 0 && piece >= kPieces) continue;
        float numbers[kPieceDims];
#pragma unroll
        for (int j = 0; j < kPieceDims; ++j) numbers[j] = state.out[i * (kPieceDims / 2) + j / 2][t][j % 2 * 2 + column];
        store(&shared.outs[warp][head][piece * kPieceDims], numbers);
      }
    }
}

struct Parts {  // results of pieces of lists: two for each block of threads, of a list that began before and of one that goes on
  float *outs, *weights;  // [part, kGroup, kHeadDim] and [part, kGroup]; a weight is peak + log2(sum)
};

// Add the pieces of a list, but for one.
__device__ inline void join_parts(Joined& joined, const Parts& parts, const Piece& piece, int except, int at) {
  joined.add_parts(piece.parts, [&](int i, float (&numbers)[4]) {
    if (i == except) return -kInfinity;
    const int part = 2 * (piece.first_thread_block + i) + (i == 0);
    load(parts.outs + part * kGroup * kHeadDim + at, numbers);
    return parts.weights[part * kGroup + at / kHeadDim];
  });
}

__device__ inline Joined join_warps(const Shared& shared, int at) {
  const int head = at / kHeadDim, i = at % kHeadDim;
  Joined joined;
#pragma unroll
  for (int each = 0; each < kWarps; ++each) joined.peak = fmaxf(joined.peak, shared.peaks[each][head]);
#pragma unroll
  for (int each = 0; each < kWarps; ++each) {
    float numbers[4];
    load(&shared.outs[each][head][i], numbers);
    joined.add(shared.peaks[each][head], shared.sums[each][head], numbers);
  }
  return joined;
}

// Join the warps' softmaxes of a piece, and those of the list's other pieces, if it has more and they are finished. Each warp
// takes some of the numbers and waits for nobody: of each share of them, whoever is last to finish a piece joins them all.
__device__ inline void finish_piece(const Shared& shared, Scalar* out, const Parts& parts, const Piece& piece, int num_numbers) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = blockIdx.x - piece.first_thread_block;
  const int first = threadIdx.x * 4;
  if (warp * 32 * 4 >= num_numbers) return;
  int* num_finished = &finished_pieces[piece.first_thread_block][warp];
  bool is_last = piece.parts == 1;
  if (!is_last) {
    is_last = __shfl_sync(kAllLanes, lane == 0 ? load_acquire(num_finished) : 0, 0) == piece.parts - 1;
    __syncwarp();
  }
  for (int at = first; at < num_numbers; at += kWarps * 32 * 4) {
    Joined joined = join_warps(shared, at);
    if (is_last) {
      if (piece.parts > 1) join_parts(joined, parts, piece, own, at);
      joined.finish();
      store_scalars(out + at, joined.total);
    } else {
      const int part = 2 * blockIdx.x + (own == 0);
      joined.finish();
      store(parts.outs + part * kGroup * kHeadDim + at, joined.total);
      // Warps that share a head write the same to the same place.
      parts.weights[part * kGroup + at / kHeadDim] = joined.sum > 0.0f ? joined.peak + log2f(joined.sum) : -kInfinity;
    }
  }
  if (!is_last) {
    __syncwarp();
    int before = 0;
    if (lane == 0) before = arrive(num_finished);
    is_last = __shfl_sync(kAllLanes, before, 0) == piece.parts - 1;
    __syncwarp();
    if (!is_last) return;
    for (int at = first; at < num_numbers; at += kWarps * 32 * 4) {
      Joined joined;
      join_parts(joined, parts, piece, -1, at);
      joined.finish();
      store_scalars(out + at, joined.total);
    }
  }
  if (piece.parts > 1 && lane == 0) *num_finished = 0;
}

__device__ inline void compute_blocks(Shared& shared, Scalar* out, const Scalar* q, const Batch& batch, const Parts& parts,
                                      const Scale& scale) {
  const int warp = threadIdx.x / 32;
  Share share = {batch};
  Ring ring = {warp};
  int ahead = warp;  // blocks from the piece's first to the next one of this warp
  u32 outs_parity = 0;
  Query query;
  bool exists = share.begin();
  wait_for_inputs();
  if (exists) load_queries(query, q, batch, share.piece.list);
  while (exists) {
    const Piece piece = share.piece;
    const int end = piece.list.context, begin = batch.first_key(end), first_block = begin / kBlockSize + piece.first;
    Softmax state = {};
#pragma unroll
    for (int t = 0; t < kTiles; ++t) state.peak[t][0] = state.peak[t][1] = kNoPeak;

    const int num_blocks = piece.last - piece.first;
    for (; ahead < num_blocks; ahead += kWarps, ring.advance(kWarps)) {
      barrier_wait(shared.came[ring.stage], ring.parity);
      add_block(state, shared.stages[ring.stage], query, (first_block + ahead) * kBlockSize, begin, end, scale);
      barrier_arrive(shared.left[ring.stage]);
    }
    ahead -= num_blocks;

    exists = share.next();
    if (exists) load_queries(query, q, batch, share.piece.list);  // which come while the warps meet
    barrier_wait(shared.outs_left, outs_parity ^ 1);
    publish(shared, state);
    barrier_arrive(shared.outs_came);
    barrier_wait(shared.outs_came, outs_parity);
    finish_piece(shared, out + batch.first_head(piece.list) * kHeadDim, parts, piece, batch.num_heads_of(piece.list) * kHeadDim);
    barrier_arrive(shared.outs_left);
    outs_parity ^= 1;
  }
}

// Grid: x = multiprocessors.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
decode(Scalar* out, float* part_outs, float* part_weights, const Scalar* q, const Cached* k_cache, const Cached* v_cache,
       const int* context_lens, const int* rows, const int* block_table, int num_tokens, int table_width, int num_heads,
       int num_kv_heads, float scale, int window, float softcap) {
  extern __shared__ uint4 dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic);
  start_dependents();
  for (int i = threadIdx.x; i < kStages; i += kThreads) {
    barrier_init(shared.came[i], kCopyArrivals);
    barrier_init(shared.left[i], 32);
  }
  if (threadIdx.x == 0) {
    barrier_init(shared.outs_came, kWarps * 32);
    barrier_init(shared.outs_left, kWarps * 32);
  }
  barrier_init_fence();
  __syncthreads();
  const Batch batch = {context_lens, rows, block_table, num_tokens, table_width, num_heads, num_kv_heads, window};
  if (threadIdx.x / 32 >= kWarps) copy_blocks(shared, batch, k_cache, v_cache);
  else compute_blocks(shared, out, q, batch, {part_outs, part_weights}, {scale, softcap});
}
