/* cmd_tokenize.h - `amalgam tokenize`: what a model's tokenizer makes of a text. */
#ifndef AMALGAM_CMD_TOKENIZE_H
#define AMALGAM_CMD_TOKENIZE_H

/* amalgam tokenize --model DIR (--text TEXT | --file FILE) [--json] [--no-bos] [--plain]
 *
 * Prints "id<TAB>piece" a line, or with --json one object {"tokens", "ids", "pieces"}. argv[0] is
 * "tokenize". Returns the exit status: 0 done, 1 failed (one line on stderr), 2 usage. */
int cmd_tokenize(int argc, char **argv);

#endif
