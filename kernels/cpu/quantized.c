// Weights of few bits worked out, and inputs rounded to few bits.
//
// dequantize: y [rows, in] = (q - zero) · scale, a tile of a weight that stays in cache until it is multiplied with.
// round_rows: each vector of x [rows, dim] as int8 or e4m3 and the scale that takes its largest number to the largest
// there is. rescale: y [rows, out] = acc · x_scale · scale + bias.
#include "common.h"

enum { INT4, INT8, E4M3 };       // kinds of numbers, as engine/ops/native.py passes them
enum { OF_BF16, OF_F32, OF_I32 };  // types of sums

// Exponents of e4m3 are 120 less than those of float32; those of 0 stand for m · 2^-9.
INLINE float from_e4m3(uint32_t bits) {
    const float normal = from_bits(((bits & 0x7f) << 20) + (120u << 23)), small = (float)(bits & 7) * 0x1p-9f;
    const float size = bits & 0x78 ? normal : small;
    return bits & 0x80 ? -size : size;
}

// To the nearest of e4m3, of two to the even one; |x| is at most 448. Below 2^-6 its steps are 2^-9: adding 1.5 · 2^14
// leaves no bit below.
INLINE float to_e4m3(float x) {
    const uint32_t bits = to_bits(x);
    const float normal = from_bits((bits + 0x7ffff + (bits >> 20 & 1)) & 0xfff00000);
    const float small = (x + 0x1.8p14f) - 0x1.8p14f;
    return (bits & 0x7fffffff) < 0x3c800000 ? small : normal;
}

INLINE float number(uint8_t byte, int shift, const int kind) {
    if (kind == INT4) return (float)((byte >> shift & 15) - 8);
    return kind == INT8 ? (float)(int8_t)byte : from_e4m3(byte);
}

typedef struct {
    char *y;
    const uint8_t *numbers;  // [rows, in]; INT4: [rows, in / 2], the lower bits are the first half of a row
    const float *scales;     // [blocks of rows, groups], or null: 1
    const int16_t *zeros;    // as scales, or null: 0
    int64_t first, in, group_size, block_rows;  // first: of these rows, in the weight
    int kind, type;
} weight;

INLINE void work_out_rows(const weight *w, int64_t first, int64_t last, const int kind, const int type) {
    const int64_t halves = kind == INT4 ? 2 : 1, width = w->in / halves;
    const int64_t groups = (w->in + w->group_size - 1) / w->group_size;
    for (int64_t row = first; row < last; row++) {
        const int64_t line = (w->first + row) / w->block_rows * groups;
        for (int64_t half = 0; half < halves; half++) {
            const uint8_t *bytes = w->numbers + row * width;
            char *y = w->y + (row * w->in + half * width) * size_of(type);
            for (int64_t i = 0; i < width;) {
                const int64_t group = (half * width + i) / w->group_size;
                const int64_t end = (group + 1) * w->group_size - half * width, stop = end < width ? end : width;
                const float scale = w->scales ? w->scales[line + group] : 1.0f;
                const float zero = w->zeros ? (float)w->zeros[line + group] : 0.0f;
#pragma omp simd
                for (int64_t j = i; j < stop; j++)
                    put(y, j, (number(bytes[j], 4 * half, kind) - zero) * scale, type);
                i = stop;
            }
        }
    }
}

static void work_out_chunk(const void *context, int64_t first, int64_t last) {
    const weight *w = context;
    if (w->kind == INT4 && w->type == BF16) work_out_rows(w, first, last, INT4, BF16);
    else if (w->kind == INT4) work_out_rows(w, first, last, INT4, F32);
    else if (w->kind == INT8 && w->type == BF16) work_out_rows(w, first, last, INT8, BF16);
    else if (w->kind == INT8) work_out_rows(w, first, last, INT8, F32);
    else if (w->type == BF16) work_out_rows(w, first, last, E4M3, BF16);
    else work_out_rows(w, first, last, E4M3, F32);
}

void dequantize(void *y, const void *numbers, const void *scales, const void *zeros, int64_t first, int64_t rows,
                int64_t in, int64_t group_size, int64_t block_rows, int kind, int type) {
    const weight w = {y, numbers, scales, zeros, first, in, group_size, block_rows, kind, type};
    parallel_for(rows, rows_per_chunk(in), work_out_chunk, &w);
}

typedef struct {
    char *y;  // INT8: bytes, E4M3: of x's type
    float *scales;
    const char *x;
    int64_t dim;
    int kind, type;
} rounding;

INLINE void round_each(const rounding *r, int64_t first, int64_t last, const int kind, const int type) {
    for (int64_t row = first; row < last; row++) {
        const char *x = at(r->x, row * r->dim, type);
        float largest = 0.0f;
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < r->dim; i++) {
            const float size = from_bits(to_bits(get(x, i, type)) & 0x7fffffff);
            largest = size > largest ? size : largest;
        }
        const float limit = kind == INT8 ? 127.0f : 448.0f, exact = largest / limit;
        const float scale = exact > 0x1p-126f ? exact : 0x1p-126f;
        r->scales[row] = scale;
        char *y = r->y + row * r->dim * (kind == INT8 ? 1 : size_of(type));
#pragma omp simd
        for (int64_t i = 0; i < r->dim; i++) {
            const float step = get(x, i, type) / scale, below = step < limit ? step : limit;
            const float clamped = below > -limit ? below : -limit;
            if (kind == INT8) ((int8_t *)y)[i] = (int8_t)(int32_t)((clamped + 12582912.0f) - 12582912.0f);
            else put(y, i, to_e4m3(clamped), type);
        }
    }
}

static void round_chunk(const void *context, int64_t first, int64_t last) {
    const rounding *r = context;
    if (r->kind == INT8 && r->type == BF16) round_each(r, first, last, INT8, BF16);
    else if (r->kind == INT8) round_each(r, first, last, INT8, F32);
    else if (r->type == BF16) round_each(r, first, last, E4M3, BF16);
    else round_each(r, first, last, E4M3, F32);
}

void round_rows(void *y, void *scales, const void *x, int64_t rows, int64_t dim, int kind, int type) {
    const rounding r = {y, scales, x, dim, kind, type};
    parallel_for(rows, rows_per_chunk(dim), round_chunk, &r);
}

typedef struct {
    char *y;
    const char *sums, *bias;
    const float *x_scales, *scales;
    int64_t out;
    int sum_type, type;
} rescaling;

INLINE void rescale_rows(const rescaling *s, int64_t first, int64_t last, const int sum_type, const int type) {
    for (int64_t row = first; row < last; row++) {
        const char *from = s->sums + row * s->out * (sum_type == OF_BF16 ? 2 : 4);
        char *y = s->y + row * s->out * size_of(type);
        const float x_scale = s->x_scales[row];
#pragma omp simd
        for (int64_t i = 0; i < s->out; i++) {
            const float sum = sum_type == OF_I32 ? (float)((const int32_t *)from)[i] : get(from, i, sum_type);
            put(y, i, sum * s->scales[i] * x_scale + (s->bias ? get(s->bias, i, type) : 0.0f), type);
        }
    }
}

static void rescale_chunk(const void *context, int64_t first, int64_t last) {
    const rescaling *s = context;
    if (s->type == F32 && s->sum_type == OF_I32) rescale_rows(s, first, last, OF_I32, F32);
    else if (s->type == F32) rescale_rows(s, first, last, OF_F32, F32);
    else if (s->sum_type == OF_I32) rescale_rows(s, first, last, OF_I32, BF16);
    else if (s->sum_type == OF_F32) rescale_rows(s, first, last, OF_F32, BF16);
    else rescale_rows(s, first, last, OF_BF16, BF16);
}

void rescale(void *y, const void *sums, const void *x_scales, const void *scales, const void *bias, int64_t rows,
             int64_t out, int sum_type, int type) {
    const rescaling s = {y, sums, bias, x_scales, scales, out, sum_type, type};
    parallel_for(rows, rows_per_chunk(out), rescale_chunk, &s);
}
