/* lua_json.h - values between Lua and JSON. Objects are written with sorted keys, so equal tables
 * give equal text and a text can be hashed as a key. */
#ifndef AMALGAM_LUA_JSON_H
#define AMALGAM_LUA_JSON_H
#include "base.h"
#include <jansson.h>
#include <lua.h>

/* Push `value`; null becomes nil (and so disappears from tables). */
void lua_push_json(lua_State *L, const json_t *value);

/* The value at `index` as a new reference, or NULL with the reason recorded: functions, userdata,
 * threads, tables with mixed or non-string keys, NaN and infinity, nesting past 32. A table with a
 * value at [1] is an array; the empty table is an object. Integral floats stay floats. */
json_t *lua_to_json(lua_State *L, int index);
#endif
