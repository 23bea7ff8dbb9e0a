// One token a row of logits [n, vocab_size], by the parameters in the row's line of a table; the best token of each row; log
// probabilities; and the random numbers of the draws.
//
// A cluster of blocks shares a row, each block reads its own part of it once for every question: what is the best logit,
// how far behind it do top-k, top-p and min-p reach, which token is drawn. The row stays in the L2 cache between the
// questions, nothing is sorted, and no question needs the host. How far a logit lies behind the best is counted in whole
// steps of 2^-24, and what blocks add up are integers: a token does not depend on how many blocks share the row.
//
// NaN counts as more than every number, so the best of a row tells whether the row has a token at all (`has_token`).
//
// Bound by reading (a row without limits is read once, with top-k and top-p four to eight times) and, where many tokens can
// be drawn, by the arithmetic of their noise.
#include "types.cuh"
#include "reduce.cuh"

constexpr int kThreads = 768, kWarps = kThreads / 32;
constexpr int kBins = kThreads;                      // of a histogram, one a thread
constexpr int kCopies = 4;                           // of a histogram, so that few lanes add to the same word
constexpr int kSeen = 2 * kCopies * kBins;           // tokens whose uses are counted at a time
constexpr int kMaxBlocks = 8;                        // of a cluster
constexpr float kStepsPerNat = 0x1p24f;
constexpr u32 kOutOfReach = 1u << 30;  // 64 nats: what is further behind has no part in anything
// The head of a row is what is less than 6 nats behind, its bins are of 2^17 steps; those of the tail are of 2^21, and a bin is
// divided into 2^9.
constexpr int kHeadShift = 17, kTailShift = 21, kFinerShift = 9;
static_assert(kBins >> kFinerShift > 0 && kBins << kHeadShift < kOutOfReach - 1 && kOutOfReach >> kTailShift <= kBins,
              "the bins of a histogram are enough for what they divide");
constexpr float kMostNoise = 16.64f;   // -log(-log(1 - 2^-24)) is less
constexpr float kLowest = -3.402823466e38f;

// As in engine/ops/sampling_line.py. After it: the forbidden tokens, then pairs of a token and its bias.
struct Line {
  float inverse_temperature;  // 0: the best token is taken
  float top_p;
  int top_k;  // 0: all
  u32 max_steps;  // min-p as the steps that a token may lie behind the best
  float repetition_penalty, presence_penalty, frequency_penalty;
  int num_prompt_tokens, min_tokens, num_forbidden, num_biased, has_penalties;
  u64 seed;
};


struct Best { float value = -kInfinity; int token = 0; };
struct Words { u32 of[4]; };

// The tokens in this thread's bin of distances from the best, and in all bins before it. Masses are sums of e^-distance, in
// units of 2^-40.
struct Sum { u64 mass; u32 count; };
struct Bin { Sum before, own, total; };
struct Found { int bin; Sum before, own; };
struct Limit { u32 steps; u64 mass; };

struct Shared {
  u32 seen[kSeen];       // uses of tokens, then histograms
  u64 bins[2][kBins];    // of the block: counts in the upper half, deficits in the lower
  u64 best_of_warp[2][kWarps], best[2];
  Sum sum_of_warp[kWarps];
  u64 number_of_warp[kWarps], numbers[2], tail_mass;
  Found found;
};
static_assert(sizeof(Shared) <= 40 << 10, "engine/ops/cuda/sampling.py gives as much");

// What one block has of a row: groups [first, last) of four tokens.
struct Part { Shared& shared; float* row; int vocab_size, first, last; };

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

// The four words of a group of tokens: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011) with counter (token / 4, 0, position, 0) and key seed.
__device__ inline Words words_of(int group, int position, u64 seed) {
  return philox(group, 0, position, 0, static_cast<u32>(seed), static_cast<u32>(seed >> 32));
}
// 23 bits and a half: every such number is a float32, the largest below 1.
__device__ inline float uniform(u32 word) { return (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f; }
__device__ inline float gumbel(u32 word) { return -logf(-logf(uniform(word))); }

__device__ inline Part part_of(uint4* shared, float* logits, int vocab_size) {
  const int num_groups = ceil_div(vocab_size, 4), each = ceil_div(num_groups, cluster_size());
  const int first = min(cluster_rank() * each, num_groups);
  return {*reinterpret_cast<Shared*>(shared), logits + static_cast<i64>(blockIdx.y) * vocab_size, vocab_size, first,
          min(first + each, num_groups)};
}

// Past the part, tokens have the logit -infinity.
__device__ inline void load_group(const Part& part, int group, float (&logits)[4]) {
  if (group < part.last && part.vocab_size % 4 == 0) return load(part.row + 4 * group, logits);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    logits[i] = group < part.last && 4 * group + i < part.vocab_size ? part.row[4 * group + i] : -kInfinity;
}

// Show a thread its groups, several of them on their way at a time; the threads of a warp stay together.
template <int kHeld, class Visit> __device__ inline void for_each_group(const Part& part, Visit visit) {
  for (int start = part.first; start < part.last; start += kHeld * kThreads) {
    const int group = start + threadIdx.x;
    float held[kHeld][4];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) load_group(part, group + i * kThreads, held[i]);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) visit(held[i], group + i * kThreads);
  }
}

// Tokens come in rising order: of equal ones the first stays. After NaN the best is NaN.
__device__ inline void consider(Best& best, float value, int token) {
  const float most = max_or_nan(best.value, value);
  if (most != best.value) best.token = token;
  best.value = most;
}
// Whether the best of a row can be drawn: not NaN, not infinite, not what is left of a row of nothing but -infinity.
__device__ inline bool has_token(Best best) { return fabsf(best.value) < kInfinity; }
__device__ inline void consider_group(Best& best, const float (&values)[4], int group) {
#pragma unroll
  for (int i = 0; i < 4; ++i) consider(best, values[i], 4 * group + i);
}

// Numbers as integers of the same order: that of their bits, of negative ones the other way round. Adding 0 makes one number
// of -0 and 0. NaN as `consider` makes it is the largest.
__device__ inline u32 ordered(float x) {
  const u32 bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float from_ordered(u32 x) { return __uint_as_float(x & 0x80000000u ? x & 0x7fffffffu : ~x); }

// Of equal numbers the one with the lowest token has the largest key.
__device__ inline u64 key_of(Best best) {
  return static_cast<u64>(ordered(best.value)) << 32 | ~static_cast<u32>(best.token);
}
__device__ inline Best best_of(u64 key) {
  return {from_ordered(static_cast<u32>(key >> 32)), static_cast<int>(~static_cast<u32>(key))};
}

// What all blocks of the cluster hold at a place of their shared memory, fetched at once and combined.
template <class T, class Combine> __device__ inline T of_cluster(const T* mine, Combine combine) {
  T all[kMaxBlocks], result{};
#pragma unroll
  for (int rank = 0; rank < kMaxBlocks; ++rank)
    if (rank < cluster_size()) all[rank] = *in_block(mine, rank);
#pragma unroll
  for (int rank = 0; rank < kMaxBlocks; ++rank)
    if (rank < cluster_size()) result = combine(result, all[rank]);
  return result;
}

// The best of all threads of the cluster, the lowest token of equal ones. `which` (0 or 1) is different from call to call.
__device__ inline Best cluster_best(Shared& shared, Best mine, int which) {
  u64(&of_warp)[kWarps] = shared.best_of_warp[which];
  const u64 key = warp_max(key_of(mine));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = key;
  __syncthreads();
  if (threadIdx.x < 32) {
    const u64 all = warp_max(threadIdx.x < kWarps ? of_warp[threadIdx.x] : 0);
    if (threadIdx.x == 0) shared.best[which] = all;
  }
  meet_cluster();
  return best_of(of_cluster(&shared.best[which], [](u64 a, u64 b) { return max(a, b); }));
}

// The sum over all threads of the cluster. `which` as above.
__device__ inline u64 cluster_sum(Shared& shared, u64 mine, int which) {
  mine = warp_prefix_sum(mine);
  if (threadIdx.x % 32 == 31) shared.number_of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x < 32) {
    const u64 all = warp_prefix_sum(threadIdx.x < kWarps ? shared.number_of_warp[threadIdx.x] : 0);
    if (threadIdx.x == 31) shared.numbers[which] = all;
  }
  meet_cluster();
  return of_cluster(&shared.numbers[which], [](u64 a, u64 b) { return a + b; });
}

// logit_bias, min_tokens and penalties, in the logits themselves.
__device__ inline void change_logits(const Part& part, const Line& line, const int* lists, const int* history, int end) {
  const int first = 4 * part.first, last = min(4 * part.last, part.vocab_size);
  const auto is_mine = [=](int token) { return first <= token && token < last; };
  const int* biased = lists + line.num_forbidden;
  for (int i = threadIdx.x; i < line.num_biased; i += kThreads)
    if (const int token = biased[2 * i]; is_mine(token)) part.row[token] += __int_as_float(biased[2 * i + 1]);
  __syncthreads();
  if (end - line.num_prompt_tokens < line.min_tokens)
    for (int i = threadIdx.x; i < line.num_forbidden; i += kThreads)
      if (is_mine(lists[i])) part.row[lists[i]] = -kInfinity;
  __syncthreads();
  if (!line.has_penalties) return;
  u32(&seen)[kSeen] = part.shared.seen;
  constexpr u32 kInPrompt = 1u << 31;  // the other bits count uses in the output
  for (int start = first; start < last; start += kSeen) {
    const int size = min(kSeen, last - start);
    for (int i = threadIdx.x; i < size; i += kThreads) seen[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < end; i += kThreads) {
      const int place = history[i] - start;
      if (place < 0 || place >= size) continue;
      if (i < line.num_prompt_tokens) atomicOr(&seen[place], kInPrompt);
      else atomicAdd(&seen[place], 1u);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kThreads) {
      if (seen[i] == 0) continue;
      const float count = seen[i] & ~kInPrompt;
      float x = part.row[start + i];
      x = x > 0.0f ? x / line.repetition_penalty : __fmul_rn(x, line.repetition_penalty);
      const float presence = count > 0.0f ? line.presence_penalty : 0.0f;
      part.row[start + i] = __fsub_rn(x, __fadd_rn(__fmul_rn(line.frequency_penalty, count), presence));
    }
    __syncthreads();
  }
}

// Whether a distance is one of at most so many steps is asked of the distance itself.
__device__ inline float reach_of(u32 steps) { return __uint2float_ru(steps + 1) / kStepsPerNat; }

// Sums of this thread and those before it, and of all of them.
__device__ inline Bin prefix_sums(Sum (&of_warp)[kWarps], Sum own) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Sum with_own{warp_prefix_sum(own.mass), warp_prefix_sum(own.count)};
  if (lane == 31) of_warp[warp] = with_own;
  __syncthreads();
  const Sum other = lane < kWarps ? of_warp[lane] : Sum{};
  const Sum up_to_other{warp_prefix_sum(other.mass), warp_prefix_sum(other.count)};
  const auto from = [&](int lane) -> Sum {
    return {__shfl_sync(kAllLanes, up_to_other.mass, lane), __shfl_sync(kAllLanes, up_to_other.count, lane)};
  };
  const Sum total = from(31), up_to_warp = from(warp), of_own_warp = of_warp[warp];
  return {{up_to_warp.mass - of_own_warp.mass + with_own.mass - own.mass,
           up_to_warp.count - of_own_warp.count + with_own.count - own.count}, own, total};
}

// Masses are summed as what they are less than those of their bins' starts, an eighth at most: deficits, in such units.
__device__ inline float units_of_deficit(const Part& part, int shift) {
  return 4e9f / part.vocab_size / ((1u << shift) / kStepsPerNat);  // no sum is too large for a word
}

// A histogram of the row's tokens (but those above `ceiling`) from so many steps on, in bins of 2^shift steps: the count in
// the upper half of this thread's, the deficits in the lower. With that of the head comes the mass of the tail. Its place
// is not that of the one before, which other blocks may still be reading.
__device__ inline u64 histogram(
    const Part& part, const Line& line, float top, u32 ceiling, u32 first, int shift, int& place) {
  Shared& shared = part.shared;
  u32(*counts)[kCopies] = reinterpret_cast<u32(*)[kCopies]>(shared.seen), (*deficits)[kCopies] = counts + kBins;
#pragma unroll
  for (int i = 0; i < kCopies; ++i) counts[threadIdx.x][i] = deficits[threadIdx.x][i] = 0;
  __syncthreads();
  const bool is_head = shift == kHeadShift;
  const float inverse_temperature = line.inverse_temperature, reach = reach_of(ceiling);
  const float start = first / kStepsPerNat;
  const float end = fminf(reach, (first + (static_cast<u32>(kBins) << shift)) / kStepsPerNat);
  const float units = units_of_deficit(part, shift);
  u64 tail = 0;
  for_each_group<3>(part, [&](const float (&logits)[4], int) {
    u32 tail_of_group = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float behind = __fsub_rn(top, __fmul_rn(logits[i], inverse_temperature));
      if (start <= behind && behind < end) {
        const u32 steps = static_cast<u32>(behind * kStepsPerNat) - first;
        const int bin = steps >> shift, copy = threadIdx.x % kCopies;
        atomicAdd(&counts[bin][copy], 1u);
        const float x = (steps & ((1u << shift) - 1)) / kStepsPerNat;
        const float deficit = (((-x / 24 + 1.0f / 6) * x - 0.5f) * x + 1) * x;  // 1 - e^-x
        if (shift > 0) atomicAdd(&deficits[bin][copy], static_cast<u32>(deficit * units + 0.5f));
      } else if (is_head && behind < reach) {
        tail_of_group += static_cast<u32>(exp2_fast(38.0f - kLog2e * behind));  // 4 e^-6 fit into a word
      }
    }
    tail += tail_of_group;
  });
  tail = warp_prefix_sum(4 * tail);
  if (threadIdx.x % 32 == 31) shared.number_of_warp[threadIdx.x / 32] = tail;
  __syncthreads();
  place ^= 1;
  u64 own = 0;
#pragma unroll
  for (int i = 0; i < kCopies; ++i) own += static_cast<u64>(counts[threadIdx.x][i]) << 32 | deficits[threadIdx.x][i];
  shared.bins[place][threadIdx.x] = own;
  if (threadIdx.x < 32) {
    const u64 all = warp_prefix_sum(threadIdx.x < kWarps ? shared.number_of_warp[threadIdx.x] : 0);
    if (threadIdx.x == 31) shared.numbers[place] = all;
  }
  meet_cluster();
  const auto add = [](u64 a, u64 b) { return a + b; };
  if (is_head) {
    const u64 mass = of_cluster(&shared.numbers[place], add);
    if (threadIdx.x == 0) shared.tail_mass = mass;
  }
  return of_cluster(&shared.bins[place][threadIdx.x], add);
}

__device__ inline Bin bin_of(const Part& part, u64 counted, u32 first, int shift) {
  const u32 count = static_cast<u32>(counted >> 32);
  const float start = (first + (threadIdx.x << shift)) / kStepsPerNat;
  const float mass = (count - static_cast<u32>(counted) / units_of_deficit(part, shift)) * expf(-start);
  return prefix_sums(part.shared.sum_of_warp, {static_cast<u64>(mass * 0x1p40f), count});
}

// The bin where the sum over the bins, of masses or counts, reaches the target; past the last one, if there is a tail. If
// there is none the last bin reaches any target: sums are rounded.
__device__ inline Found find(Found& found, const Bin& bin, bool by_mass, u64 target, bool has_tail) {
  const Sum up_to_own{bin.before.mass + bin.own.mass, bin.before.count + bin.own.count};
  const bool was_reached = (by_mass ? bin.before.mass : bin.before.count) >= target;
  const bool is_reached = (by_mass ? up_to_own.mass : up_to_own.count) >= target;
  const bool is_last = up_to_own.count == bin.total.count && bin.own.count > 0;
  __syncthreads();
  const bool is_past = !is_reached && is_last && has_tail;
  if (is_past) found = {kBins, up_to_own, {}};
  else if (!was_reached && (is_reached || is_last)) found = {static_cast<int>(threadIdx.x), bin.before, bin.own};
  __syncthreads();
  return found;
}

// Less of a limit: the steps within which the top_k best tokens lie, or (top_k is 0) those that have top_p of its mass.
// Searched from the head on, in ever finer bins.
__device__ inline Limit find_limit(
    const Part& part, const Line& line, float top, Limit limit, u64 head, int top_k, float top_p, int& place) {
  const bool by_mass = top_k == 0;
  __syncthreads();  // the sums that another limit's search ended with have been read
  Bin bin = bin_of(part, head, 0, kHeadShift);
  if (limit.mass == 0) limit.mass = bin.total.mass + part.shared.tail_mass;
  u64 target = by_mass ? max(1ull, static_cast<u64>(ceil(static_cast<double>(top_p) * limit.mass))) : top_k;
  u64 mass = 0;
  u32 first = 0;
  int shift = kHeadShift;
  while (bin.total.count > 0) {
    const Found found = find(part.shared.found, bin, by_mass, target, shift == kHeadShift);
    mass += found.before.mass;
    target -= by_mass ? found.before.mass : found.before.count;
    first += found.bin << shift;
    const bool takes_all = by_mass ? found.own.count == 1 : target == found.own.count;
    if (found.bin == kBins) shift = kTailShift;
    else if (takes_all || shift == 0) return {min(limit.steps, first + (1u << shift) - 1), mass + found.own.mass};
    else shift = max(shift - kFinerShift, 0);
    bin = bin_of(part, histogram(part, line, top, limit.steps, first, shift, place), first, shift);
  }
  return {limit.steps, mass};
}

// The steps that the drawn token may lie behind the best, by min-p, then top-k, then top-p.
__device__ inline u32 limit_of(const Part& part, const Line& line, float top) {
  Limit limit{line.max_steps, 0};
  const bool has_top_k = 0 < line.top_k && line.top_k < part.vocab_size, has_top_p = line.top_p < 1.0f;
  if (!has_top_k && !has_top_p) return limit.steps;
  int place = 0;
  const u64 head = histogram(part, line, top, limit.steps, 0, kHeadShift, place);
#pragma unroll 1
  for (int turn = has_top_k ? 0 : 1; turn < (has_top_p ? 2 : 1); ++turn)
    limit = find_limit(part, line, top, limit, head, turn == 0 ? line.top_k : 0, line.top_p, place);
  return limit.steps;
}

// The best of logits and noise among a group. A token wins if its noise is more than its warp's best is ahead of it; noise of
// more than x is made of a number u with 1 - u < -log(u) < e^-x only. So few logarithms are needed.
__device__ inline void draw_group(
    Best& best, const float (&scaled)[4], const bool (&is_kept)[4], int group, int position, u64 seed) {
  const float best_of_warp = fmaxf(from_ordered(__reduce_max_sync(kAllLanes, ordered(best.value))), kLowest);
  float most = -kInfinity;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (is_kept[i]) most = max_or_nan(most, scaled[i]);
  const float ahead = best_of_warp - most;
  if (ahead > kMostNoise) return;  // a group with NaN goes on, and hands it to the best
  const float room = __expf(-ahead) * 1.01f + 1e-6f;  // for rounding
  const u32 least = room < 1.0f ? static_cast<u32>((1.0f - room) * 0x1p32f) : 0;
  const Words words = words_of(group, position, seed);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (is_kept[i] && words.of[i] >= least) consider(best, __fadd_rn(scaled[i], gumbel(words.of[i])), 4 * group + i);
}

__device__ inline void put(Best best, int* tokens, int* token_ids, int row, int end, int max_len) {
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    tokens[blockIdx.y] = has_token(best) ? best.token : -1;
    if (end < max_len) token_ids[static_cast<i64>(row) * max_len + end] = has_token(best) ? best.token : 0;
  }
  meet_cluster();  // a block that has left cannot be read
}

// Grid: x = the blocks of a cluster, y = rows of logits.
extern "C" __global__ void __launch_bounds__(kThreads)
sample(int* tokens, float* logits, const int* lines, const int* rows, const int* ends, int* token_ids, int vocab_size,
       int line_size, int max_len) {
  start_dependents();
  wait_for_inputs();
  const int row = rows[blockIdx.y], end = ends[blockIdx.y];
  const int* words = lines + static_cast<i64>(row) * line_size;
  const Line& line = *reinterpret_cast<const Line*>(words);
  extern __shared__ uint4 shared[];
  const Part part = part_of(shared, logits, vocab_size);
  if (line.num_forbidden + line.num_biased + line.has_penalties > 0)
    change_logits(part, line, words + sizeof(Line) / 4, token_ids + static_cast<i64>(row) * max_len, end);
  Best best;
  const float inverse_temperature = line.inverse_temperature;
  if (inverse_temperature == 0.0f) {
    for_each_group<4>(part, [&](const float (&logits)[4], int group) { consider_group(best, logits, group); });
    return put(cluster_best(part.shared, best, 0), tokens, token_ids, row, end, max_len);
  }
  float top = 0.0f, reach = kInfinity;
  if (line.top_k > 0 || line.top_p < 1.0f || line.max_steps < kOutOfReach - 1) {
    for_each_group<4>(part, [&](const float (&logits)[4], int group) { consider_group(best, logits, group); });
    best = cluster_best(part.shared, best, 0);
    if (!has_token(best)) return put(best, tokens, token_ids, row, end, max_len);
    top = __fmul_rn(best.value, inverse_temperature);
    reach = reach_of(limit_of(part, line, top));
    best = Best();
  }
  const u64 seed = line.seed;
  for_each_group<2>(part, [&](const float (&logits)[4], int group) {
    float scaled[4];
    bool is_kept[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scaled[i] = __fmul_rn(logits[i], inverse_temperature);
      is_kept[i] = !(__fsub_rn(top, scaled[i]) >= reach);  // NaN, too
    }
    draw_group(best, scaled, is_kept, group, end, seed);
  });
  put(cluster_best(part.shared, best, 1), tokens, token_ids, row, end, max_len);
}

// The same for rows that take the best token of the logits as they are.
extern "C" __global__ void __launch_bounds__(kThreads)
take_best(int* tokens, float* logits, const int* rows, const int* ends, int* token_ids, int vocab_size, int max_len) {
  start_dependents();
  wait_for_inputs();
  extern __shared__ uint4 shared[];
  const Part part = part_of(shared, logits, vocab_size);
  Best best;
  for_each_group<4>(part, [&](const float (&logits)[4], int group) { consider_group(best, logits, group); });
  put(cluster_best(part.shared, best, 0), tokens, token_ids, rows[blockIdx.y], ends[blockIdx.y], max_len);
}

// The best of this thread's tokens whose keys are below `bound`.
__device__ inline Best best_below(const Part& part, u64 bound) {
  Best best;
  for_each_group<2>(part, [&](const float (&logits)[4], int group) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (key_of({logits[i], 4 * group + i}) < bound) consider(best, logits[i], 4 * group + i);
  });
  return best;
}

// Log probabilities of one token of each row, how many tokens are better (and 1), and the num_top best with theirs.
extern "C" __global__ void __launch_bounds__(kThreads)
logprobs(float* chosen, int* ranks, float* top_values, int* top_tokens, float* logits, const int* tokens, int vocab_size,
         int num_top) {
  start_dependents();
  wait_for_inputs();
  extern __shared__ uint4 shared[];
  const Part part = part_of(shared, logits, vocab_size);
  const float own = part.row[max(tokens[blockIdx.y], 0)];
  Best mine = best_below(part, ~0ull);
  const float top = cluster_best(part.shared, mine, 0).value;
  u64 mass = 0;  // in units of 2^-40: the sum is the same however it is shared out
  u64 num_better = 0;
  for_each_group<2>(part, [&](const float (&logits)[4], int) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mass += static_cast<u64>(expf(logits[i] - top) * 0x1p40f);
      num_better += logits[i] > own;
    }
  });
  const float log_mass = top + logf(static_cast<float>(cluster_sum(part.shared, mass, 0)) * 0x1p-40f);
  num_better = cluster_sum(part.shared, num_better, 1);
  const bool writes = cluster_rank() == 0 && threadIdx.x == 0;
  if (writes) chosen[blockIdx.y] = own - log_mass, ranks[blockIdx.y] = num_better + 1;
  for (int i = 0; i < num_top; ++i) {
    const Best best = cluster_best(part.shared, mine, 1 - i % 2);
    const int place = blockIdx.y * num_top + i;
    if (writes) top_values[place] = best.value - log_mass, top_tokens[place] = best.token;
    if (key_of(best) == key_of(mine)) mine = best_below(part, key_of(mine));
  }
  meet_cluster();  // a block that has left cannot be read
}

// Grid: x = rows, y = groups of four tokens.
extern "C" __global__ void gumbel_noise(float* noise, const i64* seeds, const i64* positions, int vocab_size) {
  start_dependents();
  wait_for_inputs();
  const i64 row = blockIdx.x;
  const int group = blockIdx.y * blockDim.x + threadIdx.x;
  if (4 * group >= vocab_size) return;
  const Words words = words_of(group, positions[row], seeds[row]);
  const float drawn[4] = {gumbel(words.of[0]), gumbel(words.of[1]), gumbel(words.of[2]), gumbel(words.of[3])};
  float* target = noise + row * vocab_size + 4 * group;
  if (vocab_size % 4 == 0) return store(target, drawn);  // then every row starts at a 16-byte boundary
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (4 * group + i < vocab_size) target[i] = drawn[i];
}
