/* cmd_models.h - `amalgam models` and `amalgam inspect model`. argv[0] is the command's own name; the
 * result is the exit status: 0 done, 1 failed (message on stderr), 2 usage. */
#ifndef AMALGAM_CMD_MODELS_H
#define AMALGAM_CMD_MODELS_H

/* models [--json]: the models of workloads/models with shapes, parameters, sizes. */
int cmd_models(int argc, char **argv);

/* inspect model --model DIR|NAME [--precision P] [--tp N] [--json]: every weight of one rank, what it
 * takes in that precision, and where it lies when the folder holds a checkpoint. */
int cmd_inspect_model(int argc, char **argv);
#endif
