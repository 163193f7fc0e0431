/* Directed rounding to codes, for native.c: rounding/reference.py has the definition, rounding/directed.py the same in
 * NumPy, to the bit. Some columns are taken together, from the first row to the last as often as it needs.
 */

enum { E4M3, E2M1, INTEGER, AFFINE, TABLE }; /* what codes mean: codecs/grid.py */

enum {
    TOGETHER = 16,    /* columns */
    ROWS_AHEAD = 16,  /* by which they are fetched before their use */
    BUCKETS = 64,     /* of prices; what moves nothing is in one more */
    MOST_ROUNDS = 12, /* reference.py: ROUNDS, POLISHES, MOST_POLISHES and MUCH */
    POLISHES = 8,
    MOST_POLISHES = 40,
};
#define MUCH 1e-5

/* Codes whose values are looked up: levels are counted from the smallest value on. */
typedef struct {
    float values[16], below[16];   /* of each level; the greatest that is nearest to it, of the last infinite */
    int32_t levels[16], codes[16]; /* of each code; of each level */
    int32_t greatest;
} Table;

/* A matrix and what it is rounded with. Scales and zero points are read with strides, in elements, which may be 0. */
typedef struct {
    int64_t kind, bits; /* of a code */
    int64_t rows, cols, target_stride, code_stride, scale_row, scale_col, zero_row, zero_col, count;
    const float *target;
    uint8_t *codes;
    const float *scales;
    const void *zeros;  /* of integers, int8_t or NULL; of affine codes what is added, float */
    const Table *table; /* of codes that have one */
    const double *basis, *heights; /* [count, rows]; the sum of their squares, [rows] */
    double *measures;              /* [6, cols]: what Rounded has */
    char *scratch;                 /* 23 bytes for each of TOGETHER columns of all rows */
    double nothing;                /* a residual, relative to the norm of the column, that is as good as none */
} Rounding;

/* Columns on their way: each [rows][TOGETHER]. */
typedef struct {
    float (*target)[TOGETHER], (*scale)[TOGETHER], (*value)[TOGETHER], (*step)[TOGETHER], (*offset)[TOGETHER];
    int8_t (*level)[TOGETHER], (*zero)[TOGETHER];
    uint8_t (*bucket)[TOGETHER];
} Strip;

/* Of floats: bits of mantissa, the exponent's bias, and the level of the greatest value. */
#define MANTISSA(kind) ((kind) == E4M3 ? 3 : 1)
#define BIAS(kind) ((kind) == E4M3 ? 7 : 1)
#define GREATEST(kind, bits) ((kind) == E4M3 ? 126 : (kind) == E2M1 ? 7 : (1 << ((bits)-1)) - 1)
#define LEAST(kind, bits) ((kind) == INTEGER || (kind) == AFFINE ? -(1 << ((bits)-1)) : -GREATEST(kind, bits))
/* Whether a scale may be negative. */
#define MIRRORED(kind) ((kind) == AFFINE || (kind) == TABLE)
#define PRESENT(kind, scale) (MIRRORED(kind) ? (scale) != 0 : (scale) > 0)
/* The step between the values next to zero. */
#define FINEST(kind) ((kind) == E4M3 ? 0x1p-9f : 0x1p-1f)

INLINE float value_of(
    const int kind, int bits, const Table *table, int32_t level, int32_t zero, float scale, float offset
) {
    if (kind == INTEGER) return (float)(level - zero) * scale;
    if (kind == AFFINE) return (float)(level + (1 << (bits - 1))) * scale + offset;
    if (kind == TABLE) return table->values[level] * scale;
    const int32_t size = level < 0 ? -level : level;
    const float normal = from_bits((uint32_t)(size + ((127 - BIAS(kind)) << MANTISSA(kind))) << (23 - MANTISSA(kind)));
    const float value = size < 1 << MANTISSA(kind) ? (float)size * FINEST(kind) : normal;
    return (level < 0 ? -value : value) * scale;
}

INLINE int32_t nearest_level(const int kind, int bits, const Table *table, float value, int32_t zero) {
    if (kind == TABLE) {
        int32_t level = 0;
        for (int k = 0; k < 15; k++) level += value > table->below[k];
        return level;
    }
    if (kind == INTEGER || kind == AFFINE) {
        const float near = value > 512.0f ? 512.0f : value < -512.0f ? -512.0f : value;
        /* Added to it, a number rounds to a whole one, ties to even, which is then in the lowest bits. */
        const int32_t from = kind == INTEGER ? zero : -(1 << (bits - 1));
        const int32_t level = (int32_t)(to_bits(near + 0x1.8p23f) & 0x7FFFFF) - 0x400000 + from;
        return level > GREATEST(kind, bits) ? GREATEST(kind, bits) : level < LEAST(kind, bits) ? LEAST(kind, bits) : level;
    }
    const float greatest = kind == E4M3 ? 448.0f : 6.0f, least_normal = FINEST(kind) * (1 << MANTISSA(kind));
    const int drop = 23 - MANTISSA(kind);
    const float wide = fabsf(value), size = wide > greatest ? greatest : wide;
    const uint32_t word = to_bits(size);
    const int32_t normal =
        (int32_t)((word + ((1u << (drop - 1)) - 1) + ((word >> drop) & 1)) >> drop) - ((127 - BIAS(kind)) << MANTISSA(kind));
    const int32_t small = (int32_t)(to_bits(size * (1 / FINEST(kind)) + 0x1p23f) & 0x7FFFFF);
    const int32_t level = size < least_normal ? small : normal;
    return value < 0 ? -level : level;
}

/* The highest bit of a code is its sign; of integers it is what is added so that none is negative. */
INLINE int32_t level_of(const int kind, int bits, const Table *table, uint8_t code) {
    const int32_t high = 1 << (bits - 1);
    if (kind == TABLE) return table->levels[code & 15];
    if (kind == INTEGER || kind == AFFINE) return code - high;
    return code & high ? -(code & (high - 1)) : code;
}

INLINE int32_t code_of(const int kind, int bits, const Table *table, int32_t level) {
    const int32_t high = 1 << (bits - 1);
    if (kind == TABLE) return table->codes[level];
    return kind == INTEGER || kind == AFFINE ? level + high : level < 0 ? high - level : level;
}

/* Adds what weights make of the directions at a row to nothing. */
INLINE void along_row(const Rounding *job, int64_t row, const double weights[][TOGETHER], double along[TOGETHER]) {
    for (int c = 0; c < TOGETHER; c++) along[c] = job->basis[row] * weights[0][c];
    for (int64_t k = 1; k < job->count; k++)
        for (int c = 0; c < TOGETHER; c++) along[c] += job->basis[k * job->rows + row] * weights[k][c];
}

/* Returns the level beside one whose value is against what points along. */
INLINE int32_t moved(const int kind, int bits, const Table *table, int32_t level, double along, float scale) {
    if (MIRRORED(kind)) along = scale < 0 ? -along : along;
    const int32_t next = level - (along > 0) + (along < 0);
    if (kind == TABLE) return next > table->greatest ? table->greatest : next < 0 ? 0 : next;
    return next > GREATEST(kind, bits) ? GREATEST(kind, bits) : next < LEAST(kind, bits) ? LEAST(kind, bits) : next;
}

/* Returns the zero point of an element: only integers have them. */
INLINE int32_t zero_of(const int kind, Strip strip, int64_t row, int64_t col) {
    return kind == INTEGER ? strip.zero[row][col] : 0;
}

/* Returns what is added to an element: only affine codes have it. */
INLINE float offset_of(const int kind, Strip strip, int64_t row, int64_t col) {
    return kind == AFFINE ? strip.offset[row][col] : 0;
}

/* Returns what a level stands for at a place. */
INLINE float value_at(
    const int kind, int bits, const Table *table, Strip strip, int64_t row, int64_t col, int32_t level
) {
    const int32_t zero = zero_of(kind, strip, row, col);
    return value_of(kind, bits, table, level, zero, strip.scale[row][col], offset_of(kind, strip, row, col));
}

INLINE int32_t bucket_of(float step, float off, double gain, double norm) {
    const float price = step * (off + off + step);
    const float relative = (float)((double)price / (gain > 0 ? gain * norm : 1.0));
    const int32_t bits = (int32_t)(to_bits(relative > 0 ? relative : 0) >> 21) - ((127 - 14) << 2);
    const int32_t bucket = bits < 0 ? 0 : bits > BUCKETS - 1 ? BUCKETS - 1 : bits;
    return gain > 0 ? bucket : BUCKETS;
}

INLINE void sizes_of(int64_t count, const double residual[][TOGETHER], double size[TOGETHER]) {
    for (int c = 0; c < TOGETHER; c++) size[c] = residual[0][c] * residual[0][c];
    for (int64_t k = 1; k < count; k++)
        for (int c = 0; c < TOGETHER; c++) size[c] += residual[k][c] * residual[k][c];
    for (int c = 0; c < TOGETHER; c++) size[c] = sqrt(size[c]);
}

/* Takes moves by bucket, then by row, until the residual is covered; returns whether a column needed it. */
INLINE int take_round(
    const int kind, const Table *table, const Rounding *job, Strip strip, double residual[][TOGETHER],
    double weights[][TOGETHER], double norm[TOGETHER], double reach[TOGETHER]
) {
    double size[TOGETHER], sums[BUCKETS + 1][TOGETHER], along[TOGETHER], left[TOGETHER], within[TOGETHER] = {0};
    int32_t border[TOGETHER];
    const int bits = (int)job->bits;
    int active[TOGETHER], any = 0;
    sizes_of(job->count, residual, size);
    for (int c = 0; c < TOGETHER; c++) {
        active[c] = size[c] > (reach[c] > job->nothing * norm[c] ? reach[c] : job->nothing * norm[c]);
        any |= active[c];
        if (active[c]) reach[c] = 0;
        for (int64_t k = 0; k < job->count; k++) weights[k][c] = active[c] ? residual[k][c] / size[c] : 0;
    }
    if (!any) return 0;
    memset(sums, 0, sizeof sums);
    double most[TOGETHER] = {0};
    for (int64_t row = 0; row < job->rows; row++) {
        double gains[TOGETHER];
        int32_t buckets[TOGETHER];
        along_row(job, row, (const double(*)[TOGETHER])weights, along);
        for (int c = 0; c < TOGETHER; c++) {
            const float value = strip.value[row][c];
            const int32_t next = moved(kind, bits, table, strip.level[row][c], along[c], strip.scale[row][c]);
            const float step = value_at(kind, bits, table, strip, row, c, next) - value;
            gains[c] = fabs(along[c]) * (double)fabsf(step);
            most[c] = gains[c] > most[c] ? gains[c] : most[c];
            buckets[c] = bucket_of(step, value - strip.target[row][c], gains[c], norm[c]);
            strip.step[row][c] = step;
        }
        for (int c = 0; c < TOGETHER; c++) {
            strip.bucket[row][c] = (uint8_t)buckets[c];
            sums[buckets[c]][c] += gains[c];
        }
    }
    for (int c = 0; c < TOGETHER; c++) {
        double covered = 0;
        if (active[c]) reach[c] = most[c] / (double)(job->count * job->count);
        border[c] = 0;
        left[c] = size[c];
        for (int32_t b = 0; b <= BUCKETS; b++) {
            covered += sums[b][c];
            if (!(covered <= size[c])) break;
            border[c] = b + 1;
            left[c] = size[c] - covered;
        }
    }
    double added[job->count][TOGETHER];
    memset(added, 0, sizeof added);
    for (int64_t row = 0; row < job->rows; row++) {
        double steps[TOGETHER];
        along_row(job, row, (const double(*)[TOGETHER])weights, along);
/* Nothing of another column is written. */
#pragma GCC ivdep
        for (int c = 0; c < TOGETHER; c++) {
            const int32_t bucket = strip.bucket[row][c];
            const float step = strip.step[row][c];
            within[c] += bucket == border[c] ? fabs(along[c]) * (double)fabsf(step) : 0.0;
            const int fits = (bucket == border[c]) & (within[c] <= left[c]);
            const int taken = ((bucket < border[c]) | fits) & (bucket < BUCKETS);
            const int32_t stays = strip.level[row][c];
            const int32_t level = taken ? moved(kind, bits, table, stays, along[c], strip.scale[row][c]) : stays;
            strip.level[row][c] = (int8_t)level;
            strip.value[row][c] = value_at(kind, bits, table, strip, row, c, level);
            steps[c] = taken ? (double)step : 0.0;
        }
        for (int64_t k = 0; k < job->count; k++)
            for (int c = 0; c < TOGETHER; c++) added[k][c] += job->basis[k * job->rows + row] * steps[c];
    }
    for (int64_t k = 0; k < job->count; k++)
        for (int c = 0; c < TOGETHER; c++) residual[k][c] += active[c] ? added[k][c] : 0.0;
    return 1;
}

/* Makes the single move of each column that lowers the residual the most, unless what is left is enough, relative to
 * the norm; returns whether one was made. */
INLINE int polish(
    const int kind, const Table *table, const Rounding *job, Strip strip, double residual[][TOGETHER],
    const double norm[TOGETHER], double enough
) {
    const int bits = (int)job->bits;
    double size[TOGETHER], along[TOGETHER], best[TOGETHER];
    int64_t where[TOGETHER];
    int any = 0;
    sizes_of(job->count, residual, size);
    for (int c = 0; c < TOGETHER; c++) {
        best[c] = 0;
        where[c] = -1;
        any |= size[c] > enough * norm[c];
    }
    if (!any) return 0;
    any = 0;
    for (int64_t row = 0; row < job->rows; row++) {
        const double height = job->heights[row];
        along_row(job, row, (const double(*)[TOGETHER])residual, along);
        for (int c = 0; c < TOGETHER; c++) {
            const int32_t next = moved(kind, bits, table, strip.level[row][c], along[c], strip.scale[row][c]);
            const float value = value_at(kind, bits, table, strip, row, c, next);
            const double step = (double)(value - strip.value[row][c]);
            const double change = step * (2 * along[c] + step * height);
            where[c] = change < best[c] ? row : where[c];
            best[c] = change < best[c] ? change : best[c];
        }
    }
    for (int c = 0; c < TOGETHER; c++) {
        if (where[c] < 0 || !(size[c] > enough * norm[c])) continue;
        const int64_t row = where[c];
        double toward = job->basis[row] * residual[0][c];
        for (int64_t k = 1; k < job->count; k++) toward += job->basis[k * job->rows + row] * residual[k][c];
        const int32_t next = moved(kind, bits, table, strip.level[row][c], toward, strip.scale[row][c]);
        const float value = value_at(kind, bits, table, strip, row, c, next);
        const double step = (double)(value - strip.value[row][c]);
        strip.level[row][c] = (int8_t)next;
        strip.value[row][c] = value;
        for (int64_t k = 0; k < job->count; k++) residual[k][c] += job->basis[k * job->rows + row] * step;
        any = 1;
    }
    return any;
}

/* Reads columns of a row, the first of them again where there are fewer than TOGETHER; asks for a row further on. */
INLINE void load_row(
    const Rounding *job, int64_t row, int64_t first, int64_t size, float *target, float *scale, uint8_t *codes
) {
    const float *from = job->target + row * job->target_stride + first;
    const float *scales = job->scales + row * job->scale_row + first * job->scale_col;
    const uint8_t *bytes = job->codes + row * job->code_stride + first;
    __builtin_prefetch(from + ROWS_AHEAD * job->target_stride);
    __builtin_prefetch(scales + ROWS_AHEAD * job->scale_row);
    __builtin_prefetch(bytes + ROWS_AHEAD * job->code_stride);
    if (size == TOGETHER && job->scale_col == 1) {
        memcpy(target, from, TOGETHER * sizeof(float));
        memcpy(scale, scales, TOGETHER * sizeof(float));
        memcpy(codes, bytes, TOGETHER);
        return;
    }
    for (int64_t c = 0; c < TOGETHER; c++) {
        const int64_t col = c < size ? c : 0;
        target[c] = from[col];
        scale[c] = scales[col * job->scale_col];
        codes[c] = bytes[col];
    }
}

/* Rounds columns from `first` on, `size` of them. */
INLINE void round_strip(
    const int kind, const Table *table, const Rounding *job, Strip strip, int64_t first, int64_t size
) {
    const int64_t rows = job->rows, count = job->count;
    const int bits = (int)job->bits;
    double dots[count][TOGETHER], residual[count][TOGETHER], weights[count][TOGETHER];
    double total[TOGETHER] = {0}, norm[TOGETHER], reach[TOGETHER], along[TOGETHER], nearest[TOGETHER];
    double error[TOGETHER] = {0}, nearest_error[TOGETHER] = {0}, changed[TOGETHER] = {0};
    memset(dots, 0, sizeof dots);
    memset(residual, 0, sizeof residual);
    for (int64_t row = 0; row < rows; row++) {
        double wide[TOGETHER], off[TOGETHER];
        uint8_t codes[TOGETHER];
        load_row(job, row, first, size, strip.target[row], strip.scale[row], codes);
        if (kind == INTEGER)
            for (int c = 0; c < TOGETHER; c++) {
                const int64_t col = first + (c < size ? c : 0);
                const int64_t place = row * job->zero_row + col * job->zero_col;
                strip.zero[row][c] = job->zeros ? ((const int8_t *)job->zeros)[place] : 0;
            }
        if (kind == AFFINE)
            for (int c = 0; c < TOGETHER; c++) {
                const int64_t col = first + (c < size ? c : 0);
                strip.offset[row][c] = ((const float *)job->zeros)[row * job->zero_row + col * job->zero_col];
            }
        int32_t level[TOGETHER];
        const float *target = strip.target[row], *scale = strip.scale[row];
        for (int c = 0; c < TOGETHER; c++) {
            const float scaled = kind == AFFINE ? target[c] - strip.offset[row][c] : target[c];
            const float unscaled = scaled / (PRESENT(kind, scale[c]) ? scale[c] : 1);
            const int32_t near = nearest_level(kind, bits, table, unscaled, zero_of(kind, strip, row, c));
            level[c] = PRESENT(kind, scale[c]) ? near : level_of(kind, bits, table, codes[c]);
        }
        for (int c = 0; c < TOGETHER; c++) {
            strip.level[row][c] = (int8_t)level[c];
            strip.value[row][c] = value_of(
                kind, bits, table, level[c], zero_of(kind, strip, row, c), scale[c], offset_of(kind, strip, row, c)
            );
        }
        for (int c = 0; c < TOGETHER; c++) {
            wide[c] = (double)target[c];
            off[c] = (double)strip.value[row][c] - wide[c];
            total[c] += wide[c] * wide[c];
            nearest_error[c] += off[c] * off[c];
        }
        for (int64_t k = 0; k < count; k++)
            for (int c = 0; c < TOGETHER; c++) {
                dots[k][c] += job->basis[k * rows + row] * wide[c];
                residual[k][c] += job->basis[k * rows + row] * off[c];
            }
    }
    for (int c = 0; c < TOGETHER; c++) {
        norm[c] = sqrt(total[c]);
        reach[c] = -1;
        along[c] = nearest[c] = 0;
        for (int64_t k = 0; k < count; k++) {
            const double both = dots[k][c] + residual[k][c];
            along[c] += dots[k][c] * dots[k][c];
            nearest[c] += both * both;
        }
    }
    for (int round = 0; round < MOST_ROUNDS; round++)
        if (!take_round(kind, table, job, strip, residual, weights, norm, reach)) break;
    for (int64_t step = 0; step < MOST_POLISHES * count; step++) {
        const double enough = step < POLISHES * count ? job->nothing : MUCH;
        if (!polish(kind, table, job, strip, residual, norm, enough)) break;
    }
    for (int64_t row = 0; row < rows; row++) {
        for (int c = 0; c < TOGETHER; c++) {
            const double off = (double)strip.value[row][c] - (double)strip.target[row][c];
            error[c] += off * off;
        }
        uint8_t *codes = job->codes + row * job->code_stride + first;
        uint8_t chosen[TOGETHER] = {0};
        int32_t stays[TOGETHER], code[TOGETHER];
        memcpy(chosen, codes, size);
        for (int c = 0; c < TOGETHER; c++) {
            const int32_t level = strip.level[row][c];
            stays[c] = level == level_of(kind, bits, table, chosen[c]);
            code[c] = code_of(kind, bits, table, level);
        }
        for (int c = 0; c < TOGETHER; c++) chosen[c] = (uint8_t)(stays[c] ? chosen[c] : code[c]);
        for (int c = 0; c < TOGETHER; c++) changed[c] += (double)(1 - stays[c]);
        memcpy(codes, chosen, size);
    }
    const double *found[] = {along, nearest, total, error, nearest_error, changed};
    for (int64_t which = 0; which < 6; which++)
        memcpy(job->measures + which * job->cols + first, found[which], size * sizeof(double));
}

/* Takes all columns; what codes mean is known when it is compiled. */
#define ROUND_COLUMNS(kind)                                                       \
    case kind:                                                                    \
        for (int64_t first = 0; first < job->cols; first += TOGETHER)             \
            round_strip(kind, &table, job, strip, first, least(TOGETHER, job->cols - first)); \
        break;

PUBLIC void ablate_round(const Rounding *job) {
    const int64_t items = job->rows * TOGETHER;
    float *floats = (float *)job->scratch;
    int8_t *bytes = (int8_t *)(floats + 5 * items);
    const Strip strip = {
        .target = (void *)floats,
        .scale = (void *)(floats + items),
        .value = (void *)(floats + 2 * items),
        .step = (void *)(floats + 3 * items),
        .offset = (void *)(floats + 4 * items),
        .level = (void *)bytes,
        .bucket = (void *)(bytes + items),
        .zero = (void *)(bytes + 2 * items),
    };
    const Table table = job->table ? *job->table : (Table){.greatest = 0};
    switch (job->kind) {
        ROUND_COLUMNS(E4M3)
        ROUND_COLUMNS(E2M1)
        ROUND_COLUMNS(INTEGER)
        ROUND_COLUMNS(AFFINE)
        ROUND_COLUMNS(TABLE)
    }
}
