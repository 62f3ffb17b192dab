#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Bitmaps are added, removed, cleared, enabled, disabled and merged while
clients write and read: from the answer on new clients see the result, the
image durably has it, and nothing that was written is missing in a bitmap that
records."""

import errno
import json
import os
import shutil
import threading
import time

import harness
from harness import CONTEXT, Server, granules, nbd, until
from qmp import Qmp, action, bitmaps, change, ctl, entry, refuse

harness.requires("qemu-nbd")
dice = harness.seeded()

MIB = 1 << 20
GRANULE = 65536
SIZE = 256 * MIB
ctl_sock = os.path.join(harness.tmp, "ctl.sock")
CONTROL = "dirty-bitmap-control=" + ctl_sock


def start(*params, options=(), image="disk.qcow2"):
    server = Server(image, CONTROL, *params, options=options)
    return server, Qmp(ctl_sock)


def end(server, *also):
    """Stop.  The image is sound."""
    for h in also:
        h.shutdown()
    server.stop()
    harness.check("disk.qcow2")


def seen(server, name, granularity=GRANULE):
    """The dirty granules that a new client sees, or None if it is not
    offered the bitmap."""
    h = server.connect(CONTEXT + name)
    result = granules(harness.extents(h, CONTEXT + name), granularity) \
        if h.can_meta_context(CONTEXT + name) else None
    h.shutdown()
    return result


def stored(name, granularity=GRANULE):
    """What QEMU's server says of a copy of the image, whatever is under way
    in the image itself."""
    shutil.copy("disk.qcow2", "copy.qcow2")
    return granules(harness.qemu_extents("copy.qcow2", name), granularity)


def names():
    """Those that QEMU finds in the image, also while it is served."""
    info = json.loads(harness.run("qemu-img", "info", "-U", "--output=json",
                                  "disk.qcow2"))
    return [b["name"] for b in info["format-specific"]["data"].get("bitmaps",
                                                                   [])]


class Writer(threading.Thread):
    """A client that writes to one granule after the other."""

    def __init__(self, server):
        super().__init__()
        self.client = server.connect()
        self.begun = self.ended = 0     # so many granules
        self.stops = False
        self.error = None

    def run(self):
        try:
            while not self.stops and self.begun < SIZE // GRANULE:
                self.begun += 1
                self.client.pwrite(b"w" * 512, (self.begun - 1) * GRANULE)
                self.ended += 1
                if self.ended % 16 == 0:
                    self.client.flush()
                time.sleep(0.001)
        except nbd.Error as e:
            self.error = e

    def wait_for(self, nr):
        until(lambda: self.ended >= nr or self.error, "writes")

    def stop(self):
        self.stops = True
        self.join()
        assert self.error is None, self.error
        self.client.shutdown()


def while_writing(*params):
    """A new bitmap has what was written after the answer, nothing of what
    was written before the question, and no other loses anything."""
    harness.create("disk.qcow2", SIZE, "old")
    server, q = start(*params)
    writer = Writer(server)
    writer.start()
    moments = []
    for name in "one", "two", "three":
        writer.wait_for(writer.ended + 20)
        before = writer.ended
        change(q, "add", name, persistent=name != "three")
        moments.append((name, before, writer.begun))
        # At once.
        assert seen(server, name) is not None
    before = writer.ended
    writer.wait_for(before + 1)
    change(q, "clear", "old")
    moments.append(("old", before, writer.begun))
    writer.wait_for(writer.ended + 20)
    writer.stop()
    written = writer.ended
    for name, before, after in moments:
        dirty = seen(server, name)
        assert set(range(after, written)) <= dirty, (name, after, dirty)
        assert dirty <= set(range(before, written)), (name, before, dirty)
        assert bitmaps(q)[name]["count"] == len(dirty) * GRANULE
    dirty = {name: seen(server, name) for name in ("one", "two", "old")}
    end(server)
    assert sorted(names()) == ["old", "one", "two"]
    for name in dirty:
        assert stored(name) == dirty[name], name


def one_by_one(*params):
    """Each command, what new clients see then, and what the image has."""
    harness.create("disk.qcow2", SIZE, "a")
    server, q = start(*params)
    h = server.connect()
    want = {"a": entry()}

    def write(*at):
        for granule in at:
            h.pwrite(b"x", granule * GRANULE)

    def same():
        assert bitmaps(q) == bitmaps(q, "query-block") == want, bitmaps(q)

    write(1)
    want["a"]["count"] = GRANULE
    # QEMU's default is not to store it.
    change(q, "add", "ram")
    want["ram"] = entry(persistent=False)
    change(q, "add", "off", persistent=True, disabled=True)
    want["off"] = entry(recording=False)
    change(q, "add", "fine", persistent=True, granularity=4096)
    want["fine"] = entry(4096)
    same()
    assert names() == ["a", "off", "fine"]

    write(2, 3)
    want["a"]["count"] = 3 * GRANULE
    want["ram"]["count"] = 2 * GRANULE
    want["fine"]["count"] = 2 * 4096
    same()
    assert seen(server, "ram") == {2, 3}
    assert seen(server, "off") == set()

    change(q, "disable", "ram")
    change(q, "disable", "a")
    change(q, "enable", "off")
    change(q, "enable", "off")
    assert harness.flags("disk.qcow2", "a") == set()
    assert "auto" in harness.flags("disk.qcow2", "off")
    write(4)
    assert seen(server, "ram") == {2, 3} and seen(server, "off") == {4}
    assert seen(server, "a") == {1, 2, 3}
    change(q, "enable", "a")
    write(5)
    assert seen(server, "a") == {1, 2, 3, 5}

    # Targets keep what they have; granularities may differ.
    change(q, "merge", "off", bitmaps=["ram"])
    assert seen(server, "off") == {2, 3, 4, 5}
    change(q, "merge", "fine", bitmaps=["a", {"node": "disk", "name": "off"}])
    assert seen(server, "fine") == {1, 2, 3, 4, 5}
    change(q, "merge", "ram", bitmaps=["fine", "ram"])
    assert seen(server, "ram") == {1, 2, 3, 4, 5}
    change(q, "merge", "a", bitmaps=[])
    assert seen(server, "a") == {1, 2, 3, 5}

    change(q, "clear", "a")
    assert seen(server, "a") == set()
    write(6)
    assert seen(server, "a") == {6} and seen(server, "off") >= {2, 6}

    change(q, "remove", "fine")
    assert names() == ["a", "off"] and seen(server, "fine") is None
    change(q, "remove", "ram")
    assert seen(server, "ram") is None
    # A name is free again.
    change(q, "add", "fine", persistent=True)
    assert seen(server, "fine") == set()
    write(7)
    end(server, h)
    assert names() == ["a", "off", "fine"]
    assert stored("a") == {6, 7} and stored("fine") == {7}
    assert stored("off") == {2, 3, 4, 5, 6, 7}
    for name in names():
        assert harness.flags("disk.qcow2", name) == {"auto"}


def transactions():
    """All of it, or nothing."""
    harness.create("disk.qcow2", SIZE, "a")
    server, q = start()
    h = server.connect()
    h.pwrite(b"x", 0)
    h.flush()
    before, image = bitmaps(q), names()
    rotation = [
        action("add", "new", persistent=True),
        action("add", "delta", disabled=True),
        action("merge", "delta", bitmaps=["a"]),
        action("clear", "a"), action("disable", "a")]
    for wrong, text in (
            (action("abort"), "Transaction aborted using Abort action"),
            (action("clear", "nope"), "Dirty bitmap 'nope' not found"),
            (action("add", "new"), "Bitmap already exists: new")):
        assert q.error({"execute": "transaction", "arguments": {
            "actions": rotation + [wrong]}}) == ("GenericError", text)
        assert bitmaps(q) == before and names() == image
        assert seen(server, "new") is seen(server, "delta") is None
        assert seen(server, "a") == {0}
    assert q.ask("transaction", actions=[]) == {}
    assert q.ask("transaction", actions=rotation) == {}
    assert bitmaps(q) == {
        "a": entry(recording=False), "new": entry(),
        "delta": entry(persistent=False, recording=False, count=GRANULE)}
    assert seen(server, "delta") == {0}
    h.pwrite(b"x", GRANULE)
    assert seen(server, "new") == {1} and seen(server, "a") == set()
    # What QEMU does not do: the name of a removed bitmap is free at once.
    assert q.ask("transaction", actions=[
        action("remove", "new"), action("add", "new", persistent=True)]) == {}
    assert seen(server, "new") == set()
    end(server, h)
    assert names() == ["a", "new"]


def in_use():
    """A client that reads a bitmap keeps others from changing it.  With force
    it does not, and gets errors for that bitmap alone."""
    harness.create("disk.qcow2", SIZE, "a", "b")
    server, q = start()
    h = server.connect()
    h.pwrite(b"x", 0)

    def read(reader, name):
        return granules(harness.extents(reader, CONTEXT + name), GRANULE)

    for what, more in (("remove", {}), ("clear", {}), ("disable", {}),
                       ("enable", {}), ("merge", {"bitmaps": ["b"]})):
        reader = server.connect(CONTEXT + "a")
        busy = "Bitmap 'a' is currently in use by another operation and " \
            "cannot be used"
        before = bitmaps(q)
        assert before["a"]["busy"] and not before["b"]["busy"]
        refuse(q, busy, what, "a", **more)
        refuse(q, busy, what, "a", force=False, **more)
        refuse(q, busy, "merge", "b", bitmaps=["a"])
        assert bitmaps(q) == before
        # Other bitmaps can be changed meanwhile.
        change(q, "add", "other", persistent=True)
        change(q, "remove", "other")
        assert 0 in read(reader, "a")
        # Nor does a merge from it by force disturb the client.
        change(q, "merge", "b", bitmaps=["a"], force=True)
        assert 0 in read(reader, "a")
        delta = nbd.NBD()
        delta.connect_uri("nbd+unix:///delta:a?socket=" + server.socket)
        assert delta.pread(1, 0) == b"x"

        change(q, what, "a", force=True, **more)
        # It is enabled already.
        if what != "enable":
            for use in (lambda: read(reader, "a"), lambda: delta.pread(1, 0)):
                try:
                    use()
                    raise AssertionError("%s: it was read" % what)
                except nbd.Error as e:
                    assert e.errnum == errno.EIO, (what, e)
        delta.shutdown()
        # The connection is as good as before, for all else.
        reader.pwrite(b"y", GRANULE)
        assert reader.pread(1, GRANULE) == b"y"
        if what == "remove":
            assert "a" not in bitmaps(q)
            change(q, "add", "a", persistent=True)
        else:
            assert seen(server, "a") is not None
        h.pwrite(b"x", 0)
        if what == "disable":
            change(q, "enable", "a", force=True)
        reader.shutdown()
        until(lambda: not bitmaps(q)["a"]["busy"], "a client to be gone")
        h.pwrite(b"x", 0)
        assert 0 in seen(server, "a")
    end(server, h)


def killed(*params):
    """What was answered is in the image, whatever comes then."""
    changes = [
        ("add", "new", {"persistent": True}, {"a": {1}, "off": {1},
                                              "new": set()}),
        ("add", "ram", {}, {"a": {1}, "off": {1}}),
        ("remove", "a", {}, {"off": {1}}),
        ("clear", "a", {}, {"a": set(), "off": {1}}),
        ("disable", "a", {}, {"a": {1}, "off": {1}}),
        ("enable", "off", {}, {"a": {1}, "off": {1}}),
        ("merge", "off", {"bitmaps": ["a"]}, {"a": {1, 2}, "off": {1, 2}}),
    ]
    for what, name, more, want in changes:
        harness.create("disk.qcow2", SIZE, "a", "off")
        server = Server("disk.qcow2")
        server.connect().pwrite(b"x", GRANULE)
        server.stop()
        harness.run("qemu-img", "bitmap", "--disable", "disk.qcow2", "off")
        server, q = start(*params)
        h = server.connect()
        if what == "merge":
            h.pwrite(b"x", 2 * GRANULE)
        change(q, what, name, **more)
        server.kill()
        harness.check("disk.qcow2", leaks=True)
        assert sorted(names()) == sorted(want), (what, names())
        for bitmap, dirty in want.items():
            found = stored(bitmap)
            # Of one that records, some more may have been written ahead.
            assert found >= dirty, (what, bitmap, found)
            assert "in-use" not in harness.flags("disk.qcow2", bitmap)
            if what in ("clear", "disable") and bitmap == "a" or \
               bitmap in ("off", "new"):
                assert found == dirty, (what, bitmap, found)
        recording = {bitmap for bitmap in want
                     if harness.flags("disk.qcow2", bitmap) == {"auto"}}
        assert recording == set(want) - (
            {"off"} if what != "enable" else set()) - (
            {"a"} if what == "disable" else set()), (what, recording)

        # It is served again, and is sound.
        server, q = start()
        assert set(bitmaps(q)) == set(want)
        server.connect().pwrite(b"x", 5 * GRANULE)
        end(server)


def killed_meanwhile(*params):
    """A transaction that a kill interrupts is done, or it is not."""
    actions = [action("add", "delta", persistent=True, disabled=True),
               action("merge", "delta", bitmaps=["a"]), action("clear", "a"),
               action("remove", "b")]
    for _ in range(20):
        harness.create("disk.qcow2", SIZE, "a", "b")
        server, q = start(*params)
        h = server.connect()
        h.pwrite(b"x", GRANULE)
        h.flush()
        q.send({"execute": "transaction", "arguments": {"actions": actions}})
        time.sleep(0.01 * dice.random() ** 3)
        server.kill()
        harness.check("disk.qcow2", leaks=True)
        for name in names():
            assert "in-use" not in harness.flags("disk.qcow2", name), name
        if "b" in names():
            assert names() == ["a", "b"], names()
            assert stored("a") >= {1} and stored("b") >= {1}
        else:
            assert sorted(names()) == ["a", "delta"], names()
            assert stored("a") == set() and stored("delta") >= {1}
            assert harness.flags("disk.qcow2", "delta") == set()


def readonly():
    """-r: nothing of the image is changed.  What is in RAM alone can be."""
    harness.create("disk.qcow2", SIZE, "a", "b")
    before = harness.sha256("disk.qcow2")
    server, q = start(options=["-r"])
    for what, more in (("remove", {}), ("clear", {}), ("disable", {}),
                       ("merge", {"bitmaps": ["b"]})):
        refuse(q, "Bitmap 'a' is readonly and cannot be modified", what, "a",
               **more)
    _, text = q.error({"execute": "block-dirty-bitmap-add", "arguments": {
        "node": "disk", "name": "new", "persistent": True}})
    assert text.startswith("Can't make bitmap 'new' persistent in 'disk': ")
    assert bitmaps(q) == {"a": entry(), "b": entry()}
    change(q, "add", "ram")
    change(q, "merge", "ram", bitmaps=["a", "b"])
    assert seen(server, "ram") == set()
    server.stop()
    assert harness.sha256("disk.qcow2") == before


def limits():
    """Names of 1023 bytes, and as many bitmaps as the directory holds."""
    harness.create("disk.qcow2", SIZE)
    server, q = start()
    long = "é" * 511 + "x"
    change(q, "add", long, persistent=True)
    for persistent in True, False:
        reply = q.execute("block-dirty-bitmap-add", node="disk",
                          name=long + "x", persistent=persistent)
        assert "error" in reply, reply
    assert seen(server, long) == set()
    refuse(q, "Parameter 'name' must not contain the character NUL", "clear",
           "a\0b")
    end(server)
    assert names() == [long]


def inconsistent():
    """It can be removed, and then there can be another of its name."""
    harness.create("disk.qcow2", SIZE, "a")
    server = Server("disk.qcow2", "dirty-bitmap-crash=mark")
    server.connect().pwrite(b"x", 0)
    server.kill()
    server, q = start()
    for what, more in (("clear", {}), ("enable", {}), ("disable", {}),
                       ("merge", {"bitmaps": ["a"]}),
                       ("clear", {"force": True})):
        refuse(q, "Bitmap 'a' is inconsistent and cannot be used", what, "a",
               **more)
    assert seen(server, "a") is None
    change(q, "remove", "a")
    change(q, "add", "a", persistent=True)
    assert seen(server, "a") == set()
    end(server)


def nbdkits_server():
    """Where nbdkit's server answers: the counts, and the image."""
    harness.create("disk.qcow2", SIZE, "a")
    server, q = start("dirty-bitmap-server=off")
    h = server.connect()
    h.pwrite(b"x", 0)
    change(q, "add", "b", persistent=True)
    h.pwrite(b"x", GRANULE)
    assert bitmaps(q) == {"a": entry(count=2 * GRANULE),
                          "b": entry(count=GRANULE)}
    delta = nbd.NBD()
    delta.connect_uri("nbd+unix:///delta:b?socket=" + server.socket)
    assert delta.pread(2, GRANULE - 1) == b"\0x"
    assert bitmaps(q)["b"]["busy"]
    delta.shutdown()
    until(lambda: not bitmaps(q)["b"]["busy"], "a client to be gone")
    change(q, "remove", "a")
    h.pwrite(b"x", 2 * GRANULE)
    end(server, h)
    assert names() == ["b"] and stored("b") == {1, 2}


def exposed():
    """Only those that dirty-bitmap-expose names are offered, also when they
    come later."""
    harness.create("disk.qcow2", SIZE, "a")
    server, q = start("dirty-bitmap-expose=a")
    change(q, "add", "hidden", persistent=True)
    assert seen(server, "hidden") is None
    assert set(bitmaps(q)) == {"a", "hidden"}
    change(q, "remove", "a")
    assert seen(server, "a") is None
    change(q, "add", "a", persistent=True)
    assert seen(server, "a") == set()
    end(server)


def program():
    """nbdkit-dirty-bitmap-ctl has a way to write each of the arguments."""
    harness.create("disk.qcow2", SIZE, "a")
    server, q = start()
    add = [ctl_sock, "block-dirty-bitmap-add", "node=disk"]
    assert ctl(*add, "name=5", "persistent=true", "granularity=4096") == \
        ("{}\n", "")
    ctl(*add, "name=b")
    server.connect().pwrite(b"x", 0)
    merge = [ctl_sock, "block-dirty-bitmap-merge", "node=disk", "target=b"]
    ctl(ctl_sock, "block-dirty-bitmap-clear", "node=disk", "name=b")
    ctl(*merge, "bitmaps=a", "bitmaps=5")
    assert bitmaps(q)["b"]["count"] == GRANULE
    ctl(*merge, "bitmaps=5")
    ctl(*merge, 'bitmaps=["a"]')
    ctl(*merge, 'bitmaps={"node":"disk","name":"a"}', "bitmaps=a")
    actions = json.dumps([action("clear", "b"), action("remove", "5")])
    with open("actions", "w") as f:
        f.write(actions)
    abort = json.dumps([action("clear", "b"), action("abort")])
    transaction = [ctl_sock, "transaction"]
    assert "Abort action" in ctl(*transaction, "actions:=@-",
                                 stdin=abort.encode(), status=1)[1]
    assert "5" in bitmaps(q)
    ctl(*transaction, "actions:=@actions")
    assert bitmaps(q)["b"]["count"] == 0 and "5" not in bitmaps(q)
    ctl(*transaction, "actions:=@-", stdin=actions.replace("5", "b").encode())
    assert set(bitmaps(q)) == {"a"}
    for args, why in (
            (["actions:=@nosuch"], "nosuch: No such file"),
            (["actions:=@."], ".: Is a directory"),
            (["actions:=@/dev/null"], "actions: not JSON: /dev/null, line 1"),
            (["actions=5"], "'actions', expected: array"),
            (["bitmaps=a", "bitmaps:=[]"], "bitmaps is given twice"),
            (["bitmaps:=5", "bitmaps=a"], "bitmaps is given twice"),
            (["name=a", "name=b"], "name is given twice")):
        assert why in ctl(*transaction, *args, status=1)[1], why
    server.stop()


for mode in "keep", "mark":
    while_writing("dirty-bitmap-crash=" + mode)
    one_by_one("dirty-bitmap-crash=" + mode)
    killed("dirty-bitmap-crash=" + mode)
    killed_meanwhile("dirty-bitmap-crash=" + mode)
transactions()
in_use()
readonly()
limits()
inconsistent()
nbdkits_server()
exposed()
program()
