#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# nbdkit --help shows the filter's parameters, and those are what the
# manual page describes; nbdkit -v shows the filter's version.

. "${srcdir:-.}/lib/functions.sh"
pod=$tests/../filter/nbdkit-dirty-bitmap-filter.pod

nbdkit --filter="$FILTER" null --help > help
cat help
parameters ()
{
  grep -oE "$1" "$2" | grep -oE 'dirty-bitmap[a-z-]*=' | sort -u
}
parameters '^dirty-bitmap[a-z-]*=' help > in-help
parameters '^=item B<dirty-bitmap[a-z-]*=' "$pod" > in-pod

grep -qx 'dirty-bitmap=' in-help || fail "--help does not show dirty-bitmap="
diff -u in-pod in-help || fail "--help and the manual page differ"

# They are parameters indeed: nbdkit would refuse unknown ones.
while IFS= read -r p; do
  # These two may be empty, but not this.
  case $p in *-exportname= | *-description=) p=$p$'\x80' ;; esac
  if nbdkit --filter="$FILTER" null "$p" > out 2>&1; then
    fail "$p with no value was accepted"
  fi
  grep -q -- "${p%%=*}" out || { cat out; fail "the error does not name $p"; }
done < in-help

# The first of the filter's messages with -v is its version.
version=$(sed -n 's/^#define PACKAGE_VERSION "\(.*\)"/\1/p' \
              "$top_builddir/config.h")
[ -n "$version" ]
nbdkit -v --filter="$FILTER" null --help > out 2>&1
grep -i 'dirty.bitmap' out | head -n 3
grep 'debug: ' out | grep -m 1 'dirty-bitmap-filter [0-9]' |
  grep -q "debug: nbdkit-dirty-bitmap-filter $version\$" ||
  fail "nbdkit -v does not show the version $version"
