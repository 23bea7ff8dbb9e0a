// From the QKV projection to rotated queries and a filled KV cache: norm (if given) and rotate every query and key head,
// write queries to q_out [T, num_heads, head_dim], keys and values to the slot of their token in the paged cache.
//
// A team of lanes owns one head of one token: it reads it with 16-byte accesses, lays it in shared memory, where each lane
// finds the partners of its own numbers (they lie rotary_dim / 2 apart), and writes it once. Bound by bytes.
// Built with SCALAR and HEAD_DIM.
#include "types.cuh"
#include "reduce.cuh"

using Scalar = SCALAR;
constexpr int kHeadDim = HEAD_DIM;
constexpr int kBlockSize = 16;
constexpr int kThreads = 256;
constexpr int kWidth = kVec<Scalar>;
constexpr int kVecs = kHeadDim / kWidth;
constexpr int kLanes = kVecs >= 32 ? 32 : power_of_two_from(kVecs);
constexpr int kPieces = ceil_div(kVecs, kLanes);  // 16-byte pieces a lane holds
constexpr int kTeams = kThreads / kLanes;

// One float of room after every kWidth: lanes that walk their own pieces in step then meet in no bank.
__device__ constexpr int padded(int i) { return i + i / kWidth; }

__device__ inline float weight_at(const void* weight, int is_float, int i) {
  return is_float ? static_cast<const float*>(weight)[i] : to_float(static_cast<const Scalar*>(weight)[i]);
}

// x /= sqrt(mean(x²) + eps), times weight; x is spread over the lanes of a team.
__device__ inline void norm_head(float (&x)[kPieces][kWidth], const void* weight, int is_float, float eps, int lane) {
  float sum = 0.0f;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece)
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += x[piece][i] * x[piece][i];
  const float factor = rsqrtf(team_sum<kLanes>(sum) / kHeadDim + eps);
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int vec = piece * kLanes + lane;
    if (vec >= kVecs || weight == nullptr) continue;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[piece][i] *= factor * weight_at(weight, is_float, vec * kWidth + i);
  }
}

// Grid: x = tokens, y = their heads, kTeams at a time: num_heads queries, then num_kv_heads keys, then as many values.
extern "C" __global__ void __launch_bounds__(kThreads)
rotate_and_store(Scalar* q_out, Scalar* k_cache, Scalar* v_cache, const Scalar* qkv, const int* positions,
                 const int* slot_mapping, const float* cos_sin, const void* q_norm, const void* k_norm, int norm_is_float,
                 float eps, int num_heads, int num_kv_heads, int rotary_dim) {
  __shared__ float cosines[padded(kHeadDim)], sines[padded(kHeadDim)];
  __shared__ float heads[kTeams][padded(kHeadDim)];
  start_dependents();
  wait_for_inputs();
  const i64 token = blockIdx.x;
  const int team = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int head = blockIdx.y * kTeams + team;
  const int num_all_heads = num_heads + 2 * num_kv_heads;
  const bool exists = head < num_all_heads;
  const bool is_query = head < num_heads;
  const bool is_value = head >= num_heads + num_kv_heads;
  const int half = rotary_dim / 2;

  const float* angles = cos_sin + static_cast<i64>(positions[token]) * rotary_dim;
  for (int i = threadIdx.x; i < half; i += kThreads) {
    cosines[padded(i)] = angles[i];
    sines[padded(i)] = angles[half + i];
  }

  float x[kPieces][kWidth] = {};
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int vec = piece * kLanes + lane;
    if (exists && vec < kVecs) load(qkv + (token * num_all_heads + head) * kHeadDim + vec * kWidth, x[piece]);
  }
  const void* weight = is_value ? nullptr : is_query ? q_norm : k_norm;
  if (q_norm != nullptr || k_norm != nullptr) norm_head(x, weight, norm_is_float, eps, lane);
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int vec = piece * kLanes + lane;
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (vec < kVecs) heads[team][padded(vec * kWidth + i)] = x[piece][i];
  }
  __syncthreads();

  const i64 slot = slot_mapping[token];
  if (!exists || (!is_query && slot < 0)) return;  // a negative slot: a token that is stored nowhere
  const int kv_head = is_value ? head - num_heads - num_kv_heads : head - num_heads;
  Scalar* target = is_query ? q_out + (token * num_heads + head) * kHeadDim
                            : (is_value ? v_cache : k_cache) +
                                  ((slot / kBlockSize * num_kv_heads + kv_head) * kBlockSize + slot % kBlockSize) * kHeadDim;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int vec = piece * kLanes + lane;
    if (vec >= kVecs) continue;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int at = vec * kWidth + i;
      if (is_value || at >= 2 * half) continue;
      const bool is_first = at < half;
      const int angle = padded(is_first ? at : at - half);
      const float partner = heads[team][padded(is_first ? at + half : at - half)];
      const float sine = is_first ? -sines[angle] : sines[angle];
      x[piece][i] = x[piece][i] * cosines[angle] + partner * sine;
    }
    store(target + vec * kWidth, x[piece]);
  }
}
