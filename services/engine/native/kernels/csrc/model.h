/* A step of a whole model in one call: Python's lock is given up once for all of it, and none of the step's time is
 * Python's, which would run with cold caches between two layers. */
#ifndef TANDEM_MODEL_H
#define TANDEM_MODEL_H

#include <time.h>

#include "attention.h"
#include "linear.h"
#include "tokens.h"

/* A layer's weights. Mirrored by `Layer` in library.py. */
struct layer {
    struct weights qkv, o, gate_up, down;
    const bf16 *input_norm, *post_attention_norm; /* [hidden_size] */
    const bf16 *qk_norm; /* [num_heads + num_kv_heads][head_dim]; NULL: none */
    int64_t window;      /* as in attention_call */
};

/* Where a step's time goes. Mirrored by `Stage` in library.py. */
enum stage { EMBED, NORM, QKV, APPEND, ATTENTION, OUTPUT, GATE_UP, DOWN, LOGITS, NUM_STAGES };

/* One step. Mirrored by `ForwardCall` in library.py. `append` and `attention` are filled in but for what is a layer's;
 * `append.cache` is layer 0's, and layers are `layer_stride` bytes apart. */
struct forward_call {
    const struct layer *layers;
    const struct weights *lm_head;
    const bf16 *embedding, *norm;
    int64_t num_layers, hidden_size, layer_stride;
    int64_t gate; /* the epilogue of gate_up */
    const int64_t *token_ids; /* [T] */
    const int64_t *positions; /* [T] */
    const float *frequencies; /* of rotary embedding: [head_dim / 2] */
    float rope_factor;
    const int64_t *wanted; /* [num_wanted]: tokens whose logits are */
    int64_t num_wanted;
    float *logits; /* [num_wanted][vocabulary] */
    struct append_call append;
    struct attention_call attention;
    bf16 *x, *normed, *gated; /* room for [T] rows each */
    float *angles;            /* room for [T][head_dim] */
    double seconds[NUM_STAGES]; /* added to */
};

struct stopwatch {
    double *seconds;
    struct timespec last;
};

/* What passed since the last call went into `stage`. */
static void count_as(struct stopwatch *watch, enum stage stage) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    watch->seconds[stage] += (double)(now.tv_sec - watch->last.tv_sec) + 1e-9 * (double)(now.tv_nsec - watch->last.tv_nsec);
    watch->last = now;
}

/* rows[i] = rows[wanted[i]], in place. `wanted` ascends. */
static void keep_rows(bf16 *rows, int64_t width, const int64_t *wanted, int64_t num_wanted) {
    for (int64_t i = 0; i < num_wanted; i++)
        memmove(rows + i * width, rows + wanted[i] * width, (size_t)width * sizeof *rows);
}

/* Bytes of workspace, aligned to 64, that `tandem_forward` needs. */
EXPORT int64_t tandem_forward_workspace(const struct forward_call *call, int num_threads) {
    const int64_t num_tokens = call->append.num_tokens;
    int64_t bytes = tandem_attention_workspace(call->attention.head_dim, num_threads);
    bytes = max64(bytes, tandem_linear_workspace(call->lm_head, call->num_wanted));
    for (int64_t i = 0; i < call->num_layers; i++) {
        const struct layer *layer = &call->layers[i];
        bytes = max64(bytes, tandem_linear_workspace(&layer->qkv, num_tokens));
        bytes = max64(bytes, tandem_linear_workspace(&layer->o, num_tokens));
        bytes = max64(bytes, tandem_linear_workspace(&layer->gate_up, num_tokens));
        bytes = max64(bytes, tandem_linear_workspace(&layer->down, num_tokens));
    }
    return bytes;
}

/* Store the tokens' keys and values; write the logits of those that are wanted, which ascend. */
EXPORT void tandem_forward(struct forward_call *call, void *workspace, int num_threads) {
    struct append_call append = call->append;
    struct attention_call attention = call->attention;
    struct stopwatch watch = {.seconds = call->seconds};
    const int64_t hidden = call->hidden_size, inner = call->layers[0].gate_up.num_outputs;
    const int64_t heads = append.num_heads * append.head_dim;
    int64_t rows = append.num_tokens;
    bf16 *x = call->x, *normed = call->normed, *attended = attention.out;

    clock_gettime(CLOCK_MONOTONIC, &watch.last);
    for (int64_t i = 0; i < rows; i++)
        memcpy(x + i * hidden, call->embedding + call->token_ids[i] * hidden, (size_t)hidden * sizeof *x);
    tandem_rope_table(call->positions, call->frequencies, call->rope_factor, rows, append.head_dim / 2, call->angles);
    count_as(&watch, EMBED);
    for (int64_t i = 0; i < call->num_layers; i++) {
        const struct layer *layer = &call->layers[i];
        tandem_rms_norm(x, layer->input_norm, normed, rows, hidden, append.eps, num_threads);
        count_as(&watch, NORM);
        tandem_linear(&layer->qkv, normed, hidden, rows, append.qkv, attention.q_stride, WRITE, workspace, num_threads);
        count_as(&watch, QKV);
        append.cache = (char *)call->append.cache + i * call->layer_stride;
        append.norm = layer->qk_norm;
        tandem_rope_append(&append, num_threads);
        count_as(&watch, APPEND);
        if (i == call->num_layers - 1 && call->num_wanted == 0) return;
        attention.cache = append.cache;
        attention.window = layer->window;
        tandem_attention(&attention, workspace, num_threads);
        count_as(&watch, ATTENTION);
        if (i == call->num_layers - 1) { /* from here on, only these rows are of use to anybody */
            keep_rows(x, hidden, call->wanted, call->num_wanted);
            keep_rows(attended, heads, call->wanted, call->num_wanted);
            rows = call->num_wanted;
        }
        tandem_linear(&layer->o, attended, heads, rows, x, hidden, ADD, workspace, num_threads);
        count_as(&watch, OUTPUT);
        tandem_rms_norm(x, layer->post_attention_norm, normed, rows, hidden, append.eps, num_threads);
        count_as(&watch, NORM);
        tandem_linear(&layer->gate_up, normed, hidden, rows, call->gated, inner, (int)call->gate, workspace, num_threads);
        count_as(&watch, GATE_UP);
        tandem_linear(&layer->down, call->gated, inner, rows, x, hidden, ADD, workspace, num_threads);
        count_as(&watch, DOWN);
    }
    tandem_rms_norm(x, call->norm, normed, rows, hidden, append.eps, num_threads);
    count_as(&watch, NORM);
    tandem_linear(call->lm_head, normed, hidden, rows, call->logits, call->lm_head->num_outputs, WRITE_FLOAT, workspace,
                  num_threads);
    count_as(&watch, LOGITS);
}

#endif
