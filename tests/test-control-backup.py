#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Backups while the disk is served: a bitmap loses what a backup has copied
only when that has succeeded, whatever happens meanwhile.  And the gate, which
stops the changes of several disks at one moment."""

import os
import threading
import time

import harness
from harness import CONTEXT, Server, granules, nbd, until
from qmp import Qmp, bitmaps, ctl

harness.requires("qemu-nbd")
dice = harness.seeded()

MIB = 1 << 20
GRANULE = 65536
SIZE = 64 * MIB
ALL = set(range(SIZE // GRANULE))
ctl_sock = os.path.join(harness.tmp, "ctl.sock")


def start(*params, image="disk.qcow2", control=ctl_sock):
    server = Server(image, "dirty-bitmap-control=" + control, *params)
    return server, Qmp(control)


def kill(server):
    server.process.kill()
    server.process.wait()


def write(server, *numbers):
    h = server.connect()
    for n in numbers:
        h.pwrite(b"w" * 512, n * GRANULE)
    h.shutdown()


def seen(server, name):
    h = server.connect(CONTEXT + name)
    result = granules(harness.extents(h, CONTEXT + name), GRANULE)
    h.shutdown()
    return result


def stored(name):
    return granules(harness.qemu_extents("disk.qcow2", name), GRANULE)


def begin(q, name, **more):
    return q.ask("backup-begin", bitmap=name, view=False, **more)


def end(q, name, success, **more):
    return q.ask("backup-end", bitmap=name, success=success, **more)


def refuse(q, text, command, **arguments):
    assert q.error({"execute": command, "arguments": arguments}) == (
        "GenericError", text)


def begun(name, action, granules):
    return {"context": CONTEXT + name, "action": action,
            "dirty": granules * GRANULE, "size": SIZE}


def one_by_one(*params):
    harness.create("disk.qcow2", SIZE, "b")
    server, q = start(*params)
    write(server, 1, 2)
    assert q.ask("backup-list") == []
    assert begin(q, "b") == begun("b", "used", 2)
    write(server, 2, 3)
    assert seen(server, "b") == {1, 2, 3}
    assert q.ask("backup-list") == [
        {"bitmap": "b", "context": CONTEXT + "b", "dirty": 3 * GRANULE,
         "since": 2 * GRANULE}]
    refuse(q, "Bitmap 'b' is currently in use by another operation and cannot "
           "be used", "backup-begin", bitmap="b", view=False)
    assert end(q, "b", False) == {"dirty": 3 * GRANULE}
    assert q.ask("backup-list") == []

    assert begin(q, "b") == begun("b", "used", 3)
    write(server, 3, 4)
    # Who still reads the bitmap as it was gets an error.
    h = server.connect(CONTEXT + "b")
    assert end(q, "b", True) == {"dirty": 2 * GRANULE}
    try:
        harness.extents(h, CONTEXT + "b")
        raise AssertionError("the bitmap was replaced")
    except nbd.Error:
        pass
    h.shutdown()
    assert seen(server, "b") == {3, 4}

    # A differential.
    assert begin(q, "b") == begun("b", "used", 2)
    assert end(q, "b", True, clear=False) == {"dirty": 2 * GRANULE}
    server.stop()
    harness.check("disk.qcow2")
    assert stored("b") == {3, 4}
    assert harness.flags("disk.qcow2", "b") == {"auto"}


def nbdkits_server():
    harness.create("disk.qcow2", SIZE, "b")
    server, q = start("dirty-bitmap-server=off")
    write(server, 1, 2)
    assert begin(q, "b") == begun("b", "used", 2)
    write(server, 2, 3)
    assert end(q, "b", True) == {"dirty": 2 * GRANULE}
    server.stop()
    assert stored("b") == {2, 3}


def created(*params):
    """What nothing is known of is all dirty, until the first success."""
    harness.create("disk.qcow2", SIZE)
    server, q = start(*params)
    refuse(q, "Dirty bitmap 'n' not found", "backup-begin", bitmap="n",
           view=False, create=False)
    assert begin(q, "n") == begun("n", "created", len(ALL))
    write(server, 7)
    assert end(q, "n", False) == {"dirty": SIZE}
    server.stop()
    assert stored("n") == ALL

    server, q = start(*params)
    assert begin(q, "n") == begun("n", "used", len(ALL))
    write(server, 7)
    assert end(q, "n", True) == {"dirty": GRANULE}
    server.stop()
    harness.check("disk.qcow2")
    assert stored("n") == {7}

    # In use since a crash.
    server, q = start("dirty-bitmap-crash=mark")
    write(server, 9)
    kill(server)
    server, q = start(*params)
    assert bitmaps(q)["n"]["inconsistent"]
    assert begin(q, "n") == begun("n", "recreated", len(ALL))
    assert end(q, "n", True) == {"dirty": 0}
    server.stop()
    harness.check("disk.qcow2")


def refused():
    harness.create("disk.qcow2", SIZE, "b", "off")
    harness.run("qemu-img", "bitmap", "--disable", "disk.qcow2", "off")
    server, q = start()
    refuse(q, "Parameter 'fail-after' is about the clients of a view, and "
           "there is none with \"view\": false", "backup-begin", bitmap="b",
           view=False, **{"fail-after": 60})
    refuse(q, "Bitmap 'off' is disabled and does not record", "backup-begin",
           bitmap="off", view=False)
    refuse(q, "There is no backup of bitmap 'b'", "backup-end", bitmap="b",
           success=True)
    refuse(q, "Parameter 'success' is missing", "backup-end", bitmap="b")

    # Two products at one moment, or none.
    actions = [{"type": "backup-begin", "data": {"bitmap": b, "view": False}}
               for b in ("b", "new", "off")]
    refuse(q, "Bitmap 'off' is disabled and does not record", "transaction",
           actions=actions)
    assert q.ask("backup-list") == [] and "new" not in bitmaps(q)
    assert q.ask("transaction", actions=actions[:2]) == {}
    assert [b["bitmap"] for b in q.ask("backup-list")] == ["b", "new"]
    for what in "remove", "clear", "disable":
        refuse(q, "Bitmap 'b' is currently in use by another operation and "
               "cannot be used", "block-dirty-bitmap-" + what, node="disk",
               name="b", force=True)
    out, _ = ctl(ctl_sock, "backup-end", "bitmap=b", "success=true")
    assert '"dirty": 0' in out, out
    # The stop ends the other one as failed.
    server.stop()
    assert stored("new") == ALL


class Load(threading.Thread):
    """A client that writes here and there, and takes what fails."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.client = server.connect()
        self.stops = False

    def run(self):
        try:
            while not self.stops:
                data = bytes([dice.randrange(256)]) * 4096
                self.client.pwrite(data, dice.randrange(SIZE // 4096) * 4096)
                if dice.randrange(20) == 0:
                    self.client.flush()
        except nbd.Error:
            assert self.stops

    def stop(self):
        self.stops = True
        self.join()


def copy(server, target):
    """Copy what is dirty, as it is at present."""
    h = server.connect(CONTEXT + "b")
    at = 0
    for length, dirty in harness.extents(h, CONTEXT + "b"):
        for offset in range(at, at + length, GRANULE) if dirty else ():
            target.seek(offset)
            target.write(h.pread(min(GRANULE, SIZE - offset), offset))
        at += length
    h.shutdown()


def cycles(*params):
    """Backups that succeed, fail, or end with a kill of the server.  The last
    one is made while nobody writes, and then the copy is the disk."""
    harness.create("disk.qcow2", SIZE)
    with open("copy.raw", "wb") as target:
        target.truncate(SIZE)
        server, q = start(*params)
        for cycle in range(8):
            load = Load(server)
            load.start()
            begin(q, "b")
            copy(server, target)
            how = dice.choice(["success", "success", "failure", "kill"])
            if how == "kill":
                load.stops = True
                kill(server)
                load.join()
                server, q = start(*params)
            else:
                end(q, "b", how == "success")
                load.stop()
        begin(q, "b")
        copy(server, target)
        end(q, "b", True)
        assert seen(server, "b") == set()
    server.stop()
    harness.check("disk.qcow2", leaks=True)
    harness.run("qemu-img", "compare", "-f", "qcow2", "-F", "raw",
                "disk.qcow2", "copy.raw")


def counted(*params):
    """What backup-begin says is dirty is what the view shows as dirty, though
    clients write as soon as they may."""
    harness.create("disk.qcow2", SIZE, ("b", 512))
    server, q = start(*params)
    loads = [Load(server) for _ in range(3)]
    for load in loads:
        load.start()
    for _ in range(30):
        r = q.ask("backup-begin", bitmap="b")
        h = nbd.NBD()
        h.add_meta_context(CONTEXT + "b")
        h.set_export_name("backup:b")
        h.connect_unix(server.socket)
        shown = sum(n for n, dirty in harness.extents(h, CONTEXT + "b")
                    if dirty)
        h.shutdown()
        assert r["dirty"] == shown, (r, shown)
        end(q, "b", True)
    for load in loads:
        load.stop()
    server.stop()


class Counter(threading.Thread):
    """Counts up on one disk and then on the other."""

    def __init__(self, one, other):
        super().__init__(daemon=True)
        self.clients = one.connect(), other.connect()
        self.n = 0
        self.stops = False

    def run(self):
        while not self.stops:
            self.n += 1
            for h in self.clients:
                h.pwrite(self.n.to_bytes(512, "big"), 0)


def view_counter(server):
    h = nbd.NBD()
    h.set_export_name("backup:b")
    h.connect_unix(server.socket)
    value = int.from_bytes(h.pread(512, 0), "big")
    h.shutdown()
    return value


def gate():
    controls = [os.path.join(harness.tmp, "c%d.sock" % i) for i in (1, 2)]
    for i in 1, 2:
        harness.create("d%d.qcow2" % i, SIZE, "b")
    both = [start(image="d%d.qcow2" % i, control=controls[i - 1])
            for i in (1, 2)]
    servers, qs = zip(*both)
    counter = Counter(*servers)
    counter.start()
    for _ in range(5):
        until(lambda: counter.n > 10, "the counter")
        for q in qs:
            assert q.ask("gate-close", timeout=10000) == {}
        for q in qs:
            q.ask("backup-begin", bitmap="b")
        values = []
        for server in servers:
            h = server.connect()
            values.append(int.from_bytes(h.pread(512, 0), "big"))
            h.shutdown()
        n = counter.n
        time.sleep(0.1)
        assert counter.n == n, "a write passed the gate"
        assert values[1] <= values[0] <= values[1] + 1, values
        for q in qs:
            assert q.ask("gate-open") == {}
        until(lambda: counter.n > n + 1, "the counter")
        # The views are of one moment, however late they are read.
        assert values == [view_counter(server) for server in servers]
        for q in qs:
            assert end(q, "b", True)["dirty"] == GRANULE

    # Its time is over.
    refuse(qs[0], "The gate is open", "gate-open")
    refuse(qs[0], "Parameter 'timeout' expects a number of milliseconds from "
           "1 to 10000", "gate-close", timeout=20000)
    assert qs[0].ask("gate-close", timeout=100) == {}
    refuse(qs[0], "The gate was closed already", "gate-close")
    n = counter.n
    until(lambda: counter.n > n + 1, "the gate opens")
    refuse(qs[0], "The gate has opened by itself: gate-open ends this group of "
           "disks", "backup-begin", bitmap="b", view=False)
    refuse(qs[0], "The gate has opened by itself", "gate-open")

    # Its client is gone.
    leaves = Qmp(controls[0])
    assert leaves.ask("gate-close", timeout=10000) == {}
    n = counter.n
    leaves.close()
    began = time.monotonic()
    until(lambda: counter.n > n + 1, "the gate opens")
    assert time.monotonic() - began < 9

    refuse(qs[0], "The gate has opened by itself: gate-open ends this group of "
           "disks", "gate-close")
    refuse(qs[0], "The gate has opened by itself", "gate-open")

    # The end of the server does not wait for it.
    assert qs[0].ask("gate-close", timeout=10000) == {}
    counter.stops = True
    took = servers[0].stop()
    assert took < 9, took
    counter.join()
    servers[1].stop()


if harness.SERVER == "nbdkit":
    one_by_one()
    one_by_one("dirty-bitmap-crash=mark")
    nbdkits_server()
    created()
    refused()
    cycles("dirty-bitmap-crash=keep")
    counted()
    gate()
