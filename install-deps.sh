#!/bin/sh
# Install the Debian or Ubuntu packages that Amalgam needs and that are missing. Says what first.
# Leaves at once, without touching the network, when nothing is missing.
set -eu

# package:file - the file (or command) whose presence shows that the package is there.
needs="
gcc:gcc g++:g++ libc6-dev:/usr/include/stdio.h make:make git:git pkg-config:pkg-config
liblua5.4-dev:/usr/include/lua5.4/lua.h
libjansson-dev:/usr/include/jansson.h
libpcre2-dev:/usr/include/pcre2.h
libutf8proc-dev:/usr/include/utf8proc.h
libmicrohttpd-dev:/usr/include/microhttpd.h
libcurl4-openssl-dev:curl-config
libcmocka-dev:/usr/include/cmocka.h
gnuplot-nox:gnuplot
"
# Only checks of style want these; where apt has none of that name, those checks are skipped.
wishes="lua-check:luacheck clang-format-14:clang-format-14"

present() {
    case $1 in
        /*) [ -e "$1" ] ;;
        *) command -v "$1" >/dev/null 2>&1 ;;
    esac
}

absent() { # of a list: the packages that are not there
    for need in "$@"; do
        present "${need#*:}" || printf ' %s' "${need%%:*}"
    done
}

# shellcheck disable=SC2086
missing=$(absent $needs)
# shellcheck disable=SC2086
wished=$(absent $wishes)
stamp=build/no-wishes # apt was asked for them and had none: do not ask again at every make
[ -e "$stamp" ] && wished=""
[ -z "$missing$wished" ] && exit 0

echo "Packages needed and missing:$missing$wished"
line="apt-get update && apt-get install -y --no-install-recommends$missing$wished"
if ! command -v apt-get >/dev/null 2>&1; then
    echo "This system has no apt-get: install the equivalents of these by hand, then try again." >&2
    exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
    root=""
elif command -v sudo >/dev/null 2>&1 && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
    root="sudo"
else
    echo "Not root and no usable sudo. Run this by hand, then try again:" >&2
    echo "    sudo sh -c '$line'" >&2
    exit 1
fi
echo "Installing them now (apt)."
install() { # packages...
    [ $# -eq 0 ] || $root sh -c "DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends $*" >/dev/null
}
# shellcheck disable=SC2086
if ! $root apt-get update >/dev/null || ! install $missing; then
    echo "apt failed. Run this by hand, then try again:" >&2
    echo "    sudo sh -c '$line'" >&2
    exit 1
fi
for wish in $wished; do
    if ! install "$wish" 2>/dev/null; then
        echo "No package $wish here: the check of style that wants it will be skipped."
        mkdir -p build && touch "$stamp"
    fi
done
