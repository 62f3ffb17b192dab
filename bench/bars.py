# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""What the filter has to reach, and the judgement whether it does."""

import statistics

import figures
import serving
import workloads

# The bars.  By row and figure: how many times better than each of these
# the filter must at least be,
#   qemu   qemu-nbd -B with its defaults
#   best   qemu-nbd -B with whichever aio or cache is fastest in that row
#   raw    nbdkit's file plugin serving a raw copy: no format, no bitmap
#   mark   this filter with dirty-bitmap-crash=mark
#   nbd    nbdkit's nbd plugin without the filter
# or, AT_MOST, how many times as much as theirs its use may be.
AT_LEAST = {
    ("read1", ""): {"qemu": 1.8, "best": 1.05, "raw": 1.3},
    ("write1", ""): {"qemu": 1.7, "best": 1.15, "raw": 1.2},
    ("read16", ""): {"qemu": 3.5, "best": 2.0, "raw": 1.2},
    ("read16x4", ""): {"qemu": 3.5, "best": 2.0, "raw": 1.2},
    ("write16", ""): {"qemu": 3.5, "best": 2.2, "raw": 1.1, "mark": 0.97},
    ("write16x4", ""): {"qemu": 3.5, "best": 2.2, "raw": 1.1},
    ("mixed16", ""): {"qemu": 3.0, "best": 2.0, "raw": 1.1},
    ("alloc1", ""): {"qemu": 3.0, "best": 2.5},
    ("alloc16", ""): {"qemu": 5.0, "best": 5.0},
    ("flush1", ""): {"qemu": 2.5, "best": 2.3, "raw": 0.9},
    ("seqread", ""): {"qemu": 2.5, "best": 2.5, "raw": 1.0},
    ("seqwrite", ""): {"qemu": 2.0, "best": 2.0, "raw": 1.0},
    ("read1t", ""): {"qemu": 4.0, "best": 1.5},
    ("map64m", ""): {"qemu": 2.0, "best": 2.0},
    ("map1g", ""): {"qemu": 1.4, "best": 1.4},
    ("map4g", ""): {"qemu": 1.4, "best": 1.4},
    ("base1g", ""): {"qemu": 2.5, "best": 2.5},
    ("life", "start to first answer"): {"qemu": 5.0},
    ("life", "stop, after 1000 writes"): {"qemu": 4.0},
    # Marking costs nothing: against the filter without bitmaps.
    ("marking", ""): {"none": 0.97, "mark": 0.97},
    # Bits ahead of changes.
    ("clean-flush1", ""): {"qemu": 1.0},
    ("clean-flush16", ""): {"qemu": 1.0, "raw": 1.0},
    ("clean-fua1", ""): {"qemu": 1.0, "raw": 1.0},
    ("clean-fua16", ""): {"qemu": 1.0, "raw": 1.0},
    ("first-write16", ""): {"mark": 0.9},
    ("first-seq4k", ""): {"mark": 0.97},
    ("first-seq1m", ""): {"mark": 0.97},
}
for _row in workloads.ROWS:
    if _row.startswith("beside-"):
        AT_LEAST[_row, ""] = {"raw": 1.0}
    elif _row.startswith("behind-"):
        AT_LEAST[_row, ""] = {"nbd": 0.97}
AT_MOST = {
    ("read16", "server CPU"): {"qemu": 0.30, "raw": 0.8},
    ("write16", "server CPU"): {"qemu": 0.30, "raw": 0.8},
    ("read16x4", "server CPU"): {"qemu": 0.30, "raw": 0.8},
    ("write16x4", "server CPU"): {"qemu": 0.30, "raw": 0.8},
    ("mixed16", "server CPU"): {"qemu": 0.30, "raw": 0.8},
    ("map1g", "server CPU"): {"qemu": 0.3},
    ("map4g", "server CPU"): {"qemu": 0.3},
    ("life", "resident memory"): {"qemu": 0.6},
}

# Where the file system sets the pace (anything but tmpfs), the columns raw
# and mark alone count, and these.
ON_DISK = {
    ("flush1", ""): {"qemu": 1.2},
    ("clean-flush1", ""): {"qemu": 1.0, "mark": 1.8},
    ("clean-flush16", ""): {"qemu": 1.0},
    ("clean-fua1", ""): {"qemu": 1.0},
    ("clean-fua16", ""): {"qemu": 1.0},
}

# As few as these say little: they are shown and not judged.
ENOUGH_ROUNDS = 5

COLUMNS = ["qemu", "best", "raw", "none", "mark", "nbd"]


def bars(filesystem):
    """[((row, figure), column, bar, at most?)]"""
    out = []
    for table, at_most in (AT_LEAST, False), (AT_MOST, True):
        for key, columns in table.items():
            if filesystem != "tmpfs":
                columns = {c: b for c, b in columns.items()
                           if c in ("raw", "mark")}
                columns.update({} if at_most else ON_DISK.get(key, {}))
            out += [(key, c, columns[c], at_most)
                    for c in COLUMNS if c in columns]
    order = list(workloads.ROWS)
    return sorted(out, key=lambda bar: order.index(bar[0][0]))


def candidates(column, row, filesystem):
    if column != "best":
        return [column]
    sides = [s for s in serving.SIDES if serving.SIDES[s].group == "best"]
    # Without a flush there is nothing to compare a flush with, where a
    # flush costs anything.
    if row == "flush1" and filesystem != "tmpfs":
        sides.remove("unsafe")
    return sides


def fastest(known, run, row, name, sides):
    """Of those of the sides that took part."""
    def goodness(side):
        f, unit = known.of(run, row, side, name)
        m = statistics.median(f)
        return m if figures.more_is_better(unit) else -m
    return max((s for s in sides if known.rounds(run, row, s)),
               key=goodness)


def judge(known, filesystem):
    """[(title, against, ratio as text, bar as text, verdict)], and
    [(row, column)] of what was not measured"""
    out, missing = [], []
    for (row, name), column, bar, at_most in bars(filesystem):
        title = workloads.figure_title(row, name)
        bar_text = "%s %.2f" % ("≤" if at_most else "≥", bar)
        sides = candidates(column, row, filesystem)
        # The best of one is no best.
        others = [s for s in sides if s != "qemu"] if column == "best" \
            else sides
        run = known.best_run(row, others, filesystem)
        if run is None or not known.of(run, row, "filter", name)[0]:
            missing.append((row, column))
            continue
        peer = fastest(known, run, row, name, sides)
        ours, unit = known.of(run, row, "filter", name)
        theirs, _ = known.of(run, row, peer, name)
        ratio, low, high = figures.quotient(ours, unit, theirs)
        if at_most:
            ratio, low, high = [1 / r if r else float("inf")
                                for r in (ratio, high, low)]
        met = ratio <= bar if at_most else ratio >= bar
        rounds = min(len(ours), len(theirs))
        verdict = "met" if met else "missed"
        if rounds < ENOUGH_ROUNDS:
            verdict = "(%s, rounds: %d)" % (verdict, rounds)
        out.append((title, peer if column != "best" else "best: " + peer,
                    "%.2f (%.2f..%.2f)" % (ratio, low, high), bar_text,
                    verdict))
    return out, missing


def print_judgement(known):
    """True: nothing that was measured is below its bar."""
    good = True
    for filesystem in known.filesystems():
        lines, missing = judge(known, filesystem)
        print("\nAgainst the bars, images on %s:\n" % filesystem)
        print("| workload | against | ratio (of rounds, lowest..highest) | "
              "bar | |")
        print("|---|---|---|---|---|")
        for line in lines:
            print("| " + " | ".join(line) + " |")
        missed = sum("missed" in line[-1] for line in lines)
        print("\n%d met, %d missed, %d not measured%s" %
              (len(lines) - missed, missed, len(missing),
               ": " + " ".join("%s/%s" % cell for cell in
                               dict.fromkeys(missing)) if missing else ""))
        good = good and missed == 0
    return good
