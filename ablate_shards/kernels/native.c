/* The sums and the update of an ablation on a CPU, for project_native.py, which says what each argument is.
 *
 * Everything is added in an order that the shape alone decides, and no product is contracted with a sum: every CPU
 * gives the same bytes, whatever its vectors' width. native_passes.h holds the loops, once per precision.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(NO_CLONES)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

enum { BF16, F16, F32 };
enum { UNSCALED, BY_ROW, BY_COLUMN };

/* Columns of a strip, which stays in the first-level cache with its factors and sums; rows added at once, and how many
   times in float32 before the sums go on in float64; sums down the columns taken at once; sums along a row. */
enum { STRIP = 512, ROWS = 4, GROUP = 8, LINES = 4, LANES = 16 };

typedef struct {
    int64_t batch, rows, cols;
    int64_t matrix_stride, row_stride; /* in elements; columns are adjacent */
} Shape;

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

INLINE int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

INLINE int64_t offset(int dtype, const Shape *shape, int64_t entry, int64_t row, int64_t col) {
    return (entry * shape->matrix_stride + row * shape->row_stride + col) * (dtype == F32 ? 4 : 2);
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

#define REAL float
#define NAME(function) function##_single
#include "native_passes.h"
#undef REAL
#undef NAME

#define REAL double
#define NAME(function) function##_double
#include "native_passes.h"

/* Counts up when the arguments of a function change: a library that was built before is not used. */
#ifndef VERSION
#define VERSION 1
#endif
const int ablate_version = VERSION;
