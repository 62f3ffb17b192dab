#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""kill -9 at many points: no errors in the image but leaks (I1), what
was flushed reads back (I2), and a bitmap that is not marked in-use has
every change (I3).  A disabled bitmap does not change at all (I4).  With
dirty-bitmap-crash=keep no bitmap is ever marked, and none reports more than
the statistics said that it would.  The disk is in the image, or beside it
(dirty-bitmap-image).

POINTS=N kills more often; SEED=N replays (as far as time can be).
"""

import os
import shutil
import threading
import time

import harness
from harness import Server, nbd
from history import History, NOTHING, Operation, SECTOR
from qcow2image import Image
from statsfile import refresh

rnd = harness.seeded()
POINTS = int(os.environ.get("POINTS", "48"))
SIZE = 16 << 20
DEPTH = 2
WRITERS = 4
RECORDING = {"sector": 512, "fine": 4096, "default": 65536,
             "coarse": 2 << 20}
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


def collect(h, flying):
    """Those that are still in flight."""
    h.poll(1)
    return [(cookie, done) for cookie, done in flying
            if not (h.aio_command_completed(cookie) and (done() or True))]


def load(handles, history, flush_often, seconds):
    """Keep requests in flight, for so long or until the server is gone."""
    end = time.monotonic() + seconds
    flying = [[] for _ in handles]
    try:
        while time.monotonic() < end or any(flying):
            for i, h in enumerate(handles):
                while len(flying[i]) < DEPTH and time.monotonic() < end:
                    started = start(h, history, flush_often)
                    if started:
                        flying[i].append(started)
                if flying[i]:
                    flying[i] = collect(h, flying[i])
    except nbd.Error:
        pass


def set_bytes(name):
    bitmap = Image("disk.qcow2").bitmap(name)
    return len(bitmap.bits()) * bitmap.granularity


def check_extra(server, handles, history, flush_often):
    """Without a request in flight, what a bitmap in the image has is known
    to the byte.  Ends with a kill."""
    # The server writes the file once by itself, at its start.
    harness.until(lambda: os.path.exists("stats"), "the server's first file")
    load(handles, history, flush_often, rnd.uniform(0, 0.1))
    stats = refresh(server.pid, "stats")
    server.process.kill()
    for name in RECORDING:
        dirty = stats("dirty_bytes", bitmap=name)
        extra = stats("extra_bytes", bitmap=name)
        assert set_bytes(name) == dirty + extra, \
            "%s has %d bytes, not %d + %d" % (
                name, set_bytes(name), dirty, extra)


def images():
    """Images to start from, with some data and bits in them, and raw disks
    that they are beside."""
    for cluster in (512, 4096, 65536):
        name = "base%d.qcow2" % cluster
        harness.create(name, SIZE, *RECORDING.items(), ("off", 4096),
                       options="cluster_size=%d" % cluster)
        harness.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 1M 3M",
                    "-c", "write -P 2 9000000 512", name)
        harness.run("qemu-img", "bitmap", "--disable", name, "off")
        off = Image(name).bitmap("off").raw()
        yield name, None, harness.contents(name), off
    if harness.SERVER == "nbdkit":
        name = "beside.qcow2"
        harness.create(name, SIZE, *RECORDING.items(), ("off", 4096))
        harness.run("qemu-img", "bitmap", "--disable", name, "off")
        original = rnd.randbytes(3 << 20) + bytes(SIZE - (3 << 20))
        with open("base.raw", "wb") as f:
            f.write(original)
        yield name, "disk.raw", original, Image(name).bitmap("off").raw()


def serve(disk, *params):
    if disk is None:
        return Server("disk.qcow2", *params)
    return Server(disk, "dirty-bitmap-image=disk.qcow2", *params)


harness.requires("qemu-io")
bases = list(images())
clean = 0
for point in range(POINTS):
    base, disk, original, off = bases[point % len(bases)]
    shutil.copyfile(base, "disk.qcow2")
    if disk is not None:
        shutil.copyfile("base.raw", disk)
    history = History(original)
    keep = harness.SERVER == "nbdkit" and point // len(bases) % 2
    if os.path.exists("stats"):
        os.remove("stats")
    server = serve(disk, *(
        ["dirty-bitmap-crash=" + ("keep" if keep else "mark"),
         "dirty-bitmap-stats=" + os.path.realpath("stats")]
        if harness.SERVER == "nbdkit" else []))
    handles = [server.connect() for _ in range(WRITERS)]
    flush_often = rnd.choice([0.01, 0.05, 0.3])
    if keep and rnd.random() < 0.25:
        check_extra(server, handles, history, flush_often)
    else:
        killer = threading.Timer(rnd.uniform(0, 0.12), server.process.kill)
        killer.start()
        load(handles, history, flush_often, 60)
        killer.join()
    server.kill()
    unmarked = history.verify("disk.qcow2", disabled=OFF, disk=disk)
    clean += unmarked
    assert not keep or unmarked == len(RECORDING), "a kill cost a bitmap"
    if harness.SERVER != "nbdkit":
        continue
    assert Image("disk.qcow2").bitmap("off").raw() == off, "I4"
    if point % 5 == 0:
        # The image goes on: it is served, written and stopped cleanly.
        before = harness.disk_contents("disk.qcow2", disk)
        server = serve(disk)
        h = server.connect()
        assert h.pread(SIZE, 0) == before
        h.pwrite(b"again" * 1000, 12345)
        h.shutdown()
        server.stop()
        harness.check("disk.qcow2")
        assert harness.disk_contents("disk.qcow2", disk)[12345:17345] == \
            b"again" * 1000
print("%d kills, %d of %d bitmaps survived unmarked" %
      (POINTS, clean, POINTS * len(RECORDING)))
