// Standard Gumbel noise [rows, vocab_size] that depends on nothing but (seed, position, token id): Philox 4x32-10 (Salmon
// et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with counter (token_id / 4, 0, position, 0) and key seed;
// word token_id % 4 becomes u in (0, 1) and the noise -log(-log(u)).
//
// A thread makes the four numbers of one counter. Bound by arithmetic (ten rounds and eight logarithms).
#include "types.cuh"

struct Words { u32 of[4]; };

__device__ inline Words philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 key0, u32 key1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const u32 high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 23 bits and a half: every such number is a float32, the largest below 1.
__device__ inline float gumbel(u32 word) {
  const float uniform = (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
  return -logf(-logf(uniform));
}

// Grid: x = rows, y = counters.
extern "C" __global__ void gumbel_noise(float* noise, const i64* seeds, const i64* positions, int vocab_size) {
  const i64 row = blockIdx.x;
  const int counter = blockIdx.y * blockDim.x + threadIdx.x;
  if (4 * counter >= vocab_size) return;
  const u64 seed = static_cast<u64>(seeds[row]);
  const Words words = philox(counter, 0, static_cast<u32>(positions[row]), 0, static_cast<u32>(seed),
                             static_cast<u32>(seed >> 32));
  float* target = noise + row * vocab_size + 4 * counter;
  if (vocab_size % 4 == 0) {  // then every row starts at a 16-byte boundary
    const float drawn[4] = {gumbel(words.of[0]), gumbel(words.of[1]), gumbel(words.of[2]), gumbel(words.of[3])};
    store(target, drawn);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (4 * counter + i < vocab_size) target[i] = gumbel(words.of[i]);
}
