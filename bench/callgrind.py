# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""What callgrind counted: the instructions of each function itself,
without those that it calls.  The format is in Valgrind's manual,
"Callgrind Format Specification"."""

import collections
import re

_NAME = re.compile(r"(c?)(ob|fn|fl|fi|fe|file)=\((\d+)\)(?: (.*))?$")


def self_costs(path):
    """{(object, function): instructions}"""
    names = {"ob": {}, "fn": {}}
    current = {"ob": None, "fn": None}
    costs = collections.Counter()
    called = False              # the next cost is a callee's
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            line = line.rstrip("\n")
            named = _NAME.match(line)
            if named:
                callee, kind, number, name = named.groups()
                if kind in names:
                    if name is not None:
                        names[kind][number] = name
                    if not callee:
                        current[kind] = names[kind][number]
            elif line.startswith("calls="):
                called = True
            elif line[:1] in "0123456789+-*" and line:
                if not called:
                    cost = line.split()
                    if len(cost) > 1:
                        costs[current["ob"], current["fn"]] += int(cost[1])
                called = False
    return costs


def difference(more, less, times):
    """Per request, of two runs that differ by so many requests: the
    start and the end, which both have, cancel out."""
    return {f: (n - less[f]) / times for f, n in more.items()
            if n != less[f]}
