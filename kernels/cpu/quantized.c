// Weights of few bits worked out, and inputs rounded to few bits.
//
// dequantize: y [rows, in] = (q - zero) · scale, a tile of a weight that stays in cache until it is multiplied with.
// few_rows: the product itself, for few rows of x. round_rows: each vector of x [rows, dim] as int8 or e4m3, and the
// scale that takes its largest number to the largest there is. rescale: y [rows, out] = sum · x_scale · scale + bias.
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
    const int64_t groups = (w->in + w->group_size - 1) / w->group_size, first_group = width / w->group_size;
    for (int64_t row = first; row < last; row++) {
        const int64_t line = (w->first + row) / w->block_rows * groups;
        for (int64_t half = 0; half < halves; half++) {
            const uint8_t *bytes = w->numbers + row * width;
            char *y = w->y + (row * w->in + half * width) * size_of(type);
            // A division takes as long as the numbers of a small group.
            int64_t group = half * first_group, end = half ? (group + 1) * w->group_size - width : w->group_size;
            for (int64_t i = 0; i < width; group++, end += w->group_size) {
                const int64_t stop = end < width ? end : width;
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

#ifdef __AVX512BF16__

typedef struct {
    char *y;
    const uint16_t *x, *bias;
    weight w;  // of `type` y is
    int64_t rows, out, groups, first_group;  // of the second half of a row
} few;

// As bfloat16, twice and four times over, as five bits of a word pick one: the 16 numbers of 4 bits, once a zero of -8
// to 8 is taken off, and the 8 of e4m3 without an exponent.
static uint16_t tables[17][32] __attribute__((aligned(64))), small_e4m3[32] __attribute__((aligned(64)));

__attribute__((constructor)) static void fill_tables(void) {
    for (int zero = -8; zero <= 8; zero++)
        for (int q = 0; q < 32; q++) put(tables[zero + 8], q, (float)((q & 15) - 8 - zero), BF16);
    for (int q = 0; q < 32; q++) put(small_e4m3, q, from_e4m3(q & 7), BF16);
}

// The numbers of 32 bytes, each in a word, as bfloat16.
INLINE __m512i to_bf16(__m512i words, __m512i table, int half, const int kind) {
    if (kind == INT4) return _mm512_permutexvar_epi16(half ? _mm512_srli_epi16(words, 4) : words, table);
    const __m512i size = _mm512_slli_epi16(_mm512_and_si512(words, _mm512_set1_epi16(0x7f)), 4);
    const __m512i normal = _mm512_add_epi16(size, _mm512_set1_epi16(120 << 7));  // see from_e4m3
    const __mmask32 is_small = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x78));
    const __m512i found = _mm512_mask_permutexvar_epi16(normal, is_small, words, table);
    return _mm512_or_si512(found, _mm512_slli_epi16(_mm512_and_si512(words, _mm512_set1_epi16(0x80)), 8));
}

// The products of rows [m, m + kRows) of x and row n of the weight. A step is 32 numbers, all of one group.
INLINE void dot_groups(const few *p, int64_t m, int64_t n, const int kRows, const int kind) {
    const weight *w = &p->w;
    const int64_t halves = kind == INT4 ? 2 : 1, width = w->in / halves;
    const int64_t first_group = p->first_group, line = n * p->groups;
    const uint8_t *bytes = w->numbers + n * width;
    __m512 totals[8];
    UNROLL for (int r = 0; r < kRows; r++) totals[r] = _mm512_setzero_ps();
    for (int half = 0; half < halves; half++) {
        const uint16_t *x = p->x + m * w->in + half * width;
        int64_t group = half * first_group, end = half ? (group + 1) * w->group_size - width : w->group_size;
        for (int64_t i = 0; i < width; group++, end += w->group_size) {
            const int64_t stop = end < width ? end : width;
            const int zero = kind == INT4 && w->zeros ? w->zeros[line + group] : 0;
            const __m512i table = _mm512_load_si512(kind == INT4 ? tables[zero + 8] : small_e4m3);
            __m512 sums[8];
            UNROLL for (int r = 0; r < kRows; r++) sums[r] = _mm512_setzero_ps();
            for (; i < stop; i += 32) {
                const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(bytes + i)));
                const __m512i numbers = to_bf16(words, table, half, kind);
                UNROLL for (int r = 0; r < kRows; r++)
                    sums[r] = _mm512_dpbf16_ps(sums[r], (__m512bh)numbers,
                                               (__m512bh)_mm512_loadu_si512(x + r * w->in + i));
            }
            const __m512 scale = _mm512_set1_ps(w->scales ? w->scales[line + group] : 1.0f);
            UNROLL for (int r = 0; r < kRows; r++) totals[r] = _mm512_fmadd_ps(sums[r], scale, totals[r]);
        }
    }
    UNROLL for (int r = 0; r < kRows; r++)
        put(p->y, (m + r) * p->out + n, _mm512_reduce_add_ps(totals[r]) + (p->bias ? get(p->bias, n, BF16) : 0.0f),
            w->type);
}

INLINE void multiply_rows(const few *p, int64_t first, int64_t last, const int kind) {
    for (int64_t n = first; n < last; n++) {
        int64_t m = 0;
        for (; m + 8 <= p->rows; m += 8) dot_groups(p, m, n, 8, kind);
        for (; m + 4 <= p->rows; m += 4) dot_groups(p, m, n, 4, kind);
        for (; m + 2 <= p->rows; m += 2) dot_groups(p, m, n, 2, kind);
        for (; m < p->rows; m++) dot_groups(p, m, n, 1, kind);
    }
}

static void few_rows_chunk(const void *context, int64_t first, int64_t last) {
    const few *p = context;
    if (p->w.kind == INT4) multiply_rows(p, first, last, INT4);
    else multiply_rows(p, first, last, E4M3);
}

// y = x · Wᵀ + bias of 4 bits or e4m3, x in bfloat16, W never worked out in memory. One row of 576 inputs to 1536
// outputs by 4 bits takes 0.06 ms a core instead of 0.35 by tiles, 8 rows 0.23 instead of 0.37, 16 rows 0.46 instead of
// 0.38. Whether it did: 0 on other machines, for more rows and for groups that steps do not fit.
int few_rows(void *y, const void *x, const void *numbers, const void *scales, const void *zeros, const void *bias,
             int64_t rows, int64_t in, int64_t out, int64_t group_size, int kind, int y_type) {
    const int64_t width = kind == INT4 ? in / 2 : in;
    if (rows > 8 || kind == INT8 || in % 2 || width % 32 || group_size % 32) return 0;
    const few p = {y, x, bias, {0, numbers, scales, zeros, 0, in, group_size, 1, kind, y_type}, rows, out,
                   in / group_size, width / group_size};
    parallel_for(out, rows_per_chunk(in / 8 * rows), few_rows_chunk, &p);
    return 1;
}

#else

int few_rows(void *y, const void *x, const void *numbers, const void *scales, const void *zeros, const void *bias,
             int64_t rows, int64_t in, int64_t out, int64_t group_size, int kind, int y_type) {
    return 0;
}

#endif

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
