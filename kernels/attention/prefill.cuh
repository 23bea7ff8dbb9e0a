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

// Rows of a request, a piece of kRows of them, and the keys they see.
template <int kRows> __device__ inline Item item_of(const Batch& batch, int request, int kv_head, int piece) {
  const int first_token = batch.query_start[request], num_tokens = batch.query_start[request + 1] - first_token;
  const int first_row = piece * kRows, num_rows = num_tokens * batch.heads_per_kv();
  const int before = batch.context_lens[request] - num_tokens;
  Item item = {batch.rows[request], kv_head, first_token, first_row, num_rows, before, 0, 0};
  item.begin = batch.window > 0 ? max(0, item.position_of(first_row, batch) - batch.window + 1) : 0;
  item.end = item.position_of(min(first_row + kRows, num_rows) - 1, batch) + 1;
  return item;
}
