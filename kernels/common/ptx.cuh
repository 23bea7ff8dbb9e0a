// The few PTX instructions that CUDA C++ has no name for, and the number types they know: kernels are compiled where no
// CUDA header is installed. All of them exist from sm_80 on.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct bf16 { u16 bits; };
struct f16 { u16 bits; };
struct e4m3 { unsigned char bits; };  // fp8
struct s8 { signed char bits; };

// Two 16-bit numbers in a word, the first in the low half.
template <class T> __device__ inline float2 unpack(u32 word);
template <> __device__ inline float2 unpack<bf16>(u32 word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
template <> __device__ inline float2 unpack<f16>(u32 word) {
  float2 pair;
  asm("{ .reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(pair.x), "=f"(pair.y) : "r"(word));
  return pair;
}
template <class T> __device__ inline u32 pack(float low, float high);
template <> __device__ inline u32 pack<bf16>(float low, float high) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <> __device__ inline u32 pack<f16>(float low, float high) {
  u32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// The larger of two numbers; NaN if one of them is.
__device__ inline float max_or_nan(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}

// a · b + c of both numbers of a word, rounded once.
template <class T> __device__ inline u32 fma_pair(u32 a, u32 b, u32 c);
template <> __device__ inline u32 fma_pair<bf16>(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <> __device__ inline u32 fma_pair<f16>(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Two numbers to e4m3, the first in the low byte; what is beyond ±448 becomes ±448.
__device__ inline u16 pack_e4m3(float low, float high) {
  u16 pair;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
#else
  const auto narrow = [](float x) {
    const u32 sign = __float_as_uint(x) >> 24 & 0x80;
    const float size = fminf(fabsf(x), 448.0f);
    if (size < 0.015625f) return sign | __float2uint_rn(size * 512.0f);  // below 2^-6 steps are 2^-9
    const u32 bits = __float_as_uint(size);
    return sign | ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (127 - 7) * 8;
  };
  pair = static_cast<u16>(narrow(low) | narrow(high) << 8);
#endif
  return pair;
}

// Two e4m3 numbers, in the low half of a word, as f16: exact.
__device__ inline u32 unpack_e4m3(u32 word) {
  u32 pair;
#if __CUDA_ARCH__ >= 890
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low; }" : "=r"(pair) : "r"(word));
#else
  const u32 apart = (word & 0xff) | (word & 0xff00) << 8;  // the bits of f16, but for exponents that are 8 too small
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"((apart & 0x00800080) << 8 | (apart & 0x007f007f) << 7), "r"(0x5c005c00));
#endif
  return pair;
}

// Four e4m3 of a word, the first in the lowest byte, to two words of T. NaN becomes 480.
template <class T> __device__ inline uint2 widen(u32 word);
template <> __device__ inline uint2 widen<bf16>(u32 word) {
  // Exponent and fraction where bf16 has them, then 2^120 for the other bias; numbers below the normal ones come out right too.
  const auto pair = [](u32 bytes) {  // in the high bytes of two halves
    u32 small = (bytes & 0x80008000u) | (bytes >> 4 & 0x07f007f0u), wide;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(wide) : "r"(small), "r"(0x7b807b80u), "r"(0x80008000u));
    return wide;
  };
  return make_uint2(pair(__byte_perm(word, 0, 0x1404)), pair(__byte_perm(word, 0, 0x3424)));
}
template <> __device__ inline uint2 widen<f16>(u32 word) {
  const auto pair = [](u32 bytes) {
    u32 small = (bytes & 0x80008000u) | (bytes >> 1 & 0x3f803f80u), wide;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(wide) : "r"(small), "r"(0x5c005c00u));  // 2^8
    return wide;
  };
  return make_uint2(pair(__byte_perm(word, 0, 0x1404)), pair(__byte_perm(word, 0, 0x3424)));
}

// Four of the eight bytes of two words: digit i of the selector, from the lowest, names byte i (4 to 7: of the second word).
__device__ inline u32 select_bytes(u32 first, u32 second, u32 selector) {
  u32 bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(first), "r"(second), "r"(selector));
  return bytes;
}

// 2^x; 0 for -infinity.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh to about 1e-7 absolute: tanh.approx (2^-11) is too coarse for scores that are capped at 50.
__device__ inline float tanh_fast(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2_fast(2.0f * 1.4426950408889634f * x));
}

__device__ inline u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// Copy 16 bytes to shared memory in the background, or 16 zero bytes where `is_valid` is false (nothing is read then).
__device__ inline void cp_async_16(void* shared, const void* global, bool is_valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(shared_address(shared)), "l"(global), "r"(is_valid ? 16 : 0) : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending> __device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A kernel may be launched while the one before it still runs (see launcher.py). It waits here until all that ran before it
// has ended and can be read; until then it touches nothing but constants. Before Hopper, kernels start when it is so.
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Once every block has said so, the next kernel may start, if it was launched in that way.
__device__ inline void start_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Bring the line of an address to the L1 cache in the background.
__device__ inline void prefetch(const void* global) { asm volatile("prefetch.global.L1 [%0];" ::"l"(global)); }

// Four 8x8 matrices of 16-bit numbers; lane l brings the address of row l % 8 of matrix l / 8.
// Lane l receives numbers 2(l % 4) and 2(l % 4) + 1 of row l / 4 of each matrix (of each column for the transposed form).
__device__ inline void ldmatrix(u32 (&matrices)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(shared_row)) : "memory");
}
__device__ inline void ldmatrix_transposed(u32 (&matrices)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(shared_row)) : "memory");
}

// An 8x8 matrix of 16-bit numbers, held as ldmatrix gives it, transposed.
__device__ inline u32 transpose(u32 matrix) {
  u32 transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
  return transposed;
}

// C [16, 8] += A [16, 16] · B [16, 8]. With row = lane / 4 and pair = 2 (lane % 4), a lane holds
// A: (row, pair), (row + 8, pair), (row, pair + 8), (row + 8, pair + 8), two columns each;
// B: (pair, row), (pair + 8, row), two rows each;   C: (row, pair), (row, pair + 1), (row + 8, pair), (row + 8, pair + 1).
template <class T> __device__ inline void mma_16x8x16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <> __device__ inline void mma_16x8x16<bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ inline void mma_16x8x16<f16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of s8, exact: C [16, 8] += A [16, 32] · B [32, 8], four numbers a word where above there are two.
__device__ inline void mma_16x8x32(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A counter of arrivals, as it is now: what came before those that are counted is seen.
__device__ inline int load_acquire(const int* counter) {
  int now;
  asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  return now;
}
// Wait until so many arrivals are counted. Whoever is to arrive must run already, and wait for nobody before it does.
__device__ inline void wait_for_arrivals(const int* counter, int arrivals) {
  asm volatile(
      "{ .reg .pred missing; .reg .s32 now;\n"
      "again: ld.acquire.gpu.s32 now, [%0];\n"
      "setp.lt.s32 missing, now, %1;\n"
      "@missing bra again; }" ::"l"(counter), "r"(arrivals) : "memory");
}
// Count an arrival and tell how many came before. Who comes later sees what this thread has seen written, all over the GPU.
__device__ inline int arrive(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// Blocks of a cluster run at the same time, and read each other's shared memory. Before Hopper every block is alone.
__device__ inline int cluster_rank() {
  int rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ inline int cluster_size() {
  int size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}
__device__ inline int cluster_id() {
  int id = blockIdx.x;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(id));
#endif
  return id;
}
__device__ inline int num_clusters() {
  int number = gridDim.x;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(number));
#endif
  return number;
}
// All threads of all blocks (but those that have ended) meet, and see what the others wrote before.
__device__ inline void meet_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
// Where in the block of this rank lies what lies at `mine` in this one's shared memory.
template <class T> __device__ inline const T* in_block(const T* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  const T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(mine), "r"(rank));
  return there;
#else
  return mine;
#endif
}
