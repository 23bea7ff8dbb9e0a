// y = f(gate) · up, f = silu or gelu_tanh.
//
// gate_up [rows, 2 · dim]: gate, then up; y [rows, dim]. Bound by the exponential while the rows are in cache (some 20
// instructions a vector), by memory beyond.
#include "common.h"

enum { SILU, GELU_TANH };  // as engine/ops/native.py passes them

INLINE float silu(float x) { return x / (1.0f + fast_exp(-x)); }

INLINE float gelu_tanh(float x) {
    const float inner = 0.79788456f * (x + 0.044715f * x * x * x);
    return x / (1.0f + fast_exp(-2.0f * inner));  // = x · (1 + tanh(inner)) / 2
}

typedef struct {
    char *y;
    const char *gate_up;
    int64_t dim;
    int kind, type;
} activation;

INLINE void activate_rows(const activation *a, int64_t first, int64_t last, const int kind, const int type) {
    const int64_t dim = a->dim;
    for (int64_t row = first; row < last; row++) {
        const char *gate = a->gate_up + row * 2 * dim * size_of(type), *up = gate + dim * size_of(type);
        char *out = a->y + row * dim * size_of(type);
#pragma omp simd
        for (int64_t i = 0; i < dim; i++) {
            const float x = get(gate, i, type);
            put(out, i, (kind == SILU ? silu(x) : gelu_tanh(x)) * get(up, i, type), type);
        }
    }
}

static void activate_chunk(const void *context, int64_t first, int64_t last) {
    const activation *a = context;
    if (a->type == BF16 && a->kind == SILU) activate_rows(a, first, last, SILU, BF16);
    else if (a->type == BF16) activate_rows(a, first, last, GELU_TANH, BF16);
    else if (a->kind == SILU) activate_rows(a, first, last, SILU, F32);
    else activate_rows(a, first, last, GELU_TANH, F32);
}

void gated_activation(void *y, const void *gate_up, int64_t rows, int64_t dim, int kind, int type) {
    const activation a = {y, gate_up, dim, kind, type};
    parallel_for(rows, rows_per_chunk(dim), activate_chunk, &a);
}
