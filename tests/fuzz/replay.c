/* replay.c - a fuzz target over the files of a folder, with any compiler: `make test` and `make asan`
 * run every corpus so, and with it whatever the fuzzer once found. */
#include "fuzz.h"

#include <dirent.h>
#include <string.h>

/* A block of its own size, as libFuzzer gives it. */
static void replay(const char *path) {
    char *data;
    size_t n;
    CHECK(file_read(&data, &n, path) == ST_OK);
    uint8_t *exact = malloc(n ? n : 1);
    CHECK(exact != NULL);
    memcpy(exact, data, n);
    mem_free(data);
    printf("%s\n", path);
    fflush(stdout);
    (void)LLVMFuzzerTestOneInput(exact, n);
    free(exact);
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    (void)LLVMFuzzerInitialize(&argc, &argv);
    DIR *dir = opendir(argv[1]);
    CHECK(dir != NULL);
    int32_t n = 0;
    for (struct dirent *e = readdir(dir); e; e = readdir(dir)) {
        char path[512];
        if (e->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%s", argv[1], e->d_name);
        replay(path);
        n++;
    }
    closedir(dir);
    printf("%d inputs\n", n);
    return n > 0 ? 0 : 1;
}
