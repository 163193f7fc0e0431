/* The passes over a block in one precision: REAL says which, NAME how their functions are called. */

typedef REAL NAME(Lanes) __attribute__((vector_size(LANES * sizeof(REAL))));

INLINE NAME(Lanes) NAME(widened)(const float *values) {
    Floats single;
    memcpy(&single, values, sizeof single);
    return __builtin_convertvector(single, NAME(Lanes));
}

INLINE REAL NAME(total)(NAME(Lanes) lanes) {
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
    return lanes[0];
}

/* Sums of products with a weight, or of squares where there is none, over at most a strip. */
INLINE REAL NAME(strip)(const REAL *weight, const float *values, int64_t size) {
    const int64_t whole = size - size % LANES;
    NAME(Lanes) lanes = {0}, others = {0};
    for (int64_t j = 0; j < whole; j += LANES) {
        NAME(Lanes) value = NAME(widened)(values + j), by = value;
        if (weight) memcpy(&by, weight + j, sizeof by);
        if (j & LANES)
            others += by * value;
        else
            lanes += by * value;
    }
    lanes += others;
    for (int64_t j = whole; j < size; j++) lanes[j - whole] += (weight ? weight[j] : (REAL)values[j]) * values[j];
    return NAME(total)(lanes);
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
                const int64_t size = least(STRIP, shape->cols - low);
                const float *values = decode(dtype, at(dtype, block, shape, entry, row, low), size, tile);
                for (int64_t line = 0; line < count; line++)
                    sums[line * shape->rows] +=
                        NAME(strip)(weights + entry * stride + line * shape->cols + low, values, size);
                if (squares) sums[count * shape->rows] += NAME(strip)(NULL, values, size);
            }
        }
}

/* Adds the weighted sums down the columns of a group of rows; line `squares`, if there is one, is that of squares. */
INLINE void NAME(group_of)(int dtype, const void *block, const Shape *shape, int64_t entry, int64_t first, int64_t end,
                           REAL weights[LINES][GROUP], int64_t lines, int64_t squares, double *const *into) {
    float tiles[ROWS][STRIP];
    REAL groups[LINES][STRIP];
    for (int64_t low = 0; low < shape->cols; low += STRIP) {
        const int64_t size = least(STRIP, shape->cols - low);
        for (int64_t line = 0; line < lines; line++) memset(groups[line], 0, sizeof groups[line]);
        for (int64_t row = first; row < end; row += ROWS) {
            const float *values[ROWS];
            for (int64_t i = 0; i < ROWS; i++)
                values[i] = row + i < end ? decode(dtype, at(dtype, block, shape, entry, row + i, low), size, tiles[i])
                                          : memset(tiles[i], 0, sizeof tiles[i]);
            const float *a = values[0], *b = values[1], *c = values[2], *d = values[3];
            for (int64_t line = 0; line < lines; line++) {
                REAL *group = groups[line];
                const REAL *p = weights[line] + (row - first);
                if (line == squares)
                    for (int64_t j = 0; j < size; j++)
                        group[j] += ((REAL)a[j] * a[j] + (REAL)b[j] * b[j]) + ((REAL)c[j] * c[j] + (REAL)d[j] * d[j]);
                else
                    for (int64_t j = 0; j < size; j++)
                        group[j] += (p[0] * a[j] + p[1] * b[j]) + (p[2] * c[j] + p[3] * d[j]);
            }
        }
        for (int64_t line = 0; line < lines; line++)
            for (int64_t j = 0; j < size; j++) into[line][low + j] += groups[line][j];
    }
}

INLINE void NAME(columns_of)(int dtype, const void *block, const Shape *shape, const REAL *weights, int64_t stride,
                             int64_t count, int squares, double *into) {
    const int64_t lines = count + squares;
    REAL group[LINES][GROUP];
    double *sums[LINES];
    for (int64_t entry = 0; entry < shape->batch; entry++)
        for (int64_t first = 0; first < shape->rows; first += GROUP)
            for (int64_t start = 0; start < lines; start += LINES) {
                const int64_t end = least(first + GROUP, shape->rows), size = least(LINES, lines - start);
                for (int64_t line = 0; line < size; line++) {
                    sums[line] = into + (entry * lines + start + line) * shape->cols;
                    const REAL *weight = weights + entry * stride + (start + line) * shape->rows;
                    for (int64_t row = first; row < first + GROUP; row++)
                        group[line][row - first] = row < end && start + line < count ? weight[row] : 0;
                }
                NAME(group_of)(dtype, block, shape, entry, first, end, group, size, count - start, sums);
            }
}

/* The squared norms of a group of rows, and the sums down its columns that follow; 0 if REAL cannot carry them. */
INLINE int NAME(mix_group)(int dtype, const void *block, const Shape *shape, int64_t entry, int64_t first, int64_t end,
                           const double *basis, int64_t stride, int64_t count, int mixed, double *squares,
                           double *into) {
    float tile[STRIP];
    REAL weights[LINES][GROUP] = {0};
    double inverse[GROUP], *sums[LINES];
    for (int64_t row = first; row < end; row++) {
        squares[row] = 0;
        for (int64_t low = 0; low < shape->cols; low += STRIP) {
            const int64_t size = least(STRIP, shape->cols - low);
            const float *values = decode(dtype, at(dtype, block, shape, entry, row, low), size, tile);
            squares[row] += NAME(strip)(NULL, values, size);
        }
        if (sizeof(REAL) == sizeof(float) && dtype != F16 && !(squares[row] > LOW && squares[row] < HIGH)) return 0;
        inverse[row - first] = squares[row] > 0 ? 1 / sqrt(squares[row]) : 0;
    }
    const int64_t lines = mixed ? 2 * count : count;
    for (int64_t start = 0; start < lines; start += LINES) {
        const int64_t size = least(LINES, lines - start);
        for (int64_t line = 0; line < size; line++) {
            const double *direction = basis + (start + line) % count * stride;
            sums[line] = into + (start + line) * shape->cols;
            for (int64_t row = first; row < end; row++)
                weights[line][row - first] =
                    (REAL)(start + line < count ? direction[row] : direction[row] * inverse[row - first]);
        }
        NAME(group_of)(dtype, block, shape, entry, first, end, weights, size, -1, sums);
    }
    return 1;
}

INLINE void NAME(subtract)(REAL *moved, REAL factor, const REAL *column, int64_t size) {
    for (int64_t j = 0; j < size; j++) moved[j] -= factor * column[j];
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
                const float *values = decode(dtype, at(dtype, source, from, entry, row, low), size, tile);
                if (scaled == BY_COLUMN) {
                    const REAL *by = scale + entry * shape->cols + low;
                    for (int64_t j = 0; j < size; j++) moved[j] = by[j] * values[j];
                } else {
                    const REAL by = scaled == BY_ROW ? scale[entry * shape->rows + row] : 1;
                    for (int64_t j = 0; j < size; j++) moved[j] = by * values[j];
                }
                for (int64_t line = 0; line < count; line++)
                    NAME(subtract)(moved, rows[line * shape->rows + row], columns + line * shape->cols, size);
                NAME(encode)(dtype, moved, size, (void *)at(dtype, block, shape, entry, row, low));
            }
        }
}

/* Moves a row and keeps its norm; returns 1 if REAL cannot carry that, and then leaves the row as it is. */
INLINE int NAME(move_row)(int dtype, void *block, const Shape *shape, int64_t entry, int64_t row, const Move *move,
                          int64_t *parallel) {
    const int is_single = sizeof(REAL) == sizeof(float);
    const int64_t count = move->count, stride = move->rows;
    const REAL *mixed = is_single ? (const REAL *)move->mixed_single : (const REAL *)move->mixed_double;
    const double *gram = move->gram + entry * count * count, *basis = move->basis + row;
    const double coefficient = move->coefficient, square = move->squares[entry * move->rows + row];
    float tile[STRIP];
    REAL moved[STRIP];
    mixed += entry * count * shape->cols;
    if (!(square > 0)) return 0;
    if (is_single && dtype != F16 && !(square > LOW && square < HIGH)) return 1;
    double along = 0, cross = 0;
    for (int64_t line = 0; line < count; line++) {
        double height = 0;
        for (int64_t other = 0; other < count; other++) height += gram[other * count + line] * basis[other * stride];
        along += height * basis[line * stride];
    }
    if (!(along > 0)) return 0;
    for (int64_t low = 0; low < shape->cols; low += STRIP) {
        const int64_t size = least(STRIP, shape->cols - low);
        const float *values = decode(dtype, at(dtype, block, shape, entry, row, low), size, tile);
        for (int64_t line = 0; line < count; line++)
            cross += basis[line * stride] * NAME(strip)(mixed + line * shape->cols + low, values, size);
    }
    const double norm = sqrt(square), slope = coefficient * sqrt(along), most = move->amplification;
    const double ratio = 1 - 2 * coefficient * (cross / norm) + slope * slope;
    const double reach = 1 + fabs(slope);
    if (is_single && (reach * reach > most * most * ratio || norm > move->largest_norm)) return 1;
    const double scale = ratio < DEGENERATE ? 1 : 1 / sqrt(ratio);
    *parallel += ratio < DEGENERATE;
    for (int64_t low = 0; low < shape->cols; low += STRIP) {
        const int64_t size = least(STRIP, shape->cols - low);
        void *stored = (void *)at(dtype, block, shape, entry, row, low);
        const float *values = decode(dtype, stored, size, tile);
        for (int64_t j = 0; j < size; j++) moved[j] = (REAL)scale * values[j];
        for (int64_t line = 0; line < count; line++)
            NAME(subtract)(moved, (REAL)(coefficient * basis[line * stride] * norm * scale),
                           mixed + line * shape->cols + low, size);
        NAME(encode)(dtype, moved, size, stored);
    }
    return 0;
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
