/* lua_json.c - see lua_json.h. */
#include "lua_json.h"

#include "utf8.h"

#include <lauxlib.h>
#include <math.h>
#include <string.h>

enum { DEPTH_MAX = 32 };

void lua_push_json(lua_State *L, const json_t *value) {
    luaL_checkstack(L, 4, "json");
    switch (value ? json_typeof(value) : JSON_NULL) {
    case JSON_OBJECT: {
        lua_createtable(L, 0, (int)json_object_size(value));
        const char *key;
        json_t *member;
        json_object_foreach((json_t *)(uintptr_t)value, key, member) {
            lua_push_json(L, member);
            lua_setfield(L, -2, key);
        }
        break;
    }
    case JSON_ARRAY: {
        lua_createtable(L, (int)json_array_size(value), 0);
        for (size_t i = 0; i < json_array_size(value); i++) {
            lua_push_json(L, json_array_get(value, i));
            lua_rawseti(L, -2, (lua_Integer)i + 1);
        }
        break;
    }
    case JSON_STRING:
        lua_pushlstring(L, json_string_value(value), json_string_length(value));
        break;
    case JSON_INTEGER: lua_pushinteger(L, json_integer_value(value)); break;
    case JSON_REAL: lua_pushnumber(L, json_real_value(value)); break;
    case JSON_TRUE: lua_pushboolean(L, 1); break;
    case JSON_FALSE: lua_pushboolean(L, 0); break;
    case JSON_NULL: lua_pushnil(L); break;
    }
}

static json_t *convert(lua_State *L, int index, int depth);

static json_t *convert_array(lua_State *L, int index, int depth) {
    json_t *array = json_array();
    const lua_Integer n = (lua_Integer)lua_rawlen(L, index);
    for (lua_Integer i = 1; array && i <= n; i++) {
        lua_rawgeti(L, index, i);
        json_t *member = convert(L, lua_gettop(L), depth + 1);
        lua_pop(L, 1);
        if (!member || json_array_append_new(array, member) != 0) {
            json_decref(array);
            return NULL;
        }
    }
    return array;
}

/* jansson keeps insertion order; sorting happens when text is made (JSON_SORT_KEYS). */
static json_t *convert_object(lua_State *L, int index, int depth) {
    json_t *object = json_object();
    lua_pushnil(L);
    while (object && lua_next(L, index)) {
        json_t *member = NULL;
        size_t n = 0;
        const char *key = lua_type(L, -2) == LUA_TSTRING ? lua_tolstring(L, -2, &n) : NULL;
        if (!key)
            (void)FAIL(ST_FORMAT, "a table has a key that is no string beside others");
        else if (strlen(key) != n || !utf8_valid(key, n))
            (void)FAIL(ST_FORMAT, "a key is no UTF-8 text, or has a zero byte");
        else
            member = convert(L, lua_gettop(L), depth + 1);
        if (!member || json_object_set_new(object, key, member) != 0) {
            json_decref(object);
            lua_pop(L, 2);
            return NULL;
        }
        lua_pop(L, 1);
    }
    return object;
}

static json_t *convert(lua_State *L, int index, int depth) {
    if (depth > DEPTH_MAX || !lua_checkstack(L, 6)) {
        (void)FAIL(ST_FORMAT, "tables are nested deeper than %d", DEPTH_MAX);
        return NULL;
    }
    switch (lua_type(L, index)) {
    case LUA_TNIL: return json_null();
    case LUA_TBOOLEAN: return json_boolean(lua_toboolean(L, index));
    case LUA_TNUMBER:
        if (lua_isinteger(L, index)) return json_integer(lua_tointeger(L, index));
        if (!isfinite(lua_tonumber(L, index))) {
            (void)FAIL(ST_FORMAT, "a number is not finite");
            return NULL;
        }
        return json_real(lua_tonumber(L, index));
    case LUA_TSTRING: {
        size_t n;
        const char *s = lua_tolstring(L, index, &n);
        json_t *v = json_stringn(s, n);
        if (!v) (void)FAIL(ST_FORMAT, "a string is not valid UTF-8");
        return v;
    }
    case LUA_TTABLE: {
        lua_rawgeti(L, index, 1);
        const bool is_array = !lua_isnil(L, -1);
        lua_pop(L, 1);
        return is_array ? convert_array(L, index, depth) : convert_object(L, index, depth);
    }
    default: (void)FAIL(ST_FORMAT, "a %s cannot be stored", luaL_typename(L, index)); return NULL;
    }
}

json_t *lua_to_json(lua_State *L, int index) { return convert(L, lua_absindex(L, index), 0); }
