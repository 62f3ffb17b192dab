#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""backup-begin with "scope": "dirty": the view has what is dirty in the bitmap
as it was at that moment, and nothing else: reads of the rest fail.  Writes to
the rest keep nothing.  In an image, and beside one."""

import errno
import os
import threading

import nbd

import harness
from harness import CONTEXT, Server
from qmp import Qmp

dice = harness.seeded()
SIZE = (12 << 20) + 1536
UNIT = 65536
ctl_sock = os.path.join(harness.tmp, "ctl.sock")


def serve(beside, granularity):
    for name in "disk.qcow2", "disk.raw":
        if os.path.exists(name):
            os.unlink(name)
    if beside:
        with open("disk.raw", "wb") as f:
            f.truncate(SIZE)
        harness.create("disk.qcow2", SIZE)
        disk, more = "disk.raw", ["dirty-bitmap-image=disk.qcow2"]
    else:
        harness.create("disk.qcow2", SIZE)
        disk, more = "disk.qcow2", []
    return Server(disk, "dirty-bitmap-control=" + ctl_sock, "dirty-bitmap=b",
                  "dirty-bitmap-granularity=%d" % granularity, *more)


def change(h, times):
    for _ in range(times):
        count = dice.choice((1, 512, 5000, 70000))
        offset = dice.randrange(SIZE - count)
        kind = dice.randrange(4)
        if kind == 0:
            h.zero(count, offset)
        elif kind == 1:
            h.trim(count, offset)
        else:
            h.pwrite(bytes([dice.randrange(1, 256)]) * count, offset)


def view_of(server):
    h = nbd.NBD()
    h.add_meta_context("base:allocation")
    h.add_meta_context(CONTEXT + "b")
    h.connect_uri("nbd+unix:///backup:b?socket=" + server.socket)
    return h


def whole(h):
    return b"".join(h.pread(min(1 << 20, SIZE - at), at)
                    for at in range(0, SIZE, 1 << 20))


def runs(h):
    """The bitmap's, as (offset, length, dirty)."""
    offset = 0
    for length, dirty in harness.extents(h, CONTEXT + "b"):
        yield offset, length, dirty
        offset += length


def fails(h, count, offset):
    try:
        h.pread(count, offset)
    except nbd.Error as e:
        assert e.errnum == errno.EIO, e
        return
    raise AssertionError("what is clean was read: %d bytes at %d" %
                         (count, offset))


def kept(q):
    return q.ask("backup-list")[0]["view"]["kept"]


def shows_what_is_dirty(beside, granularity):
    server = serve(beside, granularity)
    q = Qmp(ctl_sock)
    h = server.connect(CONTEXT + "b")
    change(h, 40)
    q.ask("backup-begin", bitmap="b", view=False)
    q.ask("backup-end", bitmap="b", success=True)
    change(h, 12)
    before = whole(h)
    q.ask("backup-begin", bitmap="b", scope="dirty")
    v = view_of(server)
    told = list(runs(v))
    assert {dirty for _, _, dirty in told} == {0, 1}, told

    # Writes to what is clean, by whole units, keep nothing.
    for offset, length, dirty in told:
        if not dirty:
            first = -(-offset // UNIT) * UNIT
            end = (offset + length) // UNIT * UNIT
            if first < end:
                h.pwrite(b"clean" * 100, first)
                h.zero(end - first, first)
    assert kept(q) == 0, kept(q)

    writer = server.connect()
    thread = threading.Thread(target=change, args=(writer, 300))
    thread.start()
    for _ in range(3):
        for offset, length, dirty in told:
            if dirty:
                at = offset + dice.randrange(length)
                n = min(offset + length - at, 1 << 20)
                assert v.pread(n, at) == before[at:at + n], (at, n)
                assert v.pread(min(length, 1 << 20), offset) == \
                    before[offset:offset + min(length, 1 << 20)]
            else:
                fails(v, 1, offset)
                fails(v, min(length, 1 << 20), offset)
                if offset > 0:
                    fails(v, 2, offset - 1)
    thread.join()
    assert list(runs(v)) == told
    offset = 0
    for length, flags in harness.extents(v, "base:allocation"):
        if flags:
            assert before[offset:offset + length] == bytes(length), offset
        offset += length
    units = {u for offset, length, dirty in told if dirty
             for u in range(offset // UNIT, (offset + length - 1) // UNIT + 1)}
    assert 0 < kept(q) <= len(units) * UNIT, (kept(q), len(units))
    for handle in v, h, writer:
        handle.shutdown()
    q.ask("backup-end", bitmap="b", success=True)
    q.close()
    server.stop()
    harness.check("disk.qcow2")


def what_is_refused():
    server = serve(False, 65536)
    q = Qmp(ctl_sock)
    for text, arguments in (
            ("Parameter 'scope' expects 'disk' or 'dirty'",
             {"scope": "some"}),
            ("Parameter 'scope' is about a view, and there is none with "
             "\"view\": false", {"scope": "dirty", "view": False})):
        kind, got = q.error({"execute": "backup-begin",
                             "arguments": {"bitmap": "b", **arguments}})
        assert (kind, got) == ("GenericError", text), got
    # A new bitmap is all dirty: nothing is left out.
    q.ask("backup-begin", bitmap="new", scope="dirty")
    v = nbd.NBD()
    v.connect_uri("nbd+unix:///backup:new?socket=" + server.socket)
    assert v.pread(SIZE % (1 << 20), SIZE - SIZE % (1 << 20)) == \
        bytes(SIZE % (1 << 20))
    v.shutdown()
    q.ask("backup-end", bitmap="new", success=True)
    q.ask("backup-begin", bitmap="b", scope="disk")
    v = view_of(server)
    assert whole(v) == bytes(SIZE)
    v.shutdown()
    q.close()
    server.stop()


if harness.SERVER == "nbdkit":
    for beside in False, True:
        for granularity in 512, 4096, 65536, 1 << 20:
            print(beside, granularity, flush=True)
            shows_what_is_dirty(beside, granularity)
    what_is_refused()
