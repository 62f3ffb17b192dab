#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Views of backups: what a client reads from backup:NAME is the disk, and its
bitmap, at the moment of backup-begin, whatever is written meanwhile; clients of
the control socket are told when a view breaks or ends; nothing is left behind.
"""

import errno
import os
import threading
import time

import harness
from harness import CONTEXT, ZERO, Server, granules, nbd, run, until
from qmp import Qmp, bitmaps

harness.requires("qemu-nbd", "qemu-io")
dice = harness.seeded()

MIB = 1 << 20
GRANULE = 65536
SIZE = 16 * MIB + 1536
ctl_sock = os.path.join(harness.tmp, "ctl.sock")
scratch = os.path.join(harness.tmp, "scratch")
os.mkdir(scratch)


def start(*params, image="disk.qcow2"):
    server = Server(image, "dirty-bitmap-control=" + ctl_sock,
                    "dirty-bitmap-scratch=" + scratch, *params)
    return server, Qmp(ctl_sock)


def seen(h, name):
    return granules(harness.extents(h, CONTEXT + name), GRANULE)


def bits(server, name):
    h = server.connect(CONTEXT + name)
    result = seen(h, name)
    h.shutdown()
    return result


def stored(name):
    return granules(harness.qemu_extents("disk.qcow2", name), GRANULE)


def view(server, name):
    h = nbd.NBD()
    h.add_meta_context("base:allocation")
    h.add_meta_context(CONTEXT + name)
    h.connect_uri("nbd+unix:///backup:%s?socket=%s" % (name, server.socket))
    return h


def no_view(server, name):
    try:
        view(server, name)
    except nbd.Error:
        return
    raise AssertionError("there is an export backup:" + name)


def fails(what, *args):
    """The request fails with EIO."""
    try:
        what(*args)
    except nbd.Error as e:
        assert e.errnum == errno.EIO, e
        return
    raise AssertionError("it succeeded")


def whole(h, step=MIB):
    size = h.get_size()
    return b"".join(h.pread(min(step, size - at), at)
                    for at in range(0, size, step))


def begin(q, name, **more):
    r = q.ask("backup-begin", bitmap=name, **more)
    assert list(r)[0] == "export" and r["export"] == "backup:" + name, r
    return r


def end(q, name, success, **more):
    return q.ask("backup-end", bitmap=name, success=success, **more)


def refuse(q, text, command, **arguments):
    """The reason that comes behind the text."""
    kind, got = q.error({"execute": command, "arguments": arguments})
    assert kind == "GenericError" and got.startswith(text), got
    return got[len(text):]


def event(listener, name):
    """The data of the next event, which has this name."""
    message = listener.message()
    assert message["event"] == name and "timestamp" in message, message
    return message["data"]


def deleted(listener, name):
    data = event(listener, "BLOCK_EXPORT_DELETED")
    assert data == {"id": "backup:" + name}, data


def size_of(path):
    return os.stat(path).st_size


def is_clean(image="disk.qcow2"):
    harness.check(image)
    assert os.listdir(scratch) == [], os.listdir(scratch)


# Images of all kinds, with a bitmap b.  What is written to them is random, so
# that bytes which come from another place or moment are seen.

def random_raw(name, part):
    with open(name, "wb") as f:
        f.write(dice.randbytes(int(SIZE * part)))
        f.truncate(SIZE)


def plain():
    random_raw("source", 0.7)
    run("qemu-img", "convert", "-O", "qcow2", "source", "disk.qcow2")


def extended():
    random_raw("source", 0.7)
    run("qemu-img", "convert", "-O", "qcow2", "-o", "extended_l2=on",
        "source", "disk.qcow2")


def compressed():
    random_raw("source", 0.7)
    run("qemu-img", "convert", "-c", "-O", "qcow2", "source", "disk.qcow2")


def backing():
    random_raw("base.raw", 0.5)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b",
        "base.raw", "disk.qcow2", str(SIZE))


def snapshot():
    plain()
    run("qemu-img", "snapshot", "-c", "s", "disk.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 1M 2M", "disk.qcow2")


def data_file():
    random_raw("source", 0.7)
    run("qemu-img", "convert", "-O", "qcow2", "-o", "data_file=data.raw",
        "source", "disk.qcow2")


class Load(threading.Thread):
    """A client that changes the disk in all ways, and knows what it has."""

    def __init__(self, server, data):
        super().__init__(daemon=True)
        self.client = server.connect()
        self.data = bytearray(data)
        self.changed = set()
        self.changes = 0
        self.stops = False
        self.start()

    def change(self):
        count = min(dice.choice([512, 4096, 70000, MIB]) +
                    dice.randrange(3), SIZE)
        offset = dice.randrange(SIZE - count + 1)
        end = offset + count
        self.changed |= set(range(offset // GRANULE, -(-end // GRANULE)))
        how = dice.randrange(6)
        if how < 3:
            new = dice.randbytes(count)
            self.client.pwrite(new, offset)
        else:
            new = bytes(count)
            if how == 3:
                self.client.zero(count, offset)
            elif how == 4:
                self.client.zero(count, offset, nbd.CMD_FLAG_NO_HOLE)
            else:
                self.client.trim(count, offset)
                new = self.client.pread(count, offset)
        self.data[offset:end] = new
        self.changes += 1

    def run(self):
        while not self.stops:
            self.change()
            if dice.randrange(20) == 0:
                self.client.flush()

    def stop(self):
        self.stops = True
        self.join()
        self.client.shutdown()


def zeroes_are(h, data):
    """Where the view has zeroes by its block status, it has."""
    at = 0
    for length, kind in harness.extents(h, "base:allocation"):
        if kind & ZERO:
            assert not any(data[at:at + length]), (at, length)
        at += length


def compare(h, data, rounds=200):
    for _ in range(rounds):
        count = dice.choice([512, 3000, 200000])
        offset = dice.randrange(SIZE - count + 1)
        assert h.pread(count, offset) == data[offset:offset + count], (
            offset, count)


def reads_as_at_begin(make, *params):
    """Once for each kind of image."""
    make()
    run("qemu-img", "bitmap", "--add", "disk.qcow2", "b")
    server, q = start(*params)
    load = Load(server, bytes(SIZE))
    until(lambda: load.changes > 20, "changes")
    load.stop()
    h = server.connect()
    before = whole(h)
    dirty = bits(server, "b")
    h.shutdown()

    begun = begin(q, "b")
    assert begun["action"] == "used" and begun["size"] == SIZE
    load = Load(server, before)
    h = view(server, "b")
    assert h.is_read_only() and h.get_size() == SIZE
    assert h.can_multi_conn()
    while load.changes < 100:
        compare(h, before)
        assert seen(h, "b") == dirty
        zeroes_are(h, before)
    load.stop()
    assert whole(h) == before
    assert seen(h, "b") == dirty
    zeroes_are(h, before)
    live = server.connect()
    assert whole(live) == load.data
    live.shutdown()

    assert end(q, "b", True)["dirty"] == len(load.changed) * GRANULE
    fails(h.pread, 512, 0)
    h.shutdown()
    no_view(server, "b")
    assert bits(server, "b") == load.changed
    server.stop()
    is_clean()
    assert stored("b") == load.changed
    assert harness.contents("disk.qcow2") == load.data


def lists_and_events():
    harness.create("disk.qcow2", SIZE, "b", "c")
    server, q = start("dirty-bitmap-node=vda")
    listener = Qmp(ctl_sock)
    h = server.connect()
    h.pwrite(dice.randbytes(GRANULE), 0)
    no_view(server, "b")
    exports = q.ask("query-block-exports")
    begin(q, "b")
    assert q.ask("query-block-exports") == exports + [
        {"id": "backup:b", "type": "nbd", "node-name": "vda",
         "shutting-down": False}]
    [backup] = q.ask("backup-list")
    assert backup["view"] == {"export": "backup:b", "clients": 0, "kept": 0}
    assert "fail-after" not in backup
    one, two = view(server, "b"), view(server, "b")
    h.pwrite(dice.randbytes(512), 0)
    [backup] = q.ask("backup-list")
    assert backup["view"] == {"export": "backup:b", "clients": 2,
                              "kept": GRANULE}, backup
    one.shutdown()
    two.shutdown()
    until(lambda: q.ask("backup-list")[0]["view"]["clients"] == 0,
          "the clients to be gone")
    # The export of another bitmap is another.
    no_view(server, "c")
    h.shutdown()

    # A backup without a view has no export.
    assert "export" not in q.ask("backup-begin", bitmap="c", view=False)
    assert "view" not in q.ask("backup-list")[1]
    no_view(server, "c")
    end(q, "c", False)
    # The client that causes an event gets it before the reply.
    end(q, "b", False)
    assert [e["data"] for e in q.events] == [{"id": "backup:b"}], q.events
    deleted(listener, "b")
    assert q.ask("query-block-exports") == exports
    assert q.ask("backup-list") == []

    begin(q, "b")
    end(q, "b", True)
    deleted(listener, "b")
    # Nothing is told to a client that has not negotiated.
    mute = Qmp(ctl_sock, negotiate=False)
    begin(q, "b")
    end(q, "b", True, clear=False)
    deleted(listener, "b")
    assert mute.execute("qmp_capabilities") == {"return": {}}
    assert mute.events == []
    server.stop()
    assert listener.message()["event"] == "SHUTDOWN"
    is_clean()


def fail_after():
    harness.create("disk.qcow2", SIZE, "b")
    server, q = start()
    listener = Qmp(ctl_sock)
    h = server.connect()
    h.pwrite(b"x", 0)
    text = "Parameter 'fail-after' expects a number of seconds from 1 to 604800"
    for bad in 0, 604801:
        assert refuse(q, text, "backup-begin", bitmap="b",
                      **{"fail-after": bad}) == ""
    refuse(q, "Parameter 'fail-after' is about", "backup-begin", bitmap="b",
           view=False, **{"fail-after": 5})
    assert q.ask("backup-list") == []

    # As long as a client has it open.
    begin(q, "b", **{"fail-after": 1})
    reader = view(server, "b")
    h.pwrite(b"x", GRANULE)
    time.sleep(2)
    [backup] = q.ask("backup-list")
    assert backup["fail-after"] == 1 and backup["view"]["clients"] == 1
    left = time.monotonic()
    reader.shutdown()
    data = event(listener, "BACKUP_BROKEN")
    took = time.monotonic() - left
    assert data == {"bitmap": "b", "reason": "no client had its export open "
                    "for 1 seconds"}, data
    deleted(listener, "b")
    assert 1 <= took, took
    assert q.ask("backup-list") == []
    assert "the backup of bitmap 'b' has failed: no client" in \
        server.messages()
    refuse(q, "There is no backup of bitmap 'b'", "backup-end", bitmap="b",
           success=True)
    assert bits(server, "b") == {0, 1}

    # From the beginning, in a transaction; the other one has no such bound.
    data = {"bitmap": "b", "fail-after": 1}
    q.ask("transaction", actions=[
        {"type": "backup-begin", "data": {"bitmap": "n"}},
        {"type": "backup-begin", "data": data}])
    assert event(listener, "BACKUP_BROKEN")["bitmap"] == "b"
    deleted(listener, "b")
    assert [b["bitmap"] for b in q.ask("backup-list")] == ["n"]
    # A transaction that fails begins nothing.
    for last in ({"type": "abort", "data": {}},
                 {"type": "backup-begin", "data": {"bitmap": "n"}}):
        refuse(q, "", "transaction", actions=[
            {"type": "backup-begin", "data": data}, last])
        no_view(server, "b")
    assert len(q.ask("backup-list")) == 1

    # What is ended in time is not ended again.
    begin(q, "b", **{"fail-after": 1})
    end(q, "b", True)
    deleted(listener, "b")
    begin(q, "b")
    time.sleep(1.5)
    assert len(q.ask("backup-list")) == 2
    h.shutdown()
    server.stop()
    assert listener.message()["event"] == "SHUTDOWN"
    is_clean()


def two_at_once():
    """Of different moments, and of one."""
    harness.create("disk.qcow2", SIZE, "b", "c")
    server, q = start()
    h = server.connect()
    data = [dice.randbytes(SIZE) for _ in range(3)]
    h.pwrite(data[0], 0)
    begin(q, "b")
    h.pwrite(data[1], 0)
    assert end(q, "b", True)["dirty"] == -(-SIZE // GRANULE) * GRANULE
    begin(q, "b")
    h.pwrite(data[2][:MIB], 0)
    middle = data[2][:MIB] + data[1][MIB:]
    begin(q, "c")
    h.pwrite(data[2], 0)
    one, two = view(server, "b"), view(server, "c")
    assert whole(one) == data[1] and whole(two) == middle
    end(q, "b", True)
    assert bits(server, "b") == set(range(-(-SIZE // GRANULE)))
    fails(one.pread, 512, 0)
    assert whole(two) == middle
    end(q, "c", True)
    for reader in one, two:
        reader.shutdown()

    actions = [{"type": "backup-begin", "data": {"bitmap": b}}
               for b in ("b", "c")]
    load = Load(server, data[2])
    assert q.ask("transaction", actions=actions) == {}
    one, two = view(server, "b"), view(server, "c")
    until(lambda: load.changes > 50, "changes")
    load.stop()
    assert whole(one) == whole(two)
    for name, reader in ("b", one), ("c", two):
        end(q, name, True)
        reader.shutdown()
    h.shutdown()
    server.stop()
    is_clean()


def breaks():
    """What is to be kept does not fit: the guest goes on, the view does not."""
    harness.create("disk.qcow2", SIZE, "b")
    server, q = start("dirty-bitmap-scratch-size=1M")
    listener = Qmp(ctl_sock)
    h = server.connect()
    data = dice.randbytes(4 * MIB)
    h.pwrite(data, 0)
    begin(q, "b")
    reader = view(server, "b")
    h.pwrite(data[:MIB // 2], MIB)
    assert reader.pread(MIB, MIB) == data[MIB:2 * MIB]
    assert "broken" not in q.ask("backup-list")[0]["view"]
    new = dice.randbytes(6 * MIB)
    h.pwrite(new, 0)
    told = event(listener, "BACKUP_BROKEN")
    assert told["bitmap"] == "b" and told["reason"] != "", told
    [backup] = q.ask("backup-list")
    assert backup["view"]["broken"] == told["reason"], backup
    fails(reader.pread, 512, 10 * MIB)
    assert whole(h)[:6 * MIB] == new
    reason = refuse(q, "The view of bitmap 'b' is broken: ", "backup-end",
                    bitmap="b", success=True)
    assert reason == told["reason"], (reason, told)
    # Once is enough.
    time.sleep(0.5)
    assert bits(server, "b") == set(range(6 * MIB // GRANULE))
    assert end(q, "b", False)["dirty"] == 6 * MIB
    deleted(listener, "b")
    reader.shutdown()

    assert begin(q, "b")["dirty"] == 6 * MIB
    reader = view(server, "b")
    assert whole(reader)[:6 * MIB] == new
    assert seen(reader, "b") == set(range(6 * MIB // GRANULE))
    assert end(q, "b", True)["dirty"] == 0
    reader.shutdown()
    h.shutdown()
    server.stop()
    is_clean()
    assert stored("b") == set()


def no_scratch():
    """The error says which folder."""
    gone = os.path.join(harness.tmp, "gone")
    harness.create("disk.qcow2", SIZE, "b")
    os.mkdir(gone)
    server = Server("disk.qcow2", "dirty-bitmap-control=" + ctl_sock,
                    "dirty-bitmap-scratch=" + gone)
    q = Qmp(ctl_sock)
    os.rmdir(gone)
    kind, text = q.error({"execute": "backup-begin",
                          "arguments": {"bitmap": "b"}})
    assert kind == "GenericError" and gone in text, text
    assert q.ask("backup-list") == []
    assert "view" not in q.ask("backup-begin", bitmap="b", view=False)
    server.stop()

    # By default it is the image's.
    os.mkdir(gone)
    os.rename("disk.qcow2", os.path.join(gone, "disk.qcow2"))
    server = Server(os.path.join(gone, "disk.qcow2"),
                    "dirty-bitmap-control=" + ctl_sock)
    q = Qmp(ctl_sock)
    begin(q, "b")
    deep = os.path.join("/proc", str(server.pid), "fd")
    files = [os.readlink(os.path.join(deep, fd)) for fd in os.listdir(deep)]
    assert any(f.startswith(gone + "/") and f.endswith(" (deleted)")
               for f in files), files
    assert os.listdir(gone) == ["disk.qcow2"]
    server.stop()
    os.rename(os.path.join(gone, "disk.qcow2"), "disk.qcow2")
    os.rmdir(gone)


def killed():
    harness.create("disk.qcow2", SIZE, "b")
    server, q = start()
    h = server.connect()
    h.pwrite(dice.randbytes(2 * MIB), 0)
    begin(q, "b")
    h.pwrite(dice.randbytes(2 * MIB), MIB)
    [backup] = q.ask("backup-list")
    assert backup["view"]["kept"] >= MIB, backup
    server.kill()
    assert os.listdir(scratch) == []

    server, q = start()
    assert q.ask("backup-list") == []
    no_view(server, "b")
    assert bits(server, "b") >= set(range(3 * MIB // GRANULE))
    server.stop()
    harness.check("disk.qcow2", leaks=True)


def cycles():
    """The image has nothing of them, and does not grow."""
    plain()
    run("qemu-img", "bitmap", "--add", "disk.qcow2", "b")
    server, q = start()
    sizes = []
    for cycle in range(10):
        begin(q, "b")
        h = server.connect()
        for offset in range(0, 4 * MIB, 3 * GRANULE):
            h.pwrite(dice.randbytes(5000), offset)
        h.flush()
        h.shutdown()
        end(q, "b", cycle % 3 > 0)
        sizes.append(size_of("disk.qcow2"))
    assert len(set(sizes[1:])) == 1, sizes
    server.stop()
    is_clean()


def large_holes():
    """A trim, and zeroes, of all of the disk at once."""
    for how in "trim", "zero":
        plain()
        run("qemu-img", "bitmap", "--add", "disk.qcow2", "b")
        server, q = start()
        h = server.connect()
        before = whole(h)
        begin(q, "b")
        getattr(h, how)(SIZE, 0)
        reader = view(server, "b")
        assert whole(reader) == before
        assert not any(whole(h)[:MIB])
        assert end(q, "b", True)["dirty"] == -(-SIZE // GRANULE) * GRANULE
        reader.shutdown()
        h.shutdown()
        server.stop()
        is_clean()


def nbdkits_server():
    """The view is an export of that server, too."""
    plain()
    run("qemu-img", "bitmap", "--add", "disk.qcow2", "b")
    server, q = start("dirty-bitmap-server=off")
    h = server.connect()
    before = whole(h)
    begin(q, "b")
    h.pwrite(dice.randbytes(MIB), MIB)
    reader = nbd.NBD()
    reader.connect_uri("nbd+unix:///backup:b?socket=" + server.socket)
    assert reader.is_read_only() and whole(reader) == before
    assert q.ask("backup-list")[0]["view"]["clients"] == 1
    reader.shutdown()
    assert end(q, "b", True) == {"dirty": MIB}
    h.shutdown()
    server.stop()
    is_clean()


def takes_no_events():
    """A client that does not receive its events is disconnected, and those
    that do are not."""
    name = "n" * 1000
    harness.create("disk.qcow2", SIZE, name)
    server, q = start()
    deaf = Qmp(ctl_sock)
    others = [Qmp(ctl_sock) for _ in range(2)]
    rounds = 0

    def has_place():
        other = Qmp(ctl_sock, negotiate=False)
        other.close()
        return "QMP" in other.greeting

    assert not has_place()
    while not has_place():
        begin(q, name)
        end(q, name, False)
        q.events.clear()
        for other in others:
            assert other.ask("query-name") == {}
        rounds += 1
        assert rounds < 5000
    assert rounds > 60, rounds
    deaf.close()
    server.stop()


if harness.SERVER == "nbdkit":
    for image in plain, extended, compressed, backing, snapshot, data_file:
        print(image.__name__, flush=True)
        reads_as_at_begin(image)
    reads_as_at_begin(plain, "dirty-bitmap-crash=mark")
    for test in (lists_and_events, fail_after, two_at_once, breaks,
                 no_scratch, killed, cycles, large_holes, nbdkits_server,
                 takes_no_events):
        print(test.__name__, flush=True)
        test()
