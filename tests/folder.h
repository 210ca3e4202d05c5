/* folder.h - a folder of the program's own under /tmp: setup and teardown of its group of tests. */
#ifndef AMALGAM_FOLDER_H
#define AMALGAM_FOLDER_H
#include "base.h"
#include <stdlib.h>

static char folder[64];

static int make_folder(void **state) {
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/amalgam_test_XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state) {
    char command[80];
    (void)state;
    snprintf(command, sizeof command, "rm -r '%s'", folder);
    return system(command);
}
#endif
