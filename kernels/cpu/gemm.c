// y = x · wᵀ + bias for few rows.   x [rows, in], w [out, in], bias [out] or null, y [rows, out], all of one type
//
// Bound by reading the weights, each of which is used `rows` times: a thread reads its part of them once and in order.
// A tile holds LANES running dot products in registers: kRows rows of x times LANES / kRows rows of w, which stay in
// the first cache until every row of x has met them. The order of a sum does not depend on `rows`.
#include "gemm.h"

#define MIN_AMX_ROWS 3  // one or two rows are as fast without
#define STEP_BYTES (4 * LANES)
#define PREFETCH_BYTES 4096  // ahead of the current weight: some 300 ns of a core's share of the memory's speed

// sums[i · stride + j] = packed row m + i times weight row n + j, still spread over the lanes.
INLINE void dot_rows(vec *sums, int stride, const product *p, int64_t m, int64_t n, const int kRows, const int kCols,
                     const int type) {
    const int64_t whole_steps = p->in / step_size(type), row_bytes = p->in * size_of(type);
    const int64_t packed_bytes = num_steps(p->in, type) * packed_step_bytes(type);
    const char *x = p->packed + m * packed_bytes, *w[LANES];
    vec running[LANES];  // kRows · kCols of them: a variable length would keep them from registers
    UNROLL for (int j = 0; j < kCols; j++) w[j] = p->w + (n + j < p->out ? n + j : p->out - 1) * row_bytes;
    UNROLL for (int i = 0; i < kRows * kCols; i++) running[i] = (vec){0};

    for (int64_t step = 0; step < whole_steps; step++, x += packed_step_bytes(type)) {
        UNROLL for (int j = 0; j < kCols; j++) {
            if (m == 0) __builtin_prefetch(w[j] + PREFETCH_BYTES);
            UNROLL for (int i = 0; i < kRows; i++) {
                vec *sum = running + i * kCols + j;
                *sum = dot_step(*sum, w[j], x + i * packed_bytes, type);
            }
            w[j] += STEP_BYTES;
        }
    }
    const int64_t rest = row_bytes - whole_steps * STEP_BYTES;
    if (rest) {
        UNROLL for (int j = 0; j < kCols; j++) {
            char last[STEP_BYTES] = {0};
            memcpy(last, w[j], rest);
            UNROLL for (int i = 0; i < kRows; i++) {
                vec *sum = running + i * kCols + j;
                *sum = dot_step(*sum, last, x + i * packed_bytes, type);
            }
        }
    }
    UNROLL for (int i = 0; i < kRows; i++) {
        UNROLL for (int j = 0; j < kCols; j++) sums[i * stride + j] = running[i * kCols + j];
    }
}

// The products of packed rows [m, m + kRows) and weight rows [n, n + LANES / kRows). One or two rows of x leave
// arithmetic idle: then the weights are read strictly in order, 16.7 against 12.2 GB/s a core.
INLINE vec dot_tile(const product *p, int64_t m, int64_t n, const int kRows, const int type) {
    const int kCols = LANES / kRows, kGroup = kRows == 4 ? kCols : 1;
    vec sums[LANES];
    for (int j = 0; j < kCols; j += kGroup) dot_rows(sums + j, kCols, p, m, n + j, kRows, kGroup, type);
    return sum_rows(sums);
}

INLINE void store_tile(const product *p, vec tile, int64_t m, int64_t n, const int kRows, const int type) {
    const int kCols = LANES / kRows;
    for (int i = 0; i < kRows && m + i < p->rows; i++)
        for (int j = 0; j < kCols && n + j < p->out; j++)
            put(p->y, (m + i) * p->out + n + j, tile[i * kCols + j] + (p->bias ? get(p->bias, n + j, type) : 0.0f),
                p->y_type);
}

INLINE void multiply(const product *p, int64_t first, int64_t last, const int kRows, const int type) {
    for (int64_t n = first; n < last; n += LANES / kRows)
        for (int64_t m = 0; m < p->rows; m += kRows) store_tile(p, dot_tile(p, m, n, kRows, type), m, n, kRows, type);
}

static void multiply_chunk(const void *context, int64_t first_group, int64_t last_group) {
    const product *p = context;
    const int64_t first = first_group * LANES, last = last_group * LANES < p->out ? last_group * LANES : p->out;
    const int type = p->type;
    if (type == BF16 && p->rows == 1) multiply(p, first, last, 1, BF16);
    else if (type == BF16 && p->rows == 2) multiply(p, first, last, 2, BF16);
    else if (type == BF16) multiply(p, first, last, 4, BF16);
    else if (p->rows == 1) multiply(p, first, last, 1, F32);
    else if (p->rows == 2) multiply(p, first, last, 2, F32);
    else multiply(p, first, last, 4, F32);
}

// For more rows than this the work is bound by arithmetic, and oneDNN, which lays the weights out anew, is faster.
int64_t max_linear_rows(int type) {
    if (type == F32) return 64;
    return amx_is_usable() ? 128 : PACKED_BF16_BYTES == 2 ? 32 : 16;
}

void linear(void *y, const void *x, const void *w, const void *bias, int64_t rows, int64_t in, int64_t out, int type,
            int y_type) {
    product p = {y, 0, w, bias, rows, in, out, type, y_type};
    if (type == BF16 && rows >= MIN_AMX_ROWS && linear_amx(&p, x)) return;
    const int64_t packed_row_bytes = num_steps(in, type) * packed_step_bytes(type);
    const int64_t padded_rows = rows < 3 ? rows : (rows + 3) / 4 * 4;
    char *packed = scratch(OF_CALL, padded_rows * packed_row_bytes);
    for (int64_t m = 0; m < padded_rows; m++)  // rows beyond the last are copies of it, whose products are dropped
        pack(packed + m * packed_row_bytes, at(x, (m < rows ? m : rows - 1) * in, type), in, type);
    p.packed = packed;
    parallel_for((out + LANES - 1) / LANES, groups_per_chunk(&p, LANES), multiply_chunk, &p);
}
