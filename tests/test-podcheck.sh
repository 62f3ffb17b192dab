#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# The manual pages are well-formed, and the filter's has the sections
# that nbdkit's filters have.

. "${srcdir:-.}/lib/functions.sh"
requires podchecker pod2man
pod=$tests/../filter/nbdkit-dirty-bitmap-filter.pod

podchecker -warnings -warnings "$pod" > out 2>&1 || { cat out; fail "podchecker"; }
if grep -E 'WARNING|ERROR' out; then fail "podchecker warns"; fi

for section in NAME SYNOPSIS DESCRIPTION EXAMPLES PARAMETERS LIMITATIONS \
               FILES VERSION "SEE ALSO" AUTHORS COPYRIGHT; do
  grep -qx "=head1 $section" "$pod" || fail "no section $section"
done

for page in nbdkit-dirty-bitmap-ctl nbdkit-dirty-bitmap-qemu-nbd \
    dirty-bitmap-backup; do
  page=$tests/../tools/$page.pod
  podchecker -warnings -warnings "$page" > out 2>&1 ||
    { cat out; fail "$page"; }
  if grep -E 'WARNING|ERROR' out; then fail "podchecker warns"; fi
done

# The formatter has no complaint either (it would add a section).
pod2man -u --section 1 "$pod" > page.1
if grep -n 'POD ERRORS' page.1; then fail "pod2man complains"; fi
grep -q 'dirty\\-bitmap' page.1 || grep -q 'dirty-bitmap' page.1 ||
  fail "the page is empty"
