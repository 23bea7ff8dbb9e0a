// What the bodies of the matrix product share.
#pragma once

#include "common.h"

// y = x · wᵀ + bias.   x [rows, in], w [out, in], bias [out] or null, y [rows, out]; packed: x in the body's own layout
// y is of x's type or float32: logits keep what bfloat16 would round away.
typedef struct {
    char *y;
    const char *packed, *w, *bias;
    int64_t rows, in, out;
    int type, y_type;
} product;

// Groups of so many weight rows that make a chunk of some microseconds: 64 KiB, less where many rows of x meet them.
INLINE int64_t groups_per_chunk(const product *p, int64_t group_size) {
    const int64_t bytes = group_size * p->in * (int64_t)size_of(p->type) * (p->rows > 64 ? p->rows / 32 : 1);
    return (65536 + bytes - 1) / bytes;
}

// Whether the processor has the matrix unit and the system grants it.
int amx_is_usable(void);

// Whether it did the bfloat16 product: 0 without the unit and for shapes that do not fit its tiles.
int linear_amx(product *p, const void *x);
