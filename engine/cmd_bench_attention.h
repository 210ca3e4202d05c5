/* cmd_bench_attention.h - `amalgam bench attention`: time and error of the attention kernels. */
#ifndef AMALGAM_CMD_BENCH_ATTENTION_H
#define AMALGAM_CMD_BENCH_ATTENTION_H

/* argv[0] is "attention". Returns the exit status. */
int bench_attention(int argc, char **argv);
#endif
