// What the native CPU ops share: number types, vectors of the machine's width, and branch-free exp, log and tanh.
//
// A kernel is written once for all number types as an inline function with a constant `type`, and its exported face
// calls it with each constant, so that the compiler makes one loop a type. Arithmetic is float32 everywhere.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "pool.h"

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

enum { BF16, F32 };  // number types, as engine/ops/native.py passes them

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float get(const void *p, int64_t i, const int type) {
    return type == BF16 ? from_bits((uint32_t)((const uint16_t *)p)[i] << 16) : ((const float *)p)[i];
}

// Rounds to nearest even; a NaN stays one.
INLINE void put(void *p, int64_t i, float x, const int type) {
    if (type == F32) {
        ((float *)p)[i] = x;
        return;
    }
    uint32_t bits = to_bits(x);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    ((uint16_t *)p)[i] = x == x ? rounded : 0x7fc0;
}

INLINE vec get_vec(const void *p, int64_t i, const int type) {
    if (type == F32) return *(const vec *)((const float *)p + i);
    return (vec)(__builtin_convertvector(*(const halves *)((const uint16_t *)p + i), words) << 16);
}

INLINE size_t size_of(const int type) { return type == BF16 ? 2 : 4; }

// Bytes of element i of an array.
INLINE const char *at(const void *p, int64_t i, const int type) { return (const char *)p + i * size_of(type); }

// Rows that make a chunk of a few microseconds where each has so many elements, which are read and written once.
INLINE int64_t rows_per_chunk(int64_t row_size) { return (4096 + row_size - 1) / row_size; }

// Polynomials of Cephes (Moshier), relative error 1e-7. Below -87.3 the exponential is 0.
INLINE float fast_exp(float x) {
    const float above = x < -87.3f ? -87.3f : x, clamped = above > 88.3f ? 88.3f : above;
    const float n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
    const float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = (y * r * r + r + 1.0f) * from_bits((uint32_t)((int32_t)n + 127) << 23);
    return x < -87.3f ? 0.0f : y;
}

// x > 0 and normal.
INLINE float fast_log(float x) {
    const uint32_t bits = to_bits(x);
    const float half_to_one = from_bits((bits & 0x007fffff) | 0x3f000000);
    const int is_low = half_to_one < 0.707106781f;
    const float exponent = (float)((int32_t)(bits >> 23) - 126 - is_low);
    const float r = (is_low ? 2.0f * half_to_one : half_to_one) - 1.0f;
    float y = 7.0376836292e-2f;
    y = y * r - 1.1514610310e-1f;
    y = y * r + 1.1676998740e-1f;
    y = y * r - 1.2420140846e-1f;
    y = y * r + 1.4249322787e-1f;
    y = y * r - 1.6668057665e-1f;
    y = y * r + 2.0000714765e-1f;
    y = y * r - 2.4999993993e-1f;
    y = y * r + 3.3333331174e-1f;
    y = y * r * r * r - exponent * 2.12194440e-4f - 0.5f * r * r;
    return r + y + exponent * 0.693359375f;
}

INLINE float fast_tanh(float x) {
    const float square = x * x;
    const float small = x + x * square * (-1.0f / 3.0f + square * (2.0f / 15.0f - square * (17.0f / 315.0f)));
    const float large = 1.0f - 2.0f / (fast_exp(2.0f * x) + 1.0f);
    return square < 0.01f ? small : large;
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif

// Sums of neighbours: of a in the lower half, of b in the upper half.
INLINE vec add_pairs(vec a, vec b) {
#if LANES == 16
    return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif LANES == 8
    return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return SHUFFLE(a, b, 0, 2, 4, 6) + SHUFFLE(a, b, 1, 3, 5, 7);
#endif
}

// Lane i of the result is the sum over the lanes of rows[i].
INLINE vec sum_rows(vec rows[LANES]) {
    UNROLL for (int n = LANES / 2; n > 0; n /= 2) {
        UNROLL for (int i = 0; i < n; i++) rows[i] = add_pairs(rows[2 * i], rows[2 * i + 1]);
    }
    return rows[0];
}

// Dot products go through their inner dimension in steps: what one vector instruction takes of a row in memory.
INLINE int64_t step_size(const int type) { return type == BF16 ? 2 * LANES : LANES; }

// The other factor is packed beforehand: whole steps with zeros behind the end, and, where the machine has no dot
// product of bfloat16, as float32 with the even elements of a step before its odd ones.
#ifdef __AVX512BF16__
#include <immintrin.h>
#define PACKED_BF16_BYTES 2
#else
#define PACKED_BF16_BYTES 4
#endif

INLINE int64_t num_steps(int64_t size, const int type) { return (size + step_size(type) - 1) / step_size(type); }

INLINE size_t packed_step_bytes(const int type) { return type == BF16 ? 2 * LANES * PACKED_BF16_BYTES : 4 * LANES; }

INLINE void pack(char *packed, const char *x, int64_t size, const int type) {
    const int64_t padded = num_steps(size, type) * step_size(type);
    if (type == F32 || PACKED_BF16_BYTES == 2) {
        memcpy(packed, x, size * size_of(type));
        memset(packed + size * size_of(type), 0, (padded - size) * size_of(type));
        return;
    }
    for (int64_t i = 0; i < padded; i++) {
        const int64_t step = i / (2 * LANES), lane = i % (2 * LANES);
        ((float *)packed)[step * 2 * LANES + lane % 2 * LANES + lane / 2] = i < size ? get(x, i, BF16) : 0.0f;
    }
}

INLINE vec dot_step(vec sum, const char *row, const char *packed, const int type) {
    if (type == F32) return sum + *(const vec *)row * *(const vec *)packed;
#ifdef __AVX512BF16__
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(row), (__m512bh)_mm512_loadu_si512(packed));
#else
    const words pairs = *(const words *)row;  // little-endian: the lower half of a word is the even element
    sum += (vec)(pairs << 16) * ((const vec *)packed)[0];
    return sum + (vec)(pairs & 0xffff0000u) * ((const vec *)packed)[1];
#endif
}

// Memory that a thread keeps for its next call: a piece for what the chunks of a call share, and one for a chunk alone.
enum { OF_CALL, OF_CHUNK };

INLINE char *scratch(const int purpose, int64_t bytes) {
    static __thread struct {
        char *memory;
        int64_t size;
    } pieces[2];
    if (bytes > pieces[purpose].size) {
        free(pieces[purpose].memory);
        pieces[purpose].size = (bytes + 65535) / 65536 * 65536;
        pieces[purpose].memory = aligned_alloc(64, pieces[purpose].size);
        if (!pieces[purpose].memory) abort();
    }
    return pieces[purpose].memory;
}
