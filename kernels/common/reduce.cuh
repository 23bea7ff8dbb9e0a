// Sums and maxima over the threads of a team (a power of two of neighbouring lanes), a warp or a block. Of floats with a NaN among
// them both are NaN.
#pragma once
#include "ptx.cuh"

constexpr u32 kAllLanes = 0xffffffffu;

template <int kLanes> __device__ inline float team_sum(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}
template <int kLanes> __device__ inline float team_max(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x = max_or_nan(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

__device__ inline u64 warp_max(u64 x) {
  const u32 high = static_cast<u32>(x >> 32), most = __reduce_max_sync(kAllLanes, high);
  return static_cast<u64>(most) << 32 | __reduce_max_sync(kAllLanes, high == most ? static_cast<u32>(x) : 0);
}

// The sum of a lane's number and those of the lanes before it.
template <class T> __device__ inline T warp_prefix_sum(T x) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T before = __shfl_up_sync(kAllLanes, x, distance);
    if (threadIdx.x % 32 >= distance) x += before;
  }
  return x;
}

// Every thread gets the largest of numbers from 0 on over a block of whole warps. One call a kernel: the scratch is not guarded
// for a second.
__device__ inline float block_max(float x) {
  __shared__ float of_warp[32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  x = team_max<32>(x);
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  return team_max<32>(lane < blockDim.x / 32 ? of_warp[lane] : 0.0f);
}
