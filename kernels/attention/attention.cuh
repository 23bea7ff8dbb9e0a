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

constexpr float kNoPeak = -1e30f;  // of no keys: finite, so that no difference of peaks is NaN

// Results of parts of a context for four numbers of a head, joined: an online softmax over parts.
struct Joined {
  float peak = kNoPeak, sum = 0.0f, total[4] = {};

  __device__ void fade_to(float new_peak) {
    const float fade = exp2_fast(peak - new_peak);
    peak = new_peak;
    sum *= fade;
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] *= fade;
  }
  __device__ void add(float part_peak, float part_sum, const float (&part)[4]) {
    const float share = exp2_fast(part_peak - peak);
    sum += share * part_sum;
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] += share * part[i];
  }
  // Parts, each scaled by its own sum: `load` brings the numbers of one and tells its weight, peak + log2(sum).
  template <class Load> __device__ void add_parts(int num_parts, Load load) {
    constexpr int kBatch = 16;  // parts whose numbers are on their way at once
    for (int first = 0; first < num_parts; first += kBatch) {
      float weights[kBatch], numbers[kBatch][4] = {}, new_peak = peak;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        weights[i] = first + i < num_parts ? load(first + i, numbers[i]) : -kInfinity;
        new_peak = fmaxf(new_peak, weights[i]);
      }
      fade_to(new_peak);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) add(weights[i], 1.0f, numbers[i]);
    }
  }
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] = sum > 0.0f ? total[i] / sum : 0.0f;
  }
};
