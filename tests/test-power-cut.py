#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""The power fails at any moment, and of what was written since the last
barrier any part is lost, torn at 512 bytes.  I1, I2 and I3 hold in every
such image, and it can be served again.

The storage below is a server that remembers everything; POINTS=N looks
at more crashes of each run, SEED=N replays.
"""

import os

import harness
from harness import Server
from history import History, NOTHING, Operation, SECTOR
from recorder import Recorder

if harness.SERVER != "nbdkit":
    raise SystemExit("this is not for another server")
rnd = harness.seeded()
POINTS = int(os.environ.get("POINTS", "24"))
SIZE = 4 << 20


def one_request(h):
    """One request, answered: its Operation, or None for a flush."""
    if rnd.random() < 0.15:
        h.flush()
        return None
    count = rnd.choice([1, 1, 8, 13, 128, 300])
    first = rnd.randrange(SIZE // SECTOR - count)
    if rnd.random() < 0.5:
        first -= first % 128
    kind = rnd.choice(["write"] * 5 + ["zero", "trim", "trim"])
    if kind == "write":
        stamp = rnd.randbytes(28)
        values = [{(stamp + i.to_bytes(4, "big")) * 16} for i in range(count)]
    else:
        values = [{NOTHING} if kind == "zero" else None] * count
    op = Operation(first, values)
    if kind == "write":
        h.pwrite(b"".join(v for s in values for v in s), first * SECTOR)
    elif kind == "zero":
        h.zero(count * SECTOR, first * SECTOR)
    else:
        h.trim(count * SECTOR, first * SECTOR)
    return op


def history_at(original, steps, when):
    """What had been issued and answered when `when` events had happened."""
    history = History(original)
    for began, ended, what in steps:
        if began > when:
            break
        # A request that had begun may have had an effect.
        if what is not None:
            history.issue(what)
            if ended <= when:
                history.ack(what)
        elif ended <= when:
            history.flush_acked(history.flush_issued())
    return history


def one_run(options, operations, crash):
    if os.path.exists("disk.qcow2"):
        os.unlink("disk.qcow2")
    harness.create("disk.qcow2", SIZE, ("fine", 512), ("coarse", 65536),
                   options=options)
    harness.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 1M 1M",
                "disk.qcow2")
    os.truncate("disk.qcow2", 24 << 20)
    original = harness.contents("disk.qcow2")
    with open("disk.qcow2", "rb") as f:
        recorder = Recorder(f.read())
    server = Server(args=["--filter=" + harness.FILTER, "nbd",
                          "socket=" + recorder.path,
                          "dirty-bitmap-crash=" + crash])
    h = server.connect()
    steps = []
    for _ in range(operations):
        began = len(recorder.events)
        what = one_request(h)
        steps.append((began, len(recorder.events), what))
    h.shutdown()
    server.stop()
    recorder.close()
    end = len(recorder.events)
    points = [end] + [rnd.randrange(end + 1) for _ in range(POINTS)]
    clean = 0
    for number, when in enumerate(points):
        with open("crash.qcow2", "wb") as f:
            f.write(recorder.crash(when, rnd))
        history = history_at(original, steps, when)
        try:
            unmarked = history.verify("crash.qcow2")
            assert crash == "mark" or unmarked == 2, "it cost a bitmap"
        except AssertionError:
            print("%s, %s: crash after %d of %d events" %
                  (options, crash, when, end))
            raise
        clean += unmarked
        if number % 8 == 0:
            serve_again("crash.qcow2")
    print("%s, %s: %d events, %d bitmaps unmarked in %d crashes" %
          (options, crash, end, clean, len(points)), flush=True)


def serve_again(path):
    data = harness.contents(path)
    server = Server(path)
    h = server.connect()
    assert h.pread(SIZE, 0) == data
    h.pwrite(b"again" * 1000, 12345)
    h.shutdown()
    server.stop()
    harness.check(path, leaks=True)
    expected = bytearray(data)
    expected[12345:17345] = b"again" * 1000
    assert harness.contents(path) == expected


harness.requires("qemu-io")
for cluster in (512, 4096, 65536):
    for bits in (1, 16, 64):
        one_run("cluster_size=%d,refcount_bits=%d" % (cluster, bits), 60,
                "keep" if bits == 16 else "mark")
