#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Many connections, each with many requests in flight, on one disk: each
reads what it wrote, all of it is recorded, and the image is sound.

Two connections write to different parts of the same clusters, so that
copies of a cluster and pieces of it meet (I8).
"""

import threading

import harness
from harness import CONTEXT, Server, nbd

rnd = harness.seeded()
SIZE = 64 << 20
CONNECTIONS = 6
# Each connection has its own 512 bytes out of every 4096.
PIECE, STRIDE = 512, 4096


def work(server, number, seed, errors):
    try:
        worker(server, number, seed)
    except Exception as e:  # Tell the main thread.
        errors.append("connection %d: %r" % (number, e))


def worker(server, number, seed):
    dice = harness.random.Random(seed)
    h = server.connect("base:allocation", CONTEXT + "b")
    mine = {}
    for _ in range(12):
        batch = {}
        for _ in range(40):
            slot = dice.randrange(SIZE // STRIDE // 4)
            batch[slot] = dice.choice([bytes(PIECE), dice.randbytes(PIECE)])
        cookies = []
        for slot, data in batch.items():
            offset = slot * STRIDE + number * PIECE
            if not any(data):
                cookies.append(h.aio_zero(PIECE, offset))
            else:
                buffer = nbd.Buffer.from_bytearray(bytearray(data))
                cookies.append(h.aio_pwrite(buffer, offset))
        while h.aio_in_flight():
            h.poll(-1)
        for c in cookies:
            assert h.aio_command_completed(c)
        mine.update(batch)
        if dice.random() < 0.3:
            h.flush()
        for slot in dice.sample(sorted(mine), min(10, len(mine))):
            got = h.pread(PIECE, slot * STRIDE + number * PIECE)
            assert got == mine[slot], "slot %d differs" % slot
    for slot, data in mine.items():
        got = h.pread(PIECE, slot * STRIDE + number * PIECE)
        assert got == data, "slot %d differs at the end" % slot
    written[number] = mine
    h.shutdown()


for cluster in (4096, 65536):
    harness.create("disk.qcow2", SIZE, ("b", 512),
                   options="cluster_size=%d" % cluster)
    server = Server("disk.qcow2")
    written = {}
    errors = []
    threads = [threading.Thread(target=work, args=(
        server, i, rnd.random(), errors)) for i in range(CONNECTIONS)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors
    h = server.connect(CONTEXT + "b")
    dirty = harness.granules(harness.extents(h, CONTEXT + "b"), 512)
    expected = {(slot * STRIDE + n * PIECE) // 512
                for n, mine in written.items() for slot in mine}
    assert dirty == expected, (sorted(dirty - expected)[:9],
                               sorted(expected - dirty)[:9])
    h.shutdown()
    server.stop()
    harness.check("disk.qcow2")
    model = bytearray(SIZE)
    for n, mine in written.items():
        for slot, data in mine.items():
            start = slot * STRIDE + n * PIECE
            model[start:start + PIECE] = data
    assert harness.contents("disk.qcow2") == model
    assert harness.granules(harness.qemu_extents("disk.qcow2", "b"),
                            512) == expected
