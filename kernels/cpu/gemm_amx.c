// y = x · wᵀ + bias in bfloat16 with the matrix unit of Intel processors (AMX), for a few to a few hundred rows.
//
// The unit multiplies a tile of 16 rows of w, as it lies in memory, with 16 rows of x, packed beforehand so that the
// two elements of a 32-bit word belong to one row and neighbouring words to neighbouring rows: the result is the tile
// of y transposed. The weights need no second layout. A task holds 32 rows of w against 32 rows of x in four running
// tiles. Up to some 64 rows reading the weights bounds it, as in gemm.c.
#include "gemm.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

#define TILE 16  // rows of a tile, and 32-bit words of its rows
#define STEP 32  // elements of such a row

// The operating system grants the use of the tiles to a process that asks for it.
int amx_is_usable(void) {
    static int state = -1;
    if (state < 0) state = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
    return state;
}

static void configure_tiles(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = TILE;
    }
    _tile_loadconfig(&config);
}

// packed [panel][step][16 words of a row][16 rows]: rows beyond the last are zeros.
static void pack_panels(uint32_t *packed, const product *p, const uint32_t *x) {
    const int64_t num_words = p->in / 2;
    for (int64_t panel = 0; panel * TILE < p->rows; panel++)
        for (int64_t row = panel * TILE; row < (panel + 1) * TILE; row++)
            for (int64_t word = 0; word < num_words; word++)
                packed[(panel * num_words + word) * TILE + row % TILE] = row < p->rows ? x[row * num_words + word] : 0;
}

// One tile of y, transposed while it is stored.
INLINE void store_tile(const product *p, const float tile[TILE][TILE], int64_t m, int64_t n) {
    const __m512i column = _mm512_set_epi32(240, 224, 208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16, 0);
    const vec bias = p->bias ? get_vec(p->bias, n, BF16) : (vec){0};
    for (int64_t row = 0; row < TILE && m + row < p->rows; row++) {
        const vec line = (vec)_mm512_i32gather_ps(column, &tile[0][row], 4) + bias;
        void *y = (void *)at(p->y, (m + row) * p->out + n, p->y_type);
        if (p->y_type == BF16) _mm256_storeu_si256(y, (__m256i)_mm512_cvtneps_pbh((__m512)line));
        else _mm512_storeu_ps(y, (__m512)line);
    }
}

// Weight rows [n, n + 32) times kPanels panels, the first of which is rows [m, m + 16). Tile registers 0 to 3 are
// running sums, 4 and 5 weights, 6 and 7 panels.
INLINE void multiply_block(const product *p, int64_t m, int64_t n, const int kPanels) {
    const int64_t row_bytes = p->in * 2;
    const char *w = at(p->w, n * p->in, BF16), *x = p->packed + m * row_bytes;
    const char *next = w + 2 * TILE * row_bytes;
    float tiles[4][TILE][TILE];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < p->in / STEP; step++, w += 64, x += TILE * 64, next += 2 * TILE * 64) {
        if (m == 0)  // the next block into the second cache, in the order of memory
            for (int i = 0; i < 2 * TILE; i++) __builtin_prefetch(next + i * 64, 0, 2);
        _tile_loadd(6, x, 64);
        _tile_loadd(4, w, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, w + TILE * row_bytes, row_bytes);
        _tile_dpbf16ps(1, 5, 6);
        if (kPanels == 1) continue;
        _tile_loadd(7, x + TILE * row_bytes, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, tiles[0], 64);
    _tile_stored(1, tiles[1], 64);
    store_tile(p, tiles[0], m, n);
    store_tile(p, tiles[1], m, n + TILE);
    if (kPanels == 1) return;
    _tile_stored(2, tiles[2], 64);
    _tile_stored(3, tiles[3], 64);
    store_tile(p, tiles[2], m + TILE, n);
    store_tile(p, tiles[3], m + TILE, n + TILE);
}

static void multiply_chunk(const void *context, int64_t first_block, int64_t last_block) {
    const product *p = context;
    const int64_t num_panels = (p->rows + TILE - 1) / TILE;
    configure_tiles();
    for (int64_t block = first_block; block < last_block; block++) {
        const int64_t end = (block + 1) * 2 * TILE;
        const int64_t n = (end < p->out ? end : p->out) - 2 * TILE;  // the last may overlap its neighbour
        int64_t panel = 0;
        for (; panel + 2 <= num_panels; panel += 2) multiply_block(p, panel * TILE, n, 2);
        if (panel < num_panels) multiply_block(p, panel * TILE, n, 1);
    }
    _tile_release();
}

int linear_amx(product *p, const void *x) {
    if (p->in % STEP || p->out < 2 * TILE || !amx_is_usable()) return 0;
    const int64_t num_panels = (p->rows + TILE - 1) / TILE;
    char *packed = scratch(OF_CALL, num_panels * TILE * p->in * 2);
    pack_panels((uint32_t *)packed, p, x);
    p->packed = packed;
    parallel_for((p->out + 2 * TILE - 1) / (2 * TILE), groups_per_chunk(p, 2 * TILE), multiply_chunk, p);
    return 1;
}
#else
int amx_is_usable(void) { return 0; }

int linear_amx(product *p, const void *x) { return (void)p, (void)x, 0; }
#endif
