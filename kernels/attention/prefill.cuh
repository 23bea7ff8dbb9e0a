// What the prefill kernels share: how the tokens of a batch are cut into items of work.
//
// The query heads that share a KV head are stacked, so a request has num_tokens · heads_per_kv rows for each KV head. An item
// is up to kRows of them and the keys they see. Requests without tokens may stand at the end of a batch.
#pragma once

#include "attention.cuh"
#include "reduce.cuh"

struct Batch {
  const int *query_start, *context_lens, *rows, *block_table;
  int first_request, num_requests, table_width, num_heads, num_kv_heads, window;
  __device__ int heads_per_kv() const { return num_heads / num_kv_heads; }
};

struct Item {  // stacked rows of a request and KV head, from first_row on
  int table_row, kv_head, first_token, first_row, num_rows;  // num_rows: of the whole request
  int before;      // tokens of the context that came before this chunk
  int begin, end;  // the keys that its rows see
  __device__ int num_own_rows() const { return num_rows - first_row; }
  __device__ int position_of(int row, const Batch& batch) const { return before + row / batch.heads_per_kv(); }
  // Where a row, a query head of a token, begins in q and out, in heads.
  __device__ i64 head_of(int row, const Batch& batch) const {
    const int heads_per_kv = batch.heads_per_kv();
    const i64 token = first_token + row / heads_per_kv;
    return token * batch.num_heads + kv_head * heads_per_kv + row % heads_per_kv;
  }
};

// Requests stand in a list of pieces; request i begins at (rows before it + i · (kRows - 1)) / kRows: so each has room for its
// pieces, and no sum over the requests is needed. Called by whole warps.
template <int kRows> struct Pieces {
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
template <int kRows> __device__ inline Item find_item(const Pieces<kRows>& pieces, int index, const Batch& batch) {
  const int piece = pieces.total() - 1 - index / batch.num_kv_heads, i = pieces.request_of(piece);
  const int first_token = pieces.starts[i], num_tokens = pieces.starts[i + 1] - first_token;
  const int first_row = (piece - pieces.first(i)) * kRows, num_rows = num_tokens * pieces.heads_per_kv;
  const int request = batch.first_request + i, before = batch.context_lens[request] - num_tokens;
  Item item = {batch.rows[request], index % batch.num_kv_heads, first_token, first_row, num_rows, before, 0, 0};
  item.begin = batch.window > 0 ? max(0, item.position_of(first_row, batch) - batch.window + 1) : 0;
  item.end = item.position_of(min(first_row + kRows, num_rows) - 1, batch) + 1;
  return item;
}
