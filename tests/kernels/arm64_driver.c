/* Computes the cases of a file on the NEON kernels, and writes what comes out: how test_neon.py runs them under qemu-user.
 *
 *     neon_driver CASES RESULTS
 *
 * A case is whole numbers of 8 bytes: which function, 16 parameters, then 8 arrays, each its size in bytes and its bytes.
 * Of each case the results are the arrays that the function writes. The host's bytes have this processor's order. */
#include "panel_neon.h"
#include "library.h"

#include <stdio.h>

enum function { CALL_LINEAR, CALL_ATTENTION, CALL_NORM, CALL_APPEND };
enum { NUM_PARAMETERS = 16, NUM_ARRAYS = 8 };

struct test_case {
    int64_t function, number[NUM_PARAMETERS], size[NUM_ARRAYS];
    void *array[NUM_ARRAYS]; /* NULL where there are no bytes */
};

static void require(bool condition, const char *what) {
    if (condition) return;
    fprintf(stderr, "neon_driver: %s\n", what);
    exit(1);
}

static void *room(int64_t num_bytes) {
    void *memory = aligned_alloc(LINE, (size_t)round_up(num_bytes + 1, LINE));
    require(memory != NULL, "no memory");
    return memory;
}

static bool read_case(FILE *file, struct test_case *it) {
    if (fread(&it->function, sizeof it->function, 1, file) != 1) return false;
    require(fread(it->number, sizeof it->number, 1, file) == 1, "a case ends early");
    for (int i = 0; i < NUM_ARRAYS; i++) {
        require(fread(&it->size[i], sizeof it->size[i], 1, file) == 1, "a case ends early");
        it->array[i] = it->size[i] > 0 ? room(it->size[i]) : NULL;
        require(fread(it->array[i], 1, (size_t)it->size[i], file) == (size_t)it->size[i], "an array ends early");
    }
    return true;
}

static void write_array(FILE *file, const struct test_case *it, int i) {
    require(fwrite(it->array[i], 1, (size_t)it->size[i], file) == (size_t)it->size[i], "results cannot be written");
}

static void compute_linear(const struct test_case *it, FILE *results) {
    const int64_t *n = it->number;
    void *panels = room(tandem_packed_bytes(n[0], n[1], (int)n[2]));
    tandem_pack(it->array[0], n[1], (int)n[2], it->array[1], n[0], panels);
    const struct weights weights = {panels, it->array[2], it->array[3], it->array[4], n[0], n[1], n[3]};
    void *workspace = room(tandem_linear_workspace(&weights, n[4]));
    tandem_linear(&weights, it->array[5], n[5], n[4], it->array[6], n[6], (int)n[7], workspace, (int)n[8]);
    write_array(results, it, 6);
    free(panels);
    free(workspace);
}

static void compute_attention(const struct test_case *it, FILE *results) {
    const int64_t *n = it->number;
    const struct attention_call call = {
        .q = it->array[0], .q_stride = n[0], .out = it->array[1], .cache = it->array[2], .block_stride = n[1],
        .block_tables = it->array[3], .table_stride = n[2], .query_start = it->array[4], .context_lens = it->array[5],
        .num_sequences = n[3], .num_heads = n[4], .num_kv_heads = n[5], .head_dim = n[6], .block_size = n[7],
        .window = n[8], .scale = *(const float *)it->array[6], .is_int8 = (int32_t)n[10]};
    void *workspace = room(tandem_attention_workspace(n[6], (int)n[9]));
    tandem_attention(&call, workspace, (int)n[9]);
    write_array(results, it, 1);
    free(workspace);
}

static void compute_append(const struct test_case *it, FILE *results) {
    const int64_t *n = it->number;
    const struct append_call call = {
        .qkv = it->array[0], .table = it->array[1], .norm = it->array[2], .slots = it->array[3], .cache = it->array[4],
        .block_stride = n[0], .num_tokens = n[1], .num_heads = n[2], .num_kv_heads = n[3], .head_dim = n[4],
        .block_size = n[5], .eps = *(const float *)it->array[5], .is_int8 = (int32_t)n[7]};
    tandem_rope_append(&call, (int)n[6]);
    write_array(results, it, 0);
    write_array(results, it, 4);
}

static void compute(const struct test_case *it, FILE *results) {
    switch ((enum function)it->function) {
        case CALL_LINEAR: compute_linear(it, results); break;
        case CALL_ATTENTION: compute_attention(it, results); break;
        case CALL_NORM:
            tandem_rms_norm(it->array[0], it->array[1], it->array[2], it->number[0], it->number[1],
                            *(const float *)it->array[3], 1);
            write_array(results, it, 2);
            break;
        case CALL_APPEND: compute_append(it, results); break;
        default: require(false, "a case is of no function");
    }
}

int main(int argc, char **argv) {
    require(argc == 3, "give the cases and the results");
    FILE *cases = fopen(argv[1], "rb"), *results = fopen(argv[2], "wb");
    require(cases != NULL && results != NULL, "a file does not open");
    require(tandem_start() != 0, "the kernels do not start");
    for (struct test_case it; read_case(cases, &it);) {
        compute(&it, results);
        for (int i = 0; i < NUM_ARRAYS; i++) free(it.array[i]);
    }
    require(fclose(results) == 0, "results cannot be written");
    return 0;
}
