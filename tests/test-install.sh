#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# make install puts the filter where nbdkit looks for filters, and the
# manual page beside the others; make uninstall takes both away.

. "${srcdir:-.}/lib/functions.sh"
requires make
build=${abs_top_builddir:-$tests/..}
[ -f "$build/config.status" ] || skip "$build is not configured"
unset MAKEFLAGS MAKELEVEL MFLAGS

make -C "$build/filter" install DESTDIR="$d/root" > out 2>&1 ||
  { cat out; fail "make install"; }
(cd root && find . ! -type d) | sort > installed
cat installed

filterdir=$(sed -n 's/^filterdir = //p' "$build/filter/Makefile")
case $filterdir in
  '$'*) ;;                      # below the prefix, as in distcheck
  *) grep -qx ".$filterdir/nbdkit-dirty-bitmap-filter.so" installed ||
       fail "not in $filterdir" ;;
esac
grep -q '/man1/nbdkit-dirty-bitmap-filter\.1$' installed ||
  fail "no manual page"
[ "$(wc -l < installed)" -eq 2 ] || fail "something else is installed too"

# What is installed works.
so=$(find "$d/root" -name nbdkit-dirty-bitmap-filter.so)
nbdkit --filter="$so" null --help | grep -q dirty-bitmap= ||
  fail "the installed filter does not load"

make -C "$build/filter" uninstall DESTDIR="$d/root" > out 2>&1 ||
  { cat out; fail "make uninstall"; }
find root ! -type d | sort > left
[ ! -s left ] || { cat left; fail "make uninstall leaves files"; }
