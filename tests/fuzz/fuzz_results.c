/* fuzz_results.c - stored rows of anybody: lines into Lua's values and back. What Lua can hold, but
 * null, comes back as it went. */
#include "fuzz.h"

#include "lua_json.h"
#include "results.h"

#include <lauxlib.h>

static lua_State *lua;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    lua = luaL_newstate();
    if (!lua) abort();
    return 0;
}

static int push(lua_State *L) {
    lua_push_json(L, lua_touserdata(L, 1));
    return 1;
}

static status row(void *user, const json_t *value) {
    ++*(int64_t *)user;
    lua_settop(lua, 0);
    lua_pushcfunction(lua, push);
    lua_pushlightuserdata(lua, (void *)(uintptr_t)value);
    if (lua_pcall(lua, 1, 1, 0) != LUA_OK) return ST_OK; /* nested past Lua's stack: refused */
    CHECK(lua_istable(lua, -1));
    json_decref(lua_to_json(lua, -1));
    return ST_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    int64_t n_rows = 0, n_broken;
    CHECK(results_read(fuzz_file(data, n), row, &n_rows, &n_broken) == ST_OK);
    CHECK(n_rows + n_broken <= (int64_t)n + 1);
    lua_settop(lua, 0);
    return 0;
}
