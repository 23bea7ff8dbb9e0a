// Attention of single queries over the paged KV cache: out = softmax(cap(q · Kᵀ · scale)) · V for each token of a batch:
// for the types and head sizes that tensor cores do not take.
//
// Work: a block of threads takes one token, one KV head (its kGroup query heads share every key and value that is loaded)
// and one of the `splits` parts of the context, so that a single long request fills the GPU; with several splits, partial
// results go to memory and `combine` joins them. Inside, a team of lanes owns whole keys: each lane holds 16 bytes of the
// head, a score is a dot product summed over the team, and each team runs its own online softmax until the end.
// Bound by bytes: the keys and values of the context, once.
//
// Built with SCALAR, HEAD_DIM and GROUP (query heads a block takes; with more of them to a KV head, several blocks share it).
#include "types.cuh"
#include "reduce.cuh"
#include "attention.cuh"

using Scalar = SCALAR;
constexpr int kHeadDim = HEAD_DIM;
constexpr int kGroup = GROUP;
constexpr int kThreads = 128;
constexpr int kWidth = kVec<Scalar>;
constexpr int kVecs = kHeadDim / kWidth;
constexpr int kLanes = kVecs >= 32 ? 32 : power_of_two_from(kVecs);
constexpr int kPieces = ceil_div(kVecs, kLanes);  // 16-byte pieces of a head in each lane
constexpr int kTeams = kThreads / kLanes;
constexpr int kKeys = 4;                          // keys a team has in flight
constexpr int kStep = kTeams * kKeys;             // keys the block takes at a time
constexpr int kMaxSplits = 128;

struct Softmax {  // of one team, for each of its query heads; in base 2
  float peak[kGroup], sum[kGroup], out[kGroup][kPieces][kWidth];
};

// The numbers this lane holds of a head: zeros past its end.
__device__ inline uint4 piece_of(const Scalar* head, int piece, int lane, bool exists) {
  const int vec = piece * kLanes + lane;
  return exists && vec < kVecs ? load_bits(head + vec * kWidth) : make_uint4(0, 0, 0, 0);
}

__device__ inline void add_keys(Softmax& state, const float (&scores)[kKeys][kGroup], const uint4 (&values)[kKeys][kPieces]) {
  float weights[kKeys][kGroup];
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    float peak = state.peak[g];
#pragma unroll
    for (int k = 0; k < kKeys; ++k) peak = fmaxf(peak, scores[k][g]);
    const float base = finite_or_zero(peak);  // -inf while no key was visible: then every weight is 2^-inf = 0
    const float fade = exp2_fast(state.peak[g] - base);
    state.peak[g] = peak;
    state.sum[g] *= fade;
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      weights[k][g] = exp2_fast(scores[k][g] - base);
      state.sum[g] += weights[k][g];
    }
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece)
#pragma unroll
      for (int i = 0; i < kWidth; ++i) state.out[g][piece][i] *= fade;
  }
#pragma unroll
  for (int k = 0; k < kKeys; ++k)
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      float value[kWidth];
      unpack_vec<Scalar>(values[k][piece], value);
#pragma unroll
      for (int g = 0; g < kGroup; ++g)
#pragma unroll
        for (int i = 0; i < kWidth; ++i) state.out[g][piece][i] += weights[k][g] * value[i];
    }
}

// Join the teams' softmaxes and write the result: the output itself, or (with splits) its part and the part's weight.
__device__ inline void write_result(const Softmax& state, Scalar* out, float* partial_out, float* partial_peak, i64 token,
                                    int first_head, int num_group_heads, int num_heads, int team, int lane) {
  __shared__ float peaks[kTeams][kGroup], sums[kTeams][kGroup], outs[kTeams][kGroup][kHeadDim];
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    if (lane == 0) {
      peaks[team][g] = state.peak[g];
      sums[team][g] = state.sum[g];
    }
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int vec = piece * kLanes + lane;
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        if (vec < kVecs) outs[team][g][vec * kWidth + i] = state.out[g][piece][i];
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < num_group_heads * kHeadDim; at += kThreads) {
    const int g = at / kHeadDim, i = at % kHeadDim;
    float peak = -kInfinity, sum = 0.0f, total = 0.0f;
    for (int t = 0; t < kTeams; ++t) peak = fmaxf(peak, peaks[t][g]);
    const float base = finite_or_zero(peak);
    for (int t = 0; t < kTeams; ++t) {
      const float share = exp2_fast(peaks[t][g] - base);
      sum += share * sums[t][g];
      total += share * outs[t][g][i];
    }
    const float result = sum > 0.0f ? total / sum : 0.0f;
    const i64 row = token * num_heads + first_head + g;
    if (gridDim.z == 1) {
      out[row * kHeadDim + i] = from_float<Scalar>(result);
    } else {
      const i64 part = row * gridDim.z + blockIdx.z;
      partial_out[part * kHeadDim + i] = result;
      if (i == 0) partial_peak[part] = sum > 0.0f ? peak + log2f(sum) : -kInfinity;
    }
  }
}

// Grid: x = tokens, y = KV heads times the blocks that share one, z = splits of the context.
extern "C" __global__ void __launch_bounds__(kThreads)
decode_any(Scalar* out, float* partial_out, float* partial_peak, const Scalar* q, const Scalar* k_cache, const Scalar* v_cache,
       const int* query_start, const int* context_lens, const int* rows, const int* block_table, int num_decodes,
       int num_requests, int table_width, int num_heads, int num_kv_heads, float scale, int window, float softcap) {
  const int token = blockIdx.x;
  const int request = token < num_decodes ? token : find_request(query_start, num_requests, token);
  const int heads_per_kv = num_heads / num_kv_heads, shares = gridDim.y / num_kv_heads;
  const int kv_head = blockIdx.y / shares, first_of_group = blockIdx.y % shares * kGroup;
  const int first_head = kv_head * heads_per_kv + first_of_group;
  const int num_group_heads = min(kGroup, heads_per_kv - first_of_group);
  const int team = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;

  // The keys the token sees, [begin, end), and of them this split's: whole blocks, shared out evenly.
  const int context = context_lens[request];
  const int end = min(context, context - (query_start[request + 1] - 1 - token));  // tokens past the last request are padding
  const int begin = window > 0 ? max(0, end - window) : 0;
  const int num_blocks = ceil_div(end, kBlockSize) - begin / kBlockSize;
  const int split_size = ceil_div(num_blocks, static_cast<int>(gridDim.z)) * kBlockSize;
  const int split_begin = begin / kBlockSize * kBlockSize + blockIdx.z * split_size;
  const int split_end = min(end, split_begin + split_size);

  float query[kGroup][kPieces][kWidth];
  Softmax state;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    state.peak[g] = -kInfinity;
    state.sum[g] = 0.0f;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const Scalar* head = q + (static_cast<i64>(token) * num_heads + first_head + g) * kHeadDim;
      unpack_vec<Scalar>(piece_of(head, piece, lane, g < num_group_heads), query[g][piece]);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) state.out[g][piece][i] = 0.0f;
    }
  }

  const int* table = block_table + static_cast<i64>(rows[request]) * table_width;
  const i64 block_stride = static_cast<i64>(num_kv_heads) * kBlockSize * kHeadDim;
  const i64 head_offset = static_cast<i64>(kv_head) * kBlockSize * kHeadDim;
  for (int first = split_begin; first < split_end; first += kStep) {
    uint4 keys[kKeys][kPieces], values[kKeys][kPieces];
    bool is_visible[kKeys];
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      // Neighbouring teams take neighbouring keys: what a warp reads at a time lies side by side.
      const int key = first + k * kTeams + team;
      is_visible[k] = key >= begin && key < split_end;
      const i64 block = is_visible[k] ? table[key / kBlockSize] : 0;
      const i64 at = block * block_stride + head_offset + key % kBlockSize * kHeadDim;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        keys[k][piece] = piece_of(k_cache + at, piece, lane, is_visible[k]);
        values[k][piece] = piece_of(v_cache + at, piece, lane, is_visible[k]);
      }
    }
    float scores[kKeys][kGroup];
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      float dot[kGroup] = {};
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        float key[kWidth];
        unpack_vec<Scalar>(keys[k][piece], key);
#pragma unroll
        for (int g = 0; g < kGroup; ++g)
#pragma unroll
          for (int i = 0; i < kWidth; ++i) dot[g] += query[g][piece][i] * key[i];
      }
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        const float score = capped(team_sum<kLanes>(dot[g]) * scale, softcap) * kLog2e;
        scores[k][g] = is_visible[k] ? score : -kInfinity;
      }
    }
    add_keys(state, scores, values);
  }
  write_result(state, out, partial_out, partial_peak, token, first_head, num_group_heads, num_heads, team, lane);
}

// out = the splits' parts, weighted by 2^peak. Grid: x = tokens, y = query heads; a thread takes numbers of the head.
extern "C" __global__ void __launch_bounds__(kThreads)
combine(Scalar* out, const float* partial_out, const float* partial_peak, int num_splits) {
  __shared__ float shares[kMaxSplits];
  const i64 row = static_cast<i64>(blockIdx.x) * gridDim.y + blockIdx.y;
  float peak = -kInfinity;
  for (int split = threadIdx.x % 32; split < num_splits; split += 32) peak = fmaxf(peak, partial_peak[row * num_splits + split]);
  const float base = finite_or_zero(team_max<32>(peak));
  for (int split = threadIdx.x; split < num_splits; split += kThreads)
    shares[split] = exp2_fast(partial_peak[row * num_splits + split] - base);
  __syncthreads();
  for (int i = threadIdx.x; i < kHeadDim; i += kThreads) {
    const float* part = partial_out + row * num_splits * kHeadDim + i;
    float sum = 0.0f, total = 0.0f;
#pragma unroll 8
    for (int split = 0; split < num_splits; ++split) {
      sum += shares[split];
      total += shares[split] * part[split * kHeadDim];
    }
    out[row * kHeadDim + i] = from_float<Scalar>(sum > 0.0f ? total / sum : 0.0f);
  }
}
