#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# make distcheck: the tarball, unpacked into a read-only folder, builds
# out of tree, passes the tests, installs, uninstalls and cleans up.
# Run by make check-long.

. "${srcdir:-.}/lib/functions.sh"
requires make git xz
top=$(cd "$tests/.." && pwd)
build=${abs_top_builddir:-$top}
[ -f "$build/config.status" ] || skip "$build is not configured"
unset MAKEFLAGS MAKELEVEL MFLAGS TESTS ROUNDS POINTS

# In a build of its own, so that nothing is made anew under the feet of
# whoever uses the first one.
mkdir b
cd b
"$top/configure" -q > out 2>&1 || { tail -n 40 out; fail "configure"; }
make -j"$(nproc)" distcheck > out 2>&1 || { tail -n 200 out; fail "make distcheck"; }
grep 'archives ready for distribution' out || fail "no archive"
