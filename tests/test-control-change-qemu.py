#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""The same changes of bitmaps to our control socket and to
qemu-storage-daemon's, with the same writes in between: the replies are the
same, the bitmaps have the same states after each, and in the end both images
have the same bitmaps, bit for bit.  What is not the same, as the manual says,
is left out: force, a merge of nothing, and a name that is used again in the
transaction that removes it.  So is an enable that fails in a transaction, of
which QEMU 7.2 dies."""

import json
import os
import shutil

import harness
from harness import Server, nbd
from qmp import Qmp, StorageDaemon, action, bitmaps

harness.requires("qemu-storage-daemon", "qemu-nbd")
dice = harness.seeded()
STEPS = int(os.environ.get("ROUNDS", 300))

MIB = 1 << 20
SIZE = 12 * MIB + 1536
ours_sock, theirs_sock, export_sock = (
    os.path.join(harness.tmp, n) for n in ("o", "t", "n"))
COMMAND = "block-dirty-bitmap-"
NAMES = ["a", "b", "c", "d é", "e" * 200]


def as_before(reply):
    """QEMU's reply in the words of QEMU 7.2: a later one has a text with a
    small letter."""
    if "error" in reply:
        reply["error"]["desc"] = reply["error"]["desc"].replace(
            " does not support transaction property ",
            " does not support Transaction property ")


class Pair:
    """Both servers, over a copy each of one image."""

    def __init__(self):
        self.server = Server("ours.qcow2", "dirty-bitmap-control=" + ours_sock)
        self.daemon = StorageDaemon("theirs.qcow2", theirs_sock)
        self.ours, self.theirs = (
            Qmp(ours_sock), Qmp(theirs_sock, is_qemu=True))
        theirs = self.theirs
        self.version = theirs.ask("query-version")["qemu"]["major"]
        theirs.ask("nbd-server-start", addr={
            "type": "unix", "data": {"path": export_sock}})
        theirs.ask("block-export-add", type="nbd", id="x", name="",
                   writable=True, **{"node-name": "disk"})
        self.clients = [self.server.connect(), nbd.NBD()]
        self.clients[1].connect_unix(export_sock)

    def write(self):
        offset = dice.randrange(SIZE)
        count = min(dice.choice((1, 512, 4096, 70000, MIB)), SIZE - offset)
        fill = bytes([dice.randrange(1, 256)])
        zero = dice.random() < 0.2
        for h in self.clients:
            if zero:
                h.zero(count, offset)
            else:
                h.pwrite(fill * count, offset)

    def same(self, request):
        """The reply of both."""
        replies = []
        for q in self.ours, self.theirs:
            q.send(request)
            replies.append(q.reply())
        as_before(replies[1])
        assert replies[0] == replies[1], "%s\nours:   %s\ntheirs: %s" % (
            request, *replies)
        return replies[0]

    def states(self):
        a, b = bitmaps(self.ours), bitmaps(self.theirs)
        assert a == b, "ours:   %s\ntheirs: %s" % (a, b)
        return a

    def quit(self):
        for h in self.clients:
            h.shutdown()
        for q in self.ours, self.theirs:
            assert q.ask("quit") == {}
            q.ended()
        self.server.ends()
        assert self.daemon.process.wait(harness.PATIENCE) == 0


def images():
    """A bitmap of each kind; two copies of the image."""
    harness.create("ours.qcow2", SIZE, "broken")
    server = Server("ours.qcow2", "dirty-bitmap-crash=mark")
    server.connect().pwrite(b"x", 0)
    server.kill()
    for name, *options in (("a",), ("b", "--disable"), ("c", "-g", "4096")):
        harness.run("qemu-img", "bitmap", "--add", *options, "ours.qcow2",
                    name)
    harness.run("qemu-io", "-f", "qcow2", "-c", "write 5000 1",
                "-c", "write %d 1" % (SIZE - 1), "ours.qcow2")
    shutil.copy("ours.qcow2", "theirs.qcow2")


def command(execute, /, **arguments):
    return {"execute": execute, "arguments": arguments}


def wrong_arguments():
    """Commands, and lists of actions, that never get as far as the disk."""
    right = {"node": "disk", "name": "a"}
    for what in "add", "remove", "clear", "enable", "disable":
        for wrong in ({}, {"node": "disk"}, {"name": "a"}, {**right, "x": 1},
                      {**right, "name": 5}, {**right, "node": None}):
            yield what, wrong
    yield "add", {**right, "granularity": "x", "y": 1}
    for value in "5", 5.0, True, -1, 1 << 32, (1 << 63) - 1, [], None:
        yield "add", {**right, "granularity": value}
    for key in "persistent", "disabled":
        for value in 0, "true", None:
            yield "add", {**right, key: value}
    right = {"node": "disk", "target": "a", "bitmaps": ["b"]}
    for wrong in ({"bitmaps": {}}, {"bitmaps": "b"}, {"bitmaps": [1]},
                  {"bitmaps": ["b", None]}, {"bitmaps": [[]], "x": 1},
                  {"bitmaps": [{}]}, {"bitmaps": [{"node": "disk"}]},
                  {"bitmaps": [{"name": "b"}]},
                  {"bitmaps": ["b", {"node": 1, "name": "b"}]},
                  {"bitmaps": [{"node": "disk", "name": "b", "x": 1}]},
                  {"bitmaps": ["b"], "x": 1}, {"target": 1}):
        yield "merge", {**right, **wrong}
    yield "merge", {"node": "disk", "target": "a"}
    yield "merge", {"node": "disk", "bitmaps": ["a"]}


ABORT = action("abort")
CLEAR = action("clear", "a")
WRONG_TRANSACTIONS = [
    {}, {"actions": 1}, {"actions": {}}, {"actions": [1]}, {"actions": [[]]},
    {"actions": [None]}, {"actions": [{}]}, {"actions": [{"type": 1}]},
    {"actions": [{"type": "x"}]}, {"actions": [{"data": {}}]},
    {"actions": [{"type": "x", "data": {}}]},
    {"actions": [{"type": "x", "data": 1, "z": 1}]},
    {"actions": [{"type": "Abort", "data": {}}]},
    {"actions": [{"type": "", "data": {}}]},
    {"actions": [{"type": "query-block", "data": {}}]},
    {"actions": [{"type": "abort"}]},
    {"actions": [{"type": "abort", "data": 1}]},
    {"actions": [{"type": "abort", "data": {"x": 1}}]},
    {"actions": [{"type": "abort", "data": {}, "x": 1}]},
    {"actions": [{"type": "abort", "data": {"y": 1}, "x": 1}]},
    {"actions": [ABORT, {"type": "x", "data": {}}]},
    {"actions": [CLEAR, CLEAR, {"type": CLEAR["type"]}]},
    {"actions": [], "x": 1}, {"properties": {}},
    {"properties": {"x": 1}}, {"actions": [1], "properties": 1},
    {"actions": [], "properties": 1},
    {"actions": [], "properties": {"completion-mode": 1}},
    {"actions": [], "properties": {"completion-mode": "x"}},
    {"actions": [], "properties": {"completion-mode": "grouped", "x": 1}},
]


def errors(pair):
    """What is refused before a bitmap is looked at."""
    for what, wrong in wrong_arguments():
        assert "error" in pair.same(command(COMMAND + what, **wrong))
        assert "error" in pair.same(command("transaction", actions=[
            CLEAR, {"type": COMMAND + what, "data": wrong}]))
    for wrong in WRONG_TRANSACTIONS:
        assert "error" in pair.same(command("transaction", **wrong))
    assert pair.same(command("transaction", actions=[])) == {"return": {}}
    for mode in "individual", "grouped":
        assert pair.same(command("transaction", actions=[], properties={
            "completion-mode": mode})) == {"return": {}}
    for what, name in (("add", "new"), ("remove", "a"), ("clear", "a"),
                       ("disable", "a"), ("add", "")):
        grouped = [[action(what, name)], [action(what, name), ABORT]]
        # Later ones find fault with abort, too, before they carry it out.
        if pair.version < 8:
            grouped.append([ABORT, action(what, name)])
        for actions in grouped:
            assert "error" in pair.same(command(
                "transaction", actions=actions,
                properties={"completion-mode": "grouped"}))


def elsewhere(what, name, node="nope", **more):
    """An action on another node."""
    a = action(what, name, **more)
    a["data"]["node"] = node
    return a


def refused(pair):
    """What is refused because of what there is, alone and behind what could
    be done, of which nothing is."""
    other = {"node": "nope", "name": "b"}
    actions = [ABORT]
    for what in "remove", "clear", "enable", "disable":
        actions += [action(what, "nope"), action(what, ""),
                    elsewhere(what, "a"), elsewhere(what, "nope", "")]
        if what != "remove":
            actions.append(action(what, "broken"))
    for granularity in 0, 1, 511, 513, 1000, (1 << 32) - 1:
        actions.append(action("add", "new", granularity=granularity))
        actions.append(action("add", "a", granularity=granularity))
    for persistent in False, True:
        actions += [action("add", name, persistent=persistent)
                    for name in ("", "a", "broken")]
        actions += [elsewhere("add", name, persistent=persistent)
                    for name in ("", "a", "new")]
    actions += [
        action("merge", "nope", bitmaps=["a"]),
        action("merge", "nope", bitmaps=["nope2", other]),
        action("merge", "a", bitmaps=["nope"]),
        action("merge", "a", bitmaps=["b", "", "nope"]),
        action("merge", "a", bitmaps=["b", other, "nope"]),
        action("merge", "a", bitmaps=["b", "nope", other]),
        action("merge", "a", bitmaps=["broken"]),
        action("merge", "broken", bitmaps=["a"]),
        action("merge", "broken", bitmaps=["nope"]),
        action("merge", "a", bitmaps=[{"node": "disk", "name": "nope"}]),
        elsewhere("merge", "a", bitmaps=["b"]),
    ]
    before = pair.states()
    done = [action("add", "tmp", disabled=True), action("clear", "a"),
            action("merge", "tmp", bitmaps=["c"]), action("disable", "c"),
            action("remove", "b")]
    for a in actions:
        if a is not ABORT:
            assert "error" in pair.same(command(a["type"], **a["data"])), a
        if a["type"] == COMMAND + "enable":
            continue
        assert "error" in pair.same(command("transaction", actions=[a, ABORT]))
        assert "error" in pair.same(command("transaction", actions=[ABORT, a]))
        if "b" not in str(a["data"].get("bitmaps")):
            assert "error" in pair.same(command("transaction",
                                                actions=done + [a]))
    assert pair.states() == before


def draw_name(there, wanted):
    """A name, most often one that is, or is not, among those there."""
    fitting = [n for n in NAMES if (n in there) == wanted]
    return dice.choice(fitting if fitting and dice.random() < 0.8 else NAMES)


def draw_action(there):
    what = dice.choice(("add", "add", "add", "remove", "clear", "enable",
                        "disable", "disable", "merge", "merge"))
    name = draw_name(there, what != "add")
    more = {}
    if what == "add":
        if dice.random() < 0.7:
            more["granularity"] = dice.choice((512, 1024, 65536, MIB, 1 << 31,
                                               0, 600))
        for key, chance in (("persistent", 0.8), ("disabled", 0.3)):
            if dice.random() < 0.9:
                more[key] = dice.random() < chance
    elif what == "merge":
        more["bitmaps"] = [
            source if dice.random() < 0.7 else
            {"node": dice.choice(("disk", "disk", "disk", "x")),
             "name": source}
            for source in [draw_name(there, True)
                           for _ in range(dice.randrange(1, 4))]]
    a = action(what, name, **more)
    if dice.random() < 0.03:
        a["data"]["node"] = "x"
    return a


def names_in(a):
    """All bitmaps that an action names."""
    data = a["data"]
    sources = [s if isinstance(s, str) else s["name"]
               for s in data.get("bitmaps", [])]
    return {data.get("name"), data.get("target"), *sources}


def draw_transaction(states):
    actions, removed = [], set()
    for _ in range(dice.randrange(1, 7)):
        a = ABORT if dice.random() < 0.03 else draw_action(states)
        if names_in(a) & removed:
            continue
        if a["type"].endswith("enable") and (
                a["data"]["node"] == "x" or a["data"]["name"] not in states):
            continue
        if a["type"].endswith("remove"):
            removed.add(a["data"]["name"])
        actions.append(a)
    return command("transaction", actions=actions)


def run(pair):
    """Random steps.  Returns how many succeeded."""
    done = 0
    for step in range(STEPS):
        states = pair.states()
        for _ in range(dice.randrange(3)):
            pair.write()
        if dice.random() < 0.4:
            request = draw_transaction(states)
        else:
            a = draw_action(states)
            request = command(a["type"], **a["data"])
        done += "return" in pair.same(request)
        if step % 60 == 59:
            pair.quit()
            same_images()
            pair = Pair()
    pair.states()
    pair.quit()
    return done


def stored(path):
    """{name: (flags, granularity, dirty granules)} of an image."""
    info = json.loads(harness.run("qemu-img", "info", "--output=json", path))
    result = {}
    for b in info["format-specific"]["data"].get("bitmaps", []):
        name, granularity = b["name"], b["granularity"]
        bits = None if "in-use" in b["flags"] else harness.granules(
            harness.qemu_extents(path, name), granularity)
        result[name] = sorted(b["flags"]), granularity, bits
    return result


def same_images():
    a, b = stored("ours.qcow2"), stored("theirs.qcow2")
    assert a == b, "ours:   %s\ntheirs: %s" % (a, b)
    harness.run("qemu-img", "compare", "ours.qcow2", "theirs.qcow2")
    harness.check("ours.qcow2")
    return a


images()
pair = Pair()
pair.states()
errors(pair)
refused(pair)
done = run(pair)
assert done > STEPS / 4, done
assert same_images()["broken"][0] == ["auto", "in-use"]
