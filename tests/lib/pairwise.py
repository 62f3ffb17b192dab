# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Rows of options in which every two values that can stand together do
so at least once."""

import itertools


def pair(a, b):
    return frozenset((a, b))


def complete(partial, options, possible, wanted):
    """The row that has `partial` in it, and of the rest the values that
    bring the most of the wanted pairs; None if there is none."""
    missing = [name for name in options if name not in partial]
    if not missing:
        return partial
    name = missing[0]

    def gain(value):
        return sum(pair((name, value), item) in wanted
                   for item in partial.items())

    # The order of equals is that of the list, which was shuffled.
    for value in sorted(options[name], key=gain, reverse=True):
        row = {**partial, name: value}
        if possible(row):
            row = complete(row, options, possible, wanted)
            if row is not None:
                return row
    return None


def rows(options, possible, rnd):
    """A covering array.  options is {name: [values]}; possible takes a
    row, or a part of one, and says whether the rules allow it."""
    wanted = set()
    for (a, ours), (b, others) in itertools.combinations(options.items(), 2):
        for x, y in itertools.product(ours, others):
            if possible({a: x, b: y}):
                wanted.add(pair((a, x), (b, y)))
    result = []
    impossible = set()
    while wanted:
        first = rnd.choice(sorted(wanted, key=lambda p: sorted(map(str, p))))
        names = list(options)
        rnd.shuffle(names)
        # Where there is little to choose, dead ends show soon.
        names.sort(key=lambda name: len(options[name]))
        shuffled = {n: rnd.sample(options[n], len(options[n])) for n in names}
        row = complete(dict(first), shuffled, possible, wanted)
        if row is None:         # Two that only a third one forbids.
            impossible.add(first)
            wanted.discard(first)
            continue
        row = {name: row[name] for name in options}
        wanted -= {pair(*items)
                   for items in itertools.combinations(row.items(), 2)}
        result.append(row)
    return result
