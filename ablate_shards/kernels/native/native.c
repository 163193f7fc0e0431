/* Sums and updates on a CPU, of ablations, directions and merges, for native.py, which says what each argument is.
 *
 * Everything is added in an order that the shape alone decides, and no product is contracted with a sum: every CPU
 * gives the same bytes, whatever its vectors' width. native_passes.h holds the loops, once per precision;
 * native_codes.h those that round to codes.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>
#if !defined(_WIN32)
#include <signal.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi" /* no vector leaves this file */

#define INLINE static inline __attribute__((always_inline))
/* What native.py calls. */
#if defined(_WIN32)
#define PUBLIC __declspec(dllexport)
#else
#define PUBLIC
#endif

enum { BF16, F16, F32 };
enum { UNSCALED, BY_ROW, BY_COLUMN };

/* Float32 values in a vector of this CPU. */
#if defined(__AVX512F__)
enum { WIDTH = 16 };
#elif defined(__AVX__)
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif

enum {
    STRIP = 512,                /* columns taken together, which stay in the first-level cache with factors and sums */
    ROWS = 4,                   /* rows added at once */
    GROUP = 32,                 /* rows added in float32 before the sums go on in float64 */
    LINES = 4,                  /* sums down the columns taken at once */
    LANES = 16,                 /* sums along a row taken side by side */
    PAIR = 2 * LANES,           /* columns taken at once */
    VECTORS = LANES / WIDTH,    /* vectors of each half of a PAIR */
    EIGHT = 8,                  /* sums along a row of a dump, in float64 */
    EIGHTS = 2 * EIGHT / WIDTH, /* vectors of these */
    AHEAD = 2048,               /* bytes by which rows of a dump are fetched ahead of their use */
    PIECE = 64,                 /* columns of a merge looked at together */
};

/* Squared norms between which float32 sums neither underflow nor overflow: form.py. */
#define LOW 1e-30
#define HIGH 1e30
/* Of a squared norm: less than this is left of a vector too close to the directions to be rescaled: reference.py. */
#define DEGENERATE 1e-6

typedef struct {
    int64_t batch, rows, cols;
    int64_t matrix_stride, row_stride; /* in elements; columns are adjacent */
} Shape;

typedef uint32_t Words __attribute__((vector_size(WIDTH * sizeof(uint32_t))));
typedef float Floats __attribute__((vector_size(WIDTH * sizeof(float))));
typedef double Doubles __attribute__((vector_size(WIDTH / 2 * sizeof(double))));
typedef float Singles __attribute__((vector_size(WIDTH / 2 * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(WIDTH / 2 * sizeof(uint32_t))));

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
    const float *mixed_single; /* Q [matrices, count, cols] */
    const double *mixed_double;
    double *crosses; /* [matrices, rows, 2]: R_i Q W_i, and whether it took float64 */
    double *scratch; /* room for Q of one matrix in both precisions, with whole PAIRs of columns */
    int64_t known;   /* whether crosses are read, so that some columns may stand for rows that were moved whole before */
} Move;

INLINE int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

INLINE int64_t whole_pairs(int64_t cols) { return (cols + PAIR - 1) / PAIR * PAIR; }

INLINE int64_t item_bytes(int dtype) { return dtype == F32 ? 4 : 2; }

INLINE const void *at(int dtype, const void *block, const Shape *shape, int64_t entry, int64_t row, int64_t col) {
    const int64_t element = entry * shape->matrix_stride + row * shape->row_stride + col;
    return (const char *)block + element * item_bytes(dtype);
}

/* Returns stored values, of which there are at least PAIR: where they are, or in `part` with zeros after `size`. */
INLINE const void *padded(int dtype, const void *stored, int64_t size, void *part) {
    if (size >= PAIR) return stored;
    memset(part, 0, PAIR * sizeof(float));
    return memcpy(part, stored, size * item_bytes(dtype));
}

/* The bits of a half, read as those of a float32, are off by a factor; NaN and infinity need the exponent. */
#define FROM_HALVES(FUNCTION, INTEGERS, REALS)                                      \
    INLINE REALS FUNCTION(INTEGERS half) {                                          \
        const INTEGERS sign = (half & 0x8000) << 16, digits = (half & 0x7FFF) << 13; \
        const INTEGERS special = (INTEGERS)(digits >= 0x7C00u << 13) & 0x7F800000u; \
        return (REALS)((INTEGERS)((REALS)digits * 0x1p112f) | special | sign);      \
    }
FROM_HALVES(from_halves, Words, Floats)
FROM_HALVES(from_few_halves, Bits, Singles)

/* Rounds to nearest, ties to even. */
INLINE Words to_halves(Words bits) {
    /* One and a half times 2^13 times the power of two below |x| leaves ten digits behind the first; below the least
       normal number the digits end where they end there. */
    const Floats normal = (Floats)(bits & 0x7F800000u) * 0x1.8p13f, least_normal = (Floats){0} + 0x1.8p-1f;
    const Words above = (Words)(normal > least_normal);
    const Floats shift = (Floats)(((Words)normal & above) | ((Words)least_normal & ~above));
    const Words digits = (Words)((((Floats)bits + shift) - shift) * 0x1p-112f) & 0x7FFFFFFFu;
    return digits >> 13 | (bits >> 16 & 0x8000u);
}

/* Returns of PAIR values a vector of either half, number `part`, as float32, which holds each exactly. Of values of two
   bytes one half are those at even places: no instruction has to move a value across a vector. */
INLINE void decode(int dtype, const void *stored, int part, Floats values[2]) {
    Words words;
    if (dtype == F32) {
        memcpy(values, (const float *)stored + part * WIDTH, sizeof *values);
        memcpy(values + 1, (const float *)stored + LANES + part * WIDTH, sizeof *values);
        return;
    }
    memcpy(&words, (const uint16_t *)stored + 2 * part * WIDTH, sizeof words);
    values[0] = dtype == BF16 ? (Floats)(words << 16) : from_halves(words & 0xFFFF);
    values[1] = dtype == BF16 ? (Floats)(words & 0xFFFF0000u) : from_halves(words >> 16);
}

/* Stores what is rounded, the bits of float32 or of the two bytes: the reverse of decode(). */
INLINE void store(int dtype, const Words bits[2], int part, void *stored) {
    const Words words = bits[0] | bits[1] << 16;
    if (dtype == F32)
        for (int i = 0; i < 2; i++) memcpy((float *)stored + i * LANES + part * WIDTH, bits + i, sizeof *bits);
    else
        memcpy((uint16_t *)stored + 2 * part * WIDTH, &words, sizeof words);
}

/* Rounds to the nearest stored values, ties to even; they must be below the greatest finite one. */
INLINE void encode_single(int dtype, const Floats values[2], int part, void *stored) {
    Words bits[2] = {(Words)values[0], (Words)values[1]};
    for (int i = 0; i < 2; i++) {
        if (dtype == BF16) bits[i] = (bits[i] + (0x7FFF + (bits[i] >> 16 & 1))) >> 16;
        if (dtype == F16) bits[i] = to_halves(bits[i]);
    }
    store(dtype, bits, part, stored);
}

/* Rounds to the bits of the nearest stored value, ties to even; what lies beyond the greatest finite value becomes that
   value. */
INLINE uint32_t round_double(int dtype, double value) {
    const double limit = dtype == BF16 ? 0x1.fep127 : dtype == F16 ? 65504.0 : 0x1.fffffep127;
    const int drop = dtype == BF16 ? 45 : 42, bias = dtype == BF16 ? 127 : 15;
    /* Added to less than the least normal number, the shift leaves the stored digits as the last ones. */
    const double least_normal = dtype == BF16 ? 0x1p-126 : 0x1p-14, shift = dtype == BF16 ? 0x1p-81 : 0x1p28;
    const double size = fabs(value) < limit ? fabs(value) : limit;
    if (dtype == F32) return to_bits((float)copysign(size, value));
    const uint64_t bits = to_bits64(size), sign = to_bits64(value) >> 48 & 0x8000;
    const uint64_t rebased = bits - ((uint64_t)(1023 - bias) << 52);
    const uint64_t normal = (rebased + ((bits >> drop & 1) + ((1ull << (drop - 1)) - 1))) >> drop;
    const uint64_t tiny = to_bits64(size + shift), is_tiny = -(uint64_t)(size < least_normal);
    return (uint16_t)((((normal ^ tiny) & is_tiny) ^ normal) | sign);
}

/* Rounds two vectors of float64. */
INLINE void encode_double(int dtype, const void *values, int part, void *stored) {
    double exact[2 * WIDTH];
    uint32_t rounded[2 * WIDTH];
    Words bits[2];
    memcpy(exact, values, sizeof exact);
    for (int lane = 0; lane < 2 * WIDTH; lane++) rounded[lane] = round_double(dtype, exact[lane]);
    memcpy(bits, rounded, sizeof bits);
    store(dtype, bits, part, stored);
}

#define FOR_EACH_DTYPE(CALL)      \
    switch (dtype) {              \
    case BF16: CALL(BF16); break; \
    case F16: CALL(F16); break;   \
    case F32: CALL(F32); break;   \
    }

#define REAL float
#define NAME(function) function##_single
#define PASS INLINE
#define FOR_THE_DTYPE(CALL) FOR_EACH_DTYPE(CALL)
#include "native_passes.h"
#undef REAL
#undef NAME
#undef PASS
#undef FOR_THE_DTYPE

/* What float32 cannot carry is little: it is compiled once for all dtypes. */
#define REAL double
#define NAME(function) function##_double
#define PASS static __attribute__((noinline))
#define FOR_THE_DTYPE(CALL) CALL(dtype);
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
    const int64_t count = move->count, size = count * whole_pairs(shape->cols);
    int64_t parallel = 0;
    for (int64_t entry = 0; entry < shape->batch; entry++) {
        const int64_t start = entry * count * shape->cols;
        const float *single =
            arranged_single(dtype, move->mixed_single + start, count, shape->cols, (float *)(move->scratch + size));
        const double *exact = NULL;
        for (int64_t row = 0; row < shape->rows; row++) {
            if (!is_double && !move_row_single(dtype, block, shape, entry, row, move, single, &parallel)) continue;
            if (!exact) exact = arranged_double(dtype, move->mixed_double + start, count, shape->cols, move->scratch);
            move_row_double(dtype, block, shape, entry, row, move, exact, &parallel);
        }
    }
    return parallel;
}

/* Takes the squared norms of rows [matrices, rows], and adds to R W [matrices, count, cols]: with `mixed` to
   [matrices, 2 * count, cols], whose second half is Q = R W / |W_i|. `basis` is R [count, rows] from the block's first
   row on, as are the norms; `chunk` is the number of rows that a block is a multiple of. */
PUBLIC void ablate_mix(int dtype, const void *block, const Shape *shape, int64_t chunk, int is_double,
                       const double *basis, int64_t rows, int64_t count, int mixed, double *squares, double *into) {
#define CALL(kind) mix_of(kind, block, shape, chunk, is_double, basis, rows, count, mixed, squares, into)
    FOR_EACH_DTYPE(CALL)
#undef CALL
}

/* Removes from every row its share of Q, and gives it back its norm; returns how many were too close to the directions
   for that. What float32 cannot carry is done in float64. Q has the columns of the block. */
PUBLIC int64_t ablate_move(int dtype, void *block, const Shape *shape, int is_double, const Move *move) {
    int64_t parallel = 0;
#define CALL(kind) parallel = move_of(kind, block, shape, is_double, move)
    FOR_EACH_DTYPE(CALL)
#undef CALL
    return parallel;
}

/* Compilers make of __builtin_convertvector, where it widens, several instructions for the one that there is. */
#if defined(__AVX512F__)
#define DOUBLED(values) ((Doubles)_mm512_cvtps_pd((__m256)(values)))
#elif defined(__AVX2__)
#define DOUBLED(values) ((Doubles)_mm256_cvtps_pd((__m128)(values)))
#else
#define DOUBLED(values) __builtin_convertvector(values, Doubles)
#endif

/* Returns of a PAIR of stored values half a vector of either half, both in the order of decode(), as float64. It is
   loaded by halves too: of bfloat16 from memory, a whole vector that is split took up to 1.4 times as long. */
INLINE Doubles exact(int dtype, const void *stored, int part, int half) {
    Bits words;
    memcpy(&words, (const float *)stored + part * (WIDTH / 2) + (dtype == F32 ? half * LANES : 0), sizeof words);
    if (dtype == BF16) words = half ? words & 0xFFFF0000u : words << 16;
    if (dtype == F16) return DOUBLED(from_few_halves(half ? words >> 16 : words & 0xFFFF));
    return DOUBLED((Singles)words);
}

/* Adds a PAIR of each of `lines` rows, 1 or ROWS, to their group's sums; or its products with the group's weight, if
   these are `weighted`, to EIGHT lanes of each row. */
INLINE void pair_of(int dtype, int64_t lines, int weighted, const void *const *rows, double *group,
                    Doubles dots[ROWS][EIGHTS]) {
#pragma GCC unroll 16 /* or vectors would pass through memory */
    for (int number = 0; number < 4 * VECTORS; number++) {
        const int part = number / 2, half = number % 2;
        double *place = group + half * LANES + part * (WIDTH / 2);
        Doubles of_group, values[ROWS];
        memcpy(&of_group, place, sizeof of_group);
#pragma GCC unroll 4
        for (int64_t i = 0; i < lines; i++) {
            values[i] = exact(dtype, rows[i], part, half);
            if (weighted) dots[i][part % EIGHTS] += of_group * values[i];
        }
        if (weighted) continue;
        of_group += lines == ROWS ? (values[0] + values[1]) + (values[2] + values[3]) : values[0];
        memcpy(place, &of_group, sizeof of_group);
    }
}

/* Takes `lines` rows of a group: adds them to its sums, or puts their products with its weight to `out`. Row `next`
   follows the first of them. */
INLINE void lines_of(int dtype, int64_t lines, int weighted, const void *block, const Shape *shape, int64_t row,
                     int64_t next, int64_t groups, double *group, double *out) {
    const char *rows[ROWS] = {0};
    const void *from[ROWS];
    char copies[ROWS][PAIR * sizeof(float)];
    Doubles dots[ROWS][EIGHTS] = {{{0}}};
    const int64_t whole = shape->cols - shape->cols % PAIR, size = item_bytes(dtype);
    const int64_t jump = ((next - row) * shape->row_stride - shape->cols) * size;
    for (int64_t i = 0; i < lines; i++) rows[i] = at(dtype, block, shape, 0, row + i * groups, 0);
    for (int64_t col = 0; col < whole; col += PAIR) {
        const int64_t fetched = AHEAD + (col + AHEAD / size < shape->cols ? 0 : jump);
        for (int64_t i = 0; i < lines; i++) {
            from[i] = rows[i] + col * size;
            for (int64_t line = 0; line < PAIR * size; line += 64)
                __builtin_prefetch((const char *)from[i] + fetched + line);
        }
        pair_of(dtype, lines, weighted, from, group + col, dots);
    }
    if (whole < shape->cols) {
        for (int64_t i = 0; i < lines; i++)
            from[i] = padded(dtype, rows[i] + whole * size, shape->cols - whole, copies[i]);
        pair_of(dtype, lines, weighted, from, group + whole, dots);
    }
    for (int64_t i = 0; i < lines && weighted; i++) {
        double lanes[EIGHT];
        memcpy(lanes, dots[i], sizeof lanes);
        for (int width = EIGHT / 2; width; width /= 2)
            for (int lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
        out[row + i * groups] = lanes[0];
    }
}

/* Takes ROWS rows of each group after one another, so that memory is read in order. */
INLINE void groups_of(int dtype, int weighted, const void *block, const Shape *shape, int64_t first, int64_t groups,
                      double *arranged, double *out) {
    const int64_t stripe = ROWS * groups, whole = whole_pairs(shape->cols);
    for (int64_t start = 0; start < shape->rows; start += stripe)
        for (int64_t row = start, end = least(start + groups, shape->rows); row < end; row++) {
            double *group = arranged + (first + row) % groups * whole;
            if (row + (ROWS - 1) * groups < shape->rows)
                lines_of(dtype, ROWS, weighted, block, shape, row, row + 1 < end ? row + 1 : start + stripe, groups,
                         group, out);
            else
                for (int64_t one = row; one < shape->rows; one += groups)
                    lines_of(dtype, 1, weighted, block, shape, one, one + groups, groups, group, out);
        }
}

/* Adds rows to the sums of their groups [groups, cols]: row i is in group (first + i) mod groups. `scratch` has room
   for them with whole PAIRs of columns. */
PUBLIC void ablate_group_sums(int dtype, const void *block, const Shape *shape, int64_t first, int64_t groups,
                              double *into, double *scratch) {
    const int64_t whole = whole_pairs(shape->cols);
    arranged_double(dtype, into, groups, shape->cols, scratch);
#define CALL(kind) groups_of(kind, 0, block, shape, first, groups, scratch, NULL)
    FOR_EACH_DTYPE(CALL)
#undef CALL
    for (int64_t group = 0; group < groups; group++)
        for (int64_t low = 0; low < shape->cols; low += PAIR) {
            double ordered[PAIR];
            in_order_double(dtype, scratch + group * whole + low, ordered);
            memcpy(into + group * shape->cols + low, ordered, least(PAIR, shape->cols - low) * sizeof *ordered);
        }
}

/* Takes the product of each row with the weight of its group [groups, cols], less its group's offset; `scratch` as
   above. */
PUBLIC void ablate_group_dots(int dtype, const void *block, const Shape *shape, int64_t first, int64_t groups,
                              const double *weights, const double *offsets, double *scratch, double *out) {
    arranged_double(dtype, weights, groups, shape->cols, scratch);
#define CALL(kind) groups_of(kind, 1, block, shape, first, groups, scratch, out)
    FOR_EACH_DTYPE(CALL)
#undef CALL
    for (int64_t row = 0, group = first % groups; row < shape->rows; row++, group = group + 1 < groups ? group + 1 : 0)
        out[row] -= offsets[group];
}

/* Counts the pairs of a lower value of the one and a higher value of the other, both ascending: twice, and equal ones
   once. */
PUBLIC int64_t ablate_pairs(const double *lower, int64_t count, const double *higher, int64_t others) {
    int64_t below = 0, above = 0, upto = 0, twice = 0;
    while (below < count && above < others) { /* which of the two goes on is a coin toss, so not a branch */
        const int64_t is_below = lower[below] < higher[above];
        if (lower[below] == higher[above]) {
            if (upto < below) upto = below;
            while (upto < count && lower[upto] == higher[above]) upto++;
            twice += upto - below;
        }
        twice += 2 * below & (is_below - 1);
        below += is_below;
        above += 1 - is_below;
    }
    return twice + 2 * count * (others - above);
}

/* Tells the bits of the greatest magnitude among bfloat16 or float16 values. */
PUBLIC int ablate_greatest(const uint16_t *block, const Shape *shape) {
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
PUBLIC int64_t ablate_add(const uint16_t *block, const Shape *shape, const float *added, int64_t stride,
                          const float *row_margin, const float *column_margin, float slope, float margin, uint16_t *out,
                          int64_t *unsure, int64_t most, double *squares) {
    float values[STRIP];
    uint16_t least_bits[STRIP], most_bits[STRIP];
    int64_t count = 0;
    for (int64_t row = 0; row < shape->rows; row++)
        for (int64_t low = 0; low < shape->cols; low += STRIP) {
            const int64_t size = least(STRIP, shape->cols - low), at = row * shape->cols + low;
            const uint16_t *stored = block + row * shape->row_stride + low;
            for (int64_t j = 0; j < size; j++) values[j] = from_bits((uint32_t)stored[j] << 16);
            const float *by = added + row * stride + low;
            *squares += strip_single(BF16, NULL, stored, size);
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
PUBLIC void ablate_add_exactly(const uint16_t *block, const Shape *shape, const double *left, const double *right,
                               int64_t rank, const int64_t *places, int64_t count, uint16_t *out) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = places[i] / shape->cols, col = places[i] % shape->cols;
        const double *one = left + row * rank, *other = right + col * rank;
        double sum = from_bits((uint32_t)block[row * shape->row_stride + col] << 16);
        for (int64_t k = 0; k < rank; k++) sum += one[k] * other[k];
        out[places[i]] = (uint16_t)round_double(BF16, sum);
    }
}

#include "native_codes.h"

/* Tells how many float32 values a vector of the CPU it runs on has, of the widths that this file is compiled for. */
PUBLIC int ablate_vector_width(void) {
#if defined(__x86_64__) /* __builtin_cpu_supports needs a library that not every linker of Windows adds */
    enum { AVX2 = 1 << 5, F = 1 << 16, DQ = 1 << 17, BW = 1 << 30, SAVES = 1 << 27, YMM = 0x06, ZMM = 0xE6 };
    const unsigned avx512 = F | DQ | BW | 1u << 31; /* the last is VL */
    unsigned a, b, c, d, saved;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & SAVES)) return 4;
    __asm__("xgetbv" : "=a"(saved), "=d"(d) : "c"(0)); /* the registers that the system keeps for a thread */
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 4;
    if ((saved & ZMM) == ZMM && (b & avx512) == avx512) return 16;
    if ((saved & YMM) == YMM && b & AVX2) return 8;
#endif
    return 4;
}

/* What a process says as it ends when memory is touched that a file, which was cut short, no longer backs. */
enum { GUARDS = 128, SENTENCE = 1024 };
static struct {
    const char *start, *end;
    char sentence[SENTENCE];
} guards[GUARDS];

#if !defined(_WIN32) /* there a file that is mapped cannot be cut short */
static struct sigaction before;

static void cut_short(int number, siginfo_t *info, void *context) {
    (void)context;
    for (int slot = 0; slot < GUARDS; slot++) {
        const char *touched = info->si_addr, *sentence = guards[slot].sentence;
        if (touched < guards[slot].start || touched >= guards[slot].end) continue;
        if (write(STDERR_FILENO, sentence, strlen(sentence)) >= 0) _exit(1);
        _exit(1);
    }
    sigaction(number, &before, NULL); /* the memory is touched again, and the process ends as it would have */
}
#endif

/* Guards mapped memory with a sentence, which ends with a line break; returns a number to unguard it by, or -1 if there
   is no room. One thread at a time may call it. */
PUBLIC int ablate_guard(const char *start, int64_t size, const char *sentence) {
    int slot = 0;
    while (slot < GUARDS && guards[slot].start) slot++;
    if (slot == GUARDS || strlen(sentence) >= SENTENCE) return -1;
#if !defined(_WIN32)
    static int installed;
    if (!installed) {
        struct sigaction handled = {.sa_sigaction = cut_short, .sa_flags = SA_SIGINFO};
        sigemptyset(&handled.sa_mask);
        if (sigaction(SIGBUS, &handled, &before)) return -1;
        installed = 1;
    }
#endif
    strcpy(guards[slot].sentence, sentence);
    guards[slot].end = start + size;
    guards[slot].start = start;
    return slot;
}

PUBLIC void ablate_unguard(int slot) { guards[slot].start = guards[slot].end = NULL; }

/* Counts up when the arguments of a function change: a library that was built before is not used. */
#ifndef VERSION
#define VERSION 15
#endif
PUBLIC const int ablate_version = VERSION;
