#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# The shared object exports filter_init and the debug flags, nothing
# else: it lives in one process with nbdkit, its plugin and other filters.

. "${srcdir:-.}/lib/functions.sh"
requires nm

nm -D --defined-only "$FILTER" | awk '{ print $NF }' | sort > exported
cat exported
grep -qx filter_init exported || fail "filter_init is not exported"
if grep -vxE 'filter_init|dirty[-_]bitmap_debug_[a-z0-9_]+' exported; then
  fail "the above are exported too"
fi

# nbdkit finds the flag by its name.
grep -qx dirty-bitmap_debug_request exported ||
    fail "-D dirty-bitmap.request=1 would not find its flag"
