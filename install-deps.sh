#!/bin/sh
# Install the Debian or Ubuntu packages that Amalgam needs and that are missing. Says what first.
# Leaves at once, without touching the network, when nothing is missing.
set -eu

# package:file - the file (or command) whose presence shows that the package is there.
needs="
gcc:gcc make:make git:git pkg-config:pkg-config
liblua5.4-dev:/usr/include/lua5.4/lua.h
libjansson-dev:/usr/include/jansson.h
libpcre2-dev:/usr/include/pcre2.h
libutf8proc-dev:/usr/include/utf8proc.h
libcmocka-dev:/usr/include/cmocka.h
gnuplot-nox:gnuplot
lua-check:luacheck
clang-format-14:clang-format-14
"

present() {
    case $1 in
        /*) [ -e "$1" ] ;;
        *) command -v "$1" >/dev/null 2>&1 ;;
    esac
}

missing=""
for need in $needs; do
    present "${need#*:}" || missing="$missing ${need%%:*}"
done
[ -z "$missing" ] && exit 0

echo "Packages needed and missing:$missing"
line="apt-get update && apt-get install -y --no-install-recommends$missing"
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
if ! $root sh -c "export DEBIAN_FRONTEND=noninteractive; $line" >/dev/null; then
    echo "apt failed. Run this by hand, then try again:" >&2
    echo "    sudo sh -c '$line'" >&2
    exit 1
fi
