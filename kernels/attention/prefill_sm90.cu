// Attention of prompt chunks over the paged KV cache on Hopper: what prefill.cu computes, at the tensor cores' full rate.
//
// Work: the query heads that share a KV head are stacked (num_tokens · heads_per_kv rows a request and KV head); an item is
// kRows of them, 64 to a warpgroup, and the keys they see, kKeys at a time, back from the diagonal. The blocks of threads of
// a grid that just fills the GPU take items until there are none, the longest first: the first by their index, then whoever
// is done takes the next. One warp finds items, one brings their keys and values with the copy engine, a KV block of 16 tokens
// at a time, and two bring their queries, all of them ahead of the warpgroups that compute. Bound by FLOPs; beside the tensor
// cores, exponentials take half of their time, so the two must overlap (Shah et al., "FlashAttention-3", 2024): a warpgroup
// starts the scores of the next tile before it takes weights from those it has, and the warpgroups start their products in
// turns, so that one is at its softmax while another multiplies. Items of few rows (single tokens) are the work of one
// warpgroup, bound by the bytes of their keys and values.
//
// Few rows behind a long context are few items, and each would keep one multiprocessor busy while others have nothing to do.
// The keys of such items are cut into parts, whose results are joined in the order of the keys: when all parts are taken, the
// grid goes on with shares of the rows of each such item, and whoever takes one waits for the last part. So parts come first,
// then whole items, then what joins the parts.
//
// The result of a row of a whole item depends on its own query and context alone, bit for bit: tiles begin at multiples of
// kKeys of the context, are taken one after the other, and what a row does not see adds exact zeros.
//
// Shared memory: tiles in panels of 64 numbers of the head, as tensor cores read them (ptx_sm90.cuh).
// From an e4m3 cache, a warpgroup of its own brings keys and values, and widens them on their way to shared memory.
//
// Built with SCALAR (bf16 or f16), CACHED (the cache's type: SCALAR, or e4m3), HEAD_DIM (64 or 128), CONSUMERS (warpgroups that
// compute), KEYS (64 or 128), STAGES.
#include "types.cuh"
#include "prefill.cuh"
#include "ptx_sm90.cuh"

using Scalar = SCALAR;
using Cached = CACHED;
constexpr bool kIsNarrow = sizeof(Cached) < sizeof(Scalar);
constexpr int kHeadDim = HEAD_DIM;
constexpr int kConsumers = CONSUMERS;
constexpr int kKeys = KEYS;
constexpr int kStages = STAGES;
constexpr int kWarpgroups = 1 + kIsNarrow + kConsumers;  // of helpers (finding, bringing), wideners, consumers
constexpr int kThreads = 128 * kWarpgroups;
constexpr int kRows = 64 * kConsumers;
constexpr int kPanels = kHeadDim / 64;
constexpr int kVecs = kHeadDim / 8;
constexpr int kSteps = kHeadDim / 16;  // tensor core steps along the head
constexpr int kBlocks = kKeys / kBlockSize;
constexpr int kItems = 2;        // the one at work, and the next
constexpr int kQueryLoaders = 2;  // warps
// Together no more than the block had at its launch (a multiple of 8 for each thread): who asks for more waits for ever.
constexpr int kHelperRegisters = kIsNarrow ? 40 : 56;
constexpr int kWidenerRegisters = 88;
constexpr int kConsumerRegisters = kConsumers == 3 ? 152 : kIsNarrow ? 192 : 224;
static_assert(kHelperRegisters + kIsNarrow * kWidenerRegisters + kConsumers * kConsumerRegisters <=
              65536 / kThreads / 8 * 8 * kWarpgroups);

constexpr int kLeastTiles = 4;   // of a part: to join it takes as long
constexpr int kMaxGrid = 1024;

// Zero between launches: units that were taken after the first ones; warps that are done with a part, or with joining.
__device__ int num_taken, num_arrivals[2 * kMaxGrid];

struct Tile { Scalar numbers[kKeys / 8][kPanels][8][64]; };

// The same for a warp: as it comes from lane 0, the compiler sees it, and keeps what follows from it in uniform registers.
__device__ inline int uniform(int x) { return __shfl_sync(kAllLanes, x, 0); }

__device__ inline int first_tile(const Item& item) { return uniform(item.begin / kKeys); }
__device__ inline int last_tile(const Item& item) { return uniform((item.end - 1) / kKeys); }

struct Unit : Item {  // an item, or one part of its keys, or a share of its rows whose parts are to be joined
  int part, num_parts, first_slot;  // first_slot: where the parts' results lie, one after the other
  bool joins;

  // Warps that arrive when they are done with a part, and with joining.
  __device__ int num_finishing() const { return num_parts * 4 * min(kConsumers, ceil_div(num_own_rows(), 64)); }
  __device__ int num_joining() const { return num_parts * 4 * kConsumers; }
};

struct Parts {  // results of parts; null if no item is to be cut
  float *outs, *weights;  // [slot, kRows, kHeadDim] and [slot, kRows]; a weight is peak + log2(sum), in base 2
};

struct Shared {
  Scalar queries[kItems][kRows / 8][kPanels][8][64];
  Tile tiles[kStages];  // keys, values, keys, ...
  Barrier tile_came[kStages], tile_left[kStages], item_came[kItems], item_left[kItems], queries_came[kItems];
  Unit items[kItems];  // without rows after the last one
};

template <int kCount> struct Ring {  // which place is next, and the parity of its phase
  int place = 0;
  u32 parity = 0;
  __device__ void advance(int by) {
    place += by;
    if (place < kCount) return;
    place -= kCount;
    parity ^= 1;
  }
};
struct Tiles {  // places of the next keys and of the next values
  Ring<kStages> keys, values;
  __device__ Tiles() { values.advance(1); }
};

struct Softmax {  // of this lane's rows, lane / 4 and lane / 4 + 8 of its warp; sums are over the lane's own columns until the end
  float peak[2], sum[2], fade[2];
};

// Finding items: one warp.

__device__ inline int num_tiles_of(const Item& item) { return (item.end - 1) / kKeys - item.begin / kKeys + 1; }

// What a grid does, unit by unit. Lanes look at 32 requests at a time.
struct Plan {
  const Batch& batch;
  bool may_cut;
  int num_requests = 0, num_tiles = 0;  // requests with tokens; tiles of all items
  int parts_of_share = 1;               // of the tiles that each block of threads would get, were they shared out evenly
  int num_cut = 0, num_whole = 0;       // parts; items that are not cut

  __device__ Plan(const Batch& batch, bool may_cut) : batch(batch), may_cut(may_cut) {
    for (int first = 0; first < batch.num_requests; first += 32) {
      const int i = first + threadIdx.x % 32, num_pieces = i < batch.num_requests ? num_pieces_of(i) : 0;
      num_requests += __popc(__ballot_sync(kAllLanes, num_pieces > 0));
      if (num_pieces > 0) num_tiles += num_pieces * (tiles_of_first(i) + tiles_of_last(i)) / 2 * batch.num_kv_heads;
    }
    num_tiles = __reduce_add_sync(kAllLanes, num_tiles);
    int num_long = 0;  // tiles of items of more than a share
    for (int i = threadIdx.x % 32; i < num_requests; i += 32)
      if (shortest_of(i) * static_cast<int>(gridDim.x) > num_tiles) num_long += num_pieces_of(i) * batch.num_kv_heads * shortest_of(i);
    // Parts that are all there is fit in one round. Where there are as many other tiles, these fill what halves leave.
    if (2 * __reduce_add_sync(kAllLanes, num_long) <= num_tiles) parts_of_share = 2;
    for (int i = threadIdx.x % 32; i < num_requests; i += 32) {
      const int num_parts = num_parts_of(i), num_units = num_pieces_of(i) * batch.num_kv_heads * num_parts;
      (num_parts > 1 ? num_cut : num_whole) += num_units;
    }
    num_cut = __reduce_add_sync(kAllLanes, num_cut);
    num_whole = __reduce_add_sync(kAllLanes, num_whole);
  }
  __device__ int num_units() const { return num_cut + num_whole + num_cut; }

  // Items go from the end of the batch: of a request, the pieces with the longest context come first. Neighbours are the parts
  // of an item, and the KV heads of a piece.
  __device__ Unit find(int index) const {
    const bool joins = index >= num_cut + num_whole, is_cut = joins || index < num_cut;
    int left = joins ? index - num_cut - num_whole : is_cut ? index : index - num_cut;
    const int slot = left;
    for (int end = num_requests; end > 0; end -= 32) {
      const int i = end - 1 - static_cast<int>(threadIdx.x % 32);
      int num_parts = i >= 0 ? num_parts_of(i) : 0;
      const int own = i >= 0 && is_cut == (num_parts > 1) ? num_pieces_of(i) * batch.num_kv_heads * num_parts : 0;
      const int up_to_own = warp_prefix_sum(own);
      const u32 ends_later = __ballot_sync(kAllLanes, up_to_own > left);
      if (ends_later == 0) {
        left -= __shfl_sync(kAllLanes, up_to_own, 31);
        continue;
      }
      const int lane = __ffs(ends_later) - 1, request = end - 1 - lane;
      left -= __shfl_sync(kAllLanes, up_to_own - own, lane);
      num_parts = __shfl_sync(kAllLanes, num_parts, lane);
      const int part = left % num_parts, index_of_item = left / num_parts;
      const int piece = num_pieces_of(request) - 1 - index_of_item / batch.num_kv_heads;
      return unit_of(request, piece, index_of_item % batch.num_kv_heads, part, num_parts, slot - part, joins);
    }
    return {};
  }

 private:
  __device__ int num_pieces_of(int request) const {
    const int* starts = batch.query_start + batch.first_request + request;
    return ceil_div((starts[1] - starts[0]) * batch.heads_per_kv(), kRows);
  }
  __device__ int tiles_of(int request, int piece) const {
    return num_tiles_of(item_of<kRows>(batch, batch.first_request + request, 0, piece));
  }
  __device__ int tiles_of_first(int request) const { return tiles_of(request, 0); }
  __device__ int tiles_of_last(int request) const { return tiles_of(request, num_pieces_of(request) - 1); }
  __device__ int shortest_of(int request) const { return min(tiles_of_first(request), tiles_of_last(request)); }
  // The items of a request are cut alike. There are no more than 2 · gridDim parts.
  __device__ int num_parts_of(int request) const {
    if (!may_cut) return 1;
    const int shortest = shortest_of(request), num_parts = parts_of_share * static_cast<int>(gridDim.x) * shortest / num_tiles;
    return max(1, min(num_parts, shortest / kLeastTiles));
  }
  __device__ Unit unit_of(int request, int piece, int kv_head, int part, int num_parts, int first_slot, bool joins) const {
    Unit unit = {item_of<kRows>(batch, batch.first_request + request, kv_head, piece), part, num_parts, first_slot, joins};
    const int first = unit.begin / kKeys, num_tiles = num_tiles_of(unit);
    unit.begin = max(unit.begin, (first + num_tiles * part / num_parts) * kKeys);
    unit.end = min(unit.end, (first + num_tiles * (part + 1) / num_parts) * kKeys);
    return unit;
  }
};

// Who joins parts waits for them, and they do come: they were taken before, by blocks that run, or are the first units of blocks
// with a lower index, which the GPU starts first.
__device__ inline void hand_out_items(Shared& shared, const Batch& batch, bool may_cut) {
  const int lane = threadIdx.x % 32;
  const Plan plan(batch, may_cut);
  const int num_units = plan.num_units();
  Ring<kItems> ring;
  const auto hand_out = [&](const Unit& unit) {
    barrier_wait(shared.item_left[ring.place], ring.parity ^ 1);
    if (lane == 0) {
      shared.items[ring.place] = unit;
      barrier_arrive(shared.item_came[ring.place]);
    }
    __syncwarp();
    ring.advance(1);
  };
  for (int index = blockIdx.x; index < num_units;) {
    const Unit unit = plan.find(index);
    if (unit.joins) {
      wait_for_inputs();  // counters are those of this launch
      wait_for_arrivals(&num_arrivals[unit.first_slot], unit.num_finishing());
    }
    hand_out(unit);
    if (index == blockIdx.x) wait_for_inputs();  // what was read so far is older than the kernel before this one
    if (num_units <= gridDim.x) break;
    int taken = 0;
    if (lane == 0) {
      taken = atomicAdd(&num_taken, 1);
      if (taken == num_units - 1) num_taken = 0;  // one was taken after each unit: this was the last
    }
    index = gridDim.x + __shfl_sync(kAllLanes, taken, 0);
  }
  wait_for_inputs();
  hand_out({});
}

// Items one after the other, each at its place of kItems, until there are no more. Every warp but the one that hands them out
// takes each of them, and so none comes twice to a place before all have seen the first.
template <class Work> __device__ inline void for_each_item(Shared& shared, Work work) {
  for (Ring<kItems> ring;; ring.advance(1)) {
    barrier_wait(shared.item_came[ring.place], ring.parity);
    const Unit& item = shared.items[ring.place];
    if (uniform(item.num_rows) == 0) return;
    work(item, ring);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(shared.item_left[ring.place]);
  }
}

// Bringing keys and values: one warp. Lane i brings block i of each tile; blocks that hold no visible key are not touched.

__device__ inline void copy_tile(Shared& shared, const Ring<kStages>& ring, const TensorMap& map, int num_blocks, bool is_mine,
                                 int octet) {
  const int lane = threadIdx.x % 32;
  barrier_wait(shared.tile_left[ring.place], ring.parity ^ 1);
  if (lane == 0) barrier_arrive_expecting(shared.tile_came[ring.place], num_blocks * kBlockSize * kHeadDim * 2);
  __syncwarp();
  if (is_mine)
    copy_octets(&shared.tiles[ring.place].numbers[lane * (kBlockSize / 8)], map, octet, shared.tile_came[ring.place]);
}

__device__ inline void bring_tiles(Shared& shared, Tiles& tiles, const TensorMap& k_map, const TensorMap& v_map, const Item& item,
                                   const Batch& batch) {
  const int* table = batch.block_table + static_cast<i64>(item.table_row) * batch.table_width;
  const int first_block = item.begin / kBlockSize, end_block = ceil_div(item.end, kBlockSize), kv_head = item.kv_head;
  const auto block_of = [&](int tile) {  // -1: none
    const int block = tile * kBlocks + threadIdx.x % 32;
    return threadIdx.x % 32 < kBlocks && block >= first_block && block < end_block ? table[block] : -1;
  };
  int tile = last_tile(item);
  const int first = first_tile(item);
  for (int block = block_of(tile), next; tile >= first; --tile, block = next) {
    next = block_of(tile - 1);  // on its way while this tile waits for its place
    const int num_blocks = min(end_block, (tile + 1) * kBlocks) - max(first_block, tile * kBlocks);
    const int octet = (block * batch.num_kv_heads + kv_head) * (kBlockSize / 8);
    copy_tile(shared, tiles.keys, k_map, num_blocks, block >= 0, octet);
    copy_tile(shared, tiles.values, v_map, num_blocks, block >= 0, octet);
    tiles.keys.advance(2);
    tiles.values.advance(2);
  }
}

// The same from an e4m3 cache: one warpgroup. A thread holds 64 bytes, while the next 64 are on their way.

constexpr int kPieces = kHeadDim / 16;  // of 16 bytes, of a row
constexpr int kPartRows = 128 * 4 / kPieces;
constexpr int kParts = kKeys / kPartRows;  // of a tile

struct Part {
  uint4 pieces[4];
  __device__ static int row(int i) { return (i * 128 + threadIdx.x % 128) / kPieces; }
  __device__ static int piece() { return threadIdx.x % kPieces; }
  // block: of lane i, block i of the tile. Zeros for what no row sees: 0 · (what lies there) may be NaN.
  __device__ void load(const Cached* cache, const Item& item, int tile, int part, int block, const Batch& batch) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = part * kPartRows + row(i), key = tile * kKeys + at;
      const i64 own_block = __shfl_sync(kAllLanes, block, at / kBlockSize);
      const Cached* source = cache + ((own_block * batch.num_kv_heads + item.kv_head) * kBlockSize + at % kBlockSize) * kHeadDim;
      pieces[i] = key >= item.begin && key < item.end ? load_bits(source + piece() * 16) : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ void widen(Tile& tile, int part) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = part * kPartRows + row(i);
      uint4 wide[2];
      widen_bits<Scalar>(wide, pieces[i]);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint4*>(&tile.numbers[at / 8][piece() / 4][at % 8][(piece() % 4 * 2 + half ^ at % 8) * 8]) = wide[half];
    }
  }
};

__device__ inline void widen_tiles(Shared& shared, Tiles& tiles, const Cached* k_cache, const Cached* v_cache, const Item& item,
                                   const Batch& batch) {
  const int* table = batch.block_table + static_cast<i64>(item.table_row) * batch.table_width;
  const int first_block = item.begin / kBlockSize, end_block = ceil_div(item.end, kBlockSize), first = first_tile(item);
  const auto block_of = [&](int tile) {
    const int block = tile * kBlocks + threadIdx.x % 32;
    return threadIdx.x % 32 < kBlocks && block >= first_block && block < end_block ? table[block] : 0;
  };
  Part parts[2];
  int tile = last_tile(item), block = block_of(tile);
  parts[0].load(k_cache, item, tile, 0, block, batch);
  for (int next; tile >= first; --tile, block = next) {
    next = block_of(tile - 1);
#pragma unroll
    for (int step = 0; step < 2 * kParts; ++step) {  // the keys' parts, then the values'
      if (step + 1 < 2 * kParts)
        parts[(step + 1) % 2].load(step + 1 < kParts ? k_cache : v_cache, item, tile, (step + 1) % kParts, block, batch);
      else if (tile > first)
        parts[0].load(k_cache, item, tile - 1, 0, next, batch);
      Ring<kStages>& ring = step < kParts ? tiles.keys : tiles.values;
      if (step % kParts == 0) barrier_wait(shared.tile_left[ring.place], ring.parity ^ 1);
      parts[step % 2].widen(shared.tiles[ring.place], step % kParts);
      if (step % kParts < kParts - 1) continue;
      publish_shared_writes();
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive(shared.tile_came[ring.place]);
      ring.advance(2);
    }
  }
}

// Bringing queries: kQueryLoaders warps. The place of rows that do not exist stays as it is: no other row depends on it.
__device__ inline void bring_queries(Shared& shared, const Scalar* q, const Unit& item, int place, const Batch& batch, int thread) {
  const int num_rows = item.joins ? 0 : min(kRows, item.num_own_rows());
  for (int i = thread; i < num_rows * kVecs; i += 32 * kQueryLoaders) {
    const int at = i / kVecs, piece = i % kVecs;
    cp_async_16(&shared.queries[place][at / 8][piece / 8][at % 8][(piece % 8 ^ at % 8) * 8],
                q + item.head_of(item.first_row + at, batch) * kHeadDim + piece * 8, true);
  }
  cp_async_commit();
  cp_async_wait<0>();
  publish_shared_writes();
  __syncwarp();
  if (thread % 32 == 0) barrier_arrive(shared.queries_came[place]);
}

// Computing: kConsumers warpgroups.

// Values outside [begin, end) become zero: their weights are zero, but 0 · (what lies there) may be NaN.
__device__ inline void clear_unseen(Tile& values, int first_key, int begin, int end, int warpgroup) {
  for (int i = threadIdx.x % 128; i < kKeys * kVecs; i += 128) {
    const int at = i / kVecs, piece = i % kVecs, key = first_key + at;
    if (key < begin || key >= end)
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
    state.fade[half] = exp2_fast((state.peak[half] - finite_or_zero(peak)) * factor);  // 1 if the peak has not moved
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
  // Peaks seldom move once many keys were seen; a product with 1 would change nothing.
  if (__ballot_sync(kAllLanes, state.fade[0] != 1.0f || state.fade[1] != 1.0f) == 0) return;
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= state.fade[i / 2 % 2];
}

// The 16 rows of this warp, by way of the place of its queries: so 16 bytes go to device memory at a time, rows whole.
__device__ inline void write_out(Scalar* out, Scalar (&place)[kRows / 8][kPanels][8][64], const float (&sums)[kHeadDim / 2],
                                 const Softmax& state, const Item& item, int warp_row, const Batch& batch) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = team_sum<4>(state.sum[half]);
    const float share = sum > 0.0f ? 1.0f / sum : 0.0f;
    const int at = warp_row + half * 8 + lane / 4;
#pragma unroll
    for (int n = 0; n < kVecs; ++n)
      *reinterpret_cast<u32*>(&place[at / 8][n / 8][at % 8][(n % 8 ^ at % 8) * 8 + lane % 4 * 2]) =
          pack<Scalar>(sums[n * 4 + 2 * half] * share, sums[n * 4 + 2 * half + 1] * share);
  }
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < 16 * kVecs; i += 32) {
    const int at = warp_row + i / kVecs, piece = i % kVecs;
    if (at < item.num_own_rows())
      *reinterpret_cast<uint4*>(out + item.head_of(item.first_row + at, batch) * kHeadDim + piece * 8) =
          load_bits(&place[at / 8][piece / 8][at % 8][(piece % 8 ^ at % 8) * 8]);
  }
}

// The results of the 16 rows of this warp for a part of their keys. `factor` brings peaks to base 2.
__device__ inline void write_part(const Parts& parts, const float (&sums)[kHeadDim / 2], const Softmax& state, const Unit& item,
                                  int warp_row, float factor) {
  const int lane = threadIdx.x % 32;
  const i64 slot_row = static_cast<i64>(item.first_slot + item.part) * kRows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = team_sum<4>(state.sum[half]);
    const float share = sum > 0.0f ? 1.0f / sum : 0.0f;
    const int at = warp_row + half * 8 + lane / 4;
    if (at >= item.num_own_rows()) continue;
    float2* target = reinterpret_cast<float2*>(parts.outs + (slot_row + at) * kHeadDim) + lane % 4;
#pragma unroll
    for (int n = 0; n < kVecs; ++n) target[n * 4] = make_float2(sums[n * 4 + 2 * half] * share, sums[n * 4 + 2 * half + 1] * share);
    if (lane % 4 == 0) parts.weights[slot_row + at] = sum > 0.0f ? state.peak[half] * factor + log2f(sum) : -kInfinity;
  }
  __syncwarp();
  if (lane == 0) arrive(&num_arrivals[item.first_slot]);
}

// One share of an item's rows: each thread takes four numbers of a row at a time.
__device__ inline void join_parts(Scalar* out, const Parts& parts, const Unit& item, const Batch& batch, int thread) {
  const int num_rows = min(kRows, item.num_own_rows());
  const int first = num_rows * item.part / item.num_parts, last = num_rows * (item.part + 1) / item.num_parts;
  for (int i = thread; i < (last - first) * (kHeadDim / 4); i += 128 * kConsumers) {
    const int at = first + i / (kHeadDim / 4), column = i % (kHeadDim / 4) * 4;
    Joined joined;
    joined.add_parts(item.num_parts, [&](int part, float (&numbers)[4]) {
      const i64 slot_row = static_cast<i64>(item.first_slot + part) * kRows + at;
      load(parts.outs + slot_row * kHeadDim + column, numbers);
      return parts.weights[slot_row];
    });
    joined.finish();
    u32* target = reinterpret_cast<u32*>(out + item.head_of(item.first_row + at, batch) * kHeadDim + column);
    target[0] = pack<Scalar>(joined.total[0], joined.total[1]);
    target[1] = pack<Scalar>(joined.total[2], joined.total[3]);
  }
  __syncwarp();
  if (thread % 32 > 0) return;
  int* counter = &num_arrivals[item.first_slot];
  if (arrive(counter) == item.num_finishing() + item.num_joining() - 1) *counter = 0;  // the last of all
}

// Who has no rows of an item gives its tiles back.
__device__ inline void skip_tiles(Shared& shared, Tiles& tiles, const Item& item) {
  const int first = first_tile(item);
  for (int tile = last_tile(item); tile >= first; --tile)
    for (Ring<kStages>* ring : {&tiles.keys, &tiles.values}) {
      barrier_wait(shared.tile_came[ring->place], ring->parity);
      if (threadIdx.x % 32 == 0) barrier_arrive(shared.tile_left[ring->place]);
      ring->advance(2);
    }
}

// One warpgroup: its 64 rows of an item, or of a part of it.
__device__ inline void compute(Shared& shared, Tiles& tiles, Scalar* out, const Parts& parts, const Unit& item,
                               const Ring<kItems>& place, const Batch& batch, int warpgroup, float scale, float softcap) {
  const int lane = threadIdx.x % 32, warp_row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16;
  const bool is_first_lane = lane == 0;
  const int num_workers = uniform(min(kConsumers, ceil_div(item.num_own_rows(), 64)));
  const bool takes_turns = num_workers > 1;
  const int own_turn = 1 + kConsumers + warpgroup, next_turn = 1 + kConsumers + (warpgroup + 1 == num_workers ? 0 : warpgroup + 1);
  const u64 queries = octet_descriptor(&shared.queries[place.place][warpgroup * 8], kPanels);
  const float factor = softcap > 0.0f ? kLog2e : scale * kLog2e;

  const int begin = uniform(item.begin), end = uniform(item.end), window = batch.window, first = first_tile(item);
  const int first_position = item.position_of(item.first_row, batch);
  const int last_position = item.position_of(min(item.first_row + kRows, item.num_rows) - 1, batch);
  const int own_row = item.first_row + warp_row + lane / 4;
  const int positions[2] = {item.position_of(own_row, batch), item.position_of(own_row + 8, batch)};
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

  Ring<kStages>&keys = tiles.keys, &values = tiles.values;
  int tile = last_tile(item);
  barrier_wait(shared.queries_came[place.place], place.parity);
  barrier_wait(shared.tile_came[keys.place], keys.parity);
  start_scores(scores, queries, shared.tiles[keys.place]);
  warpgroup_wait<0>();
  pin(scores);
  if (is_first_lane) barrier_arrive(shared.tile_left[keys.place]);
  keys.advance(2);
  take_weights(tile * kKeys);
  round_weights(weights, scores);
  if (!kIsNarrow && end % kKeys != 0) {
    barrier_wait(shared.tile_came[values.place], values.parity);
    clear_unseen(shared.tiles[values.place], tile * kKeys, begin, end, warpgroup);
  }

  if (tile > first) barrier_wait(shared.tile_came[keys.place], keys.parity);
  for (--tile; tile >= first; --tile) {
    if (takes_turns) meet_threads(own_turn, 256);
    start_scores(scores, queries, shared.tiles[keys.place]);
    barrier_wait(shared.tile_came[values.place], values.parity);
    start_values(sums, weights, shared.tiles[values.place]);
    if (takes_turns) pass_threads(next_turn, 256);
    warpgroup_wait<1>();
    pin(scores);
    if (is_first_lane) barrier_arrive(shared.tile_left[keys.place]);
    keys.advance(2);
    take_weights(tile * kKeys);
    // Waiting here for the next keys, the compiler moves no part of the softmax behind the wait for the values.
    if (tile > first) barrier_wait(shared.tile_came[keys.place], keys.parity);
    warpgroup_wait<0>();
    pin(sums);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) pin(weights[step]);
    if (is_first_lane) barrier_arrive(shared.tile_left[values.place]);
    values.advance(2);
    fade_out(sums, state);
    round_weights(weights, scores);
  }

  barrier_wait(shared.tile_came[values.place], values.parity);
  if (!kIsNarrow && begin % kKeys != 0)
    clear_unseen(shared.tiles[values.place], first * kKeys, begin, end, warpgroup);
  start_values(sums, weights, shared.tiles[values.place]);
  warpgroup_wait<0>();
  pin(sums);
  if (is_first_lane) barrier_arrive(shared.tile_left[values.place]);
  values.advance(2);
  if (uniform(item.num_parts) > 1) return write_part(parts, sums, state, item, warp_row, factor);
  meet_threads(1 + warpgroup, 128);  // tensor cores have read all queries
  write_out(out, shared.queries[place.place], sums, state, item, warp_row, batch);
}

__device__ inline void consume(Shared& shared, Scalar* out, const Parts& parts, const Batch& batch, int warpgroup, float scale,
                               float softcap) {
  const int first_turn = 1 + kConsumers;
  if (warpgroup == kConsumers - 1) pass_threads(first_turn, 256);
  Tiles tiles;
  for_each_item(shared, [&](const Unit& item, const Ring<kItems>& place) {
    if (uniform(item.joins)) join_parts(out, parts, item, batch, warpgroup * 128 + threadIdx.x % 128);
    else if (warpgroup * 64 >= uniform(item.num_own_rows())) skip_tiles(shared, tiles, item);
    else compute(shared, tiles, out, parts, item, place, batch, warpgroup, scale, softcap);
  });
  if (warpgroup == 0) meet_threads(first_turn, 256);  // after an item it is the first one's turn
}

// Grid: as many as run at once, up to kMaxGrid. part_outs: room for 2 · gridDim parts, or null.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
prefill(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const Cached* k_cache,
        const Cached* v_cache, Scalar* out, float* part_outs, float* part_weights, const Scalar* q, const int* query_start,
        const int* context_lens, const int* rows, const int* block_table, int first_request, int num_requests, int table_width,
        int num_heads, int num_kv_heads, float scale, int window, float softcap) {
  extern __shared__ uint4 dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>((reinterpret_cast<u64>(dynamic) + 1023) / 1024 * 1024);
  const Batch batch = {query_start, context_lens, rows, block_table, first_request, num_requests, table_width, num_heads,
                       num_kv_heads, window};
  start_dependents();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(shared.tile_came[stage], kIsNarrow ? 4 : 1);
      barrier_init(shared.tile_left[stage], 4 * kConsumers);  // one for each warp
    }
    for (int place = 0; place < kItems; ++place) {
      barrier_init(shared.item_came[place], 1);
      barrier_init(shared.item_left[place], kThreads / 32 - 1);  // all but the one that hands them out
      barrier_init(shared.queries_came[place], kQueryLoaders);
    }
    barrier_init_fence();
  }
  __syncthreads();

  const int warp = uniform(threadIdx.x / 32), warpgroup = warp / 4;
  if (warpgroup == 0) {
    shrink_registers<kHelperRegisters>();
    if (warp == 0) return hand_out_items(shared, batch, part_outs != nullptr);
    wait_for_inputs();
    Tiles tiles;
    for_each_item(shared, [&](const Unit& item, const Ring<kItems>& place) {
      if (warp > 1) bring_queries(shared, q, item, place.place, batch, threadIdx.x - 64);
      else if (!kIsNarrow && !uniform(item.joins)) bring_tiles(shared, tiles, k_map, v_map, item, batch);
    });
  } else if (kIsNarrow && warpgroup == 1) {
    shrink_registers<kWidenerRegisters>();
    wait_for_inputs();
    Tiles tiles;
    for_each_item(shared, [&](const Unit& item, const Ring<kItems>&) {
      if (!uniform(item.joins)) widen_tiles(shared, tiles, k_cache, v_cache, item, batch);
    });
  } else {
    grow_registers<kConsumerRegisters>();
    wait_for_inputs();
    consume(shared, out, {part_outs, part_weights}, batch, warpgroup - kIsNarrow - 1, scale, softcap);
  }
}
