#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# The tarball has every file that git has, but for debian/.

. "${srcdir:-.}/lib/functions.sh"
requires make git
top=$(cd "$tests/.." && pwd)
build=${abs_top_builddir:-$top}
[ -f "$build/config.status" ] || skip "$build is not configured"
[ -e "$top/.git" ] || skip "this is not a git tree"
unset MAKEFLAGS MAKELEVEL MFLAGS

# make wants a relative name.
dist=$(realpath --relative-to="$build" "$d/dist")
make -C "$build" distdir distdir="$dist" > out 2>&1 ||
  { cat out; fail "make distdir"; }
git -c safe.directory='*' -C "$top" ls-files -- . ':!debian' | sort > in-git
[ -s in-git ] || skip "git has no files yet"
(cd dist && find . ! -type d) | sed 's,^\./,,' | sort > in-dist
comm -23 in-git in-dist > missing
[ ! -s missing ] || { cat missing; fail "the above are not in the tarball"; }
! grep '^debian/' in-dist || fail "debian/ is in the tarball"
grep -qx configure in-dist || fail "no configure in the tarball"
grep -qx filter/nbdkit-dirty-bitmap-filter.1 in-dist ||
  fail "no manual page in the tarball"
