/* The passes over a block in one precision: REAL says which, NAME how their functions are called, PASS and FOR_THE_DTYPE
   whether they are compiled for each dtype. */

typedef REAL NAME(Vector) __attribute__((vector_size(WIDTH * sizeof(REAL))));
typedef REAL NAME(Four) __attribute__((vector_size(4 * sizeof(REAL))));

INLINE NAME(Vector) NAME(load)(const REAL *factors) {
    NAME(Vector) vector;
    memcpy(&vector, factors, sizeof vector);
    return vector;
}

/* Returns stored values as decode() does. */
INLINE void NAME(values)(int dtype, const void *stored, int part, NAME(Vector) values[2]) {
    Floats single[2];
    decode(dtype, stored, part, single);
    for (int i = 0; i < 2; i++) values[i] = __builtin_convertvector(single[i], NAME(Vector));
}

/* Puts the halves that decode() makes of a PAIR back into order. */
INLINE void NAME(in_order)(int dtype, const REAL *halves, REAL *ordered) {
    if (dtype == F32) memcpy(ordered, halves, PAIR * sizeof *ordered);
    for (int64_t j = 0; j < LANES && dtype != F32; j++) {
        ordered[2 * j] = halves[j];
        ordered[2 * j + 1] = halves[LANES + j];
    }
}

/* Orders lines of factors as decode() does values, with zeros up to whole PAIRs; returns them. */
INLINE const REAL *NAME(arranged)(int dtype, const REAL *factors, int64_t lines, int64_t cols, REAL *into) {
    const int64_t whole = whole_pairs(cols);
    for (int64_t line = 0; line < lines; line++)
        for (int64_t low = 0; low < cols; low += PAIR) {
            REAL given[PAIR] = {0}, *ordered = into + line * whole + low;
            memcpy(given, factors + line * cols + low, least(PAIR, cols - low) * sizeof *given);
            for (int64_t j = 0; j < LANES; j++) {
                ordered[j] = given[dtype == F32 ? j : 2 * j];
                ordered[LANES + j] = given[dtype == F32 ? LANES + j : 2 * j + 1];
            }
        }
    return into;
}

/* Sums the products of at most a strip with a weight, which is arranged, or its squares where there is none. */
INLINE REAL NAME(strip)(int dtype, const REAL *weight, const void *stored, int64_t size) {
    union { NAME(Vector) half[2][VECTORS]; NAME(Four) four[2][LANES / 4]; } sums = {{{{0}}}};
    for (int64_t j = 0; j < size; j += PAIR) {
        char copy[PAIR * sizeof(float)];
        const void *from = padded(dtype, (const char *)stored + j * item_bytes(dtype), size - j, copy);
        for (int part = 0; part < VECTORS; part++) {
            NAME(Vector) values[2];
            NAME(values)(dtype, from, part, values);
            for (int i = 0; i < 2; i++) {
                const NAME(Vector) by = weight ? NAME(load)(weight + j + i * LANES + part * WIDTH) : values[i];
                sums.half[i][part] += by * values[i];
            }
        }
    }
    for (int part = 0; part < VECTORS; part++) sums.half[0][part] += sums.half[1][part];
    const NAME(Four) *four = sums.four[0], total = (four[0] + four[2]) + (four[1] + four[3]);
    return (total[0] + total[2]) + (total[1] + total[3]);
}

INLINE void NAME(rows_of)(int dtype, const void *block, const Shape *shape, const REAL *weights, int64_t stride,
                          int64_t count, int squares, REAL *scratch, double *out) {
    const int64_t lines = count + squares, whole = whole_pairs(shape->cols);
    for (int64_t entry = 0; entry < shape->batch; entry++) {
        const REAL *weight = NAME(arranged)(dtype, weights + entry * stride, count, shape->cols, scratch);
        for (int64_t row = 0; row < shape->rows; row++) {
            double *sums = out + entry * lines * shape->rows + row;
            for (int64_t line = 0; line < lines; line++) sums[line * shape->rows] = 0;
            for (int64_t low = 0; low < shape->cols; low += STRIP) {
                const int64_t size = least(STRIP, shape->cols - low);
                const void *stored = at(dtype, block, shape, entry, row, low);
                for (int64_t line = 0; line < count; line++)
                    sums[line * shape->rows] += NAME(strip)(dtype, weight + line * whole + low, stored, size);
                if (squares) sums[count * shape->rows] += NAME(strip)(dtype, NULL, stored, size);
            }
        }
    }
}

/* Adds a PAIR of each of ROWS rows, weighted, to sums down the columns. */
INLINE void NAME(add_pair)(int dtype, const void *const *rows, const NAME(Vector) (*by)[ROWS], int64_t lines,
                           int64_t squares, REAL (*groups)[STRIP], int64_t j) {
    for (int part = 0; part < VECTORS; part++) {
        NAME(Vector) values[ROWS][2];
        for (int i = 0; i < ROWS; i++) NAME(values)(dtype, rows[i], part, values[i]);
        for (int64_t line = 0; line < lines; line++)
            for (int i = 0; i < 2; i++) {
                const NAME(Vector) a = values[0][i], b = values[1][i], c = values[2][i], d = values[3][i];
                REAL *group = groups[line] + j + i * LANES + part * WIDTH;
                NAME(Vector) sums = NAME(load)(group);
                if (line == squares)
                    sums += (a * a + b * b) + (c * c + d * d);
                else
                    sums += (by[line][0] * a + by[line][1] * b) + (by[line][2] * c + by[line][3] * d);
                memcpy(group, &sums, sizeof sums);
            }
    }
}

/* Adds a strip of each; line `squares`, if there is one, is that of squares. */
INLINE void NAME(add_rows)(int dtype, const void *const *rows, int64_t size, const REAL (*weights)[GROUP],
                           int64_t first, int64_t lines, int64_t squares, REAL (*groups)[STRIP]) {
    const int64_t whole = size - size % PAIR;
    NAME(Vector) by[LINES][ROWS];
    const void *from[ROWS];
    for (int64_t line = 0; line < lines; line++)
        for (int i = 0; i < ROWS; i++) by[line][i] = weights[line][first + i] - (NAME(Vector)){0};
    for (int64_t j = 0; j < whole; j += PAIR) {
        for (int i = 0; i < ROWS; i++) from[i] = (const char *)rows[i] + j * item_bytes(dtype);
        NAME(add_pair)(dtype, from, by, lines, squares, groups, j);
    }
    if (whole == size) return;
    char copies[ROWS][PAIR * sizeof(float)];
    for (int i = 0; i < ROWS; i++)
        from[i] = padded(dtype, (const char *)rows[i] + whole * item_bytes(dtype), size - whole, copies[i]);
    NAME(add_pair)(dtype, from, by, lines, squares, groups, whole);
}

/* Adds the weighted sums down the columns of a group of rows. */
INLINE void NAME(group_of)(int dtype, const void *block, const Shape *shape, int64_t entry, int64_t first, int64_t end,
                           const REAL (*weights)[GROUP], int64_t lines, int64_t squares, double *const *into) {
    static const float nothing[STRIP] = {0};
    for (int64_t low = 0; low < shape->cols; low += STRIP) {
        const int64_t size = least(STRIP, shape->cols - low);
        REAL groups[LINES][STRIP];
        for (int64_t line = 0; line < lines; line++) memset(groups[line], 0, sizeof groups[line]);
        for (int64_t row = first; row < end; row += ROWS) {
            const void *rows[ROWS];
            for (int64_t i = 0; i < ROWS; i++)
                rows[i] = row + i < end ? at(dtype, block, shape, entry, row + i, low) : nothing;
            NAME(add_rows)(dtype, rows, size, weights, row - first, lines, squares, groups);
        }
        for (int64_t line = 0; line < lines; line++)
            for (int64_t start = 0; start < size; start += PAIR) {
                REAL ordered[PAIR];
                double *sums = into[line] + low + start;
                NAME(in_order)(dtype, groups[line] + start, ordered);
                if (size - start >= PAIR)
                    for (int64_t j = 0; j < PAIR; j++) sums[j] += ordered[j];
                else
                    for (int64_t j = 0; j < size - start; j++) sums[j] += ordered[j];
            }
    }
}

/* The same, compiled for as many lines. */
INLINE void NAME(sum_group)(int dtype, const void *block, const Shape *shape, int64_t entry, int64_t first, int64_t end,
                            const REAL (*weights)[GROUP], int64_t lines, int64_t squares, double *const *into) {
    if (lines == 1 && squares != 0)
        NAME(group_of)(dtype, block, shape, entry, first, end, weights, 1, -1, into);
    else if (lines == 2 && squares < 0)
        NAME(group_of)(dtype, block, shape, entry, first, end, weights, 2, -1, into);
    else
        NAME(group_of)(dtype, block, shape, entry, first, end, weights, lines, squares, into);
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
                NAME(sum_group)(dtype, block, shape, entry, first, end, (const REAL (*)[GROUP])group, size,
                                count - start, sums);
            }
}

/* The squared norms of a group of rows, and the sums down its columns that follow; 0 if REAL cannot carry them. */
PASS int NAME(mix_group)(int dtype, const void *block, const Shape *shape, int64_t entry, int64_t first, int64_t end,
                           const double *basis, int64_t stride, int64_t count, int mixed, double *squares,
                           double *into) {
    REAL weights[LINES][GROUP] = {0};
    double inverse[GROUP], *sums[LINES];
    for (int64_t row = first; row < end; row++) {
        squares[row] = 0;
        for (int64_t low = 0; low < shape->cols; low += STRIP)
            squares[row] += NAME(strip)(dtype, NULL, at(dtype, block, shape, entry, row, low),
                                        least(STRIP, shape->cols - low));
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
        NAME(sum_group)(dtype, block, shape, entry, first, end, (const REAL (*)[GROUP])weights, size, -1, sums);
    }
    return 1;
}

/* Writes a part of a row, scaled by column or all alike, less its share of columns, all of them arranged. */
INLINE void NAME(update_row)(int dtype, const void *source, void *stored, int64_t size, const REAL *by_column,
                             REAL by_row, const REAL *row_factor, int64_t row_stride, const REAL *columns,
                             int64_t column_stride, int64_t count) {
    for (int64_t j = 0; j < size; j += PAIR) {
        char copy[PAIR * sizeof(float)], moved[PAIR * sizeof(float)];
        const int64_t offset = j * item_bytes(dtype);
        const void *from = padded(dtype, (const char *)source + offset, size - j, copy);
        void *to = size - j >= PAIR ? (char *)stored + offset : moved;
        for (int part = 0; part < VECTORS; part++) {
            NAME(Vector) values[2];
            NAME(values)(dtype, from, part, values);
            for (int i = 0; i < 2; i++) {
                const int64_t col = j + i * LANES + part * WIDTH;
                values[i] *= by_column ? NAME(load)(by_column + col) : by_row - (NAME(Vector)){0};
                for (int64_t line = 0; line < count; line++)
                    values[i] -= row_factor[line * row_stride] * NAME(load)(columns + line * column_stride + col);
            }
            NAME(encode)(dtype, values, part, to);
        }
        if (to == moved) memcpy((char *)stored + offset, moved, (size - j) * item_bytes(dtype));
    }
}

INLINE void NAME(update_of)(int dtype, void *block, const Shape *shape, const void *source, const Shape *from,
                            const REAL *scale, int scaled, const REAL *row_factor, int64_t row_stride,
                            const REAL *column_factor, int64_t column_stride, int64_t count, REAL *scratch) {
    const int64_t whole = whole_pairs(shape->cols);
    for (int64_t entry = 0; entry < shape->batch; entry++) {
        const REAL *rows = row_factor + entry * row_stride;
        const REAL *columns = NAME(arranged)(dtype, column_factor + entry * column_stride, count, shape->cols, scratch);
        const REAL *by_column = NULL;
        if (scaled == BY_COLUMN)
            by_column = NAME(arranged)(dtype, scale + entry * shape->cols, 1, shape->cols, scratch + count * whole);
        for (int64_t low = 0; low < shape->cols; low += STRIP)
            for (int64_t row = 0; row < shape->rows; row++)
                NAME(update_row)(dtype, at(dtype, source, from, entry, row, low),
                                 (void *)at(dtype, block, shape, entry, row, low), least(STRIP, shape->cols - low),
                                 by_column ? by_column + low : NULL,
                                 scaled == BY_ROW ? scale[entry * shape->rows + row] : 1, rows + row, shape->rows,
                                 columns + low, whole, count);
    }
}

/* Moves a row and keeps its norm; returns 1 if REAL cannot carry that, and then leaves the row as it is. */
PASS int NAME(move_row)(int dtype, void *block, const Shape *shape, int64_t entry, int64_t row, const Move *move,
                          const REAL *mixed, int64_t *parallel) {
    const int is_single = sizeof(REAL) == sizeof(float);
    const int64_t count = move->count, stride = move->rows, cols = shape->cols, whole = whole_pairs(cols);
    const double *gram = move->gram + entry * count * count, *basis = move->basis + row;
    const double coefficient = move->coefficient, square = move->squares[entry * move->rows + row];
    if (!(square > 0)) return 0;
    if (is_single && dtype != F16 && !(square > LOW && square < HIGH)) return 1;
    double along = 0, cross = 0;
    for (int64_t line = 0; line < count; line++) {
        double height = 0;
        for (int64_t other = 0; other < count; other++) height += gram[other * count + line] * basis[other * stride];
        along += height * basis[line * stride];
    }
    if (!(along > 0)) return 0;
    double *kept = move->crosses + 2 * (entry * move->rows + row);
    if (move->known) {
        if (is_single && kept[1]) return 1;
        cross = kept[0];
    }
    for (int64_t low = 0; !move->known && low < cols; low += STRIP) {
        const void *stored = at(dtype, block, shape, entry, row, low);
        for (int64_t line = 0; line < count; line++)
            cross += basis[line * stride] *
                     NAME(strip)(dtype, mixed + line * whole + low, stored, least(STRIP, cols - low));
    }
    const double norm = sqrt(square), slope = coefficient * sqrt(along), most = move->amplification;
    const double ratio = 1 - 2 * coefficient * (cross / norm) + slope * slope;
    const double reach = 1 + fabs(slope);
    if (is_single && (reach * reach > most * most * ratio || norm > move->largest_norm)) return 1;
    kept[0] = cross;
    kept[1] = !is_single;
    const double scale = ratio < DEGENERATE ? 1 : 1 / sqrt(ratio);
    *parallel += ratio < DEGENERATE;
    REAL factors[count];
    for (int64_t line = 0; line < count; line++)
        factors[line] = (REAL)(coefficient * basis[line * stride] * norm * scale);
    void *stored = (void *)at(dtype, block, shape, entry, row, 0);
    if (count == 1) /* most often: compiled apart, its factor stays in a register */
        NAME(update_row)(dtype, stored, stored, cols, NULL, (REAL)scale, factors, 1, mixed, whole, 1);
    else
        NAME(update_row)(dtype, stored, stored, cols, NULL, (REAL)scale, factors, 1, mixed, whole, count);
    return 0;
}

PUBLIC void NAME(ablate_rows)(int dtype, const void *block, const Shape *shape, const REAL *weights, int64_t stride,
                              int64_t count, int squares, REAL *scratch, double *out) {
#define CALL(kind) NAME(rows_of)(kind, block, shape, weights, stride, count, squares, scratch, out)
    FOR_THE_DTYPE(CALL)
#undef CALL
}

PUBLIC void NAME(ablate_columns)(int dtype, const void *block, const Shape *shape, const REAL *weights, int64_t stride,
                                 int64_t count, int squares, double *into) {
#define CALL(kind) NAME(columns_of)(kind, block, shape, weights, stride, count, squares, into)
    FOR_THE_DTYPE(CALL)
#undef CALL
}

PUBLIC void NAME(ablate_update)(int dtype, void *block, const Shape *shape, const void *source, const Shape *from,
                                const REAL *scale, int scaled, const REAL *row_factor, int64_t row_stride,
                                const REAL *column_factor, int64_t column_stride, int64_t count, REAL *scratch) {
#define CALL(kind)                                                                                        \
    NAME(update_of)(kind, block, shape, source, from, scale, scaled, row_factor, row_stride, column_factor, \
                    column_stride, count, scratch)
    FOR_THE_DTYPE(CALL)
#undef CALL
}
