/* Sums and updates on a CPU, of ablations, directions and merges, for native.py, which says what each argument is.
 *
 * Everything is added in an order that the shape alone decides, and no product is contracted with a sum: every CPU
 * gives the same bytes, whatever its vectors' width. native_passes.h holds the loops, once per precision.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#pragma GCC diagnostic ignored "-Wpsabi" /* no vector leaves this file */

/* Some versions of Clang give the clones of a function another name than its own. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && !defined(NO_CLONES)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

enum { BF16, F16, F32 };
enum { UNSCALED, BY_ROW, BY_COLUMN };

/* Columns of a strip, which stays in the first-level cache with its factors and sums; rows added at once, and in all
   in float32 before the sums go on in float64; sums down the columns taken at once; sums along a row. */
enum { STRIP = 512, ROWS = 4, GROUP = 32, LINES = 4, LANES = 16, EIGHT = 8, PIECE = 64 };

/* Squared norms between which float32 sums neither underflow nor overflow: form.py. */
#define LOW 1e-30
#define HIGH 1e30
/* Of a squared norm: less than this is left of a vector too close to the directions to be rescaled: reference.py. */
#define DEGENERATE 1e-6

typedef struct {
    int64_t batch, rows, cols;
    int64_t matrix_stride, row_stride; /* in elements; columns are adjacent */
} Shape;

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef double Doubles __attribute__((vector_size(EIGHT * sizeof(double))));
typedef float Singles __attribute__((vector_size(EIGHT * sizeof(float))));

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE uint64_t to_bits64(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* What rows lose their component by. The directions and the norms begin with the block's first row. */
typedef struct {
    int64_t rows, count; /* of the whole matrix; directions */
    double coefficient, amplification, largest_norm;
    const double *basis, *squares; /* [count, rows], [matrices, rows] */
    const double *gram;            /* Q Qᵀ [matrices, count, count] */
    const float *mixed_single;     /* Q [matrices, count, cols] */
    const double *mixed_double;
} Move;

INLINE int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

INLINE int64_t item_bytes(int dtype) { return dtype == F32 ? 4 : 2; }

INLINE const void *at(int dtype, const void *block, const Shape *shape, int64_t entry, int64_t row, int64_t col) {
    const int64_t element = entry * shape->matrix_stride + row * shape->row_stride + col;
    return (const char *)block + element * item_bytes(dtype);
}

/* Returns `count` values as float32, which holds each exactly: decoded into `tile`, or where they are. */
INLINE const float *decode(int dtype, const void *stored, int64_t count, float *tile) {
    const uint16_t *half = stored;
    if (dtype == F32) return stored;
    if (dtype == BF16)
        for (int64_t j = 0; j < count; j++) tile[j] = from_bits((uint32_t)half[j] << 16);
    else
        /* The bits of a half, read as those of a float32, are off by a factor; NaN and infinity need the exponent. */
        for (int64_t j = 0; j < count; j++) {
            const uint32_t sign = (uint32_t)(half[j] & 0x8000) << 16, digits = (uint32_t)(half[j] & 0x7FFF) << 13;
            const uint32_t special = -(uint32_t)(digits >= 0x7C00u << 13) & 0x7F800000u;
            tile[j] = from_bits(to_bits(from_bits(digits) * 0x1p112f) | special | sign);
        }
    return tile;
}

/* Rounds to the nearest stored value, ties to even; float32 values must be below the greatest finite one. */
INLINE void encode_single(int dtype, const float *values, int64_t count, void *stored) {
    uint16_t *half = stored;
    if (dtype == F32) memcpy(stored, values, count * sizeof *values);
    if (dtype == BF16)
        for (int64_t j = 0; j < count; j++) {
            const uint32_t bits = to_bits(values[j]);
            half[j] = (uint16_t)((bits + (0x7FFF + (bits >> 16 & 1))) >> 16);
        }
    if (dtype == F16)
        /* One and a half times 2^13 times the power of two below |x| leaves ten digits behind the first; below the
           least normal number the digits end where they end there. */
        for (int64_t j = 0; j < count; j++) {
            const float normal = from_bits(to_bits(values[j]) & 0x7F800000u) * 0x1.8p13f;
            const float shift = normal > 0x1.8p-1f ? normal : 0x1.8p-1f;
            const uint32_t bits = to_bits(((values[j] + shift) - shift) * 0x1p-112f) & 0x7FFFFFFFu;
            half[j] = (uint16_t)(bits >> 13 | (to_bits(values[j]) >> 16 & 0x8000u));
        }
}

/* Rounds to the nearest stored value, ties to even; what lies beyond the greatest finite value becomes that value. */
INLINE void encode_double(int dtype, const double *values, int64_t count, void *stored) {
    uint16_t *half = stored;
    float *single = stored;
    const double limit = dtype == BF16 ? 0x1.fep127 : dtype == F16 ? 65504.0 : 0x1.fffffep127;
    const int drop = dtype == BF16 ? 45 : 42, bias = dtype == BF16 ? 127 : 15;
    /* Added to less than the least normal number, the shift leaves the stored digits as the last ones. */
    const double least_normal = dtype == BF16 ? 0x1p-126 : 0x1p-14, shift = dtype == BF16 ? 0x1p-81 : 0x1p28;
    for (int64_t j = 0; j < count; j++) {
        const double size = fabs(values[j]) < limit ? fabs(values[j]) : limit;
        if (dtype == F32) {
            single[j] = (float)copysign(size, values[j]);
            continue;
        }
        const uint64_t bits = to_bits64(size), sign = to_bits64(values[j]) >> 48 & 0x8000;
        const uint64_t rebased = bits - ((uint64_t)(1023 - bias) << 52);
        const uint64_t normal = (rebased + ((bits >> drop & 1) + ((1ull << (drop - 1)) - 1))) >> drop;
        const uint64_t tiny = to_bits64(size + shift), is_tiny = -(uint64_t)(size < least_normal);
        half[j] = (uint16_t)((((normal ^ tiny) & is_tiny) ^ normal) | sign);
    }
}

#define FOR_EACH_DTYPE(CALL)      \
    switch (dtype) {              \
    case BF16: CALL(BF16); break; \
    case F16: CALL(F16); break;   \
    case F32: CALL(F32); break;   \
    }

#define REAL float
#define NAME(function) function##_single
#include "native_passes.h"
#undef REAL
#undef NAME

#define REAL double
#define NAME(function) function##_double
#include "native_passes.h"

INLINE void mix_of(int dtype, const void *block, const Shape *shape, int64_t chunk, int is_double, const double *basis,
                   int64_t rows, int64_t count, int mixed, double *squares, double *into) {
    const int64_t lines = mixed ? 2 * count : count;
    for (int64_t entry = 0; entry < shape->batch; entry++) {
        double *norms = squares + entry * rows, *sums = into + entry * lines * shape->cols;
        for (int64_t low = 0; low < shape->rows; low += chunk)
            for (int64_t first = low, stop = least(low + chunk, shape->rows); first < stop; first += GROUP) {
                const int64_t end = least(first + GROUP, stop);
                if (is_double ||
                    !mix_group_single(dtype, block, shape, entry, first, end, basis, rows, count, mixed, norms, sums))
                    mix_group_double(dtype, block, shape, entry, first, end, basis, rows, count, mixed, norms, sums);
            }
    }
}

INLINE int64_t move_of(int dtype, void *block, const Shape *shape, int is_double, const Move *move) {
    int64_t parallel = 0;
    for (int64_t entry = 0; entry < shape->batch; entry++)
        for (int64_t row = 0; row < shape->rows; row++)
            if (is_double || move_row_single(dtype, block, shape, entry, row, move, &parallel))
                move_row_double(dtype, block, shape, entry, row, move, &parallel);
    return parallel;
}

/* Takes the squared norms of rows [matrices, rows], and adds to R W [matrices, count, cols]: with `mixed` to
   [matrices, 2 * count, cols], whose second half is Q = R W / |W_i|. `basis` is R [count, rows] from the block's first
   row on, as are the norms; `chunk` is the number of rows that a block is a multiple of. */
CLONES void ablate_mix(int dtype, const void *block, const Shape *shape, int64_t chunk, int is_double,
                       const double *basis, int64_t rows, int64_t count, int mixed, double *squares, double *into) {
#define CALL(kind) mix_of(kind, block, shape, chunk, is_double, basis, rows, count, mixed, squares, into)
    FOR_EACH_DTYPE(CALL)
#undef CALL
}

/* Removes from every row its share of Q, and gives it back its norm; returns how many were too close to the directions
   for that. What float32 cannot carry is done in float64. */
CLONES int64_t ablate_move(int dtype, void *block, const Shape *shape, int is_double, const Move *move) {
    int64_t parallel = 0;
#define CALL(kind) parallel = move_of(kind, block, shape, is_double, move)
    FOR_EACH_DTYPE(CALL)
#undef CALL
    return parallel;
}

INLINE Doubles eight(const float *values) {
    Singles single;
    memcpy(&single, values, sizeof single);
    return __builtin_convertvector(single, Doubles);
}

/* Adds `lines` rows, 1 or ROWS, to a sum. */
INLINE void add_rows(int64_t lines, const float *const *rows, int64_t size, double *sums) {
    const float *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
    for (int64_t j = 0; j < size; j++)
        sums[j] += lines == ROWS ? ((double)a[j] + b[j]) + ((double)c[j] + d[j]) : a[j];
}

/* Adds the products of `lines` rows, 1 or ROWS, with a weight to one sum each, in as many lanes. */
INLINE void dot_rows(int64_t lines, const float *const *rows, int64_t size, const double *weight, Doubles *sums) {
    const int64_t whole = size - size % EIGHT;
    const float *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
    for (int64_t j = 0; j < whole; j += EIGHT) {
        Doubles by;
        memcpy(&by, weight + j, sizeof by);
        sums[0] += by * eight(a + j);
        if (lines < ROWS) continue;
        sums[1] += by * eight(b + j);
        sums[2] += by * eight(c + j);
        sums[3] += by * eight(d + j);
    }
    for (int64_t i = 0; i < lines; i++)
        for (int64_t j = whole; j < size; j++) sums[i][j - whole] += weight[j] * rows[i][j];
}

/* What is asked for of `lines` rows of a group: sums, if there are any to add to, or products with the weight. */
INLINE void lines_of(int dtype, int64_t lines, const void *block, const Shape *shape, int64_t row, int64_t groups,
                     double *sums, const double *weight, double *out) {
    float tiles[ROWS][STRIP];
    Doubles dots[ROWS] = {{0}};
    for (int64_t low = 0; low < shape->cols; low += STRIP) {
        const int64_t size = least(STRIP, shape->cols - low);
        const float *rows[ROWS] = {0};
        for (int64_t i = 0; i < lines; i++)
            rows[i] = decode(dtype, at(dtype, block, shape, 0, row + i * groups, low), size, tiles[i]);
        if (sums)
            add_rows(lines, rows, size, sums + low);
        else
            dot_rows(lines, rows, size, weight + low, dots);
    }
    for (int64_t i = 0; i < lines && !sums; i++) {
        for (int width = EIGHT / 2; width; width /= 2)
            for (int lane = 0; lane < width; lane++) dots[i][lane] += dots[i][lane + width];
        out[row + i * groups] = dots[i][0];
    }
}

/* Takes ROWS rows of each group after one another, so that memory is read in order. */
INLINE void groups_of(int dtype, const void *block, const Shape *shape, int64_t first, int64_t groups, double *sums,
                      const double *weights, double *out) {
    for (int64_t start = 0; start < shape->rows; start += ROWS * groups)
        for (int64_t row = start; row < least(start + groups, shape->rows); row++) {
            const int64_t group = (first + row) % groups * shape->cols;
            double *into = sums ? sums + group : NULL;
            const double *weight = sums ? NULL : weights + group;
            if (row + (ROWS - 1) * groups < shape->rows)
                lines_of(dtype, ROWS, block, shape, row, groups, into, weight, out);
            else
                for (int64_t one = row; one < shape->rows; one += groups)
                    lines_of(dtype, 1, block, shape, one, groups, into, weight, out);
        }
}

/* Adds rows to the sums of their groups [groups, cols]: row i is in group (first + i) mod groups. */
CLONES void ablate_group_sums(int dtype, const void *block, const Shape *shape, int64_t first, int64_t groups,
                              double *into) {
#define CALL(kind) groups_of(kind, block, shape, first, groups, into, NULL, NULL)
    FOR_EACH_DTYPE(CALL)
#undef CALL
}

/* Takes the product of each row with the weight of its group [groups, cols]. */
CLONES void ablate_group_dots(int dtype, const void *block, const Shape *shape, int64_t first, int64_t groups,
                              const double *weights, double *out) {
#define CALL(kind) groups_of(kind, block, shape, first, groups, NULL, weights, out)
    FOR_EACH_DTYPE(CALL)
#undef CALL
}

/* Tells the bits of the greatest magnitude among bfloat16 or float16 values. */
CLONES int ablate_greatest(const uint16_t *block, const Shape *shape) {
    uint16_t most = 0;
    for (int64_t row = 0; row < shape->rows; row++) {
        const uint16_t *values = block + row * shape->row_stride;
        for (int64_t j = 0; j < shape->cols; j++) {
            const uint16_t size = values[j] & 0x7FFF;
            most = size > most ? size : most;
        }
    }
    return most;
}

/* Adds to bfloat16 values what float32 knows to within a margin, rounds the sums to `out`, and lists where the two ends
   of the margin are rounded apart: returns how many these are, and ends early once there are more than `most`; up to
   PIECE more are listed. native.py says what the margin is made of. Rows of what is added begin `stride` after each
   other. Adds up the squares of the values. */
CLONES int64_t ablate_add(const uint16_t *block, const Shape *shape, const float *added, int64_t stride,
                          const float *row_margin, const float *column_margin, float slope, float margin, uint16_t *out,
                          int64_t *unsure, int64_t most, double *squares) {
    float tile[STRIP];
    uint16_t least_bits[STRIP], most_bits[STRIP];
    int64_t count = 0;
    for (int64_t row = 0; row < shape->rows; row++)
        for (int64_t low = 0; low < shape->cols; low += STRIP) {
            const int64_t size = least(STRIP, shape->cols - low), at = row * shape->cols + low;
            const float *values = decode(BF16, block + row * shape->row_stride + low, size, tile);
            const float *by = added + row * stride + low;
            *squares += strip_single(NULL, values, size);
            for (int64_t j = 0; j < size; j++) {
                const float sum = values[j] + by[j];
                const float off = row_margin[row] * column_margin[low + j] + (slope * fabsf(values[j]) + margin);
                least_bits[j] = (uint16_t)((to_bits(sum - off) + 0x8000) >> 16);
                most_bits[j] = (uint16_t)((to_bits(sum + off) + 0x8000) >> 16);
            }
            memcpy(out + at, least_bits, size * sizeof *out);
            for (int64_t first = 0; first < size; first += PIECE) {
                const int64_t end = least(first + PIECE, size);
                uint16_t differs = 0;
                for (int64_t j = first; j < end; j++) differs |= least_bits[j] ^ most_bits[j];
                if (!differs) continue;
                if (count > most) return count;
                for (int64_t j = first; j < end; j++) {
                    unsure[count] = at + j;
                    count += least_bits[j] != most_bits[j];
                }
            }
        }
    return count;
}

/* Adds to the bfloat16 values that a list names what a row of the left factor [rows, rank] and one of the right
   [cols, rank] make together, in float64. */
void ablate_add_exactly(const uint16_t *block, const Shape *shape, const double *left, const double *right,
                        int64_t rank, const int64_t *places, int64_t count, uint16_t *out) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = places[i] / shape->cols, col = places[i] % shape->cols;
        const double *one = left + row * rank, *other = right + col * rank;
        float value;
        double sum = *decode(BF16, block + row * shape->row_stride + col, 1, &value);
        for (int64_t k = 0; k < rank; k++) sum += one[k] * other[k];
        encode_double(BF16, &sum, 1, out + places[i]);
    }
}

/* Counts up when the arguments of a function change: a library that was built before is not used. */
#ifndef VERSION
#define VERSION 4
#endif
const int ablate_version = VERSION;
