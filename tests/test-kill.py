#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""kill -9 at many points: no errors in the image but leaks (I1), what
was flushed reads back (I2), and a bitmap that is not marked in-use has
every change (I3).  A disabled bitmap does not change at all (I4).  With
dirty-bitmap-crash=keep no bitmap is ever marked.

POINTS=N kills more often; SEED=N replays (as far as time can be).
"""

import os
import shutil
import threading

import harness
from harness import Server, nbd
from history import History, NOTHING, Operation, SECTOR
from qcow2image import Image

rnd = harness.seeded()
POINTS = int(os.environ.get("POINTS", "48"))
SIZE = 16 << 20
DEPTH = 8
OFF = ["off"] if harness.SERVER == "nbdkit" else []


def draw(history):
    """An operation on sectors that no request in flight touches."""
    count = rnd.choice([1, 8, 13, 64, 128, 300])
    first = rnd.randrange(SIZE // SECTOR - count)
    if rnd.random() < 0.5:
        first -= first % 128
    if history.busy.intersection(range(first, first + count)):
        return None, None
    kind = rnd.choice(["write"] * 6 + ["zero", "trim"])
    if kind == "write":
        stamp = rnd.randbytes(16)
        values = [{((stamp + i.to_bytes(4, "big")) * 26)[:SECTOR]}
                  for i in range(count)]
    else:
        values = [{NOTHING} if kind == "zero" else None] * count
    return kind, Operation(first, values)


def start(h, history, flush_often):
    """Issue one request; (cookie, function to call when it is done)."""
    if rnd.random() < flush_often:
        snapshot = history.flush_issued()
        return h.aio_flush(), lambda: history.flush_acked(snapshot)
    kind, op = draw(history)
    if op is None:
        return None
    offset, count = op.first * SECTOR, len(op.values) * SECTOR
    fua = nbd.CMD_FLAG_FUA if rnd.random() < 0.05 else 0
    history.issue(op)
    if kind == "write":
        data = bytearray(b"".join(v for s in op.values for v in s))
        cookie = h.aio_pwrite(nbd.Buffer.from_bytearray(data), offset,
                              flags=fua)
    elif kind == "zero":
        cookie = h.aio_zero(count, offset, flags=fua)
    else:
        cookie = h.aio_trim(count, offset, flags=fua)
    return cookie, lambda: history.ack(op, bool(fua))


def load(h, history, flush_often):
    """Keep requests in flight until the server is gone."""
    flying = []
    try:
        while True:
            while len(flying) < DEPTH:
                started = start(h, history, flush_often)
                if started:
                    flying.append(started)
            h.poll(-1)
            flying = [(c, done) for c, done in flying
                      if not (h.aio_command_completed(c) and
                              (done() or True))]
    except nbd.Error:
        pass


def images():
    """Images to start from, with some data and bits in them."""
    for cluster in (512, 4096, 65536):
        name = "base%d.qcow2" % cluster
        harness.create(name, SIZE, ("fine", 512), ("coarse", 65536),
                       ("off", 4096), options="cluster_size=%d" % cluster)
        harness.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 1M 3M",
                    "-c", "write -P 2 9000000 512", name)
        harness.run("qemu-img", "bitmap", "--disable", name, "off")
        yield name, harness.contents(name), Image(name).bitmap("off").raw()


harness.requires("qemu-io")
bases = list(images())
clean = 0
for point in range(POINTS):
    base, original, off = bases[point % len(bases)]
    shutil.copyfile(base, "disk.qcow2")
    history = History(original)
    keep = harness.SERVER == "nbdkit" and point // len(bases) % 2
    server = Server("disk.qcow2",
                    *(["dirty-bitmap-crash=keep"] if keep else []))
    h = server.connect()
    killer = threading.Timer(rnd.uniform(0, 0.12), server.process.kill)
    killer.start()
    load(h, history, rnd.choice([0.01, 0.05, 0.3]))
    killer.join()
    server.kill()
    unmarked = history.verify("disk.qcow2", disabled=OFF)
    clean += unmarked
    assert not keep or unmarked == 2, "a kill cost a bitmap"
    if harness.SERVER != "nbdkit":
        continue
    assert Image("disk.qcow2").bitmap("off").raw() == off, "I4"
    if point % 6 == 0:
        # The image goes on: it is served, written and stopped cleanly.
        before = harness.contents("disk.qcow2")
        server = Server("disk.qcow2")
        h = server.connect()
        assert h.pread(SIZE, 0) == before
        h.pwrite(b"again" * 1000, 12345)
        h.shutdown()
        server.stop()
        harness.check("disk.qcow2")
        assert harness.contents("disk.qcow2")[12345:17345] == b"again" * 1000
print("%d kills, %d bitmaps survived unmarked" % (POINTS, clean))
