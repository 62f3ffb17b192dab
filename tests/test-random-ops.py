#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Random operations against a plain model: the data, the kinds of
extents, the dirty granules, what QEMU makes of the image, and all that
again after the server was stopped or killed and the image opened anew.

SEED=N replays a run; ROUNDS=N makes it longer.
"""

import os

import harness
from harness import CONTEXT, HOLE, ZERO, Server, nbd

rnd = harness.seeded()
ROUNDS = int(os.environ.get("ROUNDS", "14"))


class Model:
    """The disk as bytes, the kind of each cluster, and each bitmap's
    dirty granules.

    A cluster is data, zero or hole; None where the specification leaves
    the server a choice (a part of a hole is zeroed, or must not be a hole).
    """

    def __init__(self, size, cluster, bitmaps, version):
        self.size = size
        self.data = bytearray(size)
        self.cluster = cluster
        self.kinds = [HOLE | ZERO] * -(-size // cluster)
        self.bitmaps = {name: (gran, set()) for name, gran in bitmaps}
        self.version = version

    def mark(self, offset, count):
        for gran, dirty in self.bitmaps.values():
            dirty.update(range(offset // gran,
                               (offset + count - 1) // gran + 1))

    def clusters(self, offset, count):
        """Yield (cluster, is all of it in the range)."""
        cs = self.cluster
        for i in range(offset // cs, (offset + count - 1) // cs + 1):
            end = min((i + 1) * cs, self.size)
            yield i, offset <= i * cs and offset + count >= end

    def write(self, offset, data):
        self.data[offset:offset + len(data)] = data
        self.mark(offset, len(data))
        for i, _ in self.clusters(offset, len(data)):
            self.kinds[i] = 0

    def zero(self, offset, count, no_hole):
        self.data[offset:offset + count] = bytes(count)
        self.mark(offset, count)
        for i, whole in self.clusters(offset, count):
            if self.version < 3:
                self.kinds[i] = None
            elif whole:
                self.kinds[i] = ZERO
            elif self.kinds[i] != ZERO or no_hole:
                # Data, unless all of the cluster is zero by now.
                cs = self.cluster
                if self.kinds[i] != 0 or not any(
                        self.data[i * cs:(i + 1) * cs]):
                    self.kinds[i] = None

    def trim(self, offset, count):
        self.mark(offset, count)
        for i, whole in self.clusters(offset, count):
            if whole:
                cs = self.cluster
                end = min((i + 1) * cs, self.size)
                self.data[i * cs:end] = bytes(end - i * cs)
                self.kinds[i] = HOLE | ZERO


def compare(h, model, where):
    size = model.size
    step = 8 << 20
    for offset in range(0, size, step):
        n = min(step, size - offset)
        got = h.pread(n, offset)
        if got != model.data[offset:offset + n]:
            bad = next(i for i in range(n) if got[i] != model.data[offset + i])
            raise AssertionError("%s: byte %d is %r, not %r" % (
                where, offset + bad, got[bad], model.data[offset + bad]))
    for name, (gran, dirty) in model.bitmaps.items():
        got = harness.granules(harness.extents(h, CONTEXT + name), gran)
        assert got == dirty, "%s: %s: too many %s, missing %s" % (
            where, name, sorted(got - dirty)[:9], sorted(dirty - got)[:9])
    if harness.SERVER == "nbdkit":
        compare_kinds(h, model, where)


def compare_kinds(h, model, where):
    offset = 0
    for length, kind in harness.extents(h, "base:allocation"):
        assert kind in (0, ZERO, HOLE | ZERO), "%s: type %d" % (where, kind)
        for i, _ in model.clusters(offset, length):
            wanted = model.kinds[i]
            assert wanted is None or kind == wanted, \
                "%s: cluster %d (at %d) has type %d, not %d" % (
                    where, i, i * model.cluster, kind, wanted)
        if kind:
            assert not any(model.data[offset:offset + length])
        offset += length


def one_operation(h, model):
    size = model.size
    count = min(rnd.choice([1, 511, 512, 4096, 65536, 1 << 20, 3 << 20]), size)
    count = rnd.randint(1, count) if rnd.random() < 0.5 else count
    offset = rnd.randint(0, size - count)
    if rnd.random() < 0.6:
        offset -= offset % 512
        if rnd.random() < 0.5:
            offset -= offset % model.cluster
    fua = nbd.CMD_FLAG_FUA if rnd.random() < 0.05 else 0
    verb = rnd.choice(["write"] * 5 + ["zero"] * 3 + ["trim"] * 2 +
                      ["read", "flush", "cache"])
    if verb == "write":
        data = rnd.randbytes(min(count, 1 << 12)) * (count // (1 << 12) + 1)
        h.pwrite(data[:count], offset, fua)
        model.write(offset, data[:count])
    elif verb == "zero":
        flags = nbd.CMD_FLAG_NO_HOLE if rnd.random() < 0.3 else 0
        if rnd.random() < 0.3 and harness.SERVER == "nbdkit":
            flags |= nbd.CMD_FLAG_FAST_ZERO
        try:
            h.zero(count, offset, fua | flags)
        except nbd.Error as e:
            # Only fast zeroing may be refused, having changed nothing but
            # (failed requests are recorded) the bitmaps.
            assert e.errno == "ENOTSUP" and flags & nbd.CMD_FLAG_FAST_ZERO, e
            for name, (gran, dirty) in model.bitmaps.items():
                dirty |= harness.granules(
                    harness.extents(h, CONTEXT + name), gran)
        else:
            model.zero(offset, count, bool(flags & nbd.CMD_FLAG_NO_HOLE))
    elif verb == "trim":
        h.trim(count, offset, fua)
        model.trim(offset, count)
    elif verb == "read":
        assert h.pread(count, offset) == model.data[offset:offset + count]
    elif verb == "cache":
        h.cache(count, offset)
    else:
        h.flush()


def connect(server, model):
    return server.connect("base:allocation",
                          *[CONTEXT + name for name in model.bitmaps])


def one_disk(cluster, params, version=3):
    size = rnd.choice([1 << 20, 20 << 20, (7 << 20) + 512])
    bitmaps = [("fine", 512), ("coarse", rnd.choice([4096, 65536, 2 << 20]))]
    bitmaps = bitmaps if version >= 3 else []
    disk = "disk.qcow2"
    options = "cluster_size=%d,compat=%s" % (
        cluster, "1.1" if version >= 3 else "0.10")
    if os.path.exists(disk):
        os.unlink(disk)
    harness.create(disk, size, *bitmaps, options=options)
    model = Model(size, cluster, bitmaps, version)
    where = "cluster size %d, size %d, version %d" % (cluster, size, version)
    print(where, flush=True)
    killed = False
    for session in range(4):
        server = Server(disk, *params)
        h = connect(server, model)
        compare(h, model, where + ", opened again")
        for _ in range(rnd.randint(1, 60)):
            one_operation(h, model)
        compare(h, model, where + ", session %d" % session)
        if rnd.random() < 0.3 and harness.SERVER == "nbdkit":
            h.flush()
            server.kill()
            killed = True
        else:
            h.shutdown()
            server.stop()
        harness.check(disk, leaks=killed)
        for name, (gran, dirty) in model.bitmaps.items():
            assert "in-use" not in harness.flags(disk, name)
            got = harness.granules(harness.qemu_extents(disk, name), gran)
            assert got == dirty, "%s: QEMU sees something else in %s" % (
                where, name)
        assert harness.contents(disk) == model.data, \
            where + ": QEMU reads something else"


for turn in range(ROUNDS):
    cluster_size = [512, 4096, 65536, 2 << 20][turn % 4]
    small_cache = harness.SERVER == "nbdkit" and turn % 2
    one_disk(cluster_size,
             ["dirty-bitmap-cache-size=1M"] if small_cache else [],
             version=2 if turn % 7 == 6 else 3)
