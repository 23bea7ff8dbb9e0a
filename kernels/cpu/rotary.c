// From the QKV projection to rotated queries and stored keys and values.
//
// qkv [num_tokens, (num_heads + 2 · num_kv_heads) · head_dim]: queries, keys, values; cos_sin [positions, rotary_dim]
// float32: cosines, then sines; caches [num_blocks, num_kv_heads, block_size, head_dim]; q_out [num_tokens, num_heads,
// head_dim]. A head is normed (if its weight is given), then its pairs (x[i], x[i + rotary_dim / 2]) are turned:
//     x'[i] = x[i] · cos[i] - x[i + half] · sin[i],   x'[i + half] = x[i + half] · cos[i] + x[i] · sin[i].
// Bound by memory: every number is read once and written once.
#include "common.h"

typedef struct {
    const void *qkv;
    const int32_t *positions, *slot_mapping;
    const float *cos_sin;
    void *k_cache, *v_cache, *q_out;
    const void *q_norm, *k_norm;  // may be null
    int64_t num_heads, num_kv_heads, head_dim, rotary_dim, block_size;
    float eps;
    int type, norm_type;  // of qkv, caches and q_out; of q_norm and k_norm: that or float32
} rotation;

INLINE void turn_head(void *out, const void *x, const void *norm, const float *cos, const rotation *r, const int type) {
    const int64_t half = r->rotary_dim / 2, dim = r->head_dim;
    const float *sin = cos + half;
    float head[dim];
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; i++) {
        head[i] = get(x, i, type);
        sum += head[i] * head[i];
    }
    if (norm) {
        const float scale = 1.0f / sqrtf(sum / (float)dim + r->eps);
        for (int64_t i = 0; i < dim; i++) head[i] *= scale * get(norm, i, r->norm_type);
    }
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        put(out, i, head[i] * cos[i] - head[i + half] * sin[i], type);
        put(out, i + half, head[i + half] * cos[i] + head[i] * sin[i], type);
    }
    for (int64_t i = 2 * half; i < dim; i++) put(out, i, head[i], type);
}

INLINE void rotate_tokens(const rotation *r, int64_t first, int64_t last, const int type) {
    const int64_t head_bytes = r->head_dim * size_of(type);
    for (int64_t token = first; token < last; token++) {
        const char *head = (const char *)r->qkv + token * (r->num_heads + 2 * r->num_kv_heads) * head_bytes;
        const float *cos = r->cos_sin + r->positions[token] * r->rotary_dim;
        char *q = (char *)r->q_out + token * r->num_heads * head_bytes;
        for (int64_t i = 0; i < r->num_heads; i++, head += head_bytes)
            turn_head(q + i * head_bytes, head, r->q_norm, cos, r, type);
        const int64_t block = r->slot_mapping[token] / r->block_size, offset = r->slot_mapping[token] % r->block_size;
        for (int64_t i = 0; i < r->num_kv_heads; i++, head += head_bytes) {
            const int64_t line = ((block * r->num_kv_heads + i) * r->block_size + offset) * head_bytes;
            turn_head((char *)r->k_cache + line, head, r->k_norm, cos, r, type);
            memcpy((char *)r->v_cache + line, head + r->num_kv_heads * head_bytes, head_bytes);
        }
    }
}

static void rotate_chunk(const void *context, int64_t first, int64_t last) {
    const rotation *r = context;
    if (r->type == BF16) rotate_tokens(r, first, last, BF16);
    else rotate_tokens(r, first, last, F32);
}

void rotate_and_store(void *q_out, const void *qkv, const void *positions, const void *slot_mapping,
                      const void *cos_sin, void *k_cache, void *v_cache, const void *q_norm, const void *k_norm,
                      int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t rotary_dim,
                      int64_t block_size, float eps, int type, int norm_type) {
    const rotation r = {qkv,       positions,    slot_mapping, cos_sin,    k_cache,    v_cache, q_out, q_norm,   k_norm,
                        num_heads, num_kv_heads, head_dim,     rotary_dim, block_size, eps,     type,  norm_type};
    parallel_for(num_tokens, rows_per_chunk((num_heads + 2 * num_kv_heads) * head_dim), rotate_chunk, &r);
}
