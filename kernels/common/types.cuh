// Numbers in memory: bf16, f16 or float, moved 16 bytes at a time; arithmetic is float32 everywhere.
#pragma once

#include "ptx.cuh"

constexpr float kLog2e = 1.4426950408889634f;
#define kInfinity __int_as_float(0x7f800000)

// How many numbers one 16-byte access carries.
template <class T> constexpr int kVec = 16 / sizeof(T);

__device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__device__ constexpr int power_of_two_from(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return unpack<bf16>(x.bits).x; }
__device__ inline float to_float(f16 x) { return unpack<f16>(x.bits).x; }

template <class T> __device__ inline T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (sizeof(T) == 1) return T{static_cast<unsigned char>(pack_e4m3(x, 0.0f))};
  else return T{static_cast<u16>(pack<T>(x, 0.0f))};
}

// What a store and a load do to a number.
template <class T> __device__ inline float rounded(float x) { return to_float(from_float<T>(x)); }

// kVec<T> numbers at a 16-byte boundary, as they lie in memory.
template <class T> __device__ inline void unpack_vec(uint4 bits, float (&x)[kVec<T>]) {
  const u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack<T>(words[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}
template <class T> __device__ inline uint4 pack_vec(const float (&x)[kVec<T>]) {
  u32 words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) words[i] = __float_as_uint(x[i]);
    else words[i] = pack<T>(x[2 * i], x[2 * i + 1]);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}
template <class T> __device__ inline uint4 load_bits(const T* source) {
  return *reinterpret_cast<const uint4*>(source);
}
template <class T> __device__ inline void store_bits(T* target, uint4 bits) { *reinterpret_cast<uint4*>(target) = bits; }

// kCount numbers (a multiple of kVec<T>) from or to a 16-byte boundary.
template <int kCount, class T> __device__ inline void load(const T* source, float (&x)[kCount]) {
#pragma unroll
  for (int start = 0; start < kCount; start += kVec<T>) {
    float piece[kVec<T>];
    unpack_vec<T>(load_bits(source + start), piece);
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) x[start + i] = piece[i];
  }
}
template <int kCount, class T> __device__ inline void store(T* target, const float (&x)[kCount]) {
#pragma unroll
  for (int start = 0; start < kCount; start += kVec<T>) {
    float piece[kVec<T>];
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) piece[i] = x[start + i];
    store_bits(target + start, pack_vec<T>(piece));
  }
}
// Sixteen e4m3 as numbers of T, two pieces of 16 bytes.
template <class T> __device__ inline void widen_bits(uint4 (&wide)[2], uint4 narrow) {
  const uint2 x = widen<T>(narrow.x), y = widen<T>(narrow.y), z = widen<T>(narrow.z), w = widen<T>(narrow.w);
  wide[0] = make_uint4(x.x, x.y, y.x, y.y);
  wide[1] = make_uint4(z.x, z.y, w.x, w.y);
}
