// y = x · wᵀ + bias for few rows.   x [rows, in], w [out, in], bias [out] or null, y [rows, out], all of one type
//
// Bound by reading the weights, each of which is used `rows` times: so every weight is read once, in order, by all threads
// side by side. A tile holds LANES running dot products in registers: kRows rows of x times LANES / kRows rows of w, which
// stay in the first cache until every row of x has met them.
#include "common.h"

#define ROWS_PER_TASK 32     // of w; small enough to balance threads, large enough to hide the sharing out
#define PREFETCH_BYTES 8192  // ahead of the current weight: some 300 ns of a core's share of the memory's speed

typedef struct {
    char *y;
    const char *packed, *w, *bias;
    int64_t rows, in, out;
} product;

// The products of packed rows [m, m + kRows) and weight rows [n, n + LANES / kRows).
INLINE vec dot_tile(const product *p, int64_t m, int64_t n, const int kRows, const int type) {
    const int kCols = LANES / kRows;
    const int64_t whole_steps = p->in / step_size(type), row_bytes = p->in * size_of(type);
    const int64_t packed_row_bytes = num_steps(p->in, type) * packed_step_bytes(type);
    const char *x = p->packed + m * packed_row_bytes;
    const char *w[LANES];
    vec sums[LANES];
    UNROLL for (int j = 0; j < kCols; j++) w[j] = p->w + (n + j < p->out ? n + j : p->out - 1) * row_bytes;
    UNROLL for (int i = 0; i < LANES; i++) sums[i] = (vec){0};

    for (int64_t step = 0; step < whole_steps; step++) {
        UNROLL for (int j = 0; j < kCols; j++) {
            const char *weights = w[j] + step * 4 * LANES;
            if (m == 0) __builtin_prefetch(weights + PREFETCH_BYTES);
            UNROLL for (int i = 0; i < kRows; i++)
                sums[i * kCols + j] = dot_step(sums[i * kCols + j], weights,
                                               x + i * packed_row_bytes + step * packed_step_bytes(type), type);
        }
    }
    const int64_t done = whole_steps * 4 * LANES;
    if (done < row_bytes) {
        UNROLL for (int j = 0; j < kCols; j++) {
            char weights[4 * LANES] = {0};
            memcpy(weights, w[j] + done, row_bytes - done);
            UNROLL for (int i = 0; i < kRows; i++)
                sums[i * kCols + j] = dot_step(sums[i * kCols + j], weights,
                                               x + i * packed_row_bytes + whole_steps * packed_step_bytes(type), type);
        }
    }
    return sum_rows(sums);
}

INLINE void store_tile(const product *p, vec tile, int64_t m, int64_t n, const int kRows, const int type) {
    const int kCols = LANES / kRows;
    for (int i = 0; i < kRows && m + i < p->rows; i++)
        for (int j = 0; j < kCols && n + j < p->out; j++)
            put(p->y, (m + i) * p->out + n + j, tile[i * kCols + j] + (p->bias ? get(p->bias, n + j, type) : 0.0f), type);
}

INLINE void multiply(const product *p, int64_t first, int64_t last, const int kRows, const int type) {
    for (int64_t n = first; n < last; n += LANES / kRows)
        for (int64_t m = 0; m < p->rows; m += kRows) store_tile(p, dot_tile(p, m, n, kRows, type), m, n, kRows, type);
}

static void multiply_part(const product *p, int64_t first, int64_t last, int type) {
    if (type == BF16 && p->rows == 1) multiply(p, first, last, 1, BF16);
    else if (type == BF16 && p->rows == 2) multiply(p, first, last, 2, BF16);
    else if (type == BF16) multiply(p, first, last, 4, BF16);
    else if (p->rows == 1) multiply(p, first, last, 1, F32);
    else if (p->rows == 2) multiply(p, first, last, 2, F32);
    else multiply(p, first, last, 4, F32);
}

void linear(void *y, const void *x, const void *w, const void *bias, int64_t rows, int64_t in, int64_t out, int type) {
    const int64_t packed_row_bytes = num_steps(in, type) * packed_step_bytes(type);
    const int64_t padded_rows = rows < 3 ? rows : (rows + 3) / 4 * 4;
    char *packed = scratch(padded_rows * packed_row_bytes);
    for (int64_t m = 0; m < padded_rows; m++)  // rows beyond the last are copies of it, whose products are dropped
        pack(packed + m * packed_row_bytes, at(x, (m < rows ? m : rows - 1) * in, type), in, type);
    const product p = {y, packed, w, bias, rows, in, out};
#pragma omp parallel for schedule(dynamic)
    for (int64_t n = 0; n < out; n += ROWS_PER_TASK)
        multiply_part(&p, n, n + ROWS_PER_TASK < out ? n + ROWS_PER_TASK : out, type);
}
