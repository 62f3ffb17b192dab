# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""The figures: how they are kept, and what is made of them.

Each measurement of one side in one round is one line of JSON, written
when it was made, so that nothing is lost when a run is interrupted:

    {"run": ID, "circumstances": {...}, "row": "read16", "side": "qemu",
     "figures": {"": [33804.0, "op/s"], "server CPU": [30.7, "µs/op"]}}

A ratio is only ever of figures of one run, which took turns on the same
machine in the same hour.  Where several runs have a row and a peer, the
last of those with the most rounds counts.
"""

import json
import statistics


class Figures:
    def __init__(self):
        self.runs = {}          # id: circumstances, in the order of files
        # (run, row, side): {name: ([figures], unit)}
        self.measured = {}

    def add(self, record):
        run, row, side = record["run"], record["row"], record["side"]
        self.runs.setdefault(run, record["circumstances"])
        names = self.measured.setdefault((run, row, side), {})
        for name, (figure, unit) in record["figures"].items():
            names.setdefault(name, ([], unit))[0].append(figure)

    def load(self, path):
        with open(path, encoding="utf-8") as f:
            for line in f:
                try:
                    record = json.loads(line)
                except ValueError:
                    if line.endswith("\n"):
                        raise
                    continue    # the last line of a killed run
                self.add(record)

    def rounds(self, run, row, side):
        names = self.measured.get((run, row, side))
        return min(len(f) for f, _ in names.values()) if names else 0

    def sides(self):
        return list(dict.fromkeys(side for _, _, side in self.measured))

    def filesystems(self):
        return list(dict.fromkeys(c["filesystem"]
                                  for c in self.runs.values()))

    def best_run(self, row, peers, filesystem):
        """The run that counts for the row against any of the peers."""
        best, most = None, 0
        for run, circumstances in self.runs.items():
            if circumstances["filesystem"] != filesystem:
                continue
            n = min(self.rounds(run, row, "filter"),
                    max((self.rounds(run, row, p) for p in peers), default=0))
            if n and n >= most:
                best, most = run, n
        return best

    def of(self, run, row, side, name):
        """([figures], unit)"""
        return self.measured[run, row, side].get(name, ([], ""))


def more_is_better(unit):
    return unit.endswith("/s")


def quotient(figures, unit, theirs):
    """Above 1 where figures are better, whether of a rate, a time or a
    size: of the medians, and of the rounds the lowest and the highest."""
    def one(a, b):
        if not more_is_better(unit):
            a, b = b, a
        return a / b if b else float("inf")
    rounds = [one(a, b) for a, b in zip(figures, theirs)]
    return (one(statistics.median(figures), statistics.median(theirs)),
            min(rounds), max(rounds))


def show(figure):
    return "%.0f" % figure if figure >= 100 else "%.3g" % figure


def spread(figures):
    """The median, and how far the others are from it."""
    m = statistics.median(figures)
    if m == 0:
        return "0"
    return "%s (%+.0f..%+.0f%%)" % (show(m), 100 * (min(figures) / m - 1),
                                    100 * (max(figures) / m - 1))
