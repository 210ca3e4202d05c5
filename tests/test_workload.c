/* test_workload.c - generators against the distributions they claim, readers against hand-made
 * files, and everything a broken file can do. Seeds are fixed; tolerances are five standard
 * errors. */
#include "test.h"

#include "rng.h"
#include "workload.h"
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static arena memory;

static int open_arena(void **state) {
    (void)state;
    return arena_open(&memory, (size_t)1 << 30) == ST_OK ? 0 : -1;
}

static int close_arena(void **state) {
    (void)state;
    arena_close(&memory);
    return 0;
}

static workload make(const workload_options *o) {
    workload w;
    assert_ok(workload_make(&w, &memory, o));
    return w;
}

static workload_options preset(const char *name) {
    workload_options o;
    assert_ok(workload_preset(&o, name));
    return o;
}

/* Mean and variance of a clamped, rounded log-normal by the midpoint rule over the normal
 * variable. */
static void lognormal_moments(const length_law *l, double *mean, double *variance) {
    enum { STEPS = 200000 };
    double sum = 0, squares = 0, mass = 0;
    for (int i = 0; i < STEPS; i++) {
        const double z = -8 + 16 * (i + 0.5) / STEPS, density = exp(-z * z / 2);
        double x = exp(l->a + l->b * z);
        x = x < l->min ? l->min : x > l->max ? l->max : floor(x + 0.5);
        mass += density;
        sum += density * x;
        squares += density * x * x;
    }
    *mean = sum / mass;
    *variance = squares / mass - *mean * *mean;
}

static double mean_of(const workload *w, bool prompts) {
    return (double)(prompts ? w->prompt_tokens : w->output_tokens) / w->n;
}

static void presets_have_the_means_of_their_laws(void **state) {
    (void)state;
    static const char *const names[] = {"sharegpt", "reasoning", "longdoc"};
    static const double means[][2] = {{229, 204}, {144, 5222}, {7769, 230}}; /* SOURCES.md */
    for (int i = 0; i < 3; i++) {
        workload_options o = preset(names[i]);
        o.n_requests = 4000;
        const workload w = make(&o);
        for (int p = 0; p < 2; p++) {
            const length_law *law = p ? &o.output : &o.prompt;
            double mean, variance;
            lognormal_moments(law, &mean, &variance);
            const double tolerance = 5 * sqrt(variance / w.n);
            assert_close(mean_of(&w, p == 0), mean, tolerance);
            assert_close(mean, means[i][p], 0.01 * mean);
            length_law twin = *law; /* the median 15 % up must be seen */
            twin.a += 0.14;
            double other;
            lognormal_moments(&twin, &other, &variance);
            assert_more(fabs(mean_of(&w, p == 0) - other), tolerance);
        }
        arena_reset(&memory, 0);
    }
    workload_options o;
    assert_status(workload_preset(&o, "shareGPT"), ST_NOTFOUND);
    assert_non_null(strstr(fail_message(), "sharegpt reasoning longdoc fixed"));
}

static void fixed_and_uniform_lengths(void **state) {
    (void)state;
    workload_options o = preset("fixed");
    o.n_requests = 3000;
    workload w = make(&o);
    for (int32_t i = 0; i < w.n; i++) {
        assert_int_equal(w.request[i].n_prompt, 1024);
        assert_int_equal(w.request[i].max_new, 128);
    }
    assert_int_equal(w.ctx_max, 1152);
    o.prompt = (length_law){LENGTH_UNIFORM, 10, 19, 1, 1000};
    w = make(&o);
    int32_t seen[10] = {0};
    for (int32_t i = 0; i < w.n; i++) {
        assert_in_range(w.request[i].n_prompt, 10, 19);
        seen[w.request[i].n_prompt - 10]++;
    }
    double chi = 0; /* 9 degrees of freedom: above 27.9 once in a thousand */
    for (int i = 0; i < 10; i++) chi += (seen[i] - 300.0) * (seen[i] - 300.0) / 300;
    assert_at_most(chi, 27.9);
    seen[0] += 120; /* the twin: one length too common */
    chi = 0;
    for (int i = 0; i < 10; i++) chi += (seen[i] - 300.0) * (seen[i] - 300.0) / 300;
    assert_more(chi, 27.9);
    o.prompt = (length_law){LENGTH_FIXED, 5, 0, 8, 8}; /* clamped */
    w = make(&o);
    assert_int_equal(w.request[0].n_prompt, 8);
    arena_reset(&memory, 0);
}

/* Of everything that a run depends on: arrivals, lengths, ids, seeds, salts, users. */
static uint64_t hash_of(const workload *w) {
    uint64_t h = hash_u64((uint64_t)w->n, 0);
    for (int32_t i = 0; i < w->n; i++) {
        const request *q = &w->request[i];
        const sampling *s = &q->sampling;
        const double law[] = {s->temperature, s->top_p, s->min_p, s->repetition_penalty};
        const int64_t number[] = {q->id,    q->arrival_ns, q->n_prompt,      q->max_new,
                                  q->user,  q->ignore_eos, (int64_t)q->salt, (int64_t)s->seed,
                                  s->top_k, s->n_logprobs};
        h = hash_bytes(number, sizeof number, h);
        h = hash_bytes(law, sizeof law, h);
        h = hash_bytes(q->prompt, (size_t)q->n_prompt * sizeof *q->prompt, h);
    }
    return h;
}

static void a_seed_fixes_everything(void **state) {
    (void)state;
    workload_options o = preset("sharegpt");
    o.n_requests = 200;
    o.arrival = ARRIVE_GAMMA;
    o.burstiness = 0.5;
    const workload a = make(&o), b = make(&o);
    const uint64_t hash = hash_of(&a);
    assert_true(hash == hash_of(&b));
    o.seed = 1;
    const workload c = make(&o);
    assert_true(hash != hash_of(&c));
    /* Twins: one element of anything changes the hash. */
    request *r = &b.request[77];
    ((int32_t *)(uintptr_t)r->prompt)[r->n_prompt - 1] ^= 1;
    assert_true(hash != hash_of(&b));
    ((int32_t *)(uintptr_t)r->prompt)[r->n_prompt - 1] ^= 1;
    assert_true(hash == hash_of(&b));
    r->arrival_ns++;
    assert_true(hash != hash_of(&b));
    r->arrival_ns--;
    r->max_new++;
    assert_true(hash != hash_of(&b));
    r->max_new--;
    r->sampling.seed ^= 1;
    assert_true(hash != hash_of(&b));
    arena_reset(&memory, 0);
}

static void streams_are_independent(void **state) {
    (void)state;
    workload_options o = preset("sharegpt");
    o.n_requests = 300;
    o.arrival = ARRIVE_POISSON;
    const workload a = make(&o);
    o.arrival = ARRIVE_CONSTANT;
    o.rate_per_s = 7;
    const workload b = make(&o);
    for (int32_t i = 0; i < a.n; i++) {
        assert_int_equal(a.request[i].n_prompt, b.request[i].n_prompt);
        assert_int_equal(a.request[i].max_new, b.request[i].max_new);
        assert_memory_equal(a.request[i].prompt, b.request[i].prompt,
                            (size_t)a.request[i].n_prompt * 4);
        assert_true(a.request[i].sampling.seed == b.request[i].sampling.seed);
    }
    o = preset("fixed");
    o.n_requests = 300;
    o.arrival = ARRIVE_POISSON;
    const workload c = make(&o); /* other lengths, same instants */
    for (int32_t i = 0; i < a.n; i++)
        assert_int_equal(a.request[i].arrival_ns, c.request[i].arrival_ns);
    arena_reset(&memory, 0);
}

/* Coefficient of variation of the gaps. */
static double gap_variation(const workload *w) {
    double sum = 0, squares = 0;
    for (int32_t i = 0; i < w->n; i++) {
        const int64_t before = i ? w->request[i - 1].arrival_ns : 0;
        const double gap = (double)(w->request[i].arrival_ns - before) * 1e-9;
        sum += gap;
        squares += gap * gap;
    }
    const double mean = sum / w->n;
    return sqrt(squares / w->n - mean * mean) / mean;
}

static void arrivals_have_exact_rates_and_the_variation_asked_for(void **state) {
    (void)state;
    workload_options o = preset("fixed");
    o.n_requests = 20000;
    o.prompt = o.output = (length_law){LENGTH_FIXED, 1, 0, 1, 1};
    o.rate_per_s = 12.5;
    const struct {
        arrival_kind kind;
        double burstiness, variation, tolerance;
    } law[] = {
        /* tolerance: 5 standard errors of a gamma's CV with n = 20000, from its kurtosis */
        {ARRIVE_POISSON, 1, 1, 0.05},
        {ARRIVE_GAMMA, 0.25, 2, 0.16},
        {ARRIVE_GAMMA, 4, 0.5, 0.02},
        {ARRIVE_CONSTANT, 1, 0, 1e-6},
    };
    for (int i = 0; i < COUNT_OF(law); i++) {
        o.arrival = law[i].kind;
        o.burstiness = law[i].burstiness;
        const workload w = make(&o);
        assert_int_equal(w.request[w.n - 1].arrival_ns, 1600000000000); /* 20000 / 12.5 s */
        for (int32_t k = 1; k < w.n; k++)
            assert_true(w.request[k - 1].arrival_ns <= w.request[k].arrival_ns);
        assert_close(gap_variation(&w), law[i].variation, law[i].tolerance);
        /* The twin: another burstiness lies outside. */
        assert_more(fabs(gap_variation(&w) - (law[i].variation + 0.25)), law[i].tolerance);
        arena_reset(&memory, 0);
    }
    o.arrival = ARRIVE_AT_ONCE;
    o.n_requests = 3;
    const workload w = make(&o);
    assert_int_equal(w.request[2].arrival_ns, 0);
    arena_reset(&memory, 0);
}

static void closed_loop_is_ordered_by_user(void **state) {
    (void)state;
    workload_options o = preset("sharegpt");
    o.n_requests = 11;
    const workload open = make(&o);
    o.arrival = ARRIVE_CLOSED;
    o.users = 4;
    const workload w = make(&o);
    static const int32_t user[] = {0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3};
    static const int32_t from[] = {0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7};
    for (int32_t i = 0; i < w.n; i++) {
        assert_int_equal(w.request[i].id, i);
        assert_int_equal(w.request[i].user, user[i]);
        assert_int_equal(w.request[i].n_prompt, open.request[from[i]].n_prompt);
        assert_int_equal(open.request[i].user, -1);
    }
    o.users = 50; /* more users than requests */
    const workload many = make(&o);
    assert_int_equal(many.request[10].user, 10);
    arena_reset(&memory, 0);
}

static void prefixes_are_shared_and_salts_are_not(void **state) {
    (void)state;
    workload_options o = preset("fixed");
    o.n_requests = 200;
    o.prompt = (length_law){LENGTH_UNIFORM, 50, 150, 1, 1000};
    o.shared_prefix = 100;
    o.n_prefixes = 3;
    o.vocab = 1000;
    o.salted = true;
    const workload w = make(&o);
    int32_t used = 0;
    const int32_t *first[3] = {0};
    for (int32_t i = 0; i < w.n; i++) {
        const request *r = &w.request[i];
        for (int32_t t = 0; t < r->n_prompt; t++) assert_in_range(r->prompt[t], 0, 999);
        assert_true(r->salt != 0);
        if (i) assert_true(r->salt != w.request[i - 1].salt);
        if (r->n_prompt < 100) continue;
        int32_t k = 0;
        while (k < used && memcmp(first[k], r->prompt, 400) != 0) k++;
        if (k < used) continue;
        assert_true(used < 3); /* a fourth prefix would be the twin's fault */
        first[used++] = r->prompt;
    }
    assert_int_equal(used, 3);
    assert_true(memcmp(first[0], first[1], 400) != 0);
    arena_reset(&memory, 0);
    o.n_prefixes = preset("fixed").n_prefixes; /* unless told: one */
    o.prompt.a = 100;
    const workload one = make(&o);
    for (int32_t i = 1; i < one.n; i++)
        assert_memory_equal(one.request[i].prompt, one.request[0].prompt, 400);
    arena_reset(&memory, 0);
}

/* --- Files ------------------------------------------------------------------------------------ */

static workload_options file_options(const char *format, const char *name) {
    workload_options o = preset("fixed");
    char dir[512];
    path_join(dir, sizeof dir, root_dir(), "tests/vectors/traces");
    path_join(o.file, sizeof o.file, dir, name);
    snprintf(o.format, sizeof o.format, "%s", format);
    o.n_requests = 0;
    o.arrival = ARRIVE_TRACE;
    return o;
}

typedef struct {
    int64_t at_ns;
    int32_t n_prompt, n_output;
} expected_row;

static void assert_rows(const workload *w, const expected_row *row, int32_t n) {
    assert_int_equal(w->n, n);
    for (int32_t i = 0; i < n; i++) {
        assert_int_equal(w->request[i].arrival_ns, row[i].at_ns);
        assert_int_equal(w->request[i].n_prompt, row[i].n_prompt);
        assert_int_equal(w->request[i].max_new, row[i].n_output);
    }
}

static void burstgpt_is_read_by_column_name(void **state) {
    (void)state;
    workload_options o = file_options("burstgpt", "burstgpt.csv");
    static const expected_row all[] = {
        {0, 472, 18}, {40000000000, 1087, 230}, {113000000000, 417, 276}, {143500000000, 185, 215}};
    workload w = make(&o);
    assert_rows(&w, all, 4);
    assert_int_equal(w.n_dropped, 1); /* the failed one */
    snprintf(o.model, sizeof o.model, "GPT-4");
    o.speed = 2;
    static const expected_row gpt4[] = {{0, 417, 276}, {15250000000, 185, 215}};
    w = make(&o);
    assert_rows(&w, gpt4, 2);
    o.model[0] = 0;
    o.n_requests = 2;
    o.arrival = ARRIVE_CONSTANT; /* lengths of the file, arrivals of ours */
    o.rate_per_s = 4;
    static const expected_row two[] = {{250000000, 472, 18}, {500000000, 1087, 230}};
    w = make(&o);
    assert_rows(&w, two, 2);
    o.ctx_limit = 500;
    o.n_requests = 0;
    w = make(&o);
    assert_int_equal(w.n, 2);
    assert_int_equal(w.n_dropped, 3);
    arena_reset(&memory, 0);
}

static void azure_keeps_100_ns_and_sorts(void **state) {
    (void)state;
    const workload_options o = file_options("azure", "azure.csv");
    static const expected_row rows[] = {{0, 374, 44},
                                        {4314579000, 396, 109},
                                        {4419410000, 5, 7},
                                        {4541877000, 879, 55},
                                        {4541877100, 91, 16}};
    const workload w = make(&o);
    assert_rows(&w, rows, 5);
    arena_reset(&memory, 0);
}

static bool same_tokens(const workload *w, int32_t a, int32_t b, int32_t at, int32_t n) {
    return memcmp(w->request[a].prompt + at, w->request[b].prompt + at, (size_t)n * 4) == 0;
}

static void mooncake_blocks_are_shared_prefixes(void **state) {
    (void)state;
    workload_options o = file_options("mooncake", "mooncake.jsonl");
    static const expected_row rows[] = {{0, 1300, 52},
                                        {0, 1536, 26},
                                        {3053000000, 1024, 8},
                                        {3118000000, 700, 9},
                                        {3518000000, 100, 3}};
    const workload w = make(&o);
    assert_rows(&w, rows, 5);
    assert_int_equal(w.n_dropped, 1);
    assert_true(same_tokens(&w, 0, 1, 0, 1024));
    assert_false(same_tokens(&w, 0, 1, 1024, 200)); /* 2353 is not 48 */
    assert_true(same_tokens(&w, 0, 2, 0, 512));
    assert_false(same_tokens(&w, 0, 2, 512, 200));
    assert_true(same_tokens(&w, 0, 3, 0, 512)); /* the partial block without an id is its own */
    assert_false(same_tokens(&w, 0, 3, 512, 188));
    o.seed = 9;
    const workload other = make(&o);
    assert_int_not_equal(w.request[0].prompt[0], other.request[0].prompt[0]);
    arena_reset(&memory, 0);
}

/* One token a word, its id the length of the word: enough of a tokenizer to count with. */
static status encode_words(void *user, const char *s, size_t n, int32_t *ids, int32_t max,
                           int32_t *n_ids) {
    *n_ids = 0;
    for (size_t i = 0; i < n;) {
        while (i < n && s[i] == ' ') i++;
        const size_t from = i;
        while (i < n && s[i] != ' ') i++;
        if (i == from) break;
        assert_true(*n_ids < max);
        ids[(*n_ids)++] = (int32_t)(i - from);
    }
    if (*(int *)user == 1) return FAIL(ST_FORMAT, "planned");
    return ST_OK;
}

static void sharegpt_is_filtered_shuffled_and_encoded(void **state) {
    (void)state;
    workload_options o = file_options("sharegpt", "sharegpt.json");
    o.arrival = ARRIVE_AT_ONCE;
    int fail = 0;
    o.encoder = (text_encoder){encode_words, &fail};
    const workload w = make(&o);
    assert_int_equal(w.n, 3);
    assert_int_equal(w.n_dropped, 3);
    assert_false(w.estimated);
    int32_t found = 0;
    for (int32_t i = 0; i < w.n; i++) {
        const request *r = &w.request[i];
        if (r->n_prompt != 10 || r->prompt[0] != 3 || r->prompt[1] != 4) continue;
        static const int32_t ids[] = {3, 4, 4, 1, 5, 4, 5, 2, 6, 5};
        if (r->max_new == 11) found++, assert_memory_equal(r->prompt, ids, sizeof ids);
    }
    assert_int_equal(found, 1); /* "How long does a train from Ghent to Bruges take?" */
    bool order_differs = false;
    for (o.seed = 1; o.seed < 6; o.seed++) {
        const workload v = make(&o);
        order_differs |= v.request[0].max_new != w.request[0].max_new;
    }
    assert_true(order_differs);
    o.encoder.encode = NULL; /* bytes / 4 */
    const workload guessed = make(&o);
    assert_true(guessed.estimated);
    assert_string_equal(guessed.options.name, "fixed_estimated");
    for (int32_t i = 0; i < guessed.n; i++) assert_in_range(guessed.request[i].n_prompt, 12, 16);
    fail = 1;
    o.encoder.encode = encode_words;
    workload bad;
    assert_status(workload_make(&bad, &memory, &o), ST_FORMAT);
    assert_non_null(strstr(fail_message(), "sharegpt.json:"));
    o.encoder.encode = NULL;
    o.arrival = ARRIVE_TRACE;
    assert_status(workload_make(&bad, &memory, &o), ST_RANGE); /* it has no times */
    arena_reset(&memory, 0);
}

static void our_own_lines_take_three_kinds_of_prompt(void **state) {
    (void)state;
    workload_options o = file_options("jsonl", "requests.jsonl");
    static const expected_row rows[] = {{0, 12, 5}, {500000000, 4, 3}, {1250000000, 3, 2}};
    const workload w = make(&o);
    assert_rows(&w, rows, 3);
    assert_true(w.estimated);
    static const int32_t ids[] = {5, 6, 7, 8};
    assert_memory_equal(w.request[1].prompt, ids, sizeof ids);
    o.vocab = 8;
    workload bad;
    assert_status(workload_make(&bad, &memory, &o), ST_RANGE);
    assert_non_null(strstr(fail_message(), "requests.jsonl:2: prompt_ids[3]"));
    arena_reset(&memory, 0);
}

static char scratch_path[64];

static void write_scratch(const char *data, size_t n) {
    unlink(scratch_path); /* ext4 flushes a file that is truncated and written again */
    FILE *f = fopen(scratch_path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static int make_scratch(void **state) {
    (void)state;
    snprintf(scratch_path, sizeof scratch_path, "/tmp/amalgam_workload_XXXXXX");
    const int fd = mkstemp(scratch_path);
    return fd < 0 ? -1 : close(fd);
}

static int drop_scratch(void **state) {
    (void)state;
    return unlink(scratch_path);
}

static void broken_files_are_named_with_their_line(void **state) {
    (void)state;
    static const struct {
        const char *format, *text;
        status want;
        const char *message;
    } bad[] = {
        {"burstgpt", "Timestamp,Model,Request tokens\n1,a,2\n", ST_FORMAT,
         ":1: column 'Response tokens' is missing"},
        {"burstgpt", "Timestamp,Request tokens,Response tokens,Timestamp\n1,2,3,4\n", ST_FORMAT,
         ":1: column 'Timestamp' stands twice"},
        {"burstgpt", "Timestamp,Request tokens,Response tokens\n1,2,3\n1,2\n", ST_FORMAT,
         ":3: 2 fields, the header has 3"},
        {"burstgpt", "Timestamp,Request tokens,Response tokens\n1,2.5,3\n", ST_FORMAT,
         ":2: Request tokens '2.5' is no count of tokens"},
        {"burstgpt", "Timestamp,Request tokens,Response tokens\n1,-2,3\n", ST_FORMAT,
         ":2: Request tokens '-2'"},
        {"burstgpt", "Timestamp,Request tokens,Response tokens\nnan,2,3\n", ST_FORMAT,
         ":2: Timestamp 'nan'"},
        {"burstgpt", "Timestamp,Request tokens,Response tokens\n\"1,2,3\n", ST_FORMAT,
         ":2: a quote is not closed"},
        {"burstgpt", "Timestamp,Request tokens,Response tokens\n", ST_NOTFOUND, "no usable row"},
        {"burstgpt", "", ST_FORMAT, "empty file"},
        {"azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15,1,1\n", ST_FORMAT,
         ":2: TIMESTAMP '2023-11-16 18:15' is no date and time"},
        {"azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-13-16 18:15:00,1,1\n", ST_FORMAT,
         ":2: TIMESTAMP"},
        {"azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:00,1,99999999999\n",
         ST_FORMAT, ":2: GeneratedTokens"},
        {"mooncake", "{\"timestamp\": 1, \"input_length\": 5}\n", ST_NOTFOUND,
         ":1: key 'output_length' is missing"},
        {"mooncake",
         "\n{\"timestamp\": 1, \"input_length\": 5, \"output_length\": 1, \"hash_ids\": [1, 2]}\n",
         ST_FORMAT, ":2: 2 hash_ids for 5 tokens"},
        {"mooncake", "[1]\n", ST_FORMAT, ":1: not a JSON object"},
        {"mooncake", "{\"timestamp\": 1,\n", ST_FORMAT, ":1:"},
        {"jsonl", "{\"n_prompt\": 1, \"max_new\": 1}\n{\"max_new\": 1}\n", ST_FORMAT,
         ":2: one of prompt, prompt_ids, n_prompt is needed"},
        {"jsonl",
         "{\"n_prompt\": 1, \"max_new\": 1, \"arrival_s\": 1}\n{\"n_prompt\": 1, "
         "\"max_new\": 1}\n",
         ST_FORMAT, ":2: arrival_s must stand in every row or in none"},
        {"jsonl", "{\"n_prompt\": 0, \"max_new\": 1}\n", ST_RANGE, ":1: n_prompt = 0"},
        {"sharegpt", "{}", ST_FORMAT, ":1: not a JSON array"},
        {"sharegpt", "[\n{\"conversations\": 3}\n]", ST_FORMAT, ":2: no array 'conversations'"},
        {"sharegpt", "[\n{},\n{\"a\": 1}", ST_FORMAT, ":3: ',' or ']' was expected"},
        {"sharegpt", "[{\"conversations\": [", ST_FORMAT, ":1: this object does not end"},
        {"sharegpt", "[]", ST_NOTFOUND, "no usable row"},
        {"sharegpt", "[\n\n{\"conversations\": [{\"value\": 1}, {}]}]", ST_FORMAT,
         ":3: conversations[0].value is no string"},
        {"csv", "", ST_NOTFOUND, "none of sharegpt burstgpt azure mooncake jsonl"},
    };
    workload_options o = preset("fixed");
    o.n_requests = 0;
    snprintf(o.file, sizeof o.file, "%s", scratch_path);
    for (int i = 0; i < COUNT_OF(bad); i++) {
        write_scratch(bad[i].text, strlen(bad[i].text));
        snprintf(o.format, sizeof o.format, "%s", bad[i].format);
        workload w;
        assert_status(workload_make(&w, &memory, &o), bad[i].want);
        if (!strstr(fail_message(), bad[i].message))
            fail_msg("case %d: '%s' lacks '%s'", i, fail_message(), bad[i].message);
        assert_non_null(strstr(fail_message(), scratch_path));
        assert_int_equal(memory.used, 0);
    }
    snprintf(o.file, sizeof o.file, "/nonexistent/trace.csv");
    workload w;
    snprintf(o.format, sizeof o.format, "azure");
    assert_status(workload_make(&w, &memory, &o), ST_NOTFOUND);
}

static const struct {
    const char *format, *name;
} samples[] = {
    {"sharegpt", "sharegpt.json"},  {"burstgpt", "burstgpt.csv"}, {"azure", "azure.csv"},
    {"mooncake", "mooncake.jsonl"}, {"jsonl", "requests.jsonl"},
};

/* Truncated anywhere and with any byte changed: an answer or a refusal, never a crash. A row that
 * is kept has lengths within bounds. */
static void damaged_files_do_no_harm(void **state) {
    (void)state;
    rng r;
    rng_seed(&r, 20, 0);
    for (int f = 0; f < COUNT_OF(samples); f++) {
        workload_options o = file_options(samples[f].format, samples[f].name);
        o.arrival = ARRIVE_AT_ONCE;
        char *data;
        size_t n;
        assert_ok(file_read(&data, &n, o.file));
        snprintf(o.file, sizeof o.file, "%s", scratch_path);
        int32_t refused = 0;
        for (int32_t i = 0; i < 600; i++) {
            size_t length = n;
            size_t at = (size_t)rng_below(&r, n);
            const char old = data[at];
            if (i % 3 == 0)
                length = at;
            else if (i % 3 == 1)
                data[at] = (char)(old ^ (1 << rng_below(&r, 8)));
            else
                data[at] = (char)rng_below(&r, 256);
            write_scratch(data, length);
            data[at] = old;
            workload w;
            const status st = workload_make(&w, &memory, &o);
            refused += st != ST_OK;
            for (int32_t k = 0; st == ST_OK && k < w.n; k++)
                assert_true(w.request[k].n_prompt >= 1 && w.request[k].max_new >= 1);
            arena_reset(&memory, 0);
        }
        assert_in_range(refused, 60, 599); /* damage is noticed, and not all of it is fatal */
        mem_free(data);
    }
}

static void every_allocation_may_fail(void **state) {
    (void)state;
    for (int f = -1; f < COUNT_OF(samples); f++) {
        workload_options o =
            f < 0 ? preset("sharegpt") : file_options(samples[f].format, samples[f].name);
        o.arrival = ARRIVE_CLOSED;
        int64_t n = 1;
        for (;; n++) {
            workload w;
            mem_fail_at(n);
            const status st = workload_make(&w, &memory, &o);
            mem_fail_at(0);
            if (st == ST_OK) break;
            assert_int_equal(st, ST_NOMEM);
            assert_int_equal(memory.used, 0);
            assert_true(n < 1000);
        }
        assert_true(n >= 4);
        arena_reset(&memory, 0);
    }
}

static void senseless_options_are_refused(void **state) {
    (void)state;
    const workload_options good = preset("fixed");
#define REFUSED(...)                                                                               \
    do {                                                                                           \
        workload_options o = good;                                                                 \
        workload w;                                                                                \
        __VA_ARGS__;                                                                               \
        assert_status(workload_make(&w, &memory, &o), ST_RANGE);                                   \
    } while (0)
    REFUSED(o.n_requests = 0);
    REFUSED(o.vocab = 0);
    REFUSED(o.prompt.min = 0);
    REFUSED(o.prompt.max = 0);
    REFUSED(o.output.a = NAN);
    REFUSED(o.output = ((length_law){LENGTH_UNIFORM, 9, 8, 1, 10}));
    REFUSED(o.output = ((length_law){LENGTH_LOGNORMAL, 1, -1, 1, 10}));
    REFUSED(o.arrival = ARRIVE_POISSON; o.rate_per_s = 0);
    REFUSED(o.arrival = ARRIVE_POISSON; o.rate_per_s = NAN);
    REFUSED(o.arrival = ARRIVE_GAMMA; o.burstiness = 0);
    REFUSED(o.arrival = ARRIVE_TRACE);
    REFUSED(o.arrival = ARRIVE_CLOSED; o.users = 0);
    REFUSED(o.shared_prefix = 10; o.n_prefixes = 0);
#undef REFUSED
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(presets_have_the_means_of_their_laws),
        cmocka_unit_test(fixed_and_uniform_lengths),
        cmocka_unit_test(a_seed_fixes_everything),
        cmocka_unit_test(streams_are_independent),
        cmocka_unit_test(arrivals_have_exact_rates_and_the_variation_asked_for),
        cmocka_unit_test(closed_loop_is_ordered_by_user),
        cmocka_unit_test(prefixes_are_shared_and_salts_are_not),
        cmocka_unit_test(burstgpt_is_read_by_column_name),
        cmocka_unit_test(azure_keeps_100_ns_and_sorts),
        cmocka_unit_test(mooncake_blocks_are_shared_prefixes),
        cmocka_unit_test(sharegpt_is_filtered_shuffled_and_encoded),
        cmocka_unit_test(our_own_lines_take_three_kinds_of_prompt),
        cmocka_unit_test_setup_teardown(broken_files_are_named_with_their_line, make_scratch,
                                        drop_scratch),
        cmocka_unit_test_setup_teardown(damaged_files_do_no_harm, make_scratch, drop_scratch),
        cmocka_unit_test(every_allocation_may_fail),
        cmocka_unit_test(senseless_options_are_refused),
    };
    return cmocka_run_group_tests(tests, open_arena, close_arena);
}
