#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""By default a crash costs no bitmap (dirty-bitmap-crash=keep).  qemu-img
never finds one in use, and what a kill leaves QEMU's server offers at once.
Without space for bits the bitmap falls back to being in use, and the log
and the statistics say so; once a flush has stored it, it is kept again.
"""

import os
import resource

import harness
from harness import Server, nbd
from qcow2image import Image
from statsfile import Stats, refresh

MIB = 1 << 20
SIZE = 64 * MIB
IN_USE = "in-use"


def in_use(*names):
    return [name for name in names
            if IN_USE in harness.flags("disk.qcow2", name)]


def never_in_use():
    harness.create("disk.qcow2", SIZE, ("fine", 4096), ("b", 65536))
    server = Server("disk.qcow2", "dirty-bitmap-stats=stats")
    h = server.connect()
    changes = [
        lambda: h.pwrite(b"a" * 1000, 10 * MIB),
        lambda: h.pwrite(b"b" * 1000, 10 * MIB + 65536),
        lambda: h.zero(65536, 20 * MIB),
        lambda: h.trim(2 * MIB, 30 * MIB),
        lambda: h.pwrite(b"c" * 1000, 40 * MIB, nbd.CMD_FLAG_FUA),
        h.flush,
    ]
    for change in changes:
        change()
        assert not in_use("fine", "b")
    stats = refresh(server.pid, "stats")
    dirty = 3 * 65536 + 2 * MIB + 65536
    assert stats("dirty_bytes", bitmap="b") == dirty
    # The regions of 1 MiB that were written to, of which the trim's two are
    # all dirty; larger ones if the machine is slow.
    extra = stats("extra_bytes", bitmap="b")
    assert extra >= 3 * MIB - 4 * 65536 and extra + dirty <= SIZE, extra
    assert stats("ahead_writes_total", result="success") > 0
    assert stats("ahead_writes_total", result="failure") == 0
    assert stats("ahead_regions_total") >= 4
    assert stats("ahead_seconds_total", result="success") > 0
    assert stats("fallbacks_total") == 0
    server.kill()

    assert not in_use("fine", "b")
    bitmap = Image("disk.qcow2").bitmap("b")
    assert len(bitmap.bits()) * 65536 == dirty + extra
    changed = {10 * MIB // 65536, 10 * MIB // 65536 + 1, 20 * MIB // 65536,
               40 * MIB // 65536, *range(30 * 16, 32 * 16)}
    assert changed <= bitmap.bits()
    theirs = harness.granules(harness.qemu_extents("disk.qcow2", "b"), 65536)
    assert theirs == bitmap.bits()

    # A clean stop leaves what is in memory, and that is what was loaded.
    server = Server("disk.qcow2", "dirty-bitmap-stats=stats")
    h = server.connect()
    h.pwrite(b"d", 60 * MIB)
    server.stop()
    assert Image("disk.qcow2").bitmap("b").bits() == \
        theirs | {60 * MIB // 65536}
    last = Stats("stats")
    assert last("extra_bytes", bitmap="b") == 0
    assert last("ahead_tidied_bytes_total") >= 2 * MIB
    harness.check("disk.qcow2")


def no_space():
    # Each 2 MiB of the disk need another cluster of bits.
    harness.create("disk.qcow2", SIZE, ("b", 512), ("other", 512),
                   options="preallocation=full,cluster_size=512")
    server = Server("disk.qcow2", "dirty-bitmap-stats=stats")
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE,
                     (os.path.getsize("disk.qcow2"), resource.RLIM_INFINITY))
    h = server.connect()
    places = range(0, SIZE, 4 * MIB)
    for offset in places:
        h.pwrite(b"x" * 512, offset)
        h.flush()
    assert in_use("b", "other") == ["b", "other"]
    told = [line for line in server.messages().splitlines()
            if "written ahead" in line]
    assert len(told) == 2, server.messages()
    for name, line in zip(("b", "other"), told):
        assert "bitmap '%s' is marked as in use" % name in line, line
        assert "File too large" in line or "No space" in line, line
    stats = refresh(server.pid, "stats")
    assert stats("fallbacks_total") == 2
    assert stats("ahead_writes_total", result="failure") > 0

    resource.prlimit(server.pid, resource.RLIMIT_FSIZE,
                     (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    h.flush()
    assert not in_use("b", "other")
    h.pwrite(b"x" * 512, 50 * MIB + 512)
    assert not in_use("b", "other"), "they are not kept again"
    assert refresh(server.pid, "stats")("fallbacks_total") == 2
    server.kill()
    assert {offset // 512 for offset in (*places, 50 * MIB + 512)} <= \
        Image("disk.qcow2").bitmap("b").bits()
    harness.check("disk.qcow2", leaks=True)


never_in_use()
no_space()
