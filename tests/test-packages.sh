#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# What the packages say of themselves: the version is that of configure,
# and they depend on one upstream version of nbdkit.  (That they can be
# built and used is what build-aux/check-package.sh tests.)

. "${srcdir:-.}/lib/functions.sh"
top=$(cd "$tests/.." && pwd)
spec=$top/packaging/nbdkit-dirty-bitmap-filter.spec

version=$(sed -n 's/^AC_INIT(\[.*\],\[\(.*\)\])$/\1/p' "$top/configure.ac")
[ -n "$version" ] || fail "configure.ac has no version"
same "the spec file's version" "$version" \
     "$(sed -n 's/^Version: *//p' "$spec")"
if [ -d "$top/debian" ]; then   # not in a tarball
  same "debian/changelog's version" "$version" \
       "$(sed -n '1s/.*(\(.*\)-[^-]*).*/\1/p' "$top/debian/changelog")"
fi

depends ()
{
  "$top/build-aux/nbdkit-depends.sh" 'nbdkit (>= %s), nbdkit (<< %s~)' "$@"
}

same "1.42.3" "nbdkit (>= 1.42.3), nbdkit (<< 1.42.4~)" "$(depends 1.42.3)"
same "1.32.9" "nbdkit (>= 1.32.9), nbdkit (<< 1.32.10~)" "$(depends 1.32.9)"
same "1.9.99" "nbdkit (>= 1.9.99), nbdkit (<< 1.9.100~)" "$(depends 1.9.99)"
for bad in "" 1 1. .1 1..2 1.42.3-1 1.42.x "1.42.3 "; do
  ! depends "$bad" > out 2>&1 || fail "'$bad' is taken for a version"
  grep -q "'$bad' is not a version" out || { cat out; fail "'$bad'"; }
done

# Without a version it is nbdkit's headers that are asked.
if type pkg-config >/dev/null 2>&1 && pkg-config --exists nbdkit; then
  same "what is installed" "$(depends "$(pkg-config --modversion nbdkit)")" \
       "$(depends)"
fi
