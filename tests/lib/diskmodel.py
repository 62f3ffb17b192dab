# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""What a disk, its bitmaps and its snapshots have to be.

The model follows requests, several at once.  Where the protocol leaves
it open what a byte becomes (a trim, two requests at once to the same
place) it has the values that the byte may have, asks the server, and
holds it to the answer from then on.
"""

HOLE, ZERO = 1, 2
UNKNOWN = 255
SECTOR = 512
PAGE = 65536
NOTHING = bytes(PAGE)


class Disk:
    """Sparse bytes.  A copy is cheap: pages are never changed in place."""

    def __init__(self, size):
        self.size = size
        self.pages = {}

    def copy(self):
        other = Disk(self.size)
        other.pages = dict(self.pages)
        return other

    def read(self, offset, count):
        first, last = offset // PAGE, (offset + count - 1) // PAGE
        data = b"".join(self.pages.get(i, NOTHING)
                        for i in range(first, last + 1))
        return data[offset - first * PAGE:offset - first * PAGE + count]

    def write(self, offset, data):
        done = 0
        while done < len(data):
            i, at = divmod(offset + done, PAGE)
            n = min(PAGE - at, len(data) - done)
            old = self.pages.get(i, NOTHING)
            self.pages[i] = old[:at] + data[done:done + n] + old[at + n:]
            done += n

    def zero(self, offset, count):
        end = offset + count
        for i in self.used(offset, count):
            start, stop = max(offset, i * PAGE), min(end, (i + 1) * PAGE)
            if stop - start == PAGE:
                del self.pages[i]
            else:
                self.write(start, bytes(stop - start))

    def used(self, offset, count):
        """The numbers of the pages in a range that may not be zero."""
        first, last = offset // PAGE, (offset + count - 1) // PAGE
        if last - first < len(self.pages):
            return [i for i in range(first, last + 1) if i in self.pages]
        return sorted(i for i in self.pages if first <= i <= last)

    def is_zero(self, offset, count):
        for i in self.used(offset, count):
            start = max(offset - i * PAGE, 0)
            if self.pages[i][start:offset + count - i * PAGE].strip(b"\0"):
                return False
        return True


class Operation:
    """A request.  `error` is set when it failed."""

    def __init__(self, verb, offset=0, count=0, data=None, no_hole=False,
                 fast=False, fua=False):
        self.verb = verb
        self.offset = offset
        self.count = count
        self.data = data
        self.no_hole = no_hole
        self.fast = fast
        self.fua = fua
        self.error = None

    def __str__(self):
        flags = [f for f in ("no_hole", "fast", "fua") if getattr(self, f)]
        flags += [self.error] if self.error else []
        what = "" if self.verb == "flush" else " %d+%d" % (
            self.offset, self.count)
        return self.verb + what + "".join(" " + f for f in flags)

    @property
    def end(self):
        return self.offset + self.count

    @property
    def changes(self):
        return self.verb in ("write", "zero", "trim")

    def value(self, start, stop):
        """What it makes of a range that lies inside of it."""
        if self.verb == "write":
            return self.data[start - self.offset:stop - self.offset]
        return bytes(stop - start)

    def overlaps(self, other, unit=1):
        return (self.offset // unit <= (other.end - 1) // unit and
                other.offset // unit <= (self.end - 1) // unit)


class Bitmap:
    """Granules that are dirty, and ranges that may be (`maybe`)."""

    def __init__(self, size, granularity, enabled=True):
        self.granularity = granularity
        self.enabled = enabled
        self.broken = False     # in use after a crash
        self.dirty = bytearray(-(-size // granularity))
        self.maybe = []

    def mark(self, offset, count):
        if self.enabled and not self.broken:
            self.fill(self.dirty, offset, count)

    def fill(self, dirty, offset, count):
        first = offset // self.granularity
        end = (offset + count - 1) // self.granularity + 1
        dirty[first:end] = b"\1" * (end - first)

    def clear(self):
        self.dirty = bytearray(len(self.dirty))
        self.maybe = []

    def merge(self, other):
        size = len(self.dirty) * self.granularity
        for n in ones(other.dirty):
            start = n * other.granularity
            self.fill(self.dirty, start,
                      min(other.granularity, size - start))

    def upper(self):
        most = bytearray(self.dirty)
        for offset, count in self.maybe:
            self.fill(most, offset, count)
        return most

    def adopt(self, got, where, exact=True):
        """Be what a server says, if it may say that."""
        missing = [n for n in ones(self.dirty) if not got[n]]
        assert not missing, "%s: not dirty: %s" % (where, missing[:9])
        if exact:
            most = self.upper()
            extra = [n for n in ones(got) if not most[n]]
            assert not extra, "%s: dirty: %s" % (where, extra[:9])
        self.dirty = bytearray(got)
        self.maybe = []


def ones(dirty):
    """The numbers of the granules that are set."""
    n = dirty.find(1)
    while n >= 0:
        yield n
        n = dirty.find(1, n + 1)


def differs(got, values):
    """The first byte that is none of what it may be; None if all are."""
    if any(got == value for value in values):
        return None
    for at in range(0, len(got), SECTOR):
        piece = got[at:at + SECTOR]
        choices = [value[at:at + SECTOR] for value in values]
        if piece in choices:
            continue
        for i, byte in enumerate(piece):
            if all(byte != choice[i] for choice in choices):
                return at + i
    return None


class Model:
    def __init__(self, disk, cluster, version):
        self.disk = disk
        self.size = disk.size
        self.cluster = cluster
        self.version = version
        self.sure_trim = True   # trimmed clusters read as zeroes
        self.may_crash = False  # what to keep the past of the bytes for
        self.bitmaps = {}
        self.snapshots = {}
        self.kinds = None       # of each cluster, or not followed
        self.torn = set()       # sectors that were written in a crash
        self.flushed()

    def flushed(self):
        """Nothing but this may be found after a crash."""
        self.durable = self.disk.copy()
        self.pending = []

    def usable(self):
        return {name: b for name, b in self.bitmaps.items() if not b.broken}

    # -----------------------------------------------------------------
    # Requests, at once, that were all answered.

    def done(self, ops, read):
        """read (offset, count) asks the server what it has there."""
        before = self.disk.copy()
        changing = [op for op in ops if op.changes]
        for op in changing:
            for bitmap in self.bitmaps.values():
                if op.error is None:
                    bitmap.mark(op.offset, op.count)
                elif bitmap.enabled and not bitmap.broken:
                    bitmap.maybe.append((op.offset, op.count))
        changing = [op for op in changing if op.error is None]
        doubtful = [op for op in changing if op.verb == "trim" or any(
            op is not other and op.overlaps(other) for other in changing)]
        for op in changing:
            if op in doubtful:
                continue
            if op.verb == "zero":
                self.disk.zero(op.offset, op.count)
            else:
                self.disk.write(op.offset, op.data)
        self.settle(doubtful, before, read)
        for op in ops:
            if op.verb == "read" and op.error is None:
                self.check_read(op, changing, before)
        self.follow_kinds(changing)
        if not self.may_crash:
            return
        if any(op.verb == "flush" and op.error is None for op in ops):
            self.durable, self.pending = before, []
        self.pending += [(op.offset, self.disk.read(op.offset, op.count),
                          op.fua) for op in changing]

    def cuts(self, ops):
        """The places where what may be found changes."""
        places = set()
        for op in ops:
            places |= {op.offset, op.end}
            if op.verb == "trim":
                places |= set(self.whole(op))
        return sorted(places)

    def whole(self, op):
        """The whole clusters of a range; the last one may be short."""
        cs = self.cluster
        start = -(-op.offset // cs) * cs
        stop = op.end if op.end == self.size else op.end // cs * cs
        return (start, stop) if start < stop else (op.offset, op.offset)

    def choices(self, start, stop, ops, before):
        """What a range may be after the ops, inside of all or none."""
        ops = [op for op in ops if op.offset <= start and stop <= op.end]
        values = [op.value(start, stop) for op in ops]
        if all(self.may_keep(op, start, stop) for op in ops):
            values.append(before.read(start, stop - start))
        return values

    def may_keep(self, op, start, stop):
        """May an operation leave this part of its range as it was?"""
        if op.verb != "trim":
            return False
        first, end = self.whole(op)
        return not (self.sure_trim and first <= start and stop <= end)

    def settle(self, doubtful, before, read):
        places = self.cuts(doubtful)
        for start, stop in zip(places, places[1:]):
            met = [op for op in doubtful
                   if op.offset <= start and stop <= op.end]
            if not met:
                continue
            if not any(op.verb == "write" or self.may_keep(op, start, stop)
                       for op in met):
                self.disk.zero(start, stop - start)
                continue
            for at in range(start, stop, 1 << 20):
                end = min(at + (1 << 20), stop)
                values = self.choices(at, end, doubtful, before)
                got = read(at, end - at)
                bad = differs(got, values)
                assert bad is None, \
                    "after requests at once, byte %d is %d, not one of %s" % (
                        at + bad, got[bad], sorted({v[bad] for v in values}))
                if got.count(0) == len(got):
                    self.disk.zero(at, len(got))
                else:
                    self.disk.write(at, got)

    def check_read(self, op, changing, before):
        met = [other for other in changing if op.overlaps(other)]
        if not met:
            wanted = [before.read(op.offset, op.count)]
            bad = differs(op.data, wanted)
            assert bad is None, "%s: byte %d is %d, not %d" % (
                op, op.offset + bad, op.data[bad], wanted[0][bad])
            return
        places = [op.offset] + [p for p in self.cuts(met)
                                if op.offset < p < op.end] + [op.end]
        for start, stop in zip(places, places[1:]):
            values = self.choices(start, stop, met, before)
            values.append(before.read(start, stop - start))
            got = op.data[start - op.offset:stop - op.offset]
            bad = differs(got, values)
            assert bad is None, "%s met %s: byte %d is %d, not one of %s" % (
                op, [str(m) for m in met], start + bad, got[bad],
                sorted({v[bad] for v in values}))

    # -----------------------------------------------------------------
    # The kinds of clusters, where the server has no choice.

    def follow_kinds(self, changing):
        if self.kinds is None:
            return
        for op in changing:
            self.follow_kind(op)
        for op in changing:
            for other in changing:
                if op.verb != other.verb and op.overlaps(other, self.cluster):
                    self.forget_kinds(max(op.offset, other.offset),
                                      min(op.end, other.end))

    def forget_kinds(self, start, stop):
        cs = self.cluster
        # Two that only share a cluster are apart by less than one.
        start, stop = min(start, stop - 1), max(start, stop - 1)
        for i in range(start // cs, stop // cs + 1):
            self.kinds[i] = UNKNOWN

    def follow_kind(self, op):
        cs, kinds = self.cluster, self.kinds
        start, stop = self.whole(op)
        for i in range(op.offset // cs, (op.end - 1) // cs + 1):
            whole = start <= i * cs < stop
            if op.verb == "write":
                kinds[i] = 0
            elif op.verb == "trim":
                kinds[i] = HOLE | ZERO if whole else kinds[i]
            elif self.version < 3:
                kinds[i] = UNKNOWN
            elif whole:
                kinds[i] = ZERO
            elif kinds[i] != ZERO or op.no_hole:
                # Data stays data, unless all of it is zeroes by now.
                if kinds[i] != 0 or self.disk.is_zero(
                        i * cs, min(cs, self.size - i * cs)):
                    kinds[i] = UNKNOWN

    # -----------------------------------------------------------------
    # A crash.

    def crashed(self, flying, read):
        """The server was killed with some requests unanswered: old or
        new, sector by sector; what was flushed is there (I2)."""
        values = {}
        for offset, data, fua in self.pending:
            self.add_values(values, offset, data, fua)
        for op in flying:
            if op.changes:
                self.add_values(values, op.offset,
                                op.value(op.offset, op.end), False)
                for b in self.bitmaps.values():
                    if b.enabled and not b.broken:
                        b.maybe.append((op.offset, op.count))
        numbers = sorted(values)
        self.torn |= values.keys()
        first = 0
        for i, n in enumerate(numbers):
            if i + 1 == len(numbers) or numbers[i + 1] != n + 1 or \
                    i - first == 2047:
                self.adopt_sectors(numbers[first:i + 1], values, read)
                first = i + 1
        self.flushed()

    def adopt_sectors(self, numbers, values, read):
        start = numbers[0] * SECTOR
        got = read(start, len(numbers) * SECTOR)
        for i, n in enumerate(numbers):
            piece = got[i * SECTOR:(i + 1) * SECTOR]
            assert piece in values[n], \
                "I2: after a crash sector %d holds %r, not one of %r" % (
                    n, piece[:16], [v[:16] for v in values[n]])
        self.disk.write(start, got)

    def add_values(self, values, offset, data, durable):
        for n in range(offset // SECTOR,
                       (offset + len(data) - 1) // SECTOR + 1):
            if n not in values:
                values[n] = [self.durable.read(n * SECTOR, SECTOR)]
            start = max(offset, n * SECTOR)
            stop = min(offset + len(data), (n + 1) * SECTOR)
            old = values[n][-1]
            new = (old[:start - n * SECTOR] +
                   data[start - offset:stop - offset] +
                   old[stop - n * SECTOR:])
            if durable and stop - start == SECTOR:
                values[n] = []
            values[n].append(new)
