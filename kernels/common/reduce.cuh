// Sums and maxima over the threads of a team (a power of two of neighbouring lanes), a warp or a block.
#pragma once

constexpr u32 kAllLanes = 0xffffffffu;

template <int kLanes> __device__ inline float team_sum(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}
template <int kLanes> __device__ inline float team_max(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

// Every thread gets the sum over a block of whole warps. One call a kernel: the scratch is not guarded for a second.
__device__ inline float block_sum(float x) {
  __shared__ float of_warp[32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  x = team_sum<32>(x);
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  return team_sum<32>(lane < blockDim.x / 32 ? of_warp[lane] : 0.0f);
}
