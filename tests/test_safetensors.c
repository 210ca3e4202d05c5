/* test_safetensors.c - every lie a header can tell, built by hand; damage at every byte. */
#include "folder.h"
#include "json.h"
#include "rng.h"
#include "safetensors.h"
#include "test.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *in_dir(const char *name) {
    static char path[256];
    return path_join(path, sizeof path, folder, name);
}

/* Write `length` as the header's length, the header, n data bytes 0, 1, 2, ... */
static void write_raw(const char *name, uint64_t length, const char *header, size_t n) {
    text t = {0};
    for (int i = 0; i < 8; i++) text_bytes(&t, &(uint8_t){(uint8_t)(length >> (8 * i))}, 1);
    text_bytes(&t, header, strlen(header));
    for (size_t i = 0; i < n; i++) text_bytes(&t, &(uint8_t){(uint8_t)i}, 1);
    assert_ok(text_status(&t));
    assert_ok(file_write(in_dir(name), t.data, t.length));
    text_free(&t);
}

/* Headers here are padded to 8 so that only the lie under test is wrong. */
static void write_file(const char *name, const char *header, size_t n) {
    char padded[2048];
    snprintf(padded, sizeof padded, "%s%*s", header, (int)((8 - strlen(header) % 8) % 8), "");
    write_raw(name, strlen(padded), padded, n);
}

static void refuse(const char *header, size_t n, status want, const char *says) {
    write_file("lie.safetensors", header, n);
    safetensors *s;
    const status st = safetensors_open(&s, in_dir("lie.safetensors"));
    if (st != want || !strstr(fail_message(), says) || !strstr(fail_message(), "lie.safetensors"))
        fail_msg("%s: %s (%s)", header, status_text(st), st == ST_OK ? "" : fail_message());
    assert_null(s);
}

#define TENSOR(name, type, shape, begin, end)                                                      \
    "\"" name "\":{\"dtype\":\"" type "\",\"shape\":" shape ",\"data_offsets\":[" begin "," end "]}"

/* A draft of another process stays while that lives; a signal takes it along, SIGKILL does not, and
 * whoever writes the file next clears that away. */
static void test_drafts_of_the_dead(void **state) {
    (void)state;
    static const int numbers[] = {SIGTERM, SIGKILL};
    for (int32_t i = 0; i < COUNT_OF(numbers); i++) {
        int ends[2], code;
        char temporary[300], c;
        assert_int_equal(pipe(ends), 0);
        const pid_t pid = fork();
        if (pid == 0) {
            file_draft f;
            signal(SIGTERM, SIG_DFL);
            file_remove_on_signals();
            if (file_begin(&f, in_dir("draft")) == ST_OK) (void)!write(ends[1], "", 1);
            for (;;) pause();
        }
        snprintf(temporary, sizeof temporary, "%s.%d.tmp", in_dir("draft"), (int)pid);
        assert_int_equal(read(ends[0], &c, 1), 1);
        assert_ok(file_write(in_dir("draft"), "a", 1));
        assert_true(file_exists(temporary));
        kill(pid, numbers[i]);
        assert_int_equal(waitpid(pid, &code, 0), pid);
        assert_true(WIFSIGNALED(code) && WTERMSIG(code) == numbers[i]);
        assert_int_equal(file_exists(temporary), numbers[i] == SIGKILL);
        assert_ok(file_write(in_dir("draft"), "b", 1));
        assert_false(file_exists(temporary));
        close(ends[0]);
        close(ends[1]);
    }
    assert_ok(file_write(in_dir("draft.x.tmp"), "c", 1)); /* is no temporary */
    assert_ok(file_write(in_dir("draft"), "d", 1));
    assert_true(file_exists(in_dir("draft.x.tmp")));
}

static void test_reads(void **state) {
    (void)state;
    write_file(
        "good.safetensors",
        "{\"__metadata__\":{\"format\":\"pt\"}," TENSOR("b", "F32", "[2,1]", "0", "8") "," TENSOR(
            "a", "BF16", "[3]", "8", "14") "," TENSOR("empty", "F32", "[0,5]", "8",
                                                      "8") "," TENSOR("scalar", "F16", "[]", "14",
                                                                      "16") "}",
        16);
    safetensors *s;
    assert_ok(safetensors_open(&s, in_dir("good.safetensors")));
    assert_int_equal(safetensors_count(s), 4);
    assert_string_equal(safetensors_at(s, 0)->name, "a");
    const tensor_view *a = safetensors_find(s, "a");
    assert_non_null(a);
    assert_int_equal(a->type, DT_BF16);
    assert_int_equal(a->n_dims, 1);
    assert_int_equal(a->dim[0], 3);
    assert_int_equal(a->bytes, 6);
    assert_int_equal(((const uint8_t *)a->data)[0], 8);
    assert_int_equal(safetensors_find(s, "scalar")->n_dims, 0);
    assert_int_equal(safetensors_find(s, "empty")->bytes, 0);
    assert_null(safetensors_find(s, "c"));
    assert_null(safetensors_find(s, "__metadata__"));
    safetensors_close(s);
    safetensors_close(NULL);
}

static void test_lies(void **state) {
    (void)state;
    refuse("{" TENSOR("a", "F32", "[2]", "0", "8") "}", 4, ST_FORMAT, "'a' ends at byte 8 of 4");
    refuse("{" TENSOR("a", "F32", "[2]", "8", "0") "}", 8, ST_FORMAT, "reversed");
    refuse("{" TENSOR("a", "F32", "[3]", "0", "8") "}", 8, ST_FORMAT, "12 bytes");
    refuse("{" TENSOR("a", "F32", "[1]", "0", "8") "}", 8, ST_FORMAT, "4 bytes");
    refuse("{" TENSOR("a", "F32", "[2]", "-8", "0") "}", 8, ST_FORMAT, "data_offsets");
    refuse("{" TENSOR("a", "F32", "[2]", "0", "8.0") "}", 8, ST_FORMAT, "data_offsets");
    refuse("{" TENSOR("a", "F32", "[2]", "0", "9223372036854775807") "}", 8, ST_FORMAT, "ends at");
    refuse("{" TENSOR("a", "F32", "[2]", "0", "18446744073709551616") "}", 8, ST_FORMAT, "");
    refuse("{" TENSOR("a", "F32", "[-2]", "0", "8") "}", 8, ST_FORMAT, "shape[0]");
    refuse("{" TENSOR("a", "F32", "[4611686018427387904,4]", "0", "0") "}", 0, ST_FORMAT,
           "overflow");
    refuse("{" TENSOR("a", "F32", "[4611686018427387904]", "0", "0") "}", 0, ST_FORMAT, "overflow");
    refuse("{" TENSOR("a", "F32", "[1,1,1,1,1,1,2]", "0", "8") "}", 8, ST_FORMAT, "at most 6");
    refuse("{" TENSOR("a", "F32", "\"2\"", "0", "8") "}", 8, ST_FORMAT, "shape");
    refuse("{" TENSOR("a", "C64", "[1]", "0", "8") "}", 8, ST_UNSUPPORTED, "C64");
    refuse("{" TENSOR("a", "", "[1]", "0", "8") "}", 8, ST_UNSUPPORTED, "'a'");
    refuse("{" TENSOR("a", "F4", "[3]", "0", "2") "}", 2, ST_FORMAT, "whole number");
    refuse("{" TENSOR("a", "F32", "[2]", "0", "8") "," TENSOR("b", "F32", "[2]", "4", "12") "}", 12,
           ST_FORMAT, "overlaps");
    refuse("{" TENSOR("a", "F32", "[2]", "0", "8") "," TENSOR("b", "F32", "[2]", "0", "8") "}", 8,
           ST_FORMAT, "overlaps");
    refuse("{" TENSOR("a", "F32", "[1]", "4", "8") "}", 8, ST_FORMAT, "bytes 0 to 4");
    refuse("{" TENSOR("a", "F32", "[1]", "0", "4") "}", 8, ST_FORMAT, "bytes 4 to 8 at the end");
    refuse("{" TENSOR("a", "F32", "[1]", "0", "4") "," TENSOR("a", "F32", "[1]", "4", "8") "}", 8,
           ST_FORMAT, "duplicate");
    refuse("{" TENSOR("a", "U8", "[2]", "0", "2") "," TENSOR("b", "F32", "[1]", "2", "6") "}", 6,
           ST_UNSUPPORTED, "aligned");
    refuse("{\"a\":7}", 0, ST_FORMAT, "'a'");
    refuse("{\"a\":{}}", 0, ST_FORMAT, "dtype");
    refuse("{\"a\":{\"dtype\":7}}", 0, ST_FORMAT, "dtype");
    refuse("{\"a\":{\"dtype\":\"F32\"}}", 0, ST_FORMAT, "shape");
    refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[]}}", 0, ST_FORMAT, "data_offsets");
    refuse("[]", 0, ST_FORMAT, "no JSON object");
    refuse("{", 0, ST_FORMAT, "");
}

static void test_lying_length(void **state) {
    (void)state;
    safetensors *s;
    const uint64_t lengths[] = {
        0, 1, 3, 100, 100000000, 1 << 30, UINT64_MAX, UINT64_MAX - 7, (uint64_t)1 << 63};
    for (int32_t i = 0; i < COUNT_OF(lengths); i++) {
        write_raw("length.safetensors", lengths[i], "{}      ", 0);
        assert_status(safetensors_open(&s, in_dir("length.safetensors")), ST_FORMAT);
    }
    write_raw("length.safetensors", 9, "{}      ", 0); /* one byte too many */
    assert_status(safetensors_open(&s, in_dir("length.safetensors")), ST_FORMAT);
    assert_non_null(strstr(fail_message(), "truncated?"));
    write_raw("length.safetensors", 8, "{}      ", 0); /* no tensors are fine */
    assert_ok(safetensors_open(&s, in_dir("length.safetensors")));
    assert_int_equal(safetensors_count(s), 0);
    assert_null(safetensors_find(s, "a"));
    safetensors_close(s);
    assert_ok(file_write(in_dir("length.safetensors"), "", 0));
    assert_status(safetensors_open(&s, in_dir("length.safetensors")), ST_FORMAT);
    assert_status(safetensors_open(&s, in_dir("absent")), ST_NOTFOUND);
    assert_status(safetensors_open(&s, "/dev/null"), ST_FORMAT);
}

static const char small[] =
    "{" TENSOR("a", "F32", "[2,3]", "0", "24") "," TENSOR("b", "BF16", "[4]", "24", "32") "}";

/* What a clone without Git LFS leaves. */
static void test_pointer(void **state) {
    (void)state;
    static const char words[] =
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    safetensors *s;
    assert_ok(file_write(in_dir("pointer.safetensors"), words, sizeof words - 1));
    assert_status(safetensors_open(&s, in_dir("pointer.safetensors")), ST_FORMAT);
    assert_non_null(strstr(fail_message(), "git lfs pull"));
}

static void test_truncation(void **state) {
    (void)state;
    write_file("whole.safetensors", small, 32);
    char *data;
    size_t n;
    assert_ok(file_read(&data, &n, in_dir("whole.safetensors")));
    safetensors *s;
    for (size_t cut = 0; cut < n; cut++) {
        assert_ok(file_write(in_dir("cut.safetensors"), data, cut));
        assert_status(safetensors_open(&s, in_dir("cut.safetensors")), ST_FORMAT);
    }
    mem_free(data);
}

/* What opens must be safe to read from end to end. */
static void read_all(const safetensors *s) {
    volatile uint8_t sum = 0;
    for (int32_t i = 0; i < safetensors_count(s); i++) {
        const tensor_view *t = safetensors_at(s, i);
        assert_ptr_equal(safetensors_find(s, t->name), t);
        for (int64_t j = 0; j < t->bytes; j++) sum = (uint8_t)(sum + ((const uint8_t *)t->data)[j]);
    }
}

static void test_bit_flips(void **state) {
    (void)state;
    write_file("whole.safetensors", small, 32);
    char *data;
    size_t n;
    assert_ok(file_read(&data, &n, in_dir("whole.safetensors")));
    rng r;
    rng_seed(&r, 15, 0);
    for (int i = 0; i < 1500; i++) {
        char *copy = mem_alloc(n, 1);
        memcpy(copy, data, n);
        for (uint64_t flips = 1 + rng_below(&r, 3); flips; flips--) {
            const uint64_t bit = rng_below(&r, (n - 32) * 8);
            copy[bit / 8] = (char)(copy[bit / 8] ^ (1 << bit % 8));
        }
        FILE *f = fopen(in_dir("flip.safetensors"), "wb"); /* file_write syncs: too slow here */
        assert_non_null(f);
        assert_int_equal(fwrite(copy, 1, n, f), n);
        fclose(f);
        safetensors *s;
        if (safetensors_open(&s, in_dir("flip.safetensors")) == ST_OK) read_all(s);
        safetensors_close(s);
        mem_free(copy);
    }
    mem_free(data);
}

static void test_round_trip(void **state) {
    (void)state;
    const float f[6] = {1, -2, 3.5f, 0, 1e-30f, 6e20f};
    const uint16_t h[2] = {0x3c00, 0x7bff};
    const uint8_t u[3] = {7, 0, 255};
    const tensor_view out[] = {
        {.name = "z \"quoted\" \xc3\xa9",
         .type = DT_F32,
         .n_dims = 2,
         .dim = {2, 3},
         .data = f,
         .bytes = 24},
        {.name = "half", .type = DT_F16, .n_dims = 1, .dim = {2}, .data = h, .bytes = 4},
        {.name = "none", .type = DT_F16, .n_dims = 1, .dim = {0}, .data = h, .bytes = 0},
        {.name = "codes", .type = DT_U8, .n_dims = 3, .dim = {1, 3, 1}, .data = u, .bytes = 3},
    };
    assert_ok(safetensors_write(in_dir("out.safetensors"), out, COUNT_OF(out)));
    safetensors *s, *again;
    assert_ok(safetensors_open(&s, in_dir("out.safetensors")));
    assert_int_equal(safetensors_count(s), COUNT_OF(out));
    for (int32_t i = 0; i < COUNT_OF(out); i++) {
        const tensor_view *t = safetensors_find(s, out[i].name);
        assert_non_null(t);
        assert_int_equal(t->type, out[i].type);
        assert_int_equal(t->n_dims, out[i].n_dims);
        assert_memory_equal(t->dim, out[i].dim, sizeof t->dim);
        assert_int_equal(t->bytes, out[i].bytes);
        if (t->bytes) assert_memory_equal(t->data, out[i].data, (size_t)t->bytes);
    }
    /* The digest is that of a copy, and not that of other values under the same header. */
    char *data;
    size_t n;
    assert_ok(file_read(&data, &n, in_dir("out.safetensors")));
    for (int32_t i = 0; i < 2; i++) {
        data[n - 1] ^= (char)i;
        assert_ok(file_write(in_dir("changed.safetensors"), data, n));
        assert_ok(safetensors_open(&again, in_dir("changed.safetensors")));
        assert_true((safetensors_digest(s) == safetensors_digest(again)) == (i == 0));
        safetensors_close(again);
    }
    mem_free(data);
    safetensors_close(s);

    const tensor_view odd[] = {out[3], out[0]}, twice[] = {out[1], out[1]};
    assert_status(safetensors_write(in_dir("odd.safetensors"), odd, 2), ST_UNSUPPORTED);
    assert_status(safetensors_write(in_dir("odd.safetensors"), twice, 2), ST_FORMAT);
    assert_false(file_exists(in_dir("odd.safetensors")));
    assert_status(safetensors_write("/nowhere/at/all", out, 1), ST_IO);
    assert_ok(safetensors_write(in_dir("empty.safetensors"), NULL, 0));
    assert_ok(safetensors_open(&s, in_dir("empty.safetensors")));
    safetensors_close(s);
}

static void index_case(const char *map, status want, const char *says) {
    const char *path = in_dir("sharded/model.safetensors.index.json");
    assert_ok(file_write(path, map, strlen(map)));
    safetensors *s;
    const status st = safetensors_open(&s, in_dir("sharded"));
    if (st != want || (st != ST_OK && !strstr(fail_message(), says)))
        fail_msg("%s: %s (%s)", map, status_text(st), st == ST_OK ? "" : fail_message());
    if (st == ST_OK) {
        assert_int_equal(safetensors_count(s), 2);
        assert_int_equal(safetensors_find(s, "b")->bytes, 4);
    }
    safetensors_close(s);
}

#define MAP(entries) "{\"metadata\":{\"total_size\":8},\"weight_map\":{" entries "}}"

static void test_index(void **state) {
    (void)state;
    safetensors *s;
    assert_ok(file_make_dirs(in_dir("sharded")));
    assert_status(safetensors_open(&s, in_dir("sharded")), ST_NOTFOUND);
    write_file("sharded/one.safetensors", "{" TENSOR("a", "F32", "[1]", "0", "4") "}", 4);
    write_file("sharded/two.safetensors", "{" TENSOR("b", "F32", "[1]", "0", "4") "}", 4);
    write_file("sharded/twin.safetensors", "{" TENSOR("a", "F32", "[1]", "0", "4") "}", 4);
    write_file("outside.safetensors", "{" TENSOR("b", "F32", "[1]", "0", "4") "}", 4);
    index_case(MAP("\"b\":\"two.safetensors\",\"a\":\"one.safetensors\""), ST_OK, "");
    index_case(MAP("\"a\":\"one.safetensors\",\"b\":\"three.safetensors\""), ST_FORMAT,
               "'three.safetensors' is missing");
    index_case(MAP("\"a\":\"one.safetensors\",\"b\":\"../outside.safetensors\""), ST_FORMAT,
               "no name of a file");
    index_case(MAP("\"a\":\"one.safetensors\",\"b\":\"/etc/passwd\""), ST_FORMAT,
               "no name of a file");
    index_case(MAP("\"a\":\"one.safetensors\",\"b\":\"..\""), ST_FORMAT, "no name of a file");
    index_case(MAP("\"a\":\"one.safetensors\",\"b\":\"\""), ST_FORMAT, "no name of a file");
    index_case(MAP("\"a\":\"one.safetensors\",\"b\":7"), ST_FORMAT, "no name of a file");
    index_case(MAP("\"a\":\"two.safetensors\",\"b\":\"one.safetensors\""), ST_FORMAT,
               "'a' is not in two.safetensors");
    index_case(MAP("\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"two.safetensors\""),
               ST_FORMAT, "'c' is not in");
    index_case(
        MAP("\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"twin.safetensors\""),
        ST_FORMAT, "'a' is in two files");
    index_case(MAP(""), ST_FORMAT, "empty");
    index_case("{}", ST_FORMAT, "weight_map");
    index_case("[]", ST_FORMAT, "weight_map");
    index_case("{", ST_FORMAT, "index.json");
    /* A single file beside an index wins, as in transformers. */
    write_file("sharded/model.safetensors", "{" TENSOR("only", "F32", "[1]", "0", "4") "}", 4);
    assert_ok(safetensors_open(&s, in_dir("sharded")));
    assert_non_null(safetensors_find(s, "only"));
    safetensors_close(s);
    assert_int_equal(unlink(in_dir("sharded/model.safetensors")), 0);
    index_case(MAP("\"b\":\"two.safetensors\",\"a\":\"one.safetensors\""), ST_OK, "");
}

static void *count_malloc(size_t n) { return mem_alloc(n, 1); }

/* Every allocation refused once, jansson's included: an error, no leak, and success at the end. */
static void test_out_of_memory(void **state) {
    (void)state;
    json_set_alloc_funcs(count_malloc, mem_free);
    int64_t m = 1;
    for (status st = ST_NOMEM; st != ST_OK; m++) {
        json_t *value;
        const char line[] = "{\"a\": [1, {\"b\": \"c\"}], \"d\": 2.5}";
        mem_fail_at(m);
        st = json_parse(&value, line, sizeof line - 1, "line");
        mem_fail_at(0);
        if (st != ST_OK) assert_int_equal(st, ST_NOMEM); /* FORMAT: a broken line, for readers */
        json_decref(value);
    }
    assert_true(m > 10);
    const float f = 1;
    const tensor_view one = {
        .name = "a", .type = DT_F32, .n_dims = 1, .dim = {1}, .data = &f, .bytes = 4};
    int64_t n = 1;
    for (status st = ST_NOMEM; st != ST_OK; n++) {
        safetensors *s;
        mem_fail_at(n);
        st = safetensors_open(&s, in_dir("sharded"));
        mem_fail_at(0);
        safetensors_close(s);
        assert_true(n < 1000);
    }
    assert_true(n > 20);
    n = 1;
    for (status st = ST_NOMEM; st != ST_OK; n++) {
        mem_fail_at(n);
        st = safetensors_write(in_dir("memory.safetensors"), &one, 1);
        mem_fail_at(0);
        assert_true(n < 1000);
    }
    safetensors *s;
    assert_ok(safetensors_open(&s, in_dir("memory.safetensors")));
    const tensor_view *t = safetensors_find(s, "a");
    assert_non_null(t);
    assert_int_equal(t->n_dims, 1);
    safetensors_close(s);
    json_set_alloc_funcs(malloc, free);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reads),         cmocka_unit_test(test_lies),
        cmocka_unit_test(test_lying_length),  cmocka_unit_test(test_pointer),
        cmocka_unit_test(test_truncation),    cmocka_unit_test(test_bit_flips),
        cmocka_unit_test(test_round_trip),    cmocka_unit_test(test_index),
        cmocka_unit_test(test_out_of_memory), cmocka_unit_test(test_drafts_of_the_dead),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
