#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""dirty-bitmap-backup: a full point and increments of a disk that is being
written, each restored in each way and compared with what the disk was; and
never an increment on nothing: where there is no base for one, all is copied,
and the reason is told."""

import json
import os
import re
import shutil
import signal
import socket
import threading
import time

import backups
import harness
from backups import ended, errors, fails, listed, one_error, popen, result, \
    sound, tool
from harness import Server, granules
from qmp import Qmp

harness.requires("qemu-nbd")
dice = harness.seeded()

MIB = 1 << 20
SIZE = 16 * MIB + 1536
ctl_sock = os.path.join(harness.tmp, "ctl.sock")


def start(*params, disk="disk.qcow2"):
    server = Server(disk, "dirty-bitmap-control=" + ctl_sock, *params)
    return server, Qmp(ctl_sock)


def change(server, times=8):
    """Random changes; the disk after them."""
    h = server.connect()
    size = h.get_size()
    for _ in range(times):
        count = min(dice.choice((512, 4096, 70000, MIB)), size)
        offset = dice.randrange(size - count + 1)
        how = dice.randrange(6)
        if how == 0:
            h.trim(count, offset)
        elif how == 1:
            h.zero(count, offset)
        else:
            h.pwrite(dice.randbytes(count), offset)
    data = whole(h)
    h.shutdown()
    return data


def whole(h):
    size = h.get_size()
    return b"".join(bytes(h.pread(min(MIB, size - at), at))
                    for at in range(0, size, MIB))


def now(server):
    h = server.connect()
    data = whole(h)
    h.shutdown()
    return data


def read(path):
    with open(path, "rb") as f:
        return f.read()


def bits(server, name):
    context = harness.CONTEXT + name
    h = server.connect(context)
    found = granules(harness.extents(h, context), 65536)
    h.shutdown()
    return found


def backup(server, repository="repo", *more):
    return result("--control=" + ctl_sock, server.uri, repository, *more)


def restores(repository, number, data):
    place = "%s@%d" % (repository, number)
    tool("--restore", place, "out.raw")
    assert read("out.raw") == data, number
    tool("--restore", "--compress", place, "out.qcow2")
    harness.check("out.qcow2")
    assert harness.contents("out.qcow2") == data, number
    assert backups.raw(repository, "%04d.qcow2" % number) == data, number
    os.unlink("out.raw")
    os.unlink("out.qcow2")


class Writer(threading.Thread):
    """Goes on writing."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server, self.stops, self.changes = server, False, 0
        self.start()

    def run(self):
        h = self.server.connect()
        while not self.stops:
            count = dice.choice((512, 4096, 70000))
            h.pwrite(dice.randbytes(count), dice.randrange(SIZE - count))
            self.changes += 1
        h.shutdown()

    def stop(self):
        self.stops = True
        self.join()


def cycle(*more, points=10):
    """A full point, increments, and a prune."""
    harness.create("disk.qcow2", SIZE)
    server, q = start()
    moments = []
    for n in range(1, points + 1):
        moments.append(change(server))
        told = backup(server, "repo", *more)
        assert told["number"] == n and "reason" not in told, told
        assert told["type"] == ("full" if n == 1 else "increment"), told
        assert told["disk-bytes"] == SIZE
        assert bits(server, told["bitmap"]) == set()
    points = sound("repo")
    assert all(p["copied-bytes"] < SIZE / 2 for p in points[1:]), points
    for n, data in enumerate(moments, 1):
        restores("repo", n, data)
    tool("--verify", "repo")
    # The last one, if none is named.
    tool("--restore", "repo", "out.raw")
    assert read("out.raw") == moments[-1]
    os.unlink("out.raw")

    out, err = tool("--prune", "--keep=4", "repo")
    assert "6 points removed, 4 kept" in err, err
    for keep in 4, 2:
        tool("--prune", "--keep", str(keep), "repo", *more)
        points = sound("repo")
        assert [p["number"] for p in points] == list(
            range(11 - keep, 11)), points
        assert [p["type"] for p in points] == ["full"] + \
            ["increment"] * (keep - 1)
        for p in points:
            restores("repo", p["number"], moments[p["number"] - 1])
    fails("no point 3", "--restore", "repo@3", "out2.raw")
    moments.append(change(server))
    assert backup(server, "repo", *more)["type"] == "increment"
    restores("repo", 11, moments[-1])
    server.stop()
    shutil.rmtree("repo")


def while_written():
    """Each point is of one moment: what the next backup copies makes of it
    what the disk is then."""
    harness.create("disk.qcow2", SIZE)
    server, q = start()
    for n in range(5):
        writer = Writer(server)
        harness.until(lambda: writer.changes > 20, "changes")
        told = backup(server)
        writer.stop()
        assert told["type"] == ("increment" if n else "full"), told
    data = now(server)
    assert backup(server)["number"] == 6
    restores("repo", 6, data)
    sound("repo")
    server.stop()
    shutil.rmtree("repo")


def full(told, reason):
    assert told["type"] == "full" and reason in told["reason"], told


def decisions():
    """All is copied, and why."""
    harness.create("disk.qcow2", SIZE)
    server, q = start()
    h = server.connect()
    h.pwrite(dice.randbytes(MIB), SIZE - MIB)
    h.shutdown()
    name = backup(server)["bitmap"]
    assert re.fullmatch("backup-[0-9a-f]{8}", name), name
    q.ask("block-dirty-bitmap-remove", node="disk", name=name)
    full(backup(server), "the disk did not have the bitmap " + name)
    assert backup(server)["type"] == "increment"

    # Another one, and the first again.
    full(backup(server, "repo", "--bitmap=other"),
         "the disk did not have the bitmap other")
    assert backup(server)["type"] == "increment"
    full(backup(server, "repo", "--bitmap=" + name),
         "the last point was made with the bitmap other")
    full(backup(server, "repo", "--bitmap=other"),
         "the last point was made with the bitmap " + name)
    full(backup(server, "repo", "--bitmap=" + name),
         "the last point was made with the bitmap other")
    server.stop()

    # Inconsistent.
    server, q = start("dirty-bitmap-crash=mark")
    change(server)
    server.kill()
    server, q = start("dirty-bitmap-crash=mark")
    full(backup(server), "the bitmap %s was inconsistent" % name)
    assert backup(server)["type"] == "increment"
    q.ask("block-dirty-bitmap-remove", node="disk", name="other")
    server.stop()

    # The size.
    harness.run("qemu-img", "resize", "-q", "disk.qcow2", str(SIZE + 65536))
    server, q = start()
    h = server.connect()
    # More is dirty, and zeroes, than is clean.
    h.zero(12 * MIB, 0)
    data = whole(h)
    h.shutdown()
    told = backup(server)
    full(told, "%d bytes at the last point, and has %d" % (
        SIZE, SIZE + 65536))
    restores("repo", told["number"], data)
    # Without --json, and even with --quiet, the reason is told.
    q.ask("block-dirty-bitmap-remove", node="disk", name=name)
    out, err = tool("--quiet", "--control=" + ctl_sock, server.uri, "repo")
    assert out == "" and err.count("\n") == 1, err
    assert "warning: all of the disk is copied: the disk did not have" in err
    assert tool("--quiet", "--control=" + ctl_sock, server.uri,
                "repo") == ("", "")
    server.stop()
    tool("--verify", "repo")
    sound("repo")
    shutil.rmtree("repo")


def without_control():
    """With the commands that the user is told to give."""
    harness.create("disk.qcow2", SIZE)
    server = Server("disk.qcow2", kind="nbdkit")
    moments = [change(server)]
    out, err = tool(server.uri, "repo")
    assert "warning: the disk must not be written while it is copied" in err
    server.stop()

    def do_what_is_told(err, verb):
        found = re.findall(r"^    (qemu-img bitmap --%s IMAGE \S+)$" % verb,
                           err, re.M)
        assert len(found) == 1, err
        harness.run(*found[0].replace("IMAGE", "disk.qcow2").split())

    do_what_is_told(err, "add")
    # Nobody knows what was written before the bitmap was there.
    server = Server("disk.qcow2", kind="nbdkit")
    moments.append(change(server))
    out, err = tool(server.uri, "repo")
    assert "all of the disk is copied: the last point was made with no " \
        "bitmap" in err, err
    server.stop()
    for kind in "nbdkit", "qemu-nbd", "nbdkit":
        do_what_is_told(err, "clear")
        server = Server("disk.qcow2", kind=kind)
        moments.append(change(server))
        out, err = tool(server.uri, "repo")
        assert "increment" in err, err
        server.stop()
    # If the bitmap is not cleared, too much is copied.
    server = Server("disk.qcow2", kind="nbdkit")
    moments.append(change(server))
    out, err = tool(server.uri, "repo")
    server.stop()
    points = sound("repo")
    assert [p["type"] for p in points] == ["full"] * 2 + ["increment"] * 4
    for n, data in enumerate(moments, 1):
        restores("repo", n, data)

    # Not offered, for this or that reason.
    harness.run("qemu-img", "bitmap", "--add", "disk.qcow2", "else")
    name = json.loads(read("repo/repository.json"))["bitmap"]
    harness.run("qemu-img", "bitmap", "--remove", "disk.qcow2", name)
    server = Server("disk.qcow2", kind="nbdkit")
    told = result(server.uri, "repo")
    full(told, "the server does not offer the bitmap " + name)
    assert "bitmap" not in told, told
    server.stop()
    # A new one of that name knows nothing of the last point.
    harness.run("qemu-img", "bitmap", "--add", "disk.qcow2", name)
    server = Server("disk.qcow2", kind="nbdkit")
    fails("several bitmaps: choose one with --bitmap", server.uri, "repo")
    full(result("--bitmap=" + name, server.uri, "repo"), "with no bitmap")
    assert result(server.uri, "repo")["type"] == "increment"
    full(result("--bitmap=nothing", server.uri, "repo"),
         "does not offer the bitmap nothing")
    fails("does not offer the bitmap nothing", "--bitmap=nothing",
          server.uri, "fresh")
    server.stop()
    sound("repo")
    shutil.rmtree("repo")


def until_copying(p, q):
    harness.until(lambda: p.poll() is not None or any(
        b["view"]["clients"] for b in q.ask("backup-list")), "copying")


def slow():
    """A server that takes its time."""
    return start("--filter=delay", "rdelay=50ms")


def interrupted():
    """The repository is as it was, and the bitmap has lost nothing."""
    harness.create("disk.qcow2", SIZE)
    server, q = start()
    before = change(server)
    name = backup(server)["bitmap"]
    change(server, 40)
    dirty = bits(server, name)
    assert dirty
    server.stop()
    server = Server(args=["--filter=" + harness.FILTER, "--filter=delay",
                          "file", "disk.qcow2", "rdelay=100ms",
                          "dirty-bitmap-control=" + ctl_sock])
    q = Qmp(ctl_sock)
    files = backups.contents("repo")
    for sig in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        for place in "repo", "fresh":
            p = popen("--control=" + ctl_sock, server.uri, place)
            until_copying(p, q)
            p.send_signal(sig)
            status, out, err = ended(p)
            assert status == 1 and errors(err) == [], err
            assert err.splitlines()[-1].endswith(": interrupted"), err
            assert q.ask("backup-list") == []
    assert backups.contents("repo") == files
    assert not os.path.exists("fresh")
    assert dirty <= bits(server, name)
    server.stop()
    server, q = start()
    data = now(server)
    assert backup(server)["type"] == "increment"
    restores("repo", 1, before)
    restores("repo", 2, data)
    server.stop()
    shutil.rmtree("repo")


def one_at_a_time():
    harness.create("disk.qcow2", SIZE)
    server = Server(args=["--filter=" + harness.FILTER, "--filter=delay",
                          "file", "disk.qcow2", "rdelay=100ms",
                          "dirty-bitmap-control=" + ctl_sock])
    q = Qmp(ctl_sock)
    change(server)
    p = popen("--control=" + ctl_sock, server.uri, "repo")
    until_copying(p, q)
    for args in ((server.uri, "repo"), ("--verify", "repo"),
                 ("--prune", "--keep=1", "repo"),
                 ("--restore", "repo", "out")):
        fails("in use by another", *args)
    assert not os.path.exists("out")
    assert ended(p)[0] == 0
    # A backup that has begun, and its program is gone: it is ended.
    name = listed("repo") and json.loads(
        read("repo/repository.json"))["bitmap"]
    q.ask("backup-begin", bitmap=name)
    change(server, 2)
    data = now(server)
    out, err = tool("--control=" + ctl_sock, server.uri, "repo")
    assert "an earlier backup was not ended" in err, err
    restores("repo", 2, data)
    server.stop()
    shutil.rmtree("repo")


def view_breaks():
    """Nothing is stored of a view that is broken."""
    harness.create("disk.qcow2", SIZE)
    server = Server(args=["--filter=" + harness.FILTER, "--filter=delay",
                          "file", "disk.qcow2", "rdelay=300ms",
                          "dirty-bitmap-scratch-size=1M",
                          "dirty-bitmap-control=" + ctl_sock])
    q = Qmp(ctl_sock)
    h = server.connect()
    h.pwrite(dice.randbytes(4 * MIB), 0)
    p = popen("--control=" + ctl_sock, server.uri, "repo")
    until_copying(p, q)
    for offset in range(0, 4 * MIB, 65536):
        h.aio_pwrite(dice.randbytes(65536), offset)
    while h.aio_in_flight():
        h.poll(-1)
    status, out, err = ended(p)
    assert status == 1, err
    one_error("", err)
    assert q.ask("backup-list") == []
    assert not os.path.exists("repo") or listed("repo") == []
    h.shutdown()
    server.stop()


class Held:
    """A control socket before the server's, which holds a command back."""

    def __init__(self, path, command):
        self.command = command.encode()
        self.is_held, self.goes_on = threading.Event(), threading.Event()
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        client, _ = self.listener.accept()
        server = socket.socket(socket.AF_UNIX)
        server.connect(ctl_sock)
        threading.Thread(target=self.forward, args=(server, client),
                         daemon=True).start()
        self.forward(client, server)
        server.shutdown(socket.SHUT_WR)

    def forward(self, source, target):
        while data := source.recv(1 << 16):
            if self.command in data:
                self.is_held.set()
                self.goes_on.wait()
            target.sendall(data)

    def popen(self, *args):
        """The program, when it has sent the command."""
        p = popen("--control=" + self.path, *args)
        harness.until(lambda: p.poll() is not None or self.is_held.is_set(),
                      "the command")
        return p


def keeps_what_is_dirty():
    """Of what is written during an increment the server keeps no more than
    the increment needs; during a full point it keeps all."""
    harness.create("disk.qcow2", SIZE)
    server, q = start()
    h = server.connect()
    h.pwrite(dice.randbytes(8 * MIB), 0)
    for n in range(3):
        data = whole(h)
        held = Held("held%d.sock" % n, "backup-end")
        p = held.popen(server.uri, "repo")
        kept = []
        # One that nobody has written since, and that of the round before.
        for unit in 64 + n, 63 + n:
            h.pwrite(dice.randbytes(65536), unit * 65536)
            kept += [b["view"]["kept"] for b in q.ask("backup-list")]
        assert kept == [[65536, 131072], [0, 65536], [0, 65536]][n], (n, kept)
        held.goes_on.set()
        assert ended(p)[0] == 0
        restores("repo", n + 1, data)

    # Another bitmap, just before it begins: its view does not show enough.
    files = backups.contents("repo")
    name = json.loads(read("repo/repository.json"))["bitmap"]
    held = Held("held.sock", "backup-begin")
    p = held.popen(server.uri, "repo")
    q.ask("block-dirty-bitmap-remove", node="disk", name=name)
    q.ask("block-dirty-bitmap-add", node="disk", name=name, granularity=512)
    h.pwrite(dice.randbytes(512), 0)
    held.goes_on.set()
    status, out, err = ended(p)
    assert status == 1, err
    one_error("has changed while the backup began", err)
    assert backups.contents("repo") == files and q.ask("backup-list") == []
    h.shutdown()
    server.stop()
    shutil.rmtree("repo")


def usage():
    for args in ((), ("a",), ("a", "b", "c"), ("--list",), ("--what", "a"),
                 ("--prune", "a"), ("--prune", "a", "--keep=0"),
                 ("--prune", "a", "--keep=x"), ("--keep=1", "a", "b"),
                 ("--list", "--verify", "a"), ("--list", "--force", "a"),
                 ("--verify", "--control=x", "a"),
                 ("--restore", "a", "b", "--bitmap=x")):
        status, out, err = ended(popen(*args))
        assert status == 1 and out == "" and "--help" in err, (args, err)
    out, err = tool("--help")
    assert out.startswith("usage: dirty-bitmap-backup") and err == ""
    out, err = tool("--version")
    assert out.startswith("dirty-bitmap-backup ") and err == ""

    harness.create("disk.qcow2", SIZE)
    server = Server("disk.qcow2", kind="nbdkit")
    os.mkdir("full")
    with open("full/letters", "w"):
        pass
    fails("neither a repository nor an empty folder", server.uri, "full")
    assert os.listdir("full") == ["letters"]
    fails("not a repository", "--list", "full")
    fails("No such file", "--list", "nowhere")
    fails("No such file", server.uri, "nowhere/repo")
    fails("Not a directory", server.uri, "disk.qcow2")
    fails("", "nbd+unix:///?socket=/nowhere", "repo")
    fails("", "file:///disk.qcow2", "repo")
    fails("ctl.none", "--control=ctl.none", server.uri, "repo")
    fails("too long", "--control=" + "x" * 200, server.uri, "repo")
    assert not os.path.exists("repo")
    server.stop()


for test in (usage, cycle, while_written, decisions, without_control,
             interrupted, one_at_a_time, keeps_what_is_dirty, view_breaks):
    print(test.__name__, flush=True)
    test()
print("compressed", flush=True)
cycle("--compress")
