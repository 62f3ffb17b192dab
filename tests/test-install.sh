#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# make install puts the filter where nbdkit looks for filters, the programs
# nbdkit-dirty-bitmap-ctl and dirty-bitmap-backup and the manual pages beside
# the others; make uninstall takes all away.

. "${srcdir:-.}/lib/functions.sh"
requires make
build=${abs_top_builddir:-$tests/..}
[ -f "$build/config.status" ] || skip "$build is not configured"
unset MAKEFLAGS MAKELEVEL MFLAGS

for folder in filter tools; do
  make -C "$build/$folder" install DESTDIR="$d/root" > out 2>&1 ||
    { cat out; fail "make install"; }
done
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
for program in nbdkit-dirty-bitmap-ctl dirty-bitmap-backup \
    nbdkit-dirty-bitmap-qemu-nbd; do
  grep -q "/bin/$program$" installed || fail "no program $program"
  grep -q "/man1/$program\.1$" installed || fail "no manual page of $program"
done
[ "$(wc -l < installed)" -eq 8 ] || fail "something else is installed too"

# What is installed works.
so=$(find "$d/root" -name nbdkit-dirty-bitmap-filter.so)
nbdkit --filter="$so" null --help | finds dirty-bitmap= ||
  fail "the installed filter does not load"

ctl=$(find "$d/root" -name nbdkit-dirty-bitmap-ctl)
"$ctl" --help | finds KEY=VALUE || fail "the installed program does not run"

backup=$(find "$d/root" -name dirty-bitmap-backup)
"$backup" --help | finds REPOSITORY || fail "the installed program does not run"
drop_in=$(find "$d/root" -name nbdkit-dirty-bitmap-qemu-nbd)
"$drop_in" --version | finds '^qemu-nbd [0-9]' ||
  fail "the installed drop-in does not run"

for folder in filter tools; do
  make -C "$build/$folder" uninstall DESTDIR="$d/root" > out 2>&1 ||
    { cat out; fail "make uninstall"; }
done
find root ! -type d | sort > left
[ ! -s left ] || { cat left; fail "make uninstall leaves files"; }
