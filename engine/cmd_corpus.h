/* cmd_corpus.h - `amalgam corpus`: the generator of corpus.h on the command line. */
#ifndef AMALGAM_CMD_CORPUS_H
#define AMALGAM_CMD_CORPUS_H

/* amalgam corpus --bytes N [--seed N] [--kind KIND]
 * amalgam corpus --tasks KIND --count N [--seed N] [--digits N] [--pairs N] [--sentences N]
 *
 * argv[0] is "corpus". Text, or one {"prompt", "answer"} object a line, goes to standard output.
 * Returns the exit status: 0 done, 1 the output could not be written, 2 usage. */
int cmd_corpus(int argc, char **argv);

#endif
