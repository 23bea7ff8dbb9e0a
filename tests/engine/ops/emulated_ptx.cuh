// A GPU of one block (or cluster of blocks) at a time, on the CPU: what the kernels need of CUDA, and in place of common/ptx.cuh its instructions.
//
// Each thread of a block is a fiber; fibers take turns and change only where threads meet (barriers, shuffles, tensor core
// instructions). So kernels can be stepped through with a debugger and checked where there is no GPU. Background copies
// are made late, when they are waited for: a kernel that forgets to wait reads what was there before.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;
using std::max;
using std::min;

struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Dim { int x, y, z; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From> To bits_as(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline float __uint_as_float(u32 x) { return bits_as<float>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline u32 __float_as_uint(float x) { return bits_as<u32>(x); }
inline u32 __umulhi(u32 a, u32 b) { return static_cast<u64>(a) * b >> 32; }
inline float __expf(float x) { return std::exp(x); }
inline float __uint2float_ru(u32 x) {
  const float nearest = static_cast<float>(x);
  return nearest < static_cast<double>(x) ? std::nextafter(nearest, HUGE_VALF) : nearest;
}
inline float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? __uint_as_float(0x7fffffffu) : std::fmax(a, b); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// The threads.

struct Copy { void* to; const void* from; bool is_valid; };
struct Warp {
  u64 arrivals[32] = {};
  alignas(16) unsigned char slots[2][32][64];  // by parity: nobody is two meetings ahead of another
};
struct Fiber {
  ucontext_t context;
  static constexpr int kStackBytes = 128 << 10;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};  // takes memory where it is used
  int thread, block;  // in the cluster
  u64 barriers, meetings;  // of the block, of the cluster
  bool is_done, has_waited;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

inline Dim gridDim, blockDim, blockIdx, threadIdx;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline Fiber* fiber;
inline std::function<void()> kernel;
inline void fail(const char* what) {
  std::fprintf(stderr, "thread %d of block (%d, %d, %d): %s\n", threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z, what);
  std::abort();
}

struct alignas(1024) Kilobyte { uint4 of[64] = {}; };
struct SharedMemory {  // at a multiple of 1 KiB in every block
  std::vector<Kilobyte> kilobytes;
  i64 num_bytes;
  explicit SharedMemory(i64 num_bytes) : kilobytes((num_bytes + 1023) / 1024), num_bytes(num_bytes) {
    std::memset(data(), ~0, num_bytes);  // NaN in every type
  }
  uint4* data() { return reinterpret_cast<uint4*>(kilobytes.data()); }
  i64 offset_of(const void* pointer) {
    const i64 offset = static_cast<const char*>(pointer) - reinterpret_cast<char*>(data());
    if (offset < 0 || offset >= num_bytes) fail("not in shared memory");
    return offset;
  }
};
inline std::vector<SharedMemory> shared_of_block;
#define dynamic_shared shared_of_block[fiber->block]

template <class Ready> void wait_until(Ready ready) {
  for (int turns = 0; !ready(); ++turns) {
    if (turns > 1 << 20) fail("waits for ever");
    swapcontext(&fiber->context, &scheduler);
  }
}

inline void __syncthreads() {
  const u64 mine = ++fiber->barriers;
  wait_until([mine] {
    return std::all_of(fibers.begin(), fibers.end(), [mine](const Fiber& f) {
      return f.block != fiber->block || f.is_done || f.barriers >= mine;
    });
  });
}

// Every lane of a warp brings something and sees what all brought.
template <class T> const T* meet(const T& brought) {
  static_assert(sizeof(T) <= 64);
  Warp& warp = warps[fiber->thread / 32];
  const int lane = fiber->thread % 32;
  const u64 mine = ++warp.arrivals[lane];
  T* slots = reinterpret_cast<T*>(warp.slots[mine % 2]);
  slots[lane] = brought;
  wait_until([&warp, mine] {
    for (int other = 0; other < 32; ++other) {
      if (warp.arrivals[other] >= mine) continue;
      if (fibers[fiber->thread / 32 * 32 + other].is_done) fail("meets a lane that has left");
      return false;
    }
    return true;
  });
  return slots;
}
template <class T> T __shfl_xor_sync(u32, T x, int distance) { return meet(x)[fiber->thread % 32 ^ distance]; }
template <class T> T __shfl_sync(u32, T x, int lane) { return meet(x)[lane]; }
inline void __syncwarp() { meet(0); }
inline u32 __ballot_sync(u32, bool mine) {
  const bool* all = meet(mine);
  u32 word = 0;
  for (int lane = 0; lane < 32; ++lane) word |= static_cast<u32>(all[lane]) << lane;
  return word;
}
inline int __popc(u32 word) { return __builtin_popcount(word); }
template <class T> T __shfl_up_sync(u32, T x, int distance) {
  const int lane = fiber->thread % 32;
  return meet(x)[lane < distance ? lane : lane - distance];
}
inline int __reduce_add_sync(u32, int x) {
  const int* all = meet(x);
  int sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += all[lane];
  return sum;
}
inline u32 __reduce_max_sync(u32, u32 x) {
  const u32* all = meet(x);
  return *std::max_element(all, all + 32);
}
template <class T> T atomicAdd(T* number, T x) { return (*number += x) - x; }
inline u32 atomicOr(u32* number, u32 x) { return std::exchange(*number, *number | x); }
inline int __ffs(u32 bits) { return __builtin_ffs(bits); }

inline void fiber_main() {
  kernel();
#ifdef MAY_OVERLAP
  if (!fiber->has_waited) fail("has not waited for its inputs");
#endif
  fiber->is_done = true;
  swapcontext(&fiber->context, &scheduler);
}

inline void run_cluster(int num_threads, int num_blocks) {
  const int first_block = blockIdx.x;
  fibers.resize(num_threads * num_blocks);
  warps.assign(fibers.size() / 32, Warp());
  for (int thread = 0; thread < num_threads * num_blocks; ++thread) {
    Fiber& each = fibers[thread];
    each.thread = thread, each.block = thread / num_threads, each.barriers = each.meetings = 0, each.is_done = each.has_waited = false;
    each.groups.clear(), each.open.clear();
    getcontext(&each.context);
    each.context.uc_stack.ss_sp = each.stack.get();
    each.context.uc_stack.ss_size = Fiber::kStackBytes;
    makecontext(&each.context, fiber_main, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (Fiber& each : fibers) {
      if (each.is_done) continue;
      any = true;
      fiber = &each;
      threadIdx = {each.thread % num_threads, 0, 0};
      blockIdx.x = first_block + each.block;
      swapcontext(&scheduler, &each.context);
    }
  }
}

inline void run_grid(const int* grid, int num_threads, int shared_bytes, int cluster, std::function<void()> body) {
  kernel = body;
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {num_threads, 1, 1};
#ifdef BLOCKS_WAIT
  cluster = grid[0];  // for each other, so they run at the same time
#endif
  for (int z = 0; z < grid[2]; ++z)
    for (int y = 0; y < grid[1]; ++y)
      for (int x = 0; x < grid[0]; x += cluster) {
        blockIdx = {x, y, z};
        shared_of_block.assign(cluster, SharedMemory(shared_bytes));
        run_cluster(num_threads, cluster);
      }
}

// Number types.

struct bf16 { u16 bits; };
struct f16 { u16 bits; };
struct e4m3 { unsigned char bits; };
struct s8 { signed char bits; };

template <class T> float2 unpack(u32 word);
template <> inline float2 unpack<bf16>(u32 word) { return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)}; }
template <> inline float2 unpack<f16>(u32 word) {
  return {static_cast<float>(bits_as<_Float16>(static_cast<u16>(word))),
          static_cast<float>(bits_as<_Float16>(static_cast<u16>(word >> 16)))};
}
inline u16 to_bf16(float x) {
  const u32 bits = __float_as_uint(x);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}
template <class T> u32 pack(float low, float high);
template <> inline u32 pack<bf16>(float low, float high) { return to_bf16(low) | static_cast<u32>(to_bf16(high)) << 16; }
template <> inline u32 pack<f16>(float low, float high) {
  return bits_as<u16>(static_cast<_Float16>(low)) | static_cast<u32>(bits_as<u16>(static_cast<_Float16>(high))) << 16;
}

// In double, products and sums of such numbers are exact, but for what no kernel adds.
template <class T> u32 fma_pair(u32 a, u32 b, u32 c) {
  const auto one = [](float a, float b, float c) { return static_cast<float>(static_cast<double>(a) * b + c); };
  const float2 x = unpack<T>(a), y = unpack<T>(b), z = unpack<T>(c);
  return pack<T>(one(x.x, y.x, z.x), one(x.y, y.y, z.y));
}

// Sign, four bits of exponent, three of fraction; the last code is no number.
inline float e4m3_value(u32 bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  const float size = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
  return (bits & 127) == 127 ? NAN : bits & 128 ? -size : size;
}
// The nearest number, of two the even one, by trying all.
inline u32 to_e4m3(float x) {
  if (std::isnan(x)) return 127;
  u32 best = 0;
  const float size = std::fabs(x);
  for (u32 bits = 1; bits < 127; ++bits) {
    const float distance = std::fabs(e4m3_value(bits) - size), least = std::fabs(e4m3_value(best) - size);
    if (distance < least || (distance == least && bits % 2 == 0)) best = bits;
  }
  return best | (std::signbit(x) ? 128 : 0);
}
inline u16 pack_e4m3(float low, float high) { return to_e4m3(low) | to_e4m3(high) << 8; }
template <class T> uint2 widen(u32 word) {
  const auto number = [&](int i) { return e4m3_value(word >> 8 * i & 255); };
  return make_uint2(pack<T>(number(0), number(1)), pack<T>(number(2), number(3)));
}

// The instructions of common/ptx.cuh.

inline u32 unpack_e4m3(u32 word) {
  const auto number = [](u32 bits) {
    const int exponent = bits >> 3 & 15, fraction = bits & 7;
    const float size = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
    return (bits & 127) == 127 ? NAN : bits >> 7 ? -size : size;
  };
  return pack<f16>(number(word & 255), number(word >> 8 & 255));
}
inline u32 select_bytes(u32 first, u32 second, u32 selector) {
  const u64 both = first | static_cast<u64>(second) << 32;
  u32 bytes = 0;
  for (int i = 0; i < 4; ++i) bytes |= static_cast<u32>(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return bytes;
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float tanh_fast(float x) { return std::tanh(x); }

inline void cp_async_16(void* shared, const void* global, bool is_valid) {
  if (reinterpret_cast<u64>(shared) % 16 != 0) fail("misaligned copy");
  fiber->open.push_back({shared, global, is_valid});
}
inline void copy_all(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.is_valid) std::memcpy(copy.to, copy.from, 16);
    else std::memset(copy.to, 0, 16);
  }
}
inline void cp_async_commit() {
  fiber->groups.push_back(fiber->open);
  fiber->open.clear();
}
template <int kPending> void cp_async_wait() {
  auto& groups = fiber->groups;
  while (groups.size() > kPending) {
    copy_all(groups.front());
    groups.erase(groups.begin());
  }
}

inline int cluster_size() { return shared_of_block.size(); }
inline int cluster_rank() { return fiber->block; }
inline int cluster_id() { return blockIdx.x / cluster_size(); }
inline int num_clusters() { return gridDim.x / cluster_size(); }
inline void meet_cluster() {
  const u64 mine = ++fiber->meetings;
  wait_until([mine] {
    return std::all_of(fibers.begin(), fibers.end(), [mine](const Fiber& f) { return f.is_done || f.meetings >= mine; });
  });
}
template <class T> const T* in_block(const T* mine, int rank) {
  const auto is_there = [rank](const Fiber& f) { return f.block == rank && !f.is_done; };
  if (std::none_of(fibers.begin(), fibers.end(), is_there)) fail("the other block has left");
  return reinterpret_cast<const T*>(reinterpret_cast<char*>(shared_of_block[rank].data()) + dynamic_shared.offset_of(mine));
}

inline void prefetch_l2(const void*) {}
inline void wait_for_inputs() { fiber->has_waited = true; }
inline void start_dependents() {}
inline void prefetch(const void*) {}

inline void ldmatrix(u32 (&matrices)[4], const void* shared_row) {
  if (reinterpret_cast<u64>(shared_row) % 16 != 0) fail("misaligned row");
  const auto* rows = meet(static_cast<const u16*>(shared_row));
  const int lane = fiber->thread % 32;
  for (int i = 0; i < 4; ++i) {
    const u16* row = rows[i * 8 + lane / 4];
    matrices[i] = row[lane % 4 * 2] | static_cast<u32>(row[lane % 4 * 2 + 1]) << 16;
  }
}
inline void ldmatrix_transposed(u32 (&matrices)[4], const void* shared_row) {
  if (reinterpret_cast<u64>(shared_row) % 16 != 0) fail("misaligned row");
  const auto* rows = meet(static_cast<const u16*>(shared_row));
  const int lane = fiber->thread % 32;
  for (int i = 0; i < 4; ++i)
    matrices[i] = rows[i * 8 + lane % 4 * 2][lane / 4] | static_cast<u32>(rows[i * 8 + lane % 4 * 2 + 1][lane / 4]) << 16;
}

inline u32 transpose(u32 matrix) {
  const u32* rows = meet(matrix);
  const int row = fiber->thread % 4 * 2, column = fiber->thread % 32 / 4;
  const auto number = [&](int at) { return rows[at * 4 + column / 2] >> (column % 2 * 16) & 0xffff; };
  return number(row) | number(row + 1) << 16;
}
inline int load_acquire(const int* counter) { return *counter; }
inline void wait_for_arrivals(const int* counter, int arrivals) {
  wait_until([=] { return *counter >= arrivals; });
}
inline int arrive(int* counter) { return (*counter)++; }

// By the tables of the PTX manual for m16n8k16: register i of operand A holds row lane / 4 + 8 (i % 2) and columns
// 2 (lane % 4) + 8 (i / 2) + {0, 1}; of B rows 2 (lane % 4) + 8 i + {0, 1} and column lane / 4; C's number i row
// lane / 4 + 8 (i / 2) and column 2 (lane % 4) + i % 2.
struct Operands { u32 a[4], b[2]; };
template <class T> void mma_16x8x16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const Operands* operands = meet(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto half = [](u32 word, int which) { return which ? unpack<T>(word).y : unpack<T>(word).x; };
  const int lane = fiber->thread % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const Operands& left = operands[row % 8 * 4 + k % 8 / 2];
      const Operands& right = operands[column * 4 + k % 8 / 2];
      c[i] += half(left.a[row / 8 + 2 * (k / 8)], k % 2) * half(right.b[k / 8], k % 2);
    }
  }
}
// The same for m16n8k32: register i of operand A holds row lane / 4 + 8 (i % 2) and columns 4 (lane % 4) + 16 (i / 2) + {0 to 3};
// of B rows 4 (lane % 4) + 16 i + {0 to 3} and column lane / 4.
inline void mma_16x8x32(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const Operands* operands = meet(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto number = [](u32 word, int which) { return static_cast<int>(static_cast<signed char>(word >> 8 * which)); };
  const int lane = fiber->thread % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 32; ++k) {
      const Operands& left = operands[row % 8 * 4 + k % 16 / 4];
      const Operands& right = operands[column * 4 + k % 16 / 4];
      c[i] += number(left.a[row / 8 + 2 * (k / 16)], k % 4) * number(right.b[k / 16], k % 4);
    }
  }
}
