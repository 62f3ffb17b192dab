#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Storage that fails now and then, at random: what was acknowledged and
flushed is there, a bitmap that is not marked lacks nothing, and qemu-img
check finds no error.  SEED=N replays.  (test-faults.py goes through all
faults in order.)
"""

import os

import harness
from harness import Server, nbd
from history import History, NOTHING, Operation, SECTOR
from recorder import READ, Recorder

if harness.SERVER != "nbdkit":
    raise SystemExit("this is not for another server")
rnd = harness.seeded()
SIZE = 4 << 20
ROUNDS = int(os.environ.get("ROUNDS", "12"))
EIO, ENOSPC = 5, 28


def attempt(h, history):
    """One request that may fail."""
    if rnd.random() < 0.2:
        snapshot = history.flush_issued()
        try:
            h.flush()
        except nbd.Error:
            return
        history.flush_acked(snapshot)
        return
    count = rnd.choice([1, 8, 13, 128, 300])
    first = rnd.randrange(SIZE // SECTOR - count)
    if rnd.random() < 0.5:
        first -= first % 128
    kind = rnd.choice(["write"] * 4 + ["zero", "trim"])
    if kind == "write":
        stamp = rnd.randbytes(28)
        values = [{(stamp + i.to_bytes(4, "big")) * 16} for i in range(count)]
    else:
        values = [{NOTHING} if kind == "zero" else None] * count
    op = Operation(first, values)
    history.issue(op)
    try:
        if kind == "write":
            h.pwrite(b"".join(v for s in values for v in s), first * SECTOR)
        elif kind == "zero":
            h.zero(count * SECTOR, first * SECTOR)
        else:
            h.trim(count * SECTOR, first * SECTOR)
    except nbd.Error:
        history.failed(op)
        return
    history.ack(op)


def start(image):
    with open(image, "rb") as f:
        recorder = Recorder(f.read())
    server = Server(args=["--filter=" + harness.FILTER, "nbd",
                          "socket=" + recorder.path])
    return recorder, server


def one_round(options, rate):
    if os.path.exists("disk.qcow2"):
        os.unlink("disk.qcow2")
    harness.create("disk.qcow2", SIZE, ("fine", 512), ("coarse", 65536),
                   options=options)
    harness.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 1M 1M",
                "disk.qcow2")
    os.truncate("disk.qcow2", 24 << 20)
    history = History(harness.contents("disk.qcow2"))
    recorder, server = start("disk.qcow2")

    def sometimes(command, offset, count):
        return rnd.choice([EIO, ENOSPC]) \
            if command != READ and rnd.random() < rate else 0

    h = server.connect()
    recorder.fail = sometimes
    for _ in range(80):
        attempt(h, history)
        server.alive()
    # It may go well or not at the end, as the dice fall.
    recovered = rnd.random() < 0.5
    if recovered:
        recorder.fail = lambda *a: 0
        snapshot = history.flush_issued()
        try:
            h.flush()
        except nbd.Error:
            # It tells, once, that a flush has failed before.  (What was
            # written until then is not lost here.)
            h.flush()
        history.flush_acked(snapshot)
        seen = h.pread(SIZE, 0)
    h.shutdown()
    server.stop(status=0 if recovered else None)
    stopped_well = server.process.returncode == 0
    recorder.close()
    with open("disk.qcow2", "wb") as f:
        f.write(recorder.data)
    clean = history.verify("disk.qcow2")
    if recovered:
        assert harness.contents("disk.qcow2") == seen
    if stopped_well:
        assert clean == 2, "status 0, but a bitmap is marked"
    return clean


harness.requires("qemu-io")
survived = 0
for turn in range(ROUNDS):
    options = "cluster_size=%d" % (512, 4096, 65536)[turn % 3]
    survived += one_round(options, rnd.choice([0.01, 0.05, 0.3]))
print("%d of %d bitmaps not marked" % (survived, 2 * ROUNDS))
