/* The passes over a block in one precision: REAL says which, NAME how their functions are called. */

INLINE REAL NAME(total)(REAL *lanes) {
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
    return lanes[0];
}

INLINE void NAME(rows_of)(int dtype, const void *block, const Shape *shape, const REAL *weights, int64_t stride,
                          int64_t count, int squares, double *out) {
    const int64_t lines = count + squares;
    float tile[STRIP];
    for (int64_t entry = 0; entry < shape->batch; entry++)
        for (int64_t row = 0; row < shape->rows; row++) {
            double *sums = out + entry * lines * shape->rows + row;
            for (int64_t line = 0; line < lines; line++) sums[line * shape->rows] = 0;
            for (int64_t low = 0; low < shape->cols; low += STRIP) {
                const int64_t size = least(STRIP, shape->cols - low), whole = size - size % LANES;
                const void *stored = (const char *)block + offset(dtype, shape, entry, row, low);
                const float *values = decode(dtype, stored, size, tile);
                for (int64_t line = 0; line < lines; line++) {
                    const REAL *weight = weights + entry * stride + line * shape->cols + low;
                    REAL lanes[LANES] = {0};
                    if (line < count) {
                        for (int64_t j = 0; j < whole; j += LANES)
                            for (int lane = 0; lane < LANES; lane++) lanes[lane] += weight[j + lane] * values[j + lane];
                        for (int64_t j = whole; j < size; j++) lanes[j - whole] += weight[j] * values[j];
                    } else {
                        for (int64_t j = 0; j < whole; j += LANES)
                            for (int lane = 0; lane < LANES; lane++)
                                lanes[lane] += (REAL)values[j + lane] * values[j + lane];
                        for (int64_t j = whole; j < size; j++) lanes[j - whole] += (REAL)values[j] * values[j];
                    }
                    sums[line * shape->rows] += NAME(total)(lanes);
                }
            }
        }
}

INLINE void NAME(columns_of)(int dtype, const void *block, const Shape *shape, const REAL *weights, int64_t stride,
                             int64_t count, int squares, double *into) {
    const int64_t lines = count + squares;
    float tiles[ROWS][STRIP];
    REAL groups[LINES][STRIP];
    for (int64_t entry = 0; entry < shape->batch; entry++)
        for (int64_t low = 0; low < shape->cols; low += STRIP)
            for (int64_t start = 0; start < lines; start += LINES)
                for (int64_t first = 0; first < shape->rows; first += GROUP * ROWS) {
                    const int64_t size = least(STRIP, shape->cols - low), stop = least(start + LINES, lines);
                    const int64_t end = least(first + GROUP * ROWS, shape->rows);
                    memset(groups, 0, sizeof groups);
                    for (int64_t row = first; row < end; row += ROWS) {
                        const float *values[ROWS];
                        for (int64_t i = 0; i < ROWS; i++) {
                            const void *stored = (const char *)block + offset(dtype, shape, entry, row + i, low);
                            values[i] = row + i < end ? decode(dtype, stored, size, tiles[i])
                                                      : memset(tiles[i], 0, sizeof tiles[i]);
                        }
                        const float *a = values[0], *b = values[1], *c = values[2], *d = values[3];
                        for (int64_t line = start; line < stop; line++) {
                            REAL *group = groups[line - start];
                            if (line == count) {
                                for (int64_t j = 0; j < size; j++)
                                    group[j] += ((REAL)a[j] * a[j] + (REAL)b[j] * b[j]) +
                                                ((REAL)c[j] * c[j] + (REAL)d[j] * d[j]);
                                continue;
                            }
                            const REAL *weight = weights + entry * stride + line * shape->rows + row;
                            REAL p[ROWS];
                            for (int64_t i = 0; i < ROWS; i++) p[i] = row + i < end ? weight[i] : 0;
                            for (int64_t j = 0; j < size; j++)
                                group[j] += (p[0] * a[j] + p[1] * b[j]) + (p[2] * c[j] + p[3] * d[j]);
                        }
                    }
                    for (int64_t line = start; line < stop; line++) {
                        double *sums = into + (entry * lines + line) * shape->cols + low;
                        for (int64_t j = 0; j < size; j++) sums[j] += groups[line - start][j];
                    }
                }
}

INLINE void NAME(update_of)(int dtype, void *block, const Shape *shape, const void *source, const Shape *from,
                            const REAL *scale, int scaled, const REAL *row_factor, int64_t row_stride,
                            const REAL *column_factor, int64_t column_stride, int64_t count) {
    float tile[STRIP];
    REAL moved[STRIP];
    for (int64_t entry = 0; entry < shape->batch; entry++)
        for (int64_t low = 0; low < shape->cols; low += STRIP) {
            const int64_t size = least(STRIP, shape->cols - low);
            const REAL *rows = row_factor + entry * row_stride, *columns = column_factor + entry * column_stride + low;
            for (int64_t row = 0; row < shape->rows; row++) {
                const void *stored = (const char *)source + offset(dtype, from, entry, row, low);
                const float *values = decode(dtype, stored, size, tile);
                if (scaled == BY_COLUMN) {
                    const REAL *by = scale + entry * shape->cols + low;
                    for (int64_t j = 0; j < size; j++) moved[j] = by[j] * values[j];
                } else {
                    const REAL by = scaled == BY_ROW ? scale[entry * shape->rows + row] : 1;
                    for (int64_t j = 0; j < size; j++) moved[j] = by * values[j];
                }
                for (int64_t line = 0; line < count; line++) {
                    const REAL factor = rows[line * shape->rows + row], *column = columns + line * shape->cols;
                    for (int64_t j = 0; j < size; j++) moved[j] -= factor * column[j];
                }
                NAME(encode)(dtype, moved, size, (char *)block + offset(dtype, shape, entry, row, low));
            }
        }
}

#define FOR_EACH_DTYPE(CALL)      \
    switch (dtype) {              \
    case BF16: CALL(BF16); break; \
    case F16: CALL(F16); break;   \
    case F32: CALL(F32); break;   \
    }

CLONES void NAME(ablate_rows)(int dtype, const void *block, const Shape *shape, const REAL *weights, int64_t stride,
                              int64_t count, int squares, double *out) {
#define CALL(kind) NAME(rows_of)(kind, block, shape, weights, stride, count, squares, out)
    FOR_EACH_DTYPE(CALL)
#undef CALL
}

CLONES void NAME(ablate_columns)(int dtype, const void *block, const Shape *shape, const REAL *weights, int64_t stride,
                                 int64_t count, int squares, double *into) {
#define CALL(kind) NAME(columns_of)(kind, block, shape, weights, stride, count, squares, into)
    FOR_EACH_DTYPE(CALL)
#undef CALL
}

CLONES void NAME(ablate_update)(int dtype, void *block, const Shape *shape, const void *source, const Shape *from,
                                const REAL *scale, int scaled, const REAL *row_factor, int64_t row_stride,
                                const REAL *column_factor, int64_t column_stride, int64_t count) {
#define CALL(kind)                                                                                        \
    NAME(update_of)(kind, block, shape, source, from, scale, scaled, row_factor, row_stride, column_factor, \
                    column_stride, count)
    FOR_EACH_DTYPE(CALL)
#undef CALL
}

#undef FOR_EACH_DTYPE
