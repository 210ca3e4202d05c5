/* cmd_bench_serve.c - stub */
#include "cli.h"
int cmd_bench_serve(int argc, char **argv) { (void)argc; (void)argv; return cli_exit(FAIL(ST_UNSUPPORTED, "x")); }
