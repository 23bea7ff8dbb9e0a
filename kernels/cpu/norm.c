// y = x / sqrt(mean(x²) + eps) · weight, row by row; with a residual, first residual += x and x is the sum.
//
// x, residual, y [rows, dim] of one type, weight [dim] of that type or float32. Bound by memory; a row stays in the
// first cache between its two passes.
#include "common.h"

INLINE void norm_row(void *y, const void *x, const void *weight, int64_t dim, float eps, const int type,
                     const int weight_type) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; i++) sum += get(x, i, type) * get(x, i, type);
    const float scale = 1.0f / sqrtf(sum / (float)dim + eps);
#pragma omp simd
    for (int64_t i = 0; i < dim; i++) put(y, i, get(x, i, type) * scale * get(weight, i, weight_type), type);
}

INLINE void add_row(void *residual, const void *x, int64_t dim, const int type) {
#pragma omp simd
    for (int64_t i = 0; i < dim; i++) put(residual, i, get(residual, i, type) + get(x, i, type), type);
}

typedef struct {
    char *y;
    const char *x;
    char *residual;  // may be null
    const void *weight;
    int64_t dim;
    float eps;
    int type, weight_type;
} norm;

INLINE void norm_rows(const norm *n, int64_t first, int64_t last, const int type, const int weight_type) {
    for (int64_t row = first; row < last; row++) {
        const int64_t offset = row * n->dim * size_of(type);
        if (n->residual) add_row(n->residual + offset, n->x + offset, n->dim, type);
        const char *x = (n->residual ? n->residual : n->x) + offset;
        norm_row(n->y + offset, x, n->weight, n->dim, n->eps, type, weight_type);
    }
}

static void norm_chunk(const void *context, int64_t first, int64_t last) {
    const norm *n = context;
    if (n->type == F32) norm_rows(n, first, last, F32, F32);
    else if (n->weight_type == F32) norm_rows(n, first, last, BF16, F32);
    else norm_rows(n, first, last, BF16, BF16);
}

void rms_norm(void *y, const void *x, void *residual, const void *weight, int64_t rows, int64_t dim, float eps,
              int type, int weight_type) {
    const norm n = {y, x, residual, weight, dim, eps, type, weight_type};
    parallel_for(rows, rows_per_chunk(dim), norm_chunk, &n);
}
