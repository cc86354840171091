/* Samples a batch's tokens in one call; sampler.py has the definition, and what is not decided here is decided there.
 *
 * The definition's sums and logarithms round as torch does on this machine, at times in float32. Here is computed what
 * they come to, with a bound on how far apart both can be. Where a token hangs on less than that, nothing is chosen:
 * the answer is UNDECIDED, or NEEDS_MASS where the definition's sum over the row would settle it. So no bit of what is
 * sampled is other than the definition's. What changes logits, and the scaling, are the definition's operations in
 * float32, one by one. */

#include <pthread.h>

#include "border.h"
#include "noise.h"

#define EXPORT __attribute__((visibility("default")))

enum { NO_TOKEN = -1, UNDECIDED = -2, NEEDS_MASS = -3 };
enum { GROUP = 256, MAX_THREADS = 64 };
#define GROUP_COUNTER ((int64_t)1 << 40)
#define LARGEST_LOGIT 1e33f
#define LOG_GROUP 5.546 /* no group's sum is further above its largest than log(256) */

/* What a request asks, the same at every step. */
struct sampling_params {
    const int64_t *allowed, *stops, *biased;
    const float *biases;
    int64_t num_allowed, num_stops, num_biased;
    int64_t top_k; /* huge: off */
    int64_t num_prompt_tokens;
    uint64_t seed;
    double top_p, frequency_penalty, presence_penalty;
    float temperature, log_min_p, repetition_penalty;
    int32_t is_greedy, ignores_eos, reserved;
};

/* One row: this step's, and the request's. */
struct sampling_row {
    int64_t index;      /* of the row among the logits */
    int64_t num_tokens; /* prompt and output; the place where the sampled token will stand */
    const int32_t *tokens; /* they; NULL where no penalty asks for them */
    float log_mass;        /* log(sum(exp)) of the scaled row as the definition has it; NaN: not known */
    int32_t forbids_ends;  /* min_tokens is not reached */
    struct sampling_params params;
};

struct sampling_call {
    const struct sampling_row *rows;
    int64_t num_rows;
    const float *logits; /* [.., vocab_size] */
    int64_t vocab_size, padded_size, num_candidates;
    const int64_t *eos;
    int64_t num_eos;
    int64_t *tokens; /* [num_rows] comes back */
    char *workspace; /* zeros, and zeros where marks are when it comes back */
};

/* One thread's memory. */
struct room {
    float *row;      /* edited, scaled */
    float *maxima;   /* of each part */
    float *values;   /* gathered */
    double *weights; /* of these */
    int32_t *marks;  /* by token; zeros between rows */
};

static int64_t align(int64_t num_bytes) { return (num_bytes + 63) & ~(int64_t)63; }

static int64_t room_bytes(int64_t padded_size) { return 24 * align(padded_size + 64); }

static struct room room_at(char *memory, int64_t padded_size) {
    int64_t size = align(padded_size + 64);
    return (struct room){
        .weights = (double *)memory,
        .row = (float *)(memory + 8 * size),
        .values = (float *)(memory + 12 * size),
        .maxima = (float *)(memory + 16 * size),
        .marks = (int32_t *)(memory + 20 * size),
    };
}

/* ---- parameters that change logits ---- */

static bool is_edited(const struct sampling_row *row) {
    const struct sampling_params *params = &row->params;
    return params->num_allowed || params->num_biased || row->forbids_ends || row->tokens;
}

static void forbid(float *x, int64_t n, const int64_t *tokens, int64_t num_tokens) {
    for (int64_t i = 0; i < num_tokens; i++)
        if (tokens[i] < n) x[tokens[i]] = -INFINITY;
}

static float penalize_repetition(float value, float penalty) {
    if (!isfinite(value)) return value;
    float penalized = value > 0.0f ? value / penalty : value * penalty;
    return penalized < -LARGEST_LOGIT ? -LARGEST_LOGIT : penalized > LARGEST_LOGIT ? LARGEST_LOGIT : penalized;
}

static void penalize(const struct sampling_row *row, float *x, int64_t n, int32_t *marks) {
    const struct sampling_params *params = &row->params;
    const int32_t *tokens = row->tokens;
    const int64_t num_tokens = row->num_tokens;
    if (params->repetition_penalty != 1.0f) {
        for (int64_t i = 0; i < num_tokens; i++) {
            int32_t token = tokens[i];
            if (token >= n || marks[token]) continue;
            marks[token] = 1;
            x[token] = penalize_repetition(x[token], params->repetition_penalty);
        }
        for (int64_t i = 0; i < num_tokens; i++)
            if (tokens[i] < n) marks[tokens[i]] = 0;
    }
    if (params->frequency_penalty != 0.0 || params->presence_penalty != 0.0) {
        for (int64_t i = params->num_prompt_tokens; i < num_tokens; i++)
            if (tokens[i] < n) marks[tokens[i]]++;
        for (int64_t i = params->num_prompt_tokens; i < num_tokens; i++) {
            int32_t token = tokens[i];
            if (token >= n || marks[token] == 0) continue;
            x[token] -= (float)(params->frequency_penalty * marks[token] + params->presence_penalty);
            marks[token] = 0;
        }
    }
}

static void edit(const struct sampling_call *call, const struct sampling_row *row, const float *logits, struct room room) {
    const struct sampling_params *params = &row->params;
    const int64_t n = call->vocab_size;
    float *x = room.row;
    if (params->num_allowed) {
        for (int64_t i = 0; i < n; i++) x[i] = -INFINITY;
        for (int64_t i = 0; i < params->num_allowed; i++)
            if (params->allowed[i] < n) x[params->allowed[i]] = logits[params->allowed[i]];
    } else {
        memcpy(x, logits, (size_t)n * sizeof *x);
    }
    if (row->forbids_ends) {
        forbid(x, n, params->stops, params->num_stops);
        if (!params->ignores_eos) forbid(x, n, call->eos, call->num_eos);
    }
    for (int64_t i = 0; i < params->num_biased; i++)
        if (params->biased[i] < n) x[params->biased[i]] += params->biases[i];
    if (row->tokens) penalize(row, x, n, room.marks);
}

/* ---- drawing ---- */

static int64_t num_parts(int64_t n) { return (n + PART - 1) / PART; }

static float largest_of(const float *values, int64_t n) {
    float largest = -INFINITY;
    for (int64_t i = 0; i < n; i++) largest = values[i] > largest ? values[i] : largest;
    return largest;
}

static int64_t first_equal(const float *x, int64_t n, const float *maxima, float value) {
    int64_t part = 0;
    while (maxima[part] != value) part++;
    int64_t i = part * PART;
    while (i < n && x[i] != value) i++;
    return i;
}

/* How far the definition's log(sum(exp)) of float32 numbers can be from ours: each rounds some twenty times on the way
 * to a sum of 256, twice, and the result, which has the magnitude of the largest. */
static double sum_error(float largest) { return 1e-5 + 5e-7 * fabs((double)largest); }

static int64_t draw_from_all(const float *x, int64_t n, const float *maxima, float largest, uint64_t key) {
    struct winner groups = NOBODY, tokens = NOBODY;
    for (int64_t first = 0; first < n; first += GROUP) {
        int64_t end = n - first < GROUP ? n : first + GROUP;
        float base = largest_of(maxima + first / PART, num_parts(end - first));
        if (base == -INFINITY) continue;
        double noise = gumbel(noise_bits(key, first / GROUP + GROUP_COUNTER));
        if (base + LOG_GROUP + noise < groups.best - sum_error(largest)) continue;
        compete(&groups, base + log(sum_exponentials(x + first, end - first, base)) + noise, first);
    }
    if (!(groups.best - groups.second > sum_error(largest))) return UNDECIDED;
    int64_t group_end = n - groups.token < GROUP ? n : groups.token + GROUP;
    for (int64_t first = groups.token; first < group_end; first += PART) {
        int64_t end = n - first < PART ? n : first + PART;
        draw_from_part(x, first, end, maxima[first / PART], -INFINITY, key, &tokens);
    }
    return is_close(&tokens) ? UNDECIDED : tokens.token;
}

/* Of the finite elements the k-th largest, ties counted; -inf where there are not as many. */
static float find_kth(const float *x, int64_t n, const float *maxima, int64_t k, struct room room) {
    float cut = -INFINITY;
    if (k < num_parts(n)) { /* k elements at least are as large as the k-th of the parts' largest */
        int64_t count = 0;
        for (int64_t part = 0; part < num_parts(n); part++) {
            room.values[count] = maxima[part];
            count += maxima[part] > -INFINITY;
        }
        if (count >= k) cut = find_border(room.values, NULL, count, (double)k).value;
    }
    int64_t count = gather(x, n, maxima, cut, room.values);
    return count < k ? -INFINITY : find_border(room.values, NULL, count, (double)k).value;
}

static float sum_all(const float *x, int64_t n, const float *maxima, float largest) {
    double sum = 0.0;
    for (int64_t first = 0; first < n; first += GROUP) {
        int64_t end = n - first < GROUP ? n : first + GROUP;
        /* Below that a part adds less than float32 can tell. */
        if (largest_of(maxima + first / PART, num_parts(end - first)) > largest - 40.0f)
            sum += sum_exponentials(x + first, end - first, largest);
    }
    return (float)sum;
}

/* Whether the border is the same for every share that is within `error` of `top_p`, as sums come out that differ so. */
static bool is_certain(const struct border *border, double mass, double top_p, double error) {
    bool reaches = border->above == 0.0 || top_p - border->above / mass > error;
    return reaches && (border->is_lowest || border->through / mass - top_p > error);
}

/* Find the smallest value of the nucleus: above it lies less than top_p of what min_p and top_k leave, `threshold` and
 * up. Returns 0, or why it is not known.
 *
 * Where neither leaves anything out and the nucleus is smaller than `num_candidates`, the definition takes the row's
 * mass from float32 sums; else it sums in double. `sum_error` and EXACT are what we can be off by. */
static int64_t find_nucleus(
    const struct sampling_call *call, const struct sampling_row *row, const float *x, const float *maxima,
    float largest, float threshold, struct room room, float *smallest) {
    static const double EXACT = 1e-10;
    const double top_p = row->params.top_p;
    const int64_t n = call->vocab_size;
    const bool is_open = threshold == -INFINITY && row->params.top_k >= call->padded_size;
    if (!is_open || call->num_candidates >= call->padded_size) {
        int64_t count = gather(x, n, maxima, threshold, room.values);
        double mass = weigh(room.values, count, largest, room.weights);
        struct border border = find_border(room.values, room.weights, count, top_p * mass);
        *smallest = border.value;
        return is_certain(&border, mass, top_p, EXACT) ? 0 : UNDECIDED;
    }
    const bool is_known = !isnan(row->log_mass);
    const double error = is_known ? EXACT : sum_error(largest);
    const int64_t doubt = is_known ? UNDECIDED : NEEDS_MASS;
    double mass = is_known ? exp((double)row->log_mass - (double)largest) : 0.0, gathered = 0.0;
    int64_t count = gather(x, n, maxima, largest - 8.0f, room.values);
    bool is_all = count > n / 8; /* a flat row: its nucleus is large */
    if (!is_all) {
        if (!is_known) mass = sum_all(x, n, maxima, largest);
        gathered = weigh(room.values, count, largest, room.weights);
        is_all = gathered < top_p * mass * 1.0001;
    }
    if (is_all) {
        count = gather(x, n, maxima, -INFINITY, room.values);
        gathered = weigh(room.values, count, largest, room.weights);
        if (!is_known) mass = gathered;
    }
    struct border border = find_border(room.values, room.weights, count, top_p * mass);
    border.is_lowest &= is_all;
    *smallest = border.value;
    if (border.num_through < call->num_candidates) return is_certain(&border, mass, top_p, error) ? 0 : doubt;
    if (!is_all) {
        count = gather(x, n, maxima, -INFINITY, room.values);
        gathered = weigh(room.values, count, largest, room.weights);
    }
    struct border exact = border;
    if (is_known || !is_all) exact = find_border(room.values, room.weights, count, top_p * gathered);
    *smallest = exact.value;
    /* Before the last candidate lies at most so much: those between it and the border weigh no less than the border. */
    int64_t num_between = exact.num_above - (call->num_candidates - 1);
    double each = (exact.through - exact.above) / (double)(exact.num_through - exact.num_above);
    double before = (exact.above - (num_between > 0 ? (double)num_between * each : 0.0)) / mass;
    if (exact.num_through < call->num_candidates || top_p - before <= error) return doubt;
    return is_certain(&exact, gathered, top_p, EXACT) ? 0 : UNDECIDED;
}

static int64_t draw_from_filtered(
    const struct sampling_call *call, const struct sampling_row *row, const float *x, const float *maxima,
    float largest, uint64_t key, struct room room) {
    const struct sampling_params *params = &row->params;
    const int64_t n = call->vocab_size;
    float threshold = largest + params->log_min_p;
    if (params->top_k < n) {
        float kth = find_kth(x, n, maxima, params->top_k, room);
        threshold = kth > threshold ? kth : threshold;
    }
    if (params->top_p < 1.0) {
        float smallest;
        int64_t problem = find_nucleus(call, row, x, maxima, largest, threshold, room, &smallest);
        if (problem) return problem;
        threshold = smallest > threshold ? smallest : threshold;
    }
    struct winner winner = NOBODY;
    for (int64_t first = 0; first < n; first += PART) {
        float part_largest = maxima[first / PART];
        int64_t end = n - first < PART ? n : first + PART;
        if (part_largest >= threshold) draw_from_part(x, first, end, part_largest, threshold, key, &winner);
    }
    return is_close(&winner) ? UNDECIDED : winner.token;
}

/* ---- rows ---- */

static int64_t sample_row(const struct sampling_call *call, const struct sampling_row *row, struct room room) {
    const struct sampling_params *params = &row->params;
    const int64_t n = call->vocab_size;
    const float *x = call->logits + row->index * n;
    if (is_edited(row)) {
        edit(call, row, x, room);
        x = room.row;
    }
    bool has_nan = find_maxima(x, n, room.maxima);
    float largest = largest_of(room.maxima, num_parts(n));
    if (has_nan || !isfinite(largest)) return NO_TOKEN;
    if (params->is_greedy) return first_equal(x, n, room.maxima, largest);
    if (params->temperature != 1.0f) {
        largest /= params->temperature;
        /* Beyond float32's range what comes next is torch's to say. */
        if (!isfinite(params->temperature) || !isfinite(largest)) return UNDECIDED;
        divide(x, n, params->temperature, room.row);
        divide(room.maxima, num_parts(n), params->temperature, room.maxima);
        x = room.row;
    }
    const uint64_t key = noise_key(params->seed, row->num_tokens);
    if (params->log_min_p > -INFINITY || params->top_k < n || params->top_p < 1.0)
        return draw_from_filtered(call, row, x, room.maxima, largest, key, room);
    return draw_from_all(x, n, room.maxima, largest, key);
}

/* Of the sources: a library that was built from others is not used. */
EXPORT uint32_t tandem_sampling_digest(void) { return TANDEM_SOURCE_DIGEST; }

/* Bytes that a thread works in. */
EXPORT int64_t tandem_sampling_room(int64_t padded_size) { return room_bytes(padded_size); }

struct share {
    const struct sampling_call *call;
    int thread, num_threads;
};

static void *sample_share(void *argument) {
    const struct share *share = argument;
    const struct sampling_call *call = share->call;
    struct room room = room_at(call->workspace + share->thread * room_bytes(call->padded_size), call->padded_size);
    for (int64_t i = share->thread; i < call->num_rows; i += share->num_threads)
        call->tokens[i] = sample_row(call, &call->rows[i], room);
    return NULL;
}

/* Sample every row on `num_threads` threads, each with its room in the workspace. They live as long as the call: it is
 * for calls that take milliseconds. Which thread has a row never shows. */
EXPORT void tandem_sample(const struct sampling_call *call, int num_threads) {
    pthread_t threads[MAX_THREADS];
    struct share shares[MAX_THREADS];
    bool runs[MAX_THREADS] = {false};
    num_threads = num_threads < 1 ? 1 : num_threads > MAX_THREADS ? MAX_THREADS : num_threads;
    for (int i = num_threads - 1; i >= 0; i--) {
        shares[i] = (struct share){call, i, num_threads};
        runs[i] = i > 0 && pthread_create(&threads[i], NULL, sample_share, &shares[i]) == 0;
        if (!runs[i]) sample_share(&shares[i]);
    }
    for (int i = 1; i < num_threads; i++)
        if (runs[i]) pthread_join(threads[i], NULL);
}

/* Edit and scale one row `[vocab_size]` as it is before anything is drawn from it. */
EXPORT void tandem_scaled(const struct sampling_call *call, int64_t i, float *to) {
    const struct sampling_row *row = &call->rows[i];
    struct room room = room_at(call->workspace, call->padded_size);
    const float *x = call->logits + row->index * call->vocab_size;
    if (is_edited(row)) {
        edit(call, row, x, room);
        x = room.row;
    }
    divide(x, call->vocab_size, row->params.temperature, to);
}
