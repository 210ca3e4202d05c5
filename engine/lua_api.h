/* lua_api.h - what experiments see of the engine: the module "amalgam", annotated for editors in
 * experiments/amalgam.meta.lua. Argument checks and conversions only. */
#ifndef AMALGAM_LUA_API_H
#define AMALGAM_LUA_API_H
#include "base.h"
#include <lua.h>

/* A state with the standard libraries, the module preloaded and package.path set to experiments/,
 * baselines/, plots/ and tests/ under root_dir(). NULL when memory is short. */
lua_State *lua_api_open(void);

/* Run `module`.main(arguments...) and return its integer result as exit status. A Lua error is one
 * line "file:line: reason" on standard error and exit status 2. */
int lua_api_main(const char *module, int argc, char **argv);
#endif
