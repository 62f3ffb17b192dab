#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Block status as clients rely on it: one reply covers the same range in
every context, exactly the range that was asked for, with merged extents
of legal types (rules R1 to R5, R7 and R13), over bitmaps alone, base
alone, and both.
"""

import harness
from harness import CONTEXT, HOLE, ZERO, Server, block_status, nbd

rnd = harness.seeded()
SIZE = 256 << 20
BASE = "base:allocation"
FINE, COARSE = CONTEXT + "fine", CONTEXT + "coarse"
OURS = harness.SERVER == "nbdkit"

harness.create("disk.qcow2", SIZE, ("fine", 512), ("coarse", 65536))
server = Server("disk.qcow2")
h = server.connect(BASE, FINE, COARSE)
for name in (BASE, FINE, COARSE):
    assert h.can_meta_context(name)

# Every other granule of 4 MiB: 4096 runs in the fine bitmap.
cookies = []
for n in range(0, 8192, 2):
    cookies.append(h.aio_pwrite(nbd.Buffer.from_bytearray(
        bytearray(b"x" * 512)), (64 << 20) + n * 512))
    while h.aio_in_flight() > 12:
        h.poll(-1)
while h.aio_in_flight():
    h.poll(-1)
for c in cookies:
    assert h.aio_command_completed(c)
h.zero(1 << 20, 100 << 20)
h.pwrite(b"y" * (1 << 20), 120 << 20)
h.trim(512 << 10, 120 << 20)

MB = 1 << 20
DIRTY = {n for n in range(0, SIZE // 512)
         if (64 * MB <= n * 512 < 68 * MB and n % 2 == 0) or
         100 * MB <= n * 512 < 101 * MB or 120 * MB <= n * 512 < 121 * MB}
TYPES = [(64 * MB, HOLE | ZERO), (4 * MB, 0), (32 * MB, HOLE | ZERO),
         (MB, ZERO), (19 * MB, HOLE | ZERO), (MB // 2, HOLE | ZERO),
         (MB // 2, 0), (135 * MB, HOLE | ZERO)]


def expected(offset, count):
    """The merged extents of the fine bitmap in a range."""
    runs = []
    at = offset
    while at < offset + count:
        n = min(512 - at % 512, offset + count - at)
        runs.append((n, int(at // 512 in DIRTY)))
        at += n
    return harness.merge(runs)


assert harness.granules(harness.extents(h, FINE), 512) == DIRTY
assert harness.granules(harness.extents(h, COARSE), 65536) == \
    {n // 128 for n in DIRTY}
if OURS:
    assert harness.extents(h, BASE) == harness.merge(TYPES)

# Random ranges, aligned or not: clipped, covered, merged, equal sums.
ranges = [(0, SIZE), (SIZE - 1, 1), (64 * MB, 4 * MB), (64 * MB + 1, 511)]
for _ in range(120):
    count = rnd.choice([1, 7, 512, 5000, 65536, 1 << 20])
    ranges.append((rnd.choice([60 * MB, 64 * MB, 98 * MB, 119 * MB]) +
                   rnd.randrange(3 * MB), count))
for contexts in ((BASE, FINE, COARSE), (FINE,), (COARSE,), (BASE,),
                 (BASE, COARSE)):
    c = server.connect(*contexts)
    for offset, count in ranges:
        replies = {}

        def extent(name, at, entries, error):
            assert name not in replies, "two chunks for " + name
            assert at == offset
            replies[name] = list(zip(entries[0::2], entries[1::2]))

        c.block_status(count, offset, extent)
        assert set(replies) == set(contexts)
        for name, runs in replies.items():
            assert sum(n for n, _ in runs) == count, (name, offset, count)
            assert all(n > 0 for n, _ in runs)
            assert runs == harness.merge(runs), "neighbours of one type"
            assert all(kind in ((0, 1) if name != BASE else (0, 2, 3))
                       for _, kind in runs), (name, runs)
        if FINE in replies and count < 2 * MB:
            assert replies[FINE] == expected(offset, count)

        # REQ_ONE: one extent for each, of its own true length.
        full = replies
        replies = {}
        c.block_status(count, offset, extent, nbd.CMD_FLAG_REQ_ONE)
        for name in contexts:
            assert replies[name] == full[name][:1], (name, offset, count)
    c.shutdown()

# What is wrong is refused, and the connection goes on.
h.set_strict_mode(0)
for count, offset in ((0, 0), (512, SIZE), (SIZE, 512), (512, 1 << 63)):
    try:
        h.block_status(count, offset, lambda *a: None)
    except nbd.Error as e:
        assert e.errno == "EINVAL", e
    else:
        raise AssertionError("block status of %d at %d" % (count, offset))
c = server.connect()
c.set_strict_mode(0)
try:
    c.block_status(512, 0, lambda *a: None)
except nbd.Error:
    pass
else:
    raise AssertionError("block status without a context")
assert h.pread(512, 64 << 20) == b"x" * 512
for handle in (h, c):
    handle.shutdown()
server.stop()
