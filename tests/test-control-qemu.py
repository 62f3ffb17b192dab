#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""The same JSON to our control socket and to qemu-storage-daemon's: the
replies are the same, but for what the manual says."""

import os
import re
import shutil

import harness
from harness import Server
from qmp import Qmp, StorageDaemon

harness.requires("qemu-storage-daemon")

MIB = 1 << 20
ours_sock, theirs_sock = (os.path.join(harness.tmp, n) for n in ("o", "t"))


# Each gets one reply, or as many as it says.
SAME = [
    # The members of a command.
    "{}", "[]", '"x"', '{"execute":5}', '{"execute":null}',
    '{"execute":"query-version","foo":1}', '{"execute":[],"id":3}',
    '{"id":7,"foo":1}', '{"id":7}', '{"id":{"a":[1,null]}}',
    '{"arguments":{}}', '{"arguments":5}',
    '{"execute":"query-version","arguments":5}',
    '{"execute":"query-version","arguments":[],"id":0}',
    '{"execute":"query-version","arguments":null}',
    # Names.
    '{"execute":"nosuch"}', '{"execute":"nosuch","id":5}',
    '{"execute":"","id":"a"}', '{"execute":"a\\nb"}',
    '{"execute":"\\u00e9\u00e9"}', '{"execute":"QUIT"}',
    '{"execute":"nosuch","arguments":{"a":1}}',
    # Arguments.
    '{"execute":"query-version","arguments":{"a":1}}',
    '{"execute":"query-commands","arguments":{"a":{"b":1}}}',
    '{"execute":"query-block","arguments":{"x":null}}',
    '{"execute":"quit","arguments":{"now":true}}',
    '{"execute":"query-named-block-nodes","arguments":{"flat":1}}',
    '{"execute":"query-named-block-nodes","arguments":{"flat":"true"}}',
    '{"execute":"query-named-block-nodes","arguments":{"flat":null}}',
    '{"execute":"query-named-block-nodes","arguments":{"flat":[],"a":1}}',
    '{"execute":"query-named-block-nodes","arguments":{"flat":true,"a":1}}',
    # The negotiation is over.
    '{"execute":"qmp_capabilities"}', '{"execute":"qmp_capabilities","id":1}',
    '{"execute":"qmp_capabilities","arguments":{"a":1}}',
    # Ids.
    '{"execute":"nosuch","id":-9223372036854775808}',
    '{"execute":"nosuch","id":1.5}', '{"execute":"nosuch","id":"\\u0000"}',
    '{"execute":"nosuch","id":"\\ud83d\\ude00"}',
    "{'execute':'nosuch','id':'a\\'b\"c'}", "{'execute':\"a\\'b\"}",
    # What is no JSON.
    '{"a":1,"a":2}', "}", "]", '{"a":]', "{]", '{"a":1,}',
    "\x1b", "\x00",
]

# The class is the same; the text is not.
SAME_CLASS = ["{a:1}", '{"a" 1}', '["\\x"]', '["\\ud800"]', '{"a":nul}']

# Sent before the negotiation.
BEFORE = [
    '{"execute":"query-version"}', '{"execute":"nosuch","id":1}', "[]", "{}",
    '{"execute":"quit","arguments":{"x":1}}',
    '{"execute":"qmp_capabilities","arguments":{"foo":1}}',
    '{"execute":"qmp_capabilities","arguments":{"enable":1}}',
    '{"execute":"qmp_capabilities","arguments":{"enable":[1]}}',
    '{"execute":"qmp_capabilities","arguments":{"enable":[],"a":1}}',
    '{"execute":"qmp_capabilities","id":["x"]}',
]


def replies(q, data):
    q.send(data)
    return q.reply()


def as_before(reply):
    """QEMU's reply in the words that it had before QEMU 11, which puts the
    place of a mistake first, and expects a key where it was a value."""
    if "error" in reply:
        text = re.sub(r"^\d+:\d+: (?=JSON parse error)", "",
                      reply["error"]["desc"])
        reply["error"]["desc"] = re.sub(
            "^(JSON parse error, expecting) key$", r"\1 value", text)
    return reply


def compare(ours, theirs):
    for data in BEFORE + SAME:
        a, b = replies(ours, data), as_before(replies(theirs, data))
        assert a == b, "%s\nours:   %s\ntheirs: %s" % (data, a, b)
    for data in SAME_CLASS:
        a, b = replies(ours, data), replies(theirs, data)
        assert a["error"]["class"] == b["error"]["class"], (data, a, b)
        assert a["error"]["desc"].startswith("JSON parse error, "), a
    # Nothing is left over of either.
    for q in ours, theirs:
        q.send('{"execute":"nosuch","id":"end"}')
        assert q.reply()["id"] == "end"


def without(d, *keys):
    return {k: v for k, v in d.items() if k not in keys}


def compare_nodes(ours, theirs, readonly):
    """The members that we have have their values, and those that we lack are
    those that the manual names."""
    [a] = ours.ask("query-named-block-nodes")
    [b] = [n for n in theirs.ask("query-named-block-nodes")
           if n["node-name"] == "disk"]
    bitmaps = [sorted(n["dirty-bitmaps"], key=lambda x: x["name"])
               for n in (a, b)]
    assert bitmaps[0] == bitmaps[1], bitmaps
    assert len(bitmaps[0]) == 4
    # QEMU is told what the file is called; ours is an absolute path.
    inner = ("file", "image", "dirty-bitmaps", "backing_file")
    # It counts no further than what it opened.
    assert without(a, *inner) == \
        without(b, *inner, "active", "children"), (a, b)
    assert a["ro"] == readonly
    drop = ("filename", "format-specific", "actual-size", "backing-filename",
            "full-backing-filename", "backing-filename-format",
            "backing-image", "children")
    assert without(a["image"], *drop) == \
        without(b["image"], *drop, "limits"), (a, b)
    a, b = (n["image"]["format-specific"] for n in (a, b))
    assert a["type"] == b["type"]
    assert a["data"] == without(b["data"], "bitmaps"), (a, b)
    assert ours.ask("query-block")[0]["inserted"] == \
        ours.ask("query-named-block-nodes")[0]


def images():
    """Bitmaps of all kinds; two copies of the image."""
    harness.create("ours.qcow2", 3 * MIB + 1024, "broken",
                   options="lazy_refcounts=on,refcount_bits=32")
    server = Server("ours.qcow2", "dirty-bitmap-crash=mark")
    server.connect().pwrite(b"x", 0)
    server.kill()
    for name, *options in (("on", "-g", "4096"), ("off", "--disable"),
                           ("end",)):
        harness.run("qemu-img", "bitmap", "--add", *options, "ours.qcow2",
                    name)
    harness.run("qemu-io", "-f", "qcow2", "-c", "write 5000 1",
                "-c", "write %d 1" % (3 * MIB + 1000), "ours.qcow2")
    shutil.copy("ours.qcow2", "theirs.qcow2")


def both(readonly):
    server = Server("ours.qcow2", "dirty-bitmap-control=" + ours_sock,
                    options=["-r"] if readonly else [])
    daemon = StorageDaemon("theirs.qcow2", theirs_sock, readonly)
    ours = Qmp(ours_sock, negotiate=False)
    theirs = Qmp(theirs_sock, negotiate=False, is_qemu=True)
    assert set(ours.greeting["QMP"]) == set(theirs.greeting["QMP"])
    assert set(ours.greeting["QMP"]["version"]) == \
        set(theirs.greeting["QMP"]["version"])
    compare(ours, theirs)
    compare_nodes(ours, theirs, readonly)
    for q in ours, theirs:
        assert q.ask("quit") == {}
        q.ended()
    server.ends()
    daemon.process.wait(harness.PATIENCE)


images()
both(True)
both(False)
