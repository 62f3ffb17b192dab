#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""A chain of incremental backups of a disk that is being written: in each
cycle the dirty granules of the view are copied to a new qcow2 file over the
last one.  Some backups fail, some copiers die, and some servers are killed.
Each point that succeeds is the view of its moment, by qemu-img compare.

CYCLES=N makes a longer chain."""

import os
import random
import threading

import harness
from harness import CONTEXT, Server, nbd, until
from qmp import Qmp

harness.requires("qemu-nbd")
dice = harness.seeded()

MIB = 1 << 20
SIZE = 16 * MIB + 1536
CYCLES = int(os.environ.get("CYCLES", 30))
WRITERS = 3
ctl_sock = os.path.join(harness.tmp, "ctl.sock")
target_sock = os.path.join(harness.tmp, "target.sock")


class Load(threading.Thread):
    """A client that changes the disk here and there, until its server is
    killed or it is told to stop."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.client = server.connect()
        self.dice = random.Random(dice.random())
        self.stops = False
        self.start()

    def change(self):
        offset = self.dice.randrange(SIZE)
        count = min(self.dice.choice((512, 4096, 70000)), SIZE - offset)
        what = self.dice.randrange(10)
        if what == 0:
            self.client.trim(count, offset)
        elif what == 1:
            self.client.zero(count, offset)
        elif what == 2:
            self.client.flush()
        else:
            self.client.pwrite(self.dice.randbytes(count), offset)

    def run(self):
        try:
            while not self.stops:
                self.change()
        except nbd.Error:
            assert self.stops

    def stop(self):
        self.stops = True
        self.join()


class Died(Exception):
    """The copier has, in the middle."""


def connect(server):
    h = nbd.NBD()
    h.set_export_name("backup:b")
    h.add_meta_context(CONTEXT + "b")
    h.connect_unix(server.socket)
    return h


def dirty_runs(h):
    """(offset, length) of what is dirty, in pieces of at most 1 MiB."""
    at = 0
    for length, dirty in harness.extents(h, CONTEXT + "b"):
        for offset in range(at, at + length, MIB) if dirty else ():
            yield offset, min(MIB, at + length - offset)
        at += length


def copy(server, path, dies):
    """Copy what is dirty in the view to the image at path."""
    h = connect(server)
    # With --fork it returns when the socket can be connected to.
    harness.run("qemu-nbd", "--fork", "--pid-file=target.pid", "-f", "qcow2",
                "-k", target_sock, path)
    with open("target.pid") as f:
        target = int(f.read())
    out = nbd.NBD()
    out.connect_unix(target_sock)
    for offset, length in dirty_runs(h):
        out.pwrite(h.pread(length, offset), offset)
        if dies and dice.random() < 0.2:
            break
    out.flush()
    out.shutdown()
    until(lambda: not harness.lives(target), "the end of qemu-nbd")
    if dies:
        raise Died
    h.shutdown()


def view(server):
    """All that the view has, read while the disk goes on."""
    h = connect(server)
    with open("view.raw", "wb") as f:
        for offset in range(0, SIZE, MIB):
            f.write(h.pread(min(MIB, SIZE - offset), offset))
    h.shutdown()


def make_point(points):
    path = "point%d.qcow2" % len(points)
    backing = ["-b", points[-1], "-F", "qcow2"] if points else []
    harness.run("qemu-img", "create", "-q", "-f", "qcow2", *backing, path,
                str(SIZE))
    return path


class Cycles:
    def __init__(self, *params):
        self.params = params
        self.points = []
        self.is_full = []       # for each begin: was all of the disk dirty?
        harness.create("disk.qcow2", SIZE)
        self.start()

    def start(self):
        self.server = Server("disk.qcow2", "dirty-bitmap-control=" + ctl_sock,
                             *self.params)
        self.q = Qmp(ctl_sock)

    def kill(self, load):
        for writer in load:
            writer.stops = True
        self.server.kill()
        for writer in load:
            writer.join()
        self.start()

    def cycle(self, how):
        load = [Load(self.server) for _ in range(WRITERS)]
        begun = self.q.ask("backup-begin", bitmap="b")
        assert begun["export"] == "backup:b", begun
        self.is_full.append(begun["dirty"] >= SIZE)
        path = make_point(self.points)
        try:
            copy(self.server, path, how in ("copier", "server"))
            view(self.server)
            self.q.ask("backup-end", bitmap="b", success=how == "success")
        except Died:
            if how == "server":
                self.kill(load)
                return
            self.q.ask("backup-end", bitmap="b", success=False)
        for writer in load:
            writer.stop()
        if how == "success":
            harness.run("qemu-img", "compare", "-f", "qcow2", "-F", "raw",
                        path, "view.raw")
            self.points.append(path)

    def run(self):
        for n in range(CYCLES):
            how = "success" if n == CYCLES - 1 else dice.choice(
                ["success", "success", "success", "failure", "copier",
                 "server"])
            print(n, how, flush=True)
            self.cycle(how)
        # The first is full, and at least some of the others are not.
        assert self.is_full[0] and not all(self.is_full), self.is_full
        self.server.stop()
        harness.check("disk.qcow2", leaks=True)


for mode in "keep", "mark":
    Cycles("dirty-bitmap-crash=" + mode).run()
