// What tensor cores and background copies can do on Hopper alone (sm_90a): a warpgroup (four warps) multiplies tiles that
// lie in shared memory, the copy engine brings them there, and barriers in shared memory tell when they have come.
#pragma once

#include "ptx.cuh"

// Barriers in shared memory. A phase ends when all arrivals and all bytes it expects have come; then the next begins.
// Before Hopper, they know no bytes.

using Barrier = u64;

__device__ inline void barrier_init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// After the inits, before other threads and the copy engine use the barriers.
__device__ inline void barrier_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ inline void barrier_arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
__device__ inline void barrier_arrive_expecting(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(shared_address(&barrier)), "r"(bytes) : "memory");
}
// Arrive at the barrier that lies here in another block of the cluster.
__device__ inline void barrier_arrive_in_block(Barrier& barrier, int rank) {
  asm volatile("{ .reg .u32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [there]; }"
               ::"r"(shared_address(&barrier)), "r"(rank) : "memory");
}
// Wait for the end of the phase of this parity; the one before the first has parity 1 and is over.
__device__ inline void barrier_wait(Barrier& barrier, u32 parity) {
#if __CUDA_ARCH__ >= 900
#define WAIT "try_wait.parity.shared::cta.b64"
#define LONGEST_SLEEP ", 10000000"  // ns: the longer, the less is issued
#else
#define WAIT "test_wait.parity.shared::cta.b64"
#define LONGEST_SLEEP ""
#endif
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier." WAIT " done, [%0], %1" LONGEST_SLEEP ";\n"
      "@!done bra again; }" ::"r"(shared_address(&barrier)), "r"(parity) : "memory");
#undef WAIT
#undef LONGEST_SLEEP
}
// Arrive once this thread's background copies until here (cp_async_16) have come.
__device__ inline void cp_async_arrive(Barrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Some of the block's threads meet at one of its 16 numbered barriers (0 is that of __syncthreads), or pass by it.
__device__ inline void meet_threads(int which, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(which), "r"(num_threads) : "memory");
}
__device__ inline void pass_threads(int which, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(which), "r"(num_threads) : "memory");
}

// Registers move from warpgroups that need few to those that need many (a multiple of 8 each).
template <int kCount> __device__ inline void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount> __device__ inline void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// The copy engine's view of a matrix in device memory, made by the host: pieces of its rows come in the swizzled order
// in which tensor cores read them (below), or as they are.
struct alignas(64) TensorMap { u64 words[16]; };

// Bring the view itself near, before it is used.
__device__ inline void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// Start the copy of one box of the matrix, whose first number is at (row, column), to a boundary of 1024 bytes, or of 128 where
// it comes as it is.
__device__ inline void copy_box(void* shared, const TensorMap& map, int row, int column, Barrier& barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(shared_address(shared)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier)) : "memory");
}
// The same for all blocks of the cluster that have a bit in `blocks`: to the same place in each, where the barrier is too.
__device__ inline void copy_box_to_blocks(void* shared, const TensorMap& map, int row, int column, Barrier& barrier,
                                          u16 blocks) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
               " [%0], [%1, {%2, %3}], [%4], %5;"
               ::"r"(shared_address(shared)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier)), "h"(blocks)
               : "memory");
}

// Start the copy of one box of whole rows, from row 8 · `octet` on: they come in octets (below).
__device__ inline void copy_octets(void* shared, const TensorMap& map, int octet, Barrier& barrier) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %2, %2, %3}], [%4];"
               ::"r"(shared_address(shared)), "l"(&map), "r"(0), "r"(octet), "r"(shared_address(&barrier)) : "memory");
}

// Start the copy of a row of bytes, whole pieces of 16 from a boundary of 16 to another.
__device__ inline void copy_bytes(void* shared, const void* global, int bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(&barrier)) : "memory");
}

// What this thread wrote to shared memory is seen by tensor cores and the copy engine (after a barrier among threads).
__device__ inline void publish_shared_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Operands of tensor cores in shared memory: panels of 64 numbers (128 bytes) a row, rows 128 bytes apart, and the 16-byte
// pieces of row r exchanged: piece p lies at p ^ (r % 8). `panel_bytes` is the distance of panels, where a product
// reaches over several. (PTX manual, "Matrix descriptor": distances are in units of 16 bytes.)
__device__ inline u64 panel_descriptor(const void* shared, int panel_bytes) {
  constexpr u64 kSwizzle128 = 1, kEightRows = 8 * 128 / 16;
  return (shared_address(shared) & 0x3ffff) / 16 | static_cast<u64>(panel_bytes / 16) << 16 | kEightRows << 32 |
         kSwizzle128 << 62;
}
// The same where eight rows of all panels lie together: panels are 1024 bytes apart, octets num_panels times as much.
__device__ inline u64 octet_descriptor(const void* shared, int num_panels) {
  constexpr u64 kSwizzle128 = 1, kPanel = 8 * 128 / 16;
  return (shared_address(shared) & 0x3ffff) / 16 | kPanel << 16 | num_panels * kPanel << 32 | kSwizzle128 << 62;
}
// The descriptor of what lies `bytes` further.
__device__ inline u64 further(u64 descriptor, int bytes) { return descriptor + bytes / 16; }

__device__ inline void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending> __device__ inline void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Numbers that the tensor cores were writing or reading: the compiler moves no use of them to before this point.
template <int kCount> __device__ inline void pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int kCount> __device__ inline void pin(int (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(x[i])::"memory");
}
template <int kCount> __device__ inline void pin(u32 (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

#define LIST_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LIST_16 LIST_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LIST_32 LIST_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST_64 LIST_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LIST_128 LIST_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define IN_OUT_8(f, x, i) \
  f(x[i]), f(x[i + 1]), f(x[i + 2]), f(x[i + 3]), f(x[i + 4]), f(x[i + 5]), f(x[i + 6]), f(x[i + 7])
#define IN_OUT_16(f, x, i) IN_OUT_8(f, x, i), IN_OUT_8(f, x, i + 8)
#define IN_OUT_32(f, x, i) IN_OUT_16(f, x, i), IN_OUT_16(f, x, i + 16)
#define IN_OUT_64(f, x, i) IN_OUT_32(f, x, i), IN_OUT_32(f, x, i + 32)
#define IN_OUT_128(f, x, i) IN_OUT_64(f, x, i), IN_OUT_64(f, x, i + 64)

// Products of a warpgroup, in the background until they are committed and waited for. Warp w holds rows 16w to 16w + 15
// of C and of an A in registers; within them a lane holds the same numbers as for mma_16x8x16, C column by column.
//
// multiply_keys: C [64, kColumns] (+)= A [64, 16] · Bᵀ, rows of A and B [kColumns, 16] in shared memory.
// multiply_rows: C [64, kColumns] += A [64, 16] · Bᵀ, A in registers, rows of B [kColumns, 16] in shared memory.
// multiply_values: C [64, kColumns] += A [64, 16] · B, A in registers, rows of B [16, kColumns] in shared memory.
template <class T, int kColumns>
__device__ inline void multiply_keys(float (&c)[kColumns / 2], u64 a, u64 b, bool accumulate);
template <class T, int kColumns>
__device__ inline void multiply_rows(float (&c)[kColumns / 2], const u32 (&a)[4], u64 b);
template <class T, int kColumns>
__device__ inline void multiply_values(float (&c)[kColumns / 2], const u32 (&a)[4], u64 b);

// SIZE: numbers of C that a lane holds, half of the columns; A0 ...: the places of the other operands.
#define DEFINE_KEYS(T, TYPE, COLUMNS, SIZE, A0, A1, A2)                                                                    \
  template <> __device__ inline void multiply_keys<T, COLUMNS>(float (&c)[SIZE], u64 a, u64 b, bool accumulate) {          \
    asm volatile("{ .reg .pred accumulate; setp.ne.b32 accumulate, %" A2 ", 0;\n"                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE                                     \
                 " {" LIST_##SIZE "}, %" A0 ", %" A1 ", accumulate, 1, 1, 0, 0; }"                                         \
                 : IN_OUT_##SIZE("+f", c, 0) : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                               \
  }
#define DEFINE_IN_REGISTERS(NAME, IS_TRANSPOSED, T, TYPE, COLUMNS, SIZE, A0, A1, A2, A3, A4)                               \
  template <> __device__ inline void NAME<T, COLUMNS>(float (&c)[SIZE], const u32 (&a)[4], u64 b) {                        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE                                     \
                 " {" LIST_##SIZE "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" A4 ", 1, 1, 1, " IS_TRANSPOSED ";"          \
                 : IN_OUT_##SIZE("+f", c, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                              \
  }
#define DEFINE_ROWS(...) DEFINE_IN_REGISTERS(multiply_rows, "0", __VA_ARGS__)
#define DEFINE_VALUES(...) DEFINE_IN_REGISTERS(multiply_values, "1", __VA_ARGS__)
#define DEFINE_PRODUCTS(T, TYPE)                              \
  DEFINE_KEYS(T, TYPE, 16, 8, "8", "9", "10")                 \
  DEFINE_KEYS(T, TYPE, 32, 16, "16", "17", "18")              \
  DEFINE_KEYS(T, TYPE, 64, 32, "32", "33", "34")              \
  DEFINE_KEYS(T, TYPE, 128, 64, "64", "65", "66")             \
  DEFINE_KEYS(T, TYPE, 256, 128, "128", "129", "130")         \
  DEFINE_ROWS(T, TYPE, 16, 8, "8", "9", "10", "11", "12")      \
  DEFINE_ROWS(T, TYPE, 32, 16, "16", "17", "18", "19", "20")   \
  DEFINE_ROWS(T, TYPE, 64, 32, "32", "33", "34", "35", "36")   \
  DEFINE_ROWS(T, TYPE, 128, 64, "64", "65", "66", "67", "68")  \
  DEFINE_VALUES(T, TYPE, 64, 32, "32", "33", "34", "35", "36") \
  DEFINE_VALUES(T, TYPE, 128, 64, "64", "65", "66", "67", "68")
DEFINE_PRODUCTS(bf16, "bf16")
DEFINE_PRODUCTS(f16, "f16")

// multiply_keys of 8-bit numbers: as many bytes, 32 of them along a row. Sums of s8 are exact integers, those of e4m3 are kept
// with fewer bits than a float has.
template <class T, int kColumns>
__device__ inline void multiply_keys(int (&c)[kColumns / 2], u64 a, u64 b, bool accumulate);
#define DEFINE_NARROW(T, NUMBER, TYPES, F, SCALES, COLUMNS, SIZE, A0, A1, A2)                                              \
  template <> __device__ inline void multiply_keys<T, COLUMNS>(NUMBER (&c)[SIZE], u64 a, u64 b, bool accumulate) {         \
    asm volatile("{ .reg .pred accumulate; setp.ne.b32 accumulate, %" A2 ", 0;\n"                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k32." TYPES                                                 \
                 " {" LIST_##SIZE "}, %" A0 ", %" A1 ", accumulate" SCALES "; }"                                           \
                 : IN_OUT_##SIZE(F, c, 0) : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                            \
  }
#define DEFINE_NARROW_PRODUCTS(...)                          \
  DEFINE_NARROW(__VA_ARGS__, 16, 8, "8", "9", "10")          \
  DEFINE_NARROW(__VA_ARGS__, 32, 16, "16", "17", "18")       \
  DEFINE_NARROW(__VA_ARGS__, 64, 32, "32", "33", "34")       \
  DEFINE_NARROW(__VA_ARGS__, 128, 64, "64", "65", "66")
DEFINE_NARROW_PRODUCTS(e4m3, float, "f32.e4m3.e4m3", "+f", ", 1, 1")
DEFINE_NARROW_PRODUCTS(s8, int, "s32.s8.s8", "+r", "")
#undef DEFINE_NARROW_PRODUCTS
#undef DEFINE_NARROW
#undef DEFINE_PRODUCTS
#undef DEFINE_VALUES
#undef DEFINE_ROWS
#undef DEFINE_IN_REGISTERS
#undef DEFINE_KEYS
