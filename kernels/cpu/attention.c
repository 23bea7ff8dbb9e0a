// softmax(cap(q · Kᵀ · scale)) · V for each query over the tokens of its own request up to itself, in the paged cache.
//
// q, out [num_tokens, num_heads, head_dim]; caches [num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]; the tokens of
// request i are query_start[i]:query_start[i + 1], the last of context_lens[i] in the cache, whose blocks are line
// rows[i] of block_table. window > 0: a query sees the last `window` tokens. softcap > 0: cap(s) =
// softcap · tanh(s / softcap).
//
// A request with one query is bound by reading its keys and values: they are read once for all query heads that share
// them, vectors along head_dim, in chunks of the context that threads share out and merge. A request with more queries
// is bound by arithmetic: a tile holds kRows (query, head) pairs as the lanes of two vectors, and each key and value is
// a scalar multiplied with them. Chunks and tiles depend on nothing but the request's own lengths.
#include "common.h"

#define BLOCK_SIZE 16
#define CHUNK 512              // keys of a decode task
#define TILE_ROWS (2 * LANES)  // (query, head) pairs of a prefill task
#define TILE_KEYS 32           // keys it takes at a time: what it touches stays in the first cache
#define MASKED -1e30f

typedef struct {
    char *out;
    const char *q, *k_cache, *v_cache;
    const int32_t *query_start, *context_lens, *rows, *block_table;
    int64_t num_requests, table_width, num_heads, num_kv_heads, head_dim, group_size, window;
    float scale, softcap;
    int type;
    const struct task *tasks;
    char *parts;  // what decode tasks leave: [num_tasks, num_heads] partials
} attention;

// Part `part` of request `request`: a chunk of its context if it has one query, else a tile of its queries.
typedef struct task {
    int32_t request, part;
} task;

INLINE int64_t num_queries(const attention *a, int64_t request) {
    return a->query_start[request + 1] - a->query_start[request];
}

INLINE int64_t first_visible(const attention *a, int64_t position) {
    return a->window && position >= a->window ? position - a->window + 1 : 0;
}

INLINE int64_t num_parts(const attention *a, int64_t request) {
    const int64_t context = a->context_lens[request];
    if (num_queries(a, request) != 1) return (num_queries(a, request) * a->group_size + TILE_ROWS - 1) / TILE_ROWS;
    return (context - 1) / CHUNK - first_visible(a, context - 1) / CHUNK + 1;
}

INLINE const char *cached(const attention *a, const char *cache, int64_t request, int64_t head, int64_t key,
                          const int type) {
    const int64_t block = a->block_table[a->rows[request] * a->table_width + key / BLOCK_SIZE];
    return at(cache, ((block * a->num_kv_heads + head) * BLOCK_SIZE + key % BLOCK_SIZE) * a->head_dim, type);
}

// Starts fetching the block of a key that will be needed soon: blocks lie anywhere, so the processor cannot guess the
// next.
INLINE void prefetch_block(const attention *a, const char *cache, int64_t request, int64_t head, int64_t key,
                           const int type) {
    if (key >= a->context_lens[request]) return;
    const char *block = cached(a, cache, request, head, key / BLOCK_SIZE * BLOCK_SIZE, type);
    for (int64_t i = 0; i < BLOCK_SIZE * a->head_dim * (int64_t)size_of(type); i += 64)
        __builtin_prefetch(block + i, 0, 2);
}

INLINE float cap(const attention *a, float score) {
    return a->softcap > 0.0f ? a->softcap * fast_tanh(score / a->softcap) : score;
}

// ---- one query ----

// What a decode task leaves of a query head: acc = Σ exp(s - max) · v, sum = Σ exp(s - max). acc has head_dim numbers.
typedef struct {
    float max, sum, acc[];
} partial;

INLINE int64_t partial_bytes(const attention *a) { return sizeof(partial) + a->head_dim * 4; }

// scores[i] = q · key i for LANES keys that lie side by side.
INLINE vec score_keys(const char *keys, const char *packed_q, int64_t head_dim, const int type) {
    vec sums[LANES];
    UNROLL for (int i = 0; i < LANES; i++) sums[i] = (vec){0};
    for (int64_t step = 0; step < head_dim / step_size(type); step++)
        UNROLL for (int i = 0; i < LANES; i++) {
            const char *row = keys + i * head_dim * size_of(type);
            sums[i] = dot_step(sums[i], row + step * 4 * LANES, packed_q + step * packed_step_bytes(type), type);
        }
    return sum_rows(sums);
}

INLINE void add_values(char *parts, int64_t part_bytes, const float *weights, const char *values, int64_t num_keys,
                       int64_t head_dim, const int kHeads, const int type) {
    for (int64_t d = 0; d < head_dim; d += LANES) {
        vec sums[4];
        UNROLL for (int g = 0; g < kHeads; g++) sums[g] = *(vec *)&((partial *)(parts + g * part_bytes))->acc[d];
        for (int64_t key = 0; key < num_keys; key++) {
            const vec value = get_vec(values, key * head_dim + d, type);
            UNROLL for (int g = 0; g < kHeads; g++) sums[g] += weights[g * CHUNK + key] * value;
        }
        UNROLL for (int g = 0; g < kHeads; g++) *(vec *)&((partial *)(parts + g * part_bytes))->acc[d] = sums[g];
    }
}

// weights[i] = exp(cap(scores[i] · scale) - max), in place.
INLINE void soften(const attention *a, partial *part, float *scores, int64_t size) {
    float max = MASKED, sum = 0.0f;
    if (a->softcap > 0.0f)
        for (int64_t i = 0; i < size; i++) scores[i] = cap(a, scores[i] * a->scale);
    else
        for (int64_t i = 0; i < size; i++) scores[i] *= a->scale;
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < size; i++) max = scores[i] > max ? scores[i] : max;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) {
        scores[i] = fast_exp(scores[i] - max);
        sum += scores[i];
    }
    part->max = max;
    part->sum = sum;
    memset(part->acc, 0, a->head_dim * 4);
}

// Keys [first, last) of chunk `chunk` for the query heads of one KV head; parts are theirs, workspace this thread's.
INLINE void decode_chunk(const attention *a, int64_t request, int64_t chunk, int64_t head, char *parts, char *workspace,
                         const int type) {
    const int64_t context = a->context_lens[request], visible = first_visible(a, context - 1), start = chunk * CHUNK;
    const int64_t first = visible > start ? visible : start, last = context < start + CHUNK ? context : start + CHUNK;
    const int64_t group = a->group_size, dim = a->head_dim, q_bytes = num_steps(dim, type) * packed_step_bytes(type);
    float *scores = (float *)workspace;
    char *packed = workspace + group * CHUNK * 4;
    const char *q = at(a->q, (a->query_start[request] * a->num_heads + head * group) * dim, type);

    for (int64_t g = 0; g < group; g++) pack(packed + g * q_bytes, q + g * dim * size_of(type), dim, type);
    for (int64_t key = first / LANES * LANES; key < last; key += LANES) {
        const char *keys = cached(a, a->k_cache, request, head, key, type);
        if (key % BLOCK_SIZE == 0) {
            prefetch_block(a, a->k_cache, request, head, key + 2 * BLOCK_SIZE, type);
            prefetch_block(a, a->v_cache, request, head, key, type);
        }
        for (int64_t g = 0; g < group; g++)
            *(vec *)(scores + g * CHUNK + key - start) = score_keys(keys, packed + g * q_bytes, dim, type);
    }
    for (int64_t g = 0; g < group; g++)
        soften(a, (partial *)(parts + g * partial_bytes(a)), scores + g * CHUNK + first - start, last - first);
    for (int64_t key = first, next; key < last; key = next) {
        next = (key / BLOCK_SIZE + 1) * BLOCK_SIZE < last ? (key / BLOCK_SIZE + 1) * BLOCK_SIZE : last;
        const char *values = cached(a, a->v_cache, request, head, key, type);
        const float *weights = scores + key - start;
        int64_t g = 0;
        for (; g + 3 <= group; g += 3)
            add_values(parts + g * partial_bytes(a), partial_bytes(a), weights + g * CHUNK, values, next - key, dim, 3,
                       type);
        for (; g < group; g++)
            add_values(parts + g * partial_bytes(a), partial_bytes(a), weights + g * CHUNK, values, next - key, dim, 1,
                       type);
    }
}

// The parts of one request and KV head become its output; those of one chunk lie num_kv_heads · group_size apart.
INLINE void merge_chunks(const attention *a, int64_t request, int64_t head, const char *parts, int64_t num_chunks,
                         const int type) {
    const int64_t chunk_bytes = a->num_heads * partial_bytes(a);
    for (int64_t g = 0; g < a->group_size; g++) {
        const char *mine = parts + g * partial_bytes(a);
        float max = MASKED, sum = 0.0f, acc[a->head_dim];
        for (int64_t i = 0; i < num_chunks; i++) max = fmaxf(max, ((const partial *)(mine + i * chunk_bytes))->max);
        memset(acc, 0, sizeof(acc));
        for (int64_t i = 0; i < num_chunks; i++) {
            const partial *part = (const partial *)(mine + i * chunk_bytes);
            const float weight = fast_exp(part->max - max);
            sum += weight * part->sum;
            for (int64_t d = 0; d < a->head_dim; d++) acc[d] += weight * part->acc[d];
        }
        char *out =
            (char *)at(a->out, (a->query_start[request] * a->num_heads + head * a->group_size + g) * a->head_dim, type);
        for (int64_t d = 0; d < a->head_dim; d++) put(out, d, acc[d] / sum, type);
    }
}

// ---- more queries ----

typedef struct {
    float max[TILE_ROWS], sum[TILE_ROWS], correction[TILE_ROWS], scores[TILE_KEYS][TILE_ROWS];
    int32_t position[TILE_ROWS];
    float arrays[];  // q [head_dim][TILE_ROWS], out the same, keys or values [TILE_KEYS][head_dim]
} tile;

INLINE int64_t tile_bytes(const attention *a) { return sizeof(tile) + a->head_dim * (2 * TILE_ROWS + TILE_KEYS) * 4; }

// c[n][row] = c[n][row] · keep[row] + Σ over k of x[n · stride_n + k · stride_k] · y[k][row]; without keep c starts at
// 0.
INLINE void multiply_lanes(float *c, const float *keep, const float *x, int64_t stride_n, int64_t stride_k,
                           const float *y, int64_t num_n, int64_t num_k) {
    enum { kTile = LANES == 16 ? 8 : 4 };
    for (int64_t n = 0; n < num_n; n += kTile) {
        vec sums[kTile][2];
        UNROLL for (int i = 0; i < kTile; i++) UNROLL for (int j = 0; j < 2; j++) {
            if (keep) sums[i][j] = *(vec *)(c + (n + i) * TILE_ROWS + j * LANES) * *(const vec *)(keep + j * LANES);
            else sums[i][j] = (vec){0};
        }
        for (int64_t k = 0; k < num_k; k++) {
            const vec y0 = *(const vec *)(y + k * TILE_ROWS), y1 = *(const vec *)(y + k * TILE_ROWS + LANES);
            UNROLL for (int i = 0; i < kTile; i++) {
                const float factor = x[(n + i) * stride_n + k * stride_k];
                sums[i][0] += factor * y0;
                sums[i][1] += factor * y1;
            }
        }
        UNROLL for (int i = 0; i < kTile; i++) {
            *(vec *)(c + (n + i) * TILE_ROWS) = sums[i][0];
            *(vec *)(c + (n + i) * TILE_ROWS + LANES) = sums[i][1];
        }
    }
}

// TILE_KEYS keys or values as float32; zeros behind the context, where the cache may hold anything.
INLINE void widen(const attention *a, float *wide, const char *cache, int64_t request, int64_t head, int64_t first,
                  const int type) {
    for (int64_t key = first; key < first + TILE_KEYS; key++, wide += a->head_dim) {
        if (key >= a->context_lens[request]) {
            memset(wide, 0, a->head_dim * 4);
            continue;
        }
        const char *line = cached(a, cache, request, head, key, type);
        for (int64_t d = 0; d < a->head_dim; d += LANES) *(vec *)(wide + d) = get_vec(line, d, type);
    }
}

INLINE void mask(const attention *a, tile *t, int64_t first_key) {
    const int32_t window = a->window ? a->window : INT32_MAX;
    for (int32_t i = 0, key = first_key; i < TILE_KEYS; i++, key++)
        for (int row = 0; row < TILE_ROWS; row++) {
            const int is_visible = (key <= t->position[row]) & (t->position[row] - key < window);
            t->scores[i][row] = is_visible ? t->scores[i][row] : MASKED;
        }
}

// One step of the online softmax: scores become weights, and correction what the earlier sums must be multiplied with.
INLINE void soften_tile(tile *t) {
    float max[TILE_ROWS], sum[TILE_ROWS] = {0};
    memcpy(max, t->max, sizeof(max));
    for (int i = 0; i < TILE_KEYS; i++)
        for (int row = 0; row < TILE_ROWS; row++)
            max[row] = t->scores[i][row] > max[row] ? t->scores[i][row] : max[row];
    for (int i = 0; i < TILE_KEYS; i++)
        for (int row = 0; row < TILE_ROWS; row++) {
            t->scores[i][row] = fast_exp(t->scores[i][row] - max[row]);
            sum[row] += t->scores[i][row];
        }
    for (int row = 0; row < TILE_ROWS; row++) {
        t->correction[row] = fast_exp(t->max[row] - max[row]);
        t->sum[row] = t->sum[row] * t->correction[row] + sum[row];
        t->max[row] = max[row];
    }
}

INLINE void prefill_tile(const attention *a, int64_t request, int64_t part, int64_t head, char *workspace,
                         const int type) {
    const int64_t dim = a->head_dim, group = a->group_size, context = a->context_lens[request];
    const int64_t row_0 = part * TILE_ROWS, all_rows = num_queries(a, request) * group;
    const int64_t num_rows = all_rows - row_0 < TILE_ROWS ? all_rows - row_0 : TILE_ROWS;
    tile *t = (tile *)workspace;
    float *q = t->arrays, *out = q + dim * TILE_ROWS, *wide = out + dim * TILE_ROWS;
    int64_t offsets[TILE_ROWS];  // of the rows in q and out; rows beyond the last are copies of it and not written back
    for (int64_t row = 0; row < TILE_ROWS; row++) {
        const int64_t index = row_0 + (row < num_rows ? row : num_rows - 1), query = index / group;
        offsets[row] = ((a->query_start[request] + query) * a->num_heads + head * group + index % group) * dim;
        t->position[row] = context - num_queries(a, request) + query;
        t->max[row] = MASKED;
        t->sum[row] = 0.0f;
        for (int64_t d = 0; d < dim; d++) q[d * TILE_ROWS + row] = get(a->q, offsets[row] + d, type) * a->scale;
    }
    memset(out, 0, dim * TILE_ROWS * 4);

    const int64_t first_position = t->position[0], last_position = t->position[TILE_ROWS - 1];
    for (int64_t key = first_visible(a, first_position) / BLOCK_SIZE * BLOCK_SIZE; key <= last_position;
         key += TILE_KEYS) {
        widen(a, wide, a->k_cache, request, head, key, type);
        multiply_lanes(t->scores[0], NULL, wide, dim, 1, q, TILE_KEYS, dim);
        if (a->softcap > 0.0f)
            for (int i = 0; i < TILE_KEYS; i++)
                for (int row = 0; row < TILE_ROWS; row++) t->scores[i][row] = cap(a, t->scores[i][row]);
        if (key + TILE_KEYS > first_position + 1 || key < first_visible(a, last_position)) mask(a, t, key);
        soften_tile(t);
        widen(a, wide, a->v_cache, request, head, key, type);
        multiply_lanes(out, t->correction, wide, 1, dim, t->scores[0], dim, TILE_KEYS);
    }
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t d = 0; d < dim; d++) put(a->out, offsets[row] + d, out[d * TILE_ROWS + row] / t->sum[row], type);
}

// ---- all of them ----

INLINE void run_task(const attention *a, task t, int64_t head, char *parts, char *workspace, const int type) {
    if (num_queries(a, t.request) != 1) {
        prefill_tile(a, t.request, t.part, head, workspace, type);
        return;
    }
    const int64_t first_chunk = first_visible(a, a->context_lens[t.request] - 1) / CHUNK;
    decode_chunk(a, t.request, first_chunk + t.part, head, parts, workspace, type);
    if (num_parts(a, t.request) == 1) merge_chunks(a, t.request, head, parts, 1, type);
}

INLINE char *parts_of(const attention *a, int64_t task_index, int64_t head) {
    return a->parts + (task_index * a->num_heads + head * a->group_size) * partial_bytes(a);
}

// Items are (task, KV head) pairs.
static void attend_chunk(const void *context, int64_t first, int64_t last) {
    const attention *a = context;
    const int64_t packed_bytes = num_steps(a->head_dim, a->type) * packed_step_bytes(a->type);
    const int64_t decode_bytes = a->group_size * (CHUNK * 4 + packed_bytes);
    char *workspace = scratch(OF_CHUNK, decode_bytes > tile_bytes(a) ? decode_bytes : tile_bytes(a));
    for (int64_t i = first; i < last; i++) {
        const int64_t head = i % a->num_kv_heads;
        const task t = a->tasks[i / a->num_kv_heads];
        char *parts = parts_of(a, i / a->num_kv_heads, head);
        if (a->type == BF16) run_task(a, t, head, parts, workspace, BF16);
        else run_task(a, t, head, parts, workspace, F32);
    }
}

void paged_attention(void *out, const void *q, const void *k_cache, const void *v_cache, const void *query_start,
                     const void *context_lens, const void *rows, const void *block_table, int64_t num_requests,
                     int64_t table_width, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t window,
                     float scale, float softcap, int type) {
    attention a = {out,          q,         k_cache,     v_cache,      query_start, context_lens, rows,
                   block_table,  num_requests, table_width, num_heads, num_kv_heads, head_dim, num_heads / num_kv_heads,
                   window,       scale,     softcap,     type,         NULL,        NULL};
    int64_t num_tasks = 0;
    for (int64_t i = 0; i < num_requests; i++) num_tasks += num_parts(&a, i);

    const int64_t parts_bytes = num_tasks * num_heads * partial_bytes(&a);
    a.parts = scratch(OF_CALL, parts_bytes + num_tasks * sizeof(task));
    task *tasks = (task *)(a.parts + parts_bytes), *next = tasks;
    a.tasks = tasks;
    for (int64_t i = 0; i < num_requests; i++)  // the last tiles of a prompt see most keys: they go first
        for (int64_t n = num_parts(&a, i); n > 0; n--)
            *next++ = (task){i, num_queries(&a, i) == 1 ? num_parts(&a, i) - n : n - 1};

    parallel_for(num_tasks * num_kv_heads, 1, attend_chunk, &a);
    for (int64_t i = 0; i < num_tasks; i += num_parts(&a, tasks[i].request)) {
        const int64_t request = tasks[i].request;
        if (num_queries(&a, request) != 1 || num_parts(&a, request) == 1) continue;
        for (int64_t head = 0; head < num_kv_heads; head++) {
            if (type == BF16) merge_chunks(&a, request, head, parts_of(&a, i, head), num_parts(&a, request), BF16);
            else merge_chunks(&a, request, head, parts_of(&a, i, head), num_parts(&a, request), F32);
        }
    }
}
