// y = x / sqrt(mean(x²) + eps) · weight, row by row; with a residual, first residual += x and x is the sum.
//
// x, residual, y [rows, dim] of one type, weight [dim] of that type or float32. Bound by memory; a row stays in the
// first cache between its two passes. Few rows run on the calling thread: waking the others would take longer than the
// work.
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

INLINE void norm_rows(char *y, const char *x, char *residual, const void *weight, int64_t first, int64_t last,
                      int64_t dim, float eps, const int type, const int weight_type) {
    for (int64_t row = first; row < last; row++) {
        const int64_t offset = row * dim * size_of(type);
        if (residual) add_row(residual + offset, x + offset, dim, type);
        norm_row(y + offset, residual ? residual + offset : x + offset, weight, dim, eps, type, weight_type);
    }
}

static void norm_part(void *y, const void *x, void *residual, const void *weight, int64_t first, int64_t last,
                      int64_t dim, float eps, int type, int weight_type) {
    if (type == F32) norm_rows(y, x, residual, weight, first, last, dim, eps, F32, F32);
    else if (weight_type == F32) norm_rows(y, x, residual, weight, first, last, dim, eps, BF16, F32);
    else norm_rows(y, x, residual, weight, first, last, dim, eps, BF16, BF16);
}

// residual may be null.
void rms_norm(void *y, const void *x, void *residual, const void *weight, int64_t rows, int64_t dim, float eps,
              int type, int weight_type) {
    if (rows * dim < MIN_PARALLEL_SIZE) {
        norm_part(y, x, residual, weight, 0, rows, dim, eps, type, weight_type);
        return;
    }
#pragma omp parallel
    {
        const range part = my_part(rows);
        norm_part(y, x, residual, weight, part.first, part.last, dim, eps, type, weight_type);
    }
}
