// logits += standard Gumbel noise that depends on nothing but (seed, position, token).   logits [rows, vocab_size]
//
// Where a run of logits is -infinity, as min_p, top_k, top_p and grammars leave them, no noise is worked out.
//
// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): counter (token / 4, 0,
// position, 0), key seed; word token % 4 becomes u in (0, 1) and the noise -log(-log(u)). Bound by arithmetic, all of
// it in vectors.
#include "common.h"

#define TOKENS 256  // drawn at a time, words first

INLINE void draw_words(uint32_t *words4, uint32_t first_counter, uint64_t seed, uint32_t position) {
#pragma omp simd
    for (uint32_t i = 0; i < TOKENS / 4; i++) {
        uint32_t c0 = first_counter + i, c1 = 0, c2 = position, c3 = 0, key0 = (uint32_t)seed,
                 key1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < 10; round++) {
            const uint64_t product0 = 0xD2511F53ull * c0, product1 = 0xCD9E8D57ull * c2;
            c0 = (uint32_t)(product1 >> 32) ^ c1 ^ key0;
            c1 = (uint32_t)product1;
            c2 = (uint32_t)(product0 >> 32) ^ c3 ^ key1;
            c3 = (uint32_t)product0;
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
        words4[4 * i] = c0;
        words4[4 * i + 1] = c1;
        words4[4 * i + 2] = c2;
        words4[4 * i + 3] = c3;
    }
}

typedef struct {
    float *logits;
    const int64_t *seeds;
    const int32_t *positions;
    int64_t vocab_size;
} drawing;

INLINE int64_t parts_per_row(const drawing *d) { return (d->vocab_size + TOKENS - 1) / TOKENS; }

static void draw_chunk(const void *context, int64_t first_part, int64_t last_part) {
    const drawing *d = context;
    for (int64_t part = first_part; part < last_part; part++) {
        const int64_t row = part / parts_per_row(d), first = part % parts_per_row(d) * TOKENS;
        const int64_t size = d->vocab_size - first < TOKENS ? d->vocab_size - first : TOKENS;
        float *logits = d->logits + row * d->vocab_size + first;
        int num_alive = 0;
#pragma omp simd reduction(+ : num_alive)
        for (int64_t token = 0; token < size; token++) num_alive += logits[token] != -INFINITY;
        if (!num_alive) continue;
        uint32_t drawn[TOKENS];
        draw_words(drawn, first / 4, d->seeds[row], d->positions[row]);
#pragma omp simd
        for (int64_t token = 0; token < size; token++) {
            const float uniform = ((float)(int32_t)(drawn[token] >> 9) + 0.5f) * 0x1p-23f;
            logits[token] += -fast_log(-fast_log(uniform));
        }
    }
}

void add_gumbel_noise(float *logits, const int64_t *seeds, const int32_t *positions, int64_t rows, int64_t vocab_size) {
    const drawing d = {logits, seeds, positions, vocab_size};
    parallel_for(rows * parts_per_row(&d), 16, draw_chunk, &d);
}

// logits[rows[i], t] = -infinity where bit t % 32 of words[i, t / 32] is 0. Bound by the bytes of what is ruled out:
// where a grammar lets text through, that is little.   logits [any, vocab_size], words [num_rows, num_words]
typedef struct {
    float *logits;
    const uint32_t *words;
    const int32_t *rows;
    int64_t vocab_size, num_words;
} masking;

static void mask_chunk(const void *context, int64_t first, int64_t last) {
    const masking *m = context;
    for (int64_t i = first; i < last; i++) {
        float *logits = m->logits + m->rows[i] * m->vocab_size;
        const uint32_t *words = m->words + i * m->num_words;
        for (int64_t start = 0; start < m->vocab_size; start += 32) {
            const uint32_t word = words[start / 32];
            if (word == UINT32_MAX) continue;
            const int64_t size = m->vocab_size - start < 32 ? m->vocab_size - start : 32;
            if (word == 0) {
                for (int64_t bit = 0; bit < size; bit++) logits[start + bit] = -INFINITY;
            } else {
                for (int64_t bit = 0; bit < size; bit++) {
                    if (!(word >> bit & 1)) logits[start + bit] = -INFINITY;
                }
            }
        }
    }
}

void mask_logits(
    float *logits, const uint32_t *words, const int32_t *rows, int64_t num_rows, int64_t vocab_size, int64_t num_words
) {
    const masking m = {logits, words, rows, vocab_size, num_words};
    parallel_for(num_rows, 1, mask_chunk, &m);
}
