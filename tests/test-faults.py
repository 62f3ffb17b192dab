#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Storage that fails one request after the other, as an NBD client sees
it: he gets the error that the storage gave, his connection stays, what
does not need the storage that fails goes on, and when the fault has ended
so has the trouble.  One server lives through all of it.

(unit/disk/test-faults.c fails every call of many workloads, and looks closer.)
"""

import os

import harness
from harness import CONTEXT, Server, nbd
from history import History, NOTHING, Operation, SECTOR
from qcow2image import Image
from recorder import FLUSH, READ, WRITE, ZEROES, Recorder

if harness.SERVER != "nbdkit":
    raise SystemExit("this is not for another server")
SIZE = 64 << 20
STEP = 128 << 10                # of the disk, for each fault
ERRNO = {"EIO": 5, "ENOSPC": 28}
KIB = 1024
FUA, NO_HOLE = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE


class Request:
    """One request of the workload, to be repeated until it succeeds."""

    serial = 0

    def __init__(self, kind, offset=0, count=0, flags=0):
        self.kind, self.offset, self.count = kind, offset, count
        self.flags = flags

    def operation(self):
        nr = self.count // SECTOR
        if self.kind == "write":
            Request.serial += 1
            stamp = b"%08d" % Request.serial
            values = [{(stamp + b"%08d" % i) * 32} for i in range(nr)]
        else:
            values = [{NOTHING}] * nr
        return Operation(self.offset // SECTOR, values)

    def flush(self, h, history):
        snapshot = history.flush_issued()
        h.flush()
        history.flush_acked(snapshot)

    def make(self, h, history):
        """Raises nbd.Error."""
        if self.kind == "flush":
            self.flush(h, history)
            return
        op = self.operation()
        history.issue(op)
        try:
            if self.kind == "write":
                data = b"".join(v for s in op.values for v in s)
                h.pwrite(data, self.offset, self.flags)
            elif self.kind == "zero":
                h.zero(self.count, self.offset, self.flags)
            else:
                h.trim(self.count, self.offset, self.flags)
        except nbd.Error:
            history.failed(op)
            raise
        history.ack(op, bool(self.flags & FUA))


def workload(base):
    return [Request("write", base, 8 * KIB),
            Request("write", base + 20 * KIB + 512, 1536),
            Request("flush"),
            Request("write", base + 512, 512, FUA),
            Request("zero", base + 4 * KIB, 4 * KIB),
            Request("zero", base + 64 * KIB, 8 * KIB, NO_HOLE),
            Request("zero", base + 1024, 1024),
            Request("flush"),
            Request("write", base + 66 * KIB, 1024),
            Request("trim", base + 20 * KIB, 4 * KIB),
            Request("write", base + 96 * KIB, 32 * KIB),
            Request("flush")]


class Fault:
    """Fails the request number `first` below, or all from there on."""

    def __init__(self, commands, error, first, for_good=False):
        self.commands, self.error = commands, error
        self.first, self.for_good = first, for_good
        self.seen = self.failed = self.flushes = 0

    def __call__(self, command, *_):
        if command not in self.commands:
            return 0
        self.seen += 1
        number = self.seen - 1
        if number != self.first and (number < self.first or
                                     not self.for_good):
            return 0
        self.failed += 1
        self.flushes += command == FLUSH
        return ERRNO[self.error]


def start(image, *options):
    with open(image, "rb") as f:
        recorder = Recorder(f.read())
    server = Server(args=["--filter=" + harness.FILTER, "nbd",
                          "socket=" + recorder.path, *options])
    return recorder, server


def must_flush(h, history, may_fail):
    """A flush that was not told of a barrier that failed is, once."""
    try:
        Request("flush").make(h, history)
    except nbd.Error:
        assert may_fail
        Request("flush").make(h, history)


def one_fault(h, server, recorder, history, base, fault):
    """Run the workload; True if the fault came to pass."""
    recorder.fail = fault
    failed = []
    flushes_told = 0
    for request in workload(base):
        try:
            request.make(h, history)
        except nbd.Error as e:
            assert e.errno == fault.error, "%s: %s" % (request.kind, e)
            assert fault.failed
            if request.kind == "flush":
                flushes_told = fault.flushes
            failed.append(request)
            server.alive()
            if READ not in fault.commands:
                assert h.pread(4096, 0) == KNOWN
        else:
            assert request.kind != "flush" or \
                fault.flushes == flushes_told, "a flush that failed is kept"
    recorder.fail = lambda *a: 0
    for request in failed:
        if request.kind == "flush":
            must_flush(h, history, fault.flushes != flushes_told)
            flushes_told = fault.flushes
        else:
            request.make(h, history)
    must_flush(h, history, fault.flushes != flushes_told)
    assert h.pread(4096, 0) == KNOWN
    return fault.failed > 0


def every_fault(what, commands, error, for_good):
    harness.create("disk.qcow2", SIZE, ("fine", 512), ("coarse", 65536),
                   options="cluster_size=4k")
    harness.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4k",
                "disk.qcow2")
    os.truncate("disk.qcow2", 40 << 20)
    history = History(harness.contents("disk.qcow2"))
    recorder, server = start("disk.qcow2")
    h = server.connect(CONTEXT + "fine", CONTEXT + "coarse")
    nr = 0
    while one_fault(h, server, recorder, history, (nr + 1) * STEP,
                    Fault(commands, error, nr, for_good)):
        nr += 1
    print("%s: %d faults" % (what, nr))
    assert nr > 5
    seen = h.pread(SIZE // 2, 0) + h.pread(SIZE // 2, SIZE // 2)
    maps = {name: harness.granules(harness.extents(h, CONTEXT + name), gran)
            for name, gran in (("fine", 512), ("coarse", 65536))}
    h.shutdown()
    server.stop(status=0)
    recorder.close()
    with open("disk.qcow2", "wb") as f:
        f.write(recorder.data)
    assert history.verify("disk.qcow2") == 2, "a bitmap is marked"
    harness.check("disk.qcow2")
    assert harness.contents("disk.qcow2") == seen
    for name, bits in maps.items():
        assert Image("disk.qcow2").bitmap(name).bits() == bits


def every_client(*options):
    """A flush that failed is told to each client once, whosever it was,
    and to none who came after that; with either server."""
    harness.create("each.qcow2", SIZE, "b", options="cluster_size=4k")
    os.truncate("each.qcow2", 8 << 20)
    recorder, server = start("each.qcow2", *options)
    ours, other = server.connect(), server.connect()
    for h, at in (ours, 0), (other, 1 << 20):
        h.pwrite(bytes(512), at)
    recorder.fail = Fault((FLUSH,), "EIO", 0)
    told = []
    for h in ours, other, ours, other, None:
        h = h or server.connect()
        try:
            h.flush()
            told.append(0)
        except nbd.Error as e:
            assert e.errno == "EIO", e
            told.append(1)
        h.pwrite(bytes(512), 2 << 20, FUA)
    assert told == [1, 1, 0, 0, 0], told
    ours.shutdown()
    other.shutdown()
    server.stop(status=0)
    recorder.close()


def to_the_end():
    """Storage that never recovers: the exit status tells, and which
    bitmaps; the image holds what it held, and the bitmaps are marked (without
    bits ahead, by which they would be complete)."""
    harness.create("end.qcow2", SIZE, "b", options="cluster_size=4k")
    os.truncate("end.qcow2", 8 << 20)
    history = History(bytes(SIZE))
    recorder, server = start("end.qcow2", "dirty-bitmap-crash=mark")
    h = server.connect()
    for request in workload(0):
        request.make(h, history)
    Request("write", 40 << 20, 4 * KIB).make(h, history)
    recorder.fail = Fault((WRITE, ZEROES, FLUSH), "EIO", 0, True)
    h.shutdown()
    server.stop(status=1)
    assert "'b'" in server.messages()
    recorder.close()
    with open("end.qcow2", "wb") as f:
        f.write(recorder.data)
    assert history.verify("end.qcow2") == 0
    assert Image("end.qcow2").bitmap("b").in_use


KNOWN = b"\1" * 4096
CHANGES = (WRITE, ZEROES, FLUSH)
harness.requires("qemu-io")
every_fault("EIO once", (READ,) + CHANGES, "EIO", False)
every_fault("EIO for a while", CHANGES, "EIO", True)
every_fault("ENOSPC once", (WRITE, ZEROES), "ENOSPC", False)
every_fault("no flush for a while", (FLUSH,), "EIO", True)
every_client()
every_client("dirty-bitmap-server=off")
to_the_end()
