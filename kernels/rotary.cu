// From the QKV projection to rotated queries and a filled KV cache: norm (if given) and rotate every query and key head,
// write queries to q_out [T, num_heads, head_dim], keys and values to the slot of their token in the paged cache.
//
// A team of lanes takes heads of one token, one after the other. A lane holds pairs of pieces that turn together (they lie
// rotary_dim / 2 apart), so a head is read and written once, 16 bytes at a time, and the token's angles stay in registers.
// Bound by bytes.
// Built with SCALAR, CACHED (the cache's type: SCALAR, or e4m3), HEAD_DIM and WIDTH (numbers in a piece: 16 bytes of them, or one
// where rotary_dim / 2 is no multiple).
#include "types.cuh"
#include "reduce.cuh"

using Scalar = SCALAR;
using Cached = CACHED;
constexpr int kHeadDim = HEAD_DIM;
constexpr int kWidth = WIDTH;
constexpr int kBlockSize = 16;
constexpr int kThreads = 128;
constexpr int kWidePairs = ceil_div(kHeadDim / kVec<Scalar>, 2);  // a lane for each
constexpr int kLanes = kWidePairs >= 32 ? 32 : power_of_two_from(kWidePairs);
constexpr int kOwnPairs = ceil_div(ceil_div(kHeadDim / kWidth, 2), kLanes);  // of a lane
constexpr int kTeams = kThreads / kLanes;
// Blocks of threads on a multiprocessor: with six, more bytes are on their way than with four (3.57 instead of 3.33 TB/s on an
// H200), where registers suffice. Small blocks end more evenly: 8,192 rows take 56.4 us instead of 57.2 in three of 256 threads.
#if __CUDA_ARCH__ >= 900
constexpr int kBlocks = kWidth > 1 && kLanes == kWidePairs ? 6 : 4;
#else
constexpr int kBlocks = 4;
#endif
constexpr int kAtOnce = kOwnPairs > 1 ? 1 : 2;  // heads that a team reads at once

struct Norms {
  const void *q, *k;
  int is_float;
  float eps;
};
struct Heads {  // of a token: queries, then keys, then values
  int num_queries, num_kv;
  __device__ int num_all() const { return num_queries + 2 * num_kv; }
  __device__ bool is_query(int head) const { return head < num_queries; }
  __device__ bool is_value(int head) const { return head >= num_queries + num_kv; }
};

// kWidth numbers as they lie in memory, in one access.
template <int kBytes> struct Bits;
template <> struct Bits<16> { uint4 word; };
template <> struct Bits<8> { uint2 word; };
template <> struct Bits<4> { u32 word; };
template <> struct Bits<2> { u16 word; };
template <> struct Bits<1> { unsigned char word; };
template <class T> union Piece {
  Bits<sizeof(T) * kWidth> bits;
  T numbers[kWidth];
};

struct Pairs {  // those that a lane holds of each head
  int lane, num_turning;
  __device__ int pair(int i) const { return i * kLanes + lane; }
  __device__ bool turns(int i) const { return pair(i) < num_turning; }
  // Behind the pairs that turn come pairs of neighbours, which stay as they are.
  __device__ int place(int i, int side) const {
    return (turns(i) ? pair(i) + side * num_turning : 2 * pair(i) + side) * kWidth;
  }
  __device__ bool exists(int i, int side) const { return place(i, side) < kHeadDim; }
};

struct Angles { float cosines[kOwnPairs][kWidth], sines[kOwnPairs][kWidth]; };

__device__ inline Angles load_angles(const Pairs& pairs, const float* cos_sin, int half) {
  Angles angles;
#pragma unroll
  for (int i = 0; i < kOwnPairs; ++i) {
    if (!pairs.turns(i)) continue;
    const float* source = cos_sin + pairs.pair(i) * kWidth;
    if constexpr (kWidth > 1) {
      load(source, angles.cosines[i]);
      load(source + half, angles.sines[i]);
    } else {
      angles.cosines[i][0] = source[0], angles.sines[i][0] = source[half];
    }
  }
  return angles;
}

__device__ inline float weight_at(const void* weight, int is_float, int i) {
  return is_float ? static_cast<const float*>(weight)[i] : to_float(static_cast<const Scalar*>(weight)[i]);
}

template <class T> __device__ inline void write(T* target, const float (&x)[kWidth]) {
  Piece<T> piece;
#pragma unroll
  for (int n = 0; n < kWidth; ++n) piece.numbers[n] = from_float<T>(x[n]);
  *reinterpret_cast<Bits<sizeof(piece)>*>(target) = piece.bits;
}

// Norm and turn one head, spread over the lanes of a team, and write it to its place.
__device__ inline void finish_head(const Piece<Scalar> (&head)[kOwnPairs][2], const Pairs& pairs, const Angles& angles, bool turns,
                                   const void* weight, const Norms& norms, Scalar* q_target, Cached* kv_target) {
  float x[kOwnPairs][2][kWidth], factor = 1.0f, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kOwnPairs; ++i)
#pragma unroll
    for (int side = 0; side < 2; ++side)
#pragma unroll
      for (int n = 0; n < kWidth; ++n) {
        x[i][side][n] = to_float(head[i][side].numbers[n]);
        sum += x[i][side][n] * x[i][side][n];
      }
  if (norms.q != nullptr || norms.k != nullptr) factor = rsqrtf(team_sum<kLanes>(sum) / kHeadDim + norms.eps);
#pragma unroll
  for (int i = 0; i < kOwnPairs; ++i) {
    if (weight != nullptr)
#pragma unroll
      for (int side = 0; side < 2; ++side)
#pragma unroll
        for (int n = 0; n < kWidth; ++n)
          if (pairs.exists(i, side)) x[i][side][n] *= factor * weight_at(weight, norms.is_float, pairs.place(i, side) + n);
    if (turns && pairs.turns(i))
#pragma unroll
      for (int n = 0; n < kWidth; ++n) {
        const float first = x[i][0][n], second = x[i][1][n];
        x[i][0][n] = first * angles.cosines[i][n] - second * angles.sines[i][n];
        x[i][1][n] = second * angles.cosines[i][n] + first * angles.sines[i][n];
      }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (!pairs.exists(i, side)) continue;
      if (q_target != nullptr) write(q_target + pairs.place(i, side), x[i][side]);
      if (kv_target != nullptr) write(kv_target + pairs.place(i, side), x[i][side]);
    }
  }
}

// Grid: x = teams that take heads_of_team heads of a token each, kTeams to a block. A negative slot: a token that is stored
// nowhere.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
rotate_and_store(Scalar* q_out, Cached* k_cache, Cached* v_cache, const Scalar* qkv, const int* positions, const int* slot_mapping,
                 const float* cos_sin, const void* q_norm, const void* k_norm, int norm_is_float, float eps, int num_tokens,
                 int num_heads, int num_kv_heads, int rotary_dim, int heads_of_team) {
  start_dependents();
  const Heads heads = {num_heads, num_kv_heads};
  const int teams_of_token = ceil_div(heads.num_all(), heads_of_team);
  const int team = blockIdx.x * kTeams + threadIdx.x / kLanes;
  const bool has_token = team < num_tokens * teams_of_token;  // else it comes along, without heads, as lanes of a warp meet
  const i64 token = has_token ? team / teams_of_token : 0;
  const int first_head = has_token ? team % teams_of_token * heads_of_team : heads.num_all();
  const Norms norms = {q_norm, k_norm, norm_is_float, eps};
  const Pairs pairs = {static_cast<int>(threadIdx.x) % kLanes, rotary_dim / 2 / kWidth};
  // Not from the kernel before this one: it may still be running.
  const Angles angles = load_angles(pairs, cos_sin + static_cast<i64>(positions[token]) * rotary_dim, rotary_dim / 2);
  const i64 slot = slot_mapping[token];
  wait_for_inputs();
  for (int begin = 0; begin < heads_of_team; begin += kAtOnce) {
    Piece<Scalar> pieces[kAtOnce][kOwnPairs][2] = {};
    const auto exists = [&](int at) { return begin + at < heads_of_team && first_head + begin + at < heads.num_all(); };
#pragma unroll
    for (int at = 0; at < kAtOnce; ++at)
#pragma unroll
      for (int i = 0; i < kOwnPairs; ++i)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const Scalar* source = qkv + (token * heads.num_all() + first_head + begin + at) * kHeadDim + pairs.place(i, side);
          if (exists(at) && pairs.exists(i, side))
            pieces[at][i][side].bits = *reinterpret_cast<const Bits<sizeof(Scalar) * kWidth>*>(source);
        }
#pragma unroll
    for (int at = 0; at < kAtOnce; ++at) {
      const int head = first_head + begin + at;
      const bool is_query = heads.is_query(head), is_value = heads.is_value(head);
      const int kv_head = head - heads.num_queries - (is_value ? heads.num_kv : 0);
      const i64 place = ((slot / kBlockSize * heads.num_kv + kv_head) * kBlockSize + slot % kBlockSize) * kHeadDim;
      Scalar* q_target = exists(at) && is_query ? q_out + (token * heads.num_queries + head) * kHeadDim : nullptr;
      Cached* kv_target = exists(at) && !is_query && slot >= 0 ? (is_value ? v_cache : k_cache) + place : nullptr;
      const void* weight = is_value ? nullptr : is_query ? norms.q : norms.k;
      finish_head(pieces[at], pairs, angles, !is_value, weight, norms, q_target, kv_target);
    }
  }
}
