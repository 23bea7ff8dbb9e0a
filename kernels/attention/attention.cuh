// What the attention kernels share.
#pragma once

constexpr int kBlockSize = 16;  // tokens of a KV block; caches are [num_blocks, num_kv_heads, kBlockSize, head_dim]

// The base of an online softmax: peaks are -infinity while no key was visible, and -inf - -inf would be NaN.
__device__ inline float finite_or_zero(float peak) { return peak == -kInfinity ? 0.0f : peak; }

__device__ inline float capped(float score, float softcap) {
  return softcap > 0.0f ? softcap * tanh_fast(__fdividef(score, softcap)) : score;
}

// The request whose tokens, query_start[i] to query_start[i + 1], hold this token.
__device__ inline int find_request(const int* query_start, int num_requests, int token) {
  int low = 0, high = num_requests - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (query_start[middle] <= token) low = middle;
    else high = middle - 1;
  }
  return low;
}
