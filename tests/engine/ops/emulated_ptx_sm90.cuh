// In place of common/ptx_sm90.cuh on the CPU (see emulated_ptx.cuh): barriers, the copy engine and products of warpgroups.
//
// What runs in the background is done as late as can be: boxes come when somebody waits for their barrier, products read
// their operands and write their result when they are waited for. Operands are found by their descriptors, as the PTX
// manual's "Matrix descriptor" and canonical layouts say, not by what the kernel meant.
#pragma once

#include <map>

#include "ptx.cuh"

// Shared memory has addresses of its own, from 0.
inline unsigned char* shared_base() { return reinterpret_cast<unsigned char*>(dynamic_shared.data()); }
inline u32 shared_address(const void* pointer) { return dynamic_shared.offset_of(pointer); }
inline u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

// Barriers.

using Barrier = u64;
struct BarrierState {
  int expected, missing;
  i64 bytes = 0;
  u32 phase = 0;
  std::vector<std::function<int()>> copies = {};  // each says how many bytes it brought
  void settle() {
    if (missing < 0) fail("too many arrivals");
    if (missing > 0 || bytes != 0) return;
    missing = expected, phase ^= 1;
  }
};
inline std::map<const Barrier*, BarrierState> barrier_states;

inline void barrier_init(Barrier& barrier, int arrivals) {
  shared_address(&barrier);
  barrier_states[&barrier] = {arrivals, arrivals};
}
inline void barrier_init_fence() {}
inline void barrier_arrive_expecting(Barrier& barrier, int bytes) {
  BarrierState& state = barrier_states.at(&barrier);
  state.missing -= 1, state.bytes += bytes;
  state.settle();
}
inline void barrier_arrive(Barrier& barrier) { barrier_arrive_expecting(barrier, 0); }
inline void barrier_arrive_in_block(Barrier& barrier, int rank) { barrier_arrive(const_cast<Barrier&>(*in_block(&barrier, rank))); }
inline void cp_async_arrive(Barrier& barrier) {
  BarrierState& state = barrier_states.at(&barrier);
  state.copies.push_back([&state, copies = std::move(fiber->open)] {
    copy_all(copies);
    state.missing -= 1;
    return 0;
  });
  fiber->open.clear();
}
inline void barrier_wait(Barrier& barrier, u32 parity) {
  BarrierState& state = barrier_states.at(&barrier);
  wait_until([&] {
    for (auto& copy : state.copies) state.bytes -= copy();
    if (!state.copies.empty()) state.copies.clear(), state.settle();
    return state.phase != parity;
  });
}

struct NumberedBarrier { int arrived = 0; u64 meetings = 0; };
inline std::map<int, NumberedBarrier> numbered_barriers;  // 16 of each block
inline NumberedBarrier& numbered_barrier(int which) { return numbered_barriers[fiber->block * 16 + which]; }
inline void pass_threads(int which, int num_threads) {
  NumberedBarrier& barrier = numbered_barrier(which);
  if (++barrier.arrived == num_threads) barrier.arrived = 0, barrier.meetings += 1;
}
inline void meet_threads(int which, int num_threads) {
  const u64 before = numbered_barrier(which).meetings;
  pass_threads(which, num_threads);
  wait_until([=] { return numbered_barrier(which).meetings != before; });
}

template <int kCount> void shrink_registers() {}
template <int kCount> void grow_registers() {}
inline void publish_shared_writes() {}

// The copy engine. The emulated map: address, rows, numbers in a row, rows in a box, and its columns; 0: 64 of them, swizzled.
// What lies past the matrix is zero.

struct alignas(64) TensorMap { u64 words[16]; };

inline void copy_box_to_blocks(void* shared, const TensorMap& map, int row, int column, Barrier& barrier, u16 blocks) {
  const auto [address, num_rows, row_length, box_rows] = std::array<u64, 4>{map.words[0], map.words[1], map.words[2], map.words[3]};
  const u64 box_columns = map.words[4] ? map.words[4] : 64;
  const bool is_swizzled = map.words[4] == 0;
  const u32 target = shared_address(shared);
  if (target % (is_swizzled ? 1024 : 128) != 0) fail("misaligned box");
  if (row < 0 || column < 0) fail("box outside the matrix");
  if (row_length % 8 != 0) fail("rows at places that the copy engine does not reach");
  if (box_columns > 256 || box_rows > 256) fail("box too large");
  const u16* source = reinterpret_cast<const u16*>(address);
  for (int rank = 0; rank < cluster_size(); ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    barrier_states.at(in_block(&barrier, rank)).copies.push_back([=] {  // called by a thread of that block
      const u64 pieces = box_columns / 8;  // of a row
      for (u64 piece = 0; piece < box_rows * pieces; ++piece) {
        const u64 from_row = row + piece / pieces, from_column = column + piece % pieces * 8;
        const u32 at = target + piece * 16;
        unsigned char* to = shared_base() + (is_swizzled ? swizzled(at) : at);
        if (from_row < num_rows && from_column < row_length) std::memcpy(to, source + from_row * row_length + from_column, 16);
        else std::memset(to, 0, 16);
      }
      return static_cast<int>(box_rows * box_columns * 2);
    });
  }
}
inline void copy_box(void* shared, const TensorMap& map, int row, int column, Barrier& barrier) {
  copy_box_to_blocks(shared, map, row, column, barrier, 1 << cluster_rank());
}

inline void prefetch_map(const TensorMap&) {}

inline void copy_octets(void* shared, const TensorMap& map, int octet, Barrier& barrier) {
  const auto [address, num_rows, row_length, box_rows] = std::array<u64, 4>{map.words[0], map.words[1], map.words[2], map.words[3]};
  const u32 target = shared_address(shared);
  if (target % 1024 != 0) fail("misaligned box");
  if (octet < 0 || octet * 8 + box_rows > num_rows) fail("box outside the matrix");
  const u16* source = reinterpret_cast<const u16*>(address) + octet * 8 * row_length;
  barrier_states.at(&barrier).copies.push_back([=] {
    u32 to = target;
    for (u64 first = 0; first < box_rows; first += 8)
      for (u64 panel = 0; panel < row_length; panel += 64)
        for (u64 row = first; row < first + 8; ++row)
          for (u64 piece = 0; piece < 8; ++piece, to += 16)
            std::memcpy(shared_base() + swizzled(to), source + row * row_length + panel + piece * 8, 16);
    return static_cast<int>(box_rows * row_length * 2);
  });
}

inline void copy_bytes(void* shared, const void* global, int bytes, Barrier& barrier) {
  if (shared_address(shared) % 16 != 0 || reinterpret_cast<u64>(global) % 16 != 0 || bytes % 16 != 0) fail("misaligned copy");
  shared_address(static_cast<unsigned char*>(shared) + bytes - 1);
  barrier_states.at(&barrier).copies.push_back([=] {
    std::memcpy(shared, global, bytes);
    return bytes;
  });
}

// Products.

inline u64 panel_descriptor(const void* shared, int panel_bytes) {
  return shared_address(shared) / 16 | static_cast<u64>(panel_bytes / 16) << 16 | 64ull << 32 | 1ull << 62;
}
inline u64 octet_descriptor(const void* shared, int num_panels) {
  return shared_address(shared) / 16 | 64ull << 16 | num_panels * 64ull << 32 | 1ull << 62;
}
inline u64 further(u64 descriptor, int bytes) { return descriptor + bytes / 16; }

struct Descriptor {
  u32 start, leading, stride;  // bytes
  explicit Descriptor(u64 descriptor)
      : start((descriptor & 0x3fff) * 16), leading((descriptor >> 16 & 0x3fff) * 16), stride((descriptor >> 32 & 0x3fff) * 16) {
    if (descriptor >> 62 != 1) fail("the emulator knows the 128-byte swizzle alone");
  }
  template <class T> float at(u32 offset) const {
    u16 bits;
    std::memcpy(&bits, shared_base() + swizzled(start + offset), 2);
    return unpack<T>(bits).x;
  }
  // 16 numbers along k lie side by side: rows are 128 bytes apart, groups of 8 rows `stride`.
  template <class T> float of_rows(int row, int k) const { return at<T>(row / 8 * stride + row % 8 * 128 + k * 2); }
  // The same of 32 numbers of a byte.
  unsigned char byte_of_rows(int row, int k) const { return shared_base()[swizzled(start + row / 8 * stride + row % 8 * 128 + k)]; }
  // Columns lie side by side, 64 of them; the next 64 `leading` further; groups of 8 k `stride`.
  template <class T> float of_columns(int k, int column) const {
    return at<T>(column / 64 * leading + k / 8 * stride + k % 8 * 128 + column % 64 * 2);
  }
};

struct Products { std::vector<std::function<void()>> open; std::vector<std::vector<std::function<void()>>> groups; };
inline std::map<int, Products> products_of_thread;

inline void warpgroup_begin() {}
inline void warpgroup_commit() {
  Products& mine = products_of_thread[fiber->thread];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
template <int kPending> void warpgroup_wait() {
  auto& groups = products_of_thread[fiber->thread].groups;
  while (groups.size() > kPending) {
    for (auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
}
template <class T> void pin(T&) {}

// c += A · B for a lane, with A(row 0 to 15 of the warp, k) and B(k, column).
template <int kColumns, class A, class B> void accumulate(float (&c)[kColumns / 2], A a, B b) {
  const int lane = threadIdx.x % 32;
  for (int k = 0; k < 16; ++k) {
    const float left[2] = {a(lane / 4, k), a(lane / 4 + 8, k)};
    for (int n = 0; n < kColumns / 8; ++n)
      for (int j = 0; j < 2; ++j) {
        const float right = b(k, n * 8 + lane % 4 * 2 + j);
        c[n * 4 + j] += left[0] * right;
        c[n * 4 + 2 + j] += left[1] * right;
      }
  }
}

template <class T> struct SumOfNarrowType { using Type = float; };
template <> struct SumOfNarrowType<s8> { using Type = int; };
template <class T> using SumOfNarrow = typename SumOfNarrowType<T>::Type;
template <class T, int kColumns> void multiply_keys_narrow(SumOfNarrow<T> (&c)[kColumns / 2], u64 a, u64 b, bool accumulates);

template <class T, int kColumns> void multiply_keys(float (&c)[kColumns / 2], u64 a, u64 b, bool accumulates) {
  if constexpr (sizeof(T) == 1) return multiply_keys_narrow<T, kColumns>(c, a, b, accumulates);
  else {
  const Descriptor queries(a), keys(b);
  const int first_row = threadIdx.x / 32 % 4 * 16;
  products_of_thread[fiber->thread].open.push_back([=, &c] {
    if (!accumulates) std::fill(std::begin(c), std::end(c), 0.0f);
    accumulate<kColumns>(
        c, [&](int row, int k) { return queries.of_rows<T>(first_row + row, k); },
        [&](int k, int column) { return keys.of_rows<T>(column, k); });
  });
  }
}

// Of 8-bit numbers: 32 of them along a row, as many bytes as 16 of 16 bits.
template <class T> double narrow_value(unsigned char bits) {
  if constexpr (std::is_same_v<T, e4m3>) return e4m3_value(bits);
  else return static_cast<signed char>(bits);
}
template <class T, int kColumns> void multiply_keys_narrow(SumOfNarrow<T> (&c)[kColumns / 2], u64 a, u64 b, bool accumulates) {
  const Descriptor left(a), right(b);
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 % 4 * 16;
  products_of_thread[fiber->thread].open.push_back([=, &c] {
    if (!accumulates) std::fill(std::begin(c), std::end(c), 0);
    for (int k = 0; k < 32; ++k)
      for (int i = 0; i < kColumns / 2; ++i) {
        const int row = first_row + lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        c[i] += narrow_value<T>(left.byte_of_rows(row, k)) * narrow_value<T>(right.byte_of_rows(column, k));
      }
  });
}
template <class T, int kColumns> void multiply_keys(int (&c)[kColumns / 2], u64 a, u64 b, bool accumulates) {
  multiply_keys_narrow<T, kColumns>(c, a, b, accumulates);
}

// A in registers: each lane's words, and what a lane needs of a row of A.
struct Words { u32 of[4]; };
struct Rows {
  std::array<Words, 4> words;
  explicit Rows(const u32 (&a)[4]) {
    const Words* brought = meet(Words{{a[0], a[1], a[2], a[3]}});
    for (int i = 0; i < 4; ++i) words[i] = brought[fiber->thread % 32 / 4 * 4 + i];
  }
  template <class T> float at(int row, int k) const {
    const float2 pair = unpack<T>(words[k % 8 / 2].of[row / 8 + 2 * (k / 8)]);
    return k % 2 ? pair.y : pair.x;
  }
};
template <class T, int kColumns> void multiply_rows(float (&c)[kColumns / 2], const u32 (&a)[4], u64 b) {
  const Rows left(a);
  const Descriptor right(b);
  products_of_thread[fiber->thread].open.push_back([=, &c] {
    accumulate<kColumns>(
        c, [&](int row, int k) { return left.at<T>(row, k); }, [&](int k, int column) { return right.of_rows<T>(column, k); });
  });
}
template <class T, int kColumns> void multiply_values(float (&c)[kColumns / 2], const u32 (&a)[4], u64 b) {
  const Rows left(a);
  const Descriptor right(b);
  products_of_thread[fiber->thread].open.push_back([=, &c] {
    accumulate<kColumns>(
        c, [&](int row, int k) { return left.at<T>(row, k); }, [&](int k, int column) { return right.of_columns<T>(k, column); });
  });
}
