/* main.c - one binary: `amalgam COMMAND …`. Commands are the rows of one table; those that are Lua
 * modules (run, compare, report) live in experiments/. */
#include "cli.h"
#include "lua_api.h"
#include "version.h"

#include <errno.h>
#include <fcntl.h>
#include <lauxlib.h>
#include <lualib.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int run_lua_file(int argc, char **argv);
static int cmd_tune(int argc, char **argv);

typedef struct {
    const char *name;
    int (*run)(int argc, char **argv); /* NULL: the Lua module */
    const char *module;
    const char *summary;
} command;

static const command commands[] = {
    {"run", NULL, "lib_run", "run an experiment: run e01 [--quick] [--only KEY=VALUE]"},
    {"rows", NULL, "lib_table",
     "the stored rows of an experiment as a table: rows e03 --metric ttft"},
    {"report", NULL, "lib_report", "tables, plots and PAPER.md from stored results"},
    {"compare", NULL, "lib_compare", "two versions by their stored results: compare BASE HEAD"},
    {"generate", cmd_generate, NULL, "text from a prompt"},
    {"chat", cmd_chat, NULL, "talk to a model in the terminal"},
    {"serve", cmd_serve, NULL, "OpenAI-compatible HTTP server"},
    {"eval", cmd_evaluate, NULL, "perplexity of a text under a precision"},
    {"quantize", cmd_quantise, NULL, "a checkpoint in low precision: --method rtn|gptq|awq"},
    {"servers", NULL, "lib_servers", "how to start a foreign server, and measure it"},
    {"bench", cmd_bench, NULL, "times of kernels, steps, loading, a server, our own overhead"},
    {"tune", cmd_tune, NULL, "times the linear kernels of the GPU at hand: the table to check in"},
    {"formats", cmd_formats, NULL, "which precisions run where, and with which kernels"},
    {"models", cmd_models, NULL, "the models of the sweep and their sizes"},
    {"inspect", cmd_inspect, NULL, "a model's weights, a step's plan, a recorded trace"},
    {"tokenize", cmd_tokenize, NULL, "ids of a text"},
    {"corpus", cmd_corpus, NULL, "text and tasks of the seeded generator"},
    {"doctor", cmd_doctor, NULL, "what this machine has and what is missing"},
    {"lua", run_lua_file, NULL, "run a Lua script with the module amalgam"},
};

static int help(FILE *to) {
    fprintf(to, "amalgam %s: mixed-precision LLM inference and its evaluation\n\n", AMALGAM_COMMIT);
    for (int32_t i = 0; i < COUNT_OF(commands); i++)
        fprintf(to, "  amalgam %-10s %s\n", commands[i].name, commands[i].summary);
    fprintf(to,
            "\nEvery command takes --help. --root DIR before the command names the checkout.\n");
    return to == stdout ? 0 : 2;
}

/* One of the benchmarks, but what it writes is a source file. */
static int cmd_tune(int argc, char **argv) {
    char *with[16] = {"bench"};
    for (int i = 0; i < argc && i < COUNT_OF(with) - 1; i++) with[i + 1] = argv[i];
    return cmd_bench((argc < COUNT_OF(with) ? argc : COUNT_OF(with) - 1) + 1, with);
}

/* A command that is Lua: all of them lie in one checkout. */
static int run_module(const char *module, int argc, char **argv) {
    if (!root_found())
        return cli_exit(FAIL(ST_NOTFOUND, "%s is no checkout of Amalgam: --root DIR names one",
                             strcmp(root_dir(), ".") == 0 ? "the working directory" : root_dir()));
    return lua_api_main(module, argc, argv);
}

/* `amalgam lua SCRIPT …`: for tests and house checks; arguments in the global `arg`. */
static int run_lua_file(int argc, char **argv) {
    if (argc < 2) return cli_exit(FAIL(ST_USAGE, "lua needs a script"));
    if (strcmp(argv[1], "--help") == 0) {
        puts("usage: amalgam lua SCRIPT [ARGUMENT...]\n"
             "  The script may require(\"amalgam\") (experiments/amalgam.meta.lua) and the modules "
             "of\n"
             "  experiments/, baselines/, plots/ and tests/. An integer that it returns is the "
             "exit\n"
             "  status.");
        return 0;
    }
    lua_State *L = lua_api_open();
    if (!L) return 1;
    lua_createtable(L, argc, 0);
    for (int i = 1; i < argc; i++) {
        lua_pushstring(L, argv[i]);
        lua_rawseti(L, -2, i - 1);
    }
    lua_setglobal(L, "arg");
    int result = 0;
    if (luaL_loadfile(L, argv[1]) != LUA_OK || lua_pcall(L, 0, 1, 0) != LUA_OK) {
        const char *why = lua_tostring(L, -1);
        fprintf(stderr, "amalgam: %s\n", why ? why : "error without a message");
        result = 2;
    } else if (lua_isinteger(L, -1)) {
        result = (int)lua_tointeger(L, -1);
    }
    lua_close(L);
    return result;
}

/* Idle OpenMP threads must sleep: spinning ones wait for a core that another process holds, which
 * makes the cpu device ten times slower on a machine that is not ours alone. libgomp reads the
 * variable before main begins, so the program is started over, once. */
static void idle_threads_sleep(char **argv) {
    if (getenv("OMP_WAIT_POLICY")) return;
    setenv("OMP_WAIT_POLICY", "passive", 1);
    char path[4096]; /* the file itself, so that ps shows our name */
    const ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    if (n <= 0) return;
    path[n] = 0;
    execv(path, argv); /* on failure: go on as we are */
}

/* Where one of the standard descriptors is closed, the next file or socket would be it, and what we
 * say would go there. This one takes nothing and gives nothing: as when it is closed. */
static void hold_descriptors(void) {
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0)
            (void)open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY);
}

/* What could not be written is a failure, a full disk under a file above all. Who closed the pipe
 * (`| head`) has what they wanted: no word about that. */
static int written(int code) {
    const bool flushed = fflush(stdout) == 0;
    const int why = errno;
    if (flushed && !ferror(stdout)) return code;
    struct pollfd out = {.fd = STDOUT_FILENO};
    if (code == 0 && !(poll(&out, 1, 0) > 0 && out.revents & POLLERR))
        fprintf(stderr, "amalgam: standard output: %s\n",
                flushed ? "not all of it could be written" : strerror(why));
    return code ? code : 1;
}

int main(int argc, char **argv) {
    hold_descriptors();
    idle_threads_sleep(argv);
    signal(SIGPIPE, SIG_IGN); /* a closed pipe is a write error, reported where it happens */
    file_remove_on_signals();
    signal(SIGXFSZ, SIG_IGN); /* and so is a file past the size that a batch system allows */
    int at = 1;
    if (at + 1 < argc && strcmp(argv[at], "--root") == 0) {
        if (strlen(argv[at + 1]) > 1000) return help(stderr);
        root_set(argv[at + 1]);
        at += 2;
    }
    if (at >= argc) return help(stderr);
    if (strcmp(argv[at], "--help") == 0 || strcmp(argv[at], "help") == 0)
        return written(help(stdout));
    if (strcmp(argv[at], "--version") == 0) {
        printf("amalgam %s%s%s\n", AMALGAM_COMMIT, AMALGAM_DIFF[0] ? "-dirty-" : "", AMALGAM_DIFF);
        return written(0);
    }
    for (int32_t i = 0; i < COUNT_OF(commands); i++) {
        if (strcmp(commands[i].name, argv[at]) != 0) continue;
        if (commands[i].run) return written(commands[i].run(argc - at, argv + at));
        return written(run_module(commands[i].module, argc - at - 1, argv + at + 1));
    }
    return cli_exit(FAIL(
        ST_USAGE, "unknown command '%s': the nearest is '%s' (amalgam --help lists them)", argv[at],
        nearest_name(argv[at], strlen(argv[at]), &commands->name, sizeof *commands,
                     COUNT_OF(commands))));
}
