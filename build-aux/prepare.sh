#!/bin/sh
# Build in a folder of its own below the source folder, so that a user's
# tree stays clean; only what has changed is made again.
#
# usage: prepare.sh FOLDER [configure options]

set -eu

top=$(cd "$(dirname "$0")/.." && pwd)
folder=$1
shift

cd "$top"
if test -f Makefile && test -f config.status; then
    echo "$0: the source folder is configured itself: run 'make distclean'" >&2
    exit 1
fi
if test ! -x configure || test configure.ac -nt configure; then
    autoreconf -i
fi
mkdir -p "$folder"
cd "$folder"

# Configure anew where the options are others than last time, or where
# nbdkit is.
built_for="$* $(pkg-config --modversion nbdkit)"
if test ! -f config.status ||
   test "$(cat configured-for 2>/dev/null)" != "$built_for"; then
    "$top/configure" -q "$@"
    echo "$built_for" >configured-for
fi
exec make -s -j"$(nproc)"
