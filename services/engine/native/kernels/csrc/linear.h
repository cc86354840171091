/* y = x W^T with whatever follows at once: bias, residual, activation.
 *
 * W is packed once, into panels of 32 of its rows (the columns of B): [n / 32][depth blocks][2 tiles][1 KiB]. A call packs
 * x too, into panels of up to 32 of its rows, as many as half of L2 holds at a time; each panel of W then meets them all,
 * so that W comes from memory once for that many rows, and from L2 once. */
#ifndef TANDEM_LINEAR_H
#define TANDEM_LINEAR_H

#include <unistd.h>

#include "helpers.h"
#include "threads.h"
#include "vector.h"
#include "widening.h"

enum epilogue {
    WRITE = 0,          /* y = x W^T + bias, bf16 */
    ADD = 1,            /* y += x W^T + bias: the residual stream, bf16 */
    WRITE_FLOAT = 2,    /* y = x W^T + bias, float: logits */
    GATE_SILU = 3,      /* y = act(gate) * up, bf16: W's panels hold 16 rows of gate, then 16 of up */
    GATE_GELU_TANH = 4,
    GATE_GELU_ERF = 5,
};

/* A projection's weights. Mirrored by `Weights` in library.py. */
struct weights {
    const void *panels;
    const float *bias;        /* [columns] or NULL */
    const float *scales;      /* [columns]: int8; NULL: bf16 */
    const int32_t *sums;      /* [columns], of int8 weights over the depth */
    int64_t num_columns;      /* a multiple of 32: W's rows in packed order, padded */
    int64_t depth;            /* not padded: what a row of x has */
    int64_t num_outputs;      /* what a row of y has */
};

static inline floats sigmoid(floats x) {
    /* exp(-|x|) cannot overflow */
    const floats e = exp2_of_nonpositive(absolute(x) * -1.44269504f);
    return select_floats(x < 0.0f, e, all(1.0f)) / (e + 1.0f);
}

/* Abramowitz and Stegun 7.1.26: off by 1.5e-7 at most. */
static inline floats error_function(floats x) {
    const floats a = absolute(x), t = 1.0f / (0.3275911f * a + 1.0f);
    const floats p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const floats positive = 1.0f - p * exp2_of_nonpositive(a * a * -1.44269504f);
    return select_floats(x < 0.0f, -positive, positive);
}

static inline floats activate(floats gate, enum epilogue epilogue) {
    if (epilogue == GATE_SILU) return gate * sigmoid(gate);
    if (epilogue == GATE_GELU_TANH) /* tanh(u) = 2 sigmoid(2 u) - 1 */
        return gate * sigmoid(1.5957691216f * (gate + 0.044715f * gate * gate * gate));
    return 0.5f * gate * (1.0f + error_function(gate * 0.70710678f));
}

struct linear_job {
    const struct weights *weights;
    const bf16 *x;
    int64_t x_stride; /* elements from row to row, as y_stride */
    int64_t num_rows;
    void *y;
    int64_t y_stride;
    enum epilogue epilogue;
    int64_t num_blocks;  /* of depth */
    int64_t first, stop; /* the rows packed now */
    char *packed;        /* panels of x: [rows of the panel][A_LINE] for each block of depth */
    float *row_scales;   /* int8: of the packed rows */
};

static inline int64_t num_depth_blocks(const struct weights *weights) {
    return ceil_div(weights->depth, weights->scales ? INT8_DEPTH : BF16_DEPTH);
}

enum {
    WEIGHT_CHUNK = 4,      /* blocks of depth: 8 KiB of W; the next chunk, x and C must fit L1 beside it */
    FEW_ROWS = 12,         /* that pass once: memory sets the pace, and is asked for what is so many blocks ahead */
};

/* Rows that are packed at a time: whole panels, half of L2. */
static int64_t rows_at_once(int64_t num_blocks) {
    static _Atomic int64_t known; /* the same whoever writes it */
    int64_t l2_bytes = atomic_load_explicit(&known, memory_order_relaxed);
    if (l2_bytes == 0) {
        l2_bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
        if (l2_bytes <= 0) l2_bytes = 1 << 20;
        atomic_store_explicit(&known, l2_bytes, memory_order_relaxed);
    }
    return min64(MAX_PACKED_ROWS, max64(ROWS, l2_bytes / 2 / (num_blocks * A_LINE) / ROWS * ROWS));
}

static void pack_row_bf16(char *out, ptrdiff_t block_bytes, const bf16 *x, int64_t depth) {
    for (int64_t k = 0; k < depth; k += BF16_DEPTH, out += block_bytes) put_bf16(out, x + k, min64(BF16_DEPTH, depth - k));
}

/* A row in int8: x = scale * q, with q from -127 to 127, rounded to nearest. Returns the scale. */
static float pack_row_int8(char *out, ptrdiff_t block_bytes, const bf16 *x, int64_t depth) {
    /* As whole numbers, positive floats have the same order, and a NaN is larger than all: it becomes the scale. */
    ints lanes = {0};
    for (int64_t k = 0; k < depth; k += LANES) lanes = larger_ints((ints)absolute(load_bf16(x + k, depth - k)), lanes);
    const float largest = float_of((uint32_t)largest_lane(lanes)), inverse = largest > 0 ? 127.0f / largest : 0.0f;
    for (int64_t k = 0; k < depth; k += INT8_DEPTH, out += block_bytes)
        for (int64_t i = 0; i < INT8_DEPTH; i += LANES) {
            const floats values = load_bf16(x + k + i, max64(0, depth - k - i));
            /* Adding 1.5 * 2^23 rounds, and leaves the whole number in the low bits. */
            put_int8(out, i, (ints)(values * inverse + 12582912.0f) + PANEL_INT8_OFFSET);
        }
    return largest / 127.0f;
}

static void pack_rows(void *argument, int64_t panel, int thread) {
    (void)thread;
    struct linear_job *job = argument;
    const int64_t first = panel * ROWS, rows = min64(ROWS, job->stop - job->first - first);
    char *out = job->packed + first * job->num_blocks * A_LINE;
    for (int64_t row = 0; row < rows; row++, out += A_LINE) {
        const bf16 *x = job->x + (job->first + first + row) * job->x_stride;
        if (job->weights->scales)
            job->row_scales[first + row] = pack_row_int8(out, rows * A_LINE, x, job->weights->depth);
        else
            pack_row_bf16(out, rows * A_LINE, x, job->weights->depth);
    }
}

/* The sums of some columns of a row, as they stand in C: floats, or whole numbers that still lack their scales. */
static inline floats sums_of(const struct linear_job *job, const void *c, int64_t column, float row_scale) {
    const struct weights *weights = job->weights;
    floats sums;
    memcpy(&sums, c, sizeof sums);
    if (weights->scales) {
        ints totals;
        memcpy(&totals, weights->sums + column, sizeof totals);
        totals = (ints)sums - PANEL_INT8_OFFSET * totals;
        sums = __builtin_convertvector(totals, floats) * (row_scale * load_floats(weights->scales + column));
    }
    return weights->bias ? sums + load_floats(weights->bias + column) : sums;
}

/* Write outputs of a row of y. */
static inline void put(const struct linear_job *job, floats values, int64_t row, int64_t output, enum epilogue epilogue) {
    const int64_t count = min64(LANES, job->weights->num_outputs - output);
    if (count <= 0) return;
    if (epilogue == WRITE_FLOAT) {
        memcpy((float *)job->y + row * job->y_stride + output, &values, (size_t)count * sizeof(float));
        return;
    }
    bf16 *y = (bf16 *)job->y + row * job->y_stride + output;
    if (epilogue == ADD) values += load_bf16(y, count);
    store_bf16(y, values, count);
}

/* Finish a panel: C has the sums of all packed rows. */
static inline __attribute__((always_inline)) void finish_panel(
    const struct linear_job *job, const void *sums, int64_t column, const enum epilogue epilogue) {
    const char *c = sums; /* numbers of four bytes, of either kind */
    for (int64_t row = job->first; row < job->stop; row++, c += 4 * COLUMNS) {
        const float scale = job->weights->scales ? job->row_scales[row - job->first] : 1.0f;
        for (int64_t i = 0; i < COLUMNS / 2; i += LANES) {
            const int64_t j = i + COLUMNS / 2;
            const floats left = sums_of(job, c + 4 * i, column + i, scale), right = sums_of(job, c + 4 * j, column + j, scale);
            if (epilogue >= GATE_SILU) {
                put(job, activate(left, epilogue) * right, row, column / 2 + i, epilogue);
            } else {
                put(job, left, row, column + i, epilogue);
                put(job, right, row, column + j, epilogue);
            }
        }
    }
}

/* One panel of W with all the rows that are packed. Each chunk of it stays in L1 while all rows pass over it, and each
 * pass asks memory for a share of the next chunk: of this panel or, at its end, of the next one. A helper, which has the
 * call's number, ends it where the call has ended: false then. */
static bool multiply(const struct operands *operands, int64_t panel, union sums *c, int64_t number) {
    const int64_t num_rows = operands->num_rows;
    const char *b = operands->panels + panel * operands->num_blocks * B_BLOCK;
    const int lines = (int)ceil_div(B_BLOCK / LINE, ceil_div(num_rows, ROWS));
    for (int64_t block = 0; block < operands->num_blocks; block += WEIGHT_CHUNK, b += WEIGHT_CHUNK * B_BLOCK) {
        if (number != 0) {
            if (!is_offered(number)) return false;
            stall();
        }
        const int64_t num_blocks = min64(WEIGHT_CHUNK, operands->num_blocks - block);
        struct ahead ahead = {b + (num_rows > FEW_ROWS ? num_blocks : PANEL_BLOCKS_AHEAD) * B_BLOCK, lines};
        for (int64_t first = 0; first < num_rows; first += ROWS, ahead.next += num_blocks * lines * LINE) {
            const int rows = (int)min64(ROWS, num_rows - first);
            const char *a = operands->packed + (first * operands->num_blocks + block * rows) * A_LINE;
            if (operands->is_int8)
                panel_int8(c->ints + first * COLUMNS, (const a_int8 *)a, (const int8_t *)b, num_blocks, rows, block > 0, ahead);
            else
                panel_bf16(c->floats + first * COLUMNS, (const a_bf16 *)a, (const bf16 *)b, num_blocks, rows, block > 0, ahead);
        }
    }
    return true;
}

static struct operands operands_of(const struct linear_job *job) {
    const struct weights *weights = job->weights;
    return (struct operands){job->packed, weights->panels, job->stop - job->first, job->num_blocks, weights->scales != NULL};
}

/* Make outputs of a panel's sums. */
static void finish(const struct linear_job *job, const union sums *c, int64_t panel) {
    const int64_t column = panel * COLUMNS;
    switch (job->epilogue) {
        case WRITE: finish_panel(job, c, column, WRITE); break;
        case ADD: finish_panel(job, c, column, ADD); break;
        case WRITE_FLOAT: finish_panel(job, c, column, WRITE_FLOAT); break;
        case GATE_SILU: finish_panel(job, c, column, GATE_SILU); break;
        case GATE_GELU_TANH: finish_panel(job, c, column, GATE_GELU_TANH); break;
        case GATE_GELU_ERF: finish_panel(job, c, column, GATE_GELU_ERF); break;
    }
}

static void multiply_panel(void *argument, int64_t panel, int thread) {
    (void)thread;
    union sums c ALIGNED;
    const struct operands operands = operands_of(argument);
    multiply(&operands, panel, &c, 0);
    finish(argument, &c, panel);
}

/* Finish what helpers have brought of call `number`, and give them back their rooms. Returns how many panels. */
static int64_t take_in(const struct linear_job *job, int64_t number, bool *is_done) {
    int64_t count = 0;
    for (int i = 0; i < help.num_helpers * ROOMS; i++) {
        struct room *room = &help.rooms[i];
        if (atomic_load(&room->state) != DONE) continue;
        if (room->number == number && !is_done[room->panel]) {
            finish(job, &room->sums, room->panel);
            is_done[room->panel] = true;
            count++;
        }
        atomic_store(&room->state, EMPTY);
    }
    atomic_fetch_add(&help.num_helped, count);
    return count;
}

/* All panels, with helpers; false, and nothing, where another caller has them. */
static bool multiply_with_helpers(const struct linear_job *job, int64_t num_panels) {
    if (pthread_mutex_trylock(&pool.callers) != 0) return false;
    const struct operands operands = operands_of(job);
    bool is_done[MAX_HELPED_PANELS];
    union sums sums ALIGNED;
    double last = 0, before, panel_s = 0;
    int64_t num_left = num_panels;
    memset(is_done, 0, (size_t)num_panels);
    panel_begin();
    const int64_t number = open_offer(&operands, num_panels);
    for (before = seconds_now();; before = last) {
        const int64_t panel = atomic_fetch_add(&help.ticket, 1) & 0xffffffff;
        if (panel >= num_panels) break;
        multiply(&operands, panel, &sums, 0);
        finish(job, &sums, panel);
        is_done[panel] = true;
        last = seconds_now();
        panel_s = last - before;
        num_left -= 1 + take_in(job, number, is_done);
    }
    const double end = seconds_now() + panel_s;
    while (num_left > 0 && seconds_now() < end) num_left -= take_in(job, number, is_done);
    for (int64_t panel = 0; num_left > 0; panel++) {
        if (is_done[panel]) continue;
        multiply(&operands, panel, &sums, 0);
        finish(job, &sums, panel);
        is_done[panel] = true;
        atomic_fetch_add(&help.num_redone, 1);
        num_left -= 1 + take_in(job, number, is_done);
    }
    close_offer();
    panel_end();
    pthread_mutex_unlock(&pool.callers);
    return true;
}

/* Have so many threads at the lowest priority help where rows are many; fewer if the system refuses. How many there are. */
EXPORT int tandem_use_helpers(int num_helpers) { return want_helpers(num_helpers, multiply); }

/* Bytes of workspace, aligned to 64, that `tandem_linear` needs for `num_rows` rows. */
EXPORT int64_t tandem_linear_workspace(const struct weights *weights, int64_t num_rows) {
    const int64_t num_blocks = num_depth_blocks(weights), rows = min64(num_rows, rows_at_once(num_blocks));
    return rows * num_blocks * A_LINE + round_up(rows * (int64_t)sizeof(float), LINE);
}

/* x [num_rows][depth] in bf16; y [num_rows][num_outputs], of the epilogue's type. */
EXPORT void tandem_linear(const struct weights *weights, const bf16 *x, int64_t x_stride, int64_t num_rows, void *y,
                          int64_t y_stride, int epilogue, void *workspace, int num_threads) {
    const int64_t num_blocks = num_depth_blocks(weights), step = rows_at_once(num_blocks);
    struct linear_job job = {weights, x, x_stride, num_rows, y, y_stride, (enum epilogue)epilogue, num_blocks, 0, 0,
                             workspace, NULL};
    job.row_scales = (float *)(job.packed + min64(num_rows, step) * num_blocks * A_LINE);
    for (job.first = 0; job.first < num_rows; job.first = job.stop) {
        job.stop = min64(num_rows, job.first + step);
        run_tasks(pack_rows, &job, ceil_div(job.stop - job.first, ROWS), num_threads);
        const int64_t num_panels = weights->num_columns / COLUMNS;
        const bool is_helped = num_threads == 1 && num_rows >= HELPED_ROWS && num_panels <= MAX_HELPED_PANELS;
        if (!is_helped || atomic_load(&help.num_wanted) == 0 || !multiply_with_helpers(&job, num_panels))
            run_tasks(multiply_panel, &job, num_panels, num_threads);
    }
}

/* Bytes that the panels of W [..][depth] take with `num_columns` packed columns. */
EXPORT int64_t tandem_packed_bytes(int64_t num_columns, int64_t depth, int element_bytes) {
    return num_columns / COLUMNS * ceil_div(depth * element_bytes, LINE) * B_BLOCK;
}

/* Pack the panels of W [..][depth], of 1 or 2 bytes an element. Packed column i is row order[i] of W; -1: zeros. */
EXPORT void tandem_pack(const void *matrix, int64_t depth, int element_bytes, const int64_t *order,
                        int64_t num_columns, void *panels) {
    const int64_t row_bytes = depth * element_bytes, num_blocks = ceil_div(row_bytes, LINE);
    for (int64_t tile = 0; tile < num_columns / 16; tile++)
        for (int64_t block = 0; block < num_blocks; block++) {
            const int64_t start = block * LINE, count = min64(LINE, row_bytes - start);
            char rows[16][LINE] ALIGNED;
            for (int column = 0; column < 16; column++) {
                const int64_t source = order[tile * 16 + column];
                if (source < 0 || count < LINE) memset(rows[column], 0, LINE);
                if (source >= 0) memcpy(rows[column], (const char *)matrix + source * row_bytes + start, (size_t)count);
            }
            char *out = (char *)panels + (tile / 2 * num_blocks + block) * B_BLOCK + tile % 2 * (B_BLOCK / 2);
            transpose16((uint32_t *)(void *)out, rows, LINE);
        }
}

#endif
