#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""dirty-bitmap-control: the commands tell the truth about the disk and its
bitmaps, whichever server answers the clients; quit ends nbdkit as a signal
does; the socket is its owner's alone, and is gone afterwards."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import time

import harness
from harness import CONTEXT, FILTER, Server, lives, until
from qmp import Qmp, bitmaps, ctl, entry

MIB = 1 << 20
ctl_sock = os.path.join(harness.tmp, "ctl.sock")
CONTROL = "dirty-bitmap-control=" + ctl_sock


def greeting():
    """Before the negotiation there is nothing but the negotiation."""
    q = Qmp(ctl_sock, negotiate=False)
    version = q.greeting["QMP"]["version"]
    assert q.greeting["QMP"]["capabilities"] == []
    assert version["package"].startswith("nbdkit-dirty-bitmap-filter ")
    assert set(version["qemu"]) == {"major", "minor", "micro"}
    for command in "query-version", "nosuch", "quit":
        assert q.error({"execute": command}) == (
            "CommandNotFound", "Expecting capabilities negotiation with "
            "'qmp_capabilities'")
    assert q.error({"execute": "qmp_capabilities",
                    "arguments": {"enable": ["oob"]}}) == (
        "GenericError", "Capability oob not available")
    assert q.error({"exec-oob": "qmp_capabilities"})[1] == \
        "QMP input member 'exec-oob' is unexpected"
    assert q.ask("qmp_capabilities", enable=[]) == {}
    assert q.ask("query-version") == version
    q.close()


def commands():
    q = Qmp(ctl_sock)
    names = [c["name"] for c in q.ask("query-commands")]
    changes = ["block-dirty-bitmap-" + what for what in (
        "add", "clear", "disable", "enable", "merge", "remove")]
    assert names == sorted(names) == [
        "backup-begin", "backup-end", "backup-list", *changes, "gate-close",
        "gate-open",
        "qmp_capabilities", "query-block", "query-block-exports",
        "query-commands", "query-name", "query-named-block-nodes",
        "query-stats", "query-status", "query-version", "quit",
        "transaction"], names
    assert q.ask("query-status") == {
        "running": True, "singlestep": False, "status": "running"}
    assert q.ask("query-name") == {"name": "the disk"}
    assert q.ask("query-block-exports") == [
        {"id": name, "type": "nbd", "node-name": "vda",
         "shutting-down": False}
        for name in ("the disk", "delta:a", "delta:off")]

    # Ids come back, whatever they are.
    for ident in 1, -1.5, None, "é\u0000\U0001f4be", [{"a": []}], {"x": True}:
        q.send({"execute": "query-name", "id": ident})
        assert q.reply()["id"] == ident
        q.send({"execute": "nosuch", "id": ident})
        assert q.reply()["id"] == ident

    # Several at once, byte by byte, and as people type it.
    q.send('{"execute":"query-name","id":1}{"execute":"query-name","id":2}\n'
           "{'execute': 'query-name', 'id': 'it\\'s \"3\"'} [] ")
    assert [q.reply().get("id") for _ in range(4)] == [1, 2, 'it\'s "3"', None]
    for byte in b'{ "execute" : "query-na\\u006de" }':
        q.send(bytes([byte]))
    assert q.reply() == {"return": {"name": "the disk"}}
    q.close()


def nodes():
    """As QEMU would tell them."""
    q = Qmp(ctl_sock)
    [node] = q.ask("query-named-block-nodes", flat=True)
    assert [node] == q.ask("query-named-block-nodes")
    [device] = q.ask("query-block")
    assert device["inserted"] == node and device["device"] == "vda"
    assert node["node-name"] == "vda" and node["drv"] == "qcow2"
    assert node["ro"] is False and node["backing_file_depth"] == 1
    info = json.loads(harness.run("qemu-img", "info", "-U", "--output=json",
                                  "disk.qcow2"))
    image = node["image"]
    for key in "virtual-size", "cluster-size", "format":
        assert image[key] == info[key], key
    theirs = info["format-specific"]
    del theirs["data"]["bitmaps"]
    assert image["format-specific"] == theirs, image
    assert os.path.samefile(image["filename"], "disk.qcow2")
    q.close()


def dirty(server):
    """Counts, whose granules are whole; who records; what is in use."""
    q = Qmp(ctl_sock)
    # QEMU shows neither of these two as recording; only one is broken.
    want = {"a": entry(), "hidden": entry(512),
            "off": entry(recording=False),
            "broken": entry(recording=False, inconsistent=True)}
    assert bitmaps(q) == bitmaps(q, "query-block") == want, bitmaps(q)
    size = 10 * MIB + 512
    h = server.connect()
    h.pwrite(b"x", 3 * MIB)
    h.pwrite(b"x", size - 1)
    want["a"]["count"] = 2 * 65536
    want["hidden"]["count"] = 2 * 512
    assert bitmaps(q) == want, bitmaps(q)

    # In use, as long as a client has negotiated it.
    one, two = (server.connect(CONTEXT + "a") for _ in range(2))
    want["a"]["busy"] = True
    assert bitmaps(q) == want
    one.shutdown()
    time.sleep(0.05)
    assert bitmaps(q) == want
    two.shutdown()
    want["a"]["busy"] = False
    until(lambda: bitmaps(q) == want, "a client to be gone")

    # A client of the delta export uses it, too.
    import nbd
    delta = nbd.NBD()
    delta.connect_uri("nbd+unix:///delta:off?socket=" + server.socket)
    want["off"]["busy"] = True
    assert bitmaps(q) == want
    delta.shutdown()
    want["off"]["busy"] = False
    until(lambda: bitmaps(q) == want, "a client to be gone")
    q.close()


def stats():
    """The numbers of dirty-bitmap-stats, without that parameter."""
    q = Qmp(ctl_sock)
    s = q.ask("query-stats")
    assert s["disk_size_bytes"] == 10 * MIB + 512
    assert s["connections_accepted_total"] == 4
    assert {"command": "write", "result": "success", "value": 2} in \
        s["requests_total"], s["requests_total"]
    assert {"bitmap": "a", "value": 65536 + 512} in s["dirty_bytes"]
    quantiles = {(d["command"], d["quantile"]): d["value"]
                 for d in s["request_duration_seconds"]}
    assert 0 < quantiles["write", "0.5"] < 60
    assert quantiles["trim", "0.5"] is None
    [total] = [d["value"] for d in s["request_duration_seconds_sum"]
               if d["command"] == "write"]
    assert 0 < total < 60
    q.close()


def program():
    """nbdkit-dirty-bitmap-ctl."""
    out, _ = ctl(ctl_sock, "query-block")
    lines = out.splitlines()
    assert lines[0].startswith("node vda, %d bytes, read-write, " %
                               (10 * MIB + 512)), out
    assert lines[1].split() == ["name", "recording", "persistent", "busy",
                                "granularity", "count", "inconsistent"]
    assert ["a", "yes", "yes", "no", "65536", "131072", "-"] in [
        line.split() for line in lines], out
    assert "disk_size_bytes %d\n" % (10 * MIB + 512) in \
        ctl(ctl_sock, "query-stats")[0]
    assert 'dirty_bytes{bitmap=a} %d\n' % (65536 + 512) in \
        ctl(ctl_sock, "query-stats")[0]
    # A time in seconds, in digits that people can read.
    assert re.search("^start_time_seconds [0-9]{10}([.][0-9]+)?$",
                     ctl(ctl_sock, "query-stats")[0], re.MULTILINE)
    assert json.loads(ctl("--json", ctl_sock, "query-name")[0]) == {
        "name": "the disk"}
    assert ctl(ctl_sock, "query-name")[0] == "name: the disk\n"
    assert "\nquit\n" in ctl(ctl_sock, "query-commands")[0]
    ctl(ctl_sock, "query-named-block-nodes", "flat=true")
    ctl(ctl_sock, "query-named-block-nodes", "flat:=false")
    for args, why in (
            ([ctl_sock, "nosuch"], "The command nosuch has not been found"),
            ([ctl_sock, "query-name", "a=1"], "Parameter 'a' is unexpected"),
            ([ctl_sock, "query-named-block-nodes", "flat=1"],
             "Invalid parameter type for 'flat', expected: boolean"),
            ([ctl_sock, "query-named-block-nodes", "flat:=\"true\""],
             "Invalid parameter type for 'flat', expected: boolean"),
            ([ctl_sock, "query-name", "a:=[1"], "a: not JSON: [1"),
            ([ctl_sock, "query-name", "a"], "expecting KEY=VALUE, not 'a'"),
            ([ctl_sock, "query-name", "a=1", "a=2"], "a is given twice"),
            ([ctl_sock + "x", "quit"], ctl_sock + "x: No such file"),
            (["disk.qcow2", "quit"], "disk.qcow2: Connection refused")):
        assert why in ctl(*args, status=1)[1], why
    assert ctl(status=1)[1].startswith("usage:")
    assert ctl("--help")[0].startswith("usage:")


def the_disk():
    harness.create("base.qcow2", MIB)
    harness.create("disk.qcow2", 10 * MIB + 512, "broken",
                   options="backing_file=base.qcow2,backing_fmt=qcow2")
    # A bitmap that is in use when its writer is killed.
    server = Server("disk.qcow2", "dirty-bitmap-crash=mark")
    server.connect().pwrite(b"x", 0)
    server.kill()
    for name, *options in (("a",), ("hidden", "-g", "512"),
                           ("off", "--disable")):
        harness.run("qemu-img", "bitmap", "--add", *options, "disk.qcow2",
                    name)
    server = Server("disk.qcow2", CONTROL, "dirty-bitmap-node=vda",
                    "dirty-bitmap-exportname=the disk",
                    "dirty-bitmap-delta=on", "dirty-bitmap-expose=a",
                    "dirty-bitmap-expose=off")
    server.uri = "nbd+unix:///the%20disk?socket=" + server.socket
    assert stat.S_IMODE(os.lstat(ctl_sock).st_mode) == 0o600
    greeting()
    commands()
    nodes()
    dirty(server)
    stats()
    program()
    quits(server)
    harness.check("disk.qcow2", leaks=True)


def quits(server):
    """The reply goes out, then the event to all, and nbdkit ends."""
    q, other = Qmp(ctl_sock), Qmp(ctl_sock)
    mute = Qmp(ctl_sock, negotiate=False)
    h = server.connect()
    h.pwrite(b"y" * 65536, 5 * MIB)
    assert q.ask("quit") == {}
    for client in q, other:
        [event] = client.ended()
        assert event["event"] == "SHUTDOWN" and event["data"] == {
            "guest": False, "reason": "host-qmp-quit"}, event
        assert abs(event["timestamp"]["seconds"] - time.time()) < 60
    assert mute.ended() == []
    server.ends()
    assert not os.path.exists(ctl_sock)
    assert harness.flags("disk.qcow2", "a") == {"auto"}
    assert len(harness.granules(harness.qemu_extents("disk.qcow2", "a"),
                                65536)) == 3


def signals():
    q = None
    server = Server("disk.qcow2", CONTROL)
    q = Qmp(ctl_sock)
    server.stop()
    [event] = q.ended()
    assert event["data"]["reason"] == "host-signal", event
    assert not os.path.exists(ctl_sock)


def wherever():
    """Our server or nbdkit's, read-only, a daemon, --run, -s."""
    for options, params in (((), ("dirty-bitmap-server=off",)),
                            (("-r",), ()),
                            (("-r",), ("dirty-bitmap-server=off",
                                       "dirty-bitmap-expose=a"))):
        server = Server("disk.qcow2", CONTROL, *params, options=options)
        q = Qmp(ctl_sock)
        [node] = q.ask("query-named-block-nodes")
        assert node["ro"] == ("-r" in options)
        # Those that are not offered are told exactly, too.
        assert bitmaps(q)["hidden"] == entry(512, count=65536 + 1024), \
            bitmaps(q)
        if "dirty-bitmap-server=off" in params:
            import nbd
            delta = nbd.NBD()
            delta.connect_uri("nbd+unix:///delta:a?socket=" + server.socket)
            assert bitmaps(q)["a"]["busy"] is True
            delta.shutdown()
            until(lambda: not bitmaps(q)["a"]["busy"], "a client to be gone")
        h = server.connect()
        assert h.pread(1, 5 * MIB) == b"y"
        assert q.ask("quit") == {}
        q.ended()
        server.ends()
        h = None

    subprocess.run(["nbdkit", "-U", "dsock", "-P", "daemon.pid",
                    "--filter=" + FILTER, "file", "disk.qcow2",
                    "dirty-bitmap-control=relative.sock"], check=True,
                   env=harness.environment(), stdin=subprocess.DEVNULL)
    until(lambda: os.path.exists("daemon.pid") and
          os.path.getsize("daemon.pid"), "the daemon")
    with open("daemon.pid") as f:
        pid = int(f.read())
    assert bitmaps(Qmp("relative.sock"))["a"]["count"] == 3 * 65536
    ctl("relative.sock", "quit")
    until(lambda: not lives(pid), "its end")
    assert not os.path.exists("relative.sock")

    harness.run("nbdkit", "-U", "-", "--filter=" + FILTER, "file",
                "disk.qcow2", CONTROL, "--run",
                "'%s' '%s' query-block >run.out" % (
                    os.path.join(os.environ["abs_top_builddir"], "tools",
                                 "nbdkit-dirty-bitmap-ctl"), ctl_sock),
                env=harness.environment())
    with open("run.out") as f:
        assert "hidden" in f.read()
    assert not os.path.exists(ctl_sock)

    ours, theirs = socket.socketpair()
    p = subprocess.Popen(["nbdkit", "-s", "--filter=" + FILTER, "file",
                          "disk.qcow2", CONTROL], stdin=theirs, stdout=theirs,
                         env=harness.environment())
    theirs.close()
    assert ours.recv(8) == b"NBDMAGIC"
    q = Qmp(ctl_sock)
    assert q.ask("quit") == {}
    q.ended()
    assert p.wait(harness.PATIENCE) == 0
    ours.close()
    assert not os.path.exists(ctl_sock)


def snapshot():
    """A snapshot has no bitmaps."""
    harness.run("qemu-img", "snapshot", "-c", "s", "disk.qcow2")
    server = Server("disk.qcow2", CONTROL, "dirty-bitmap-snapshot=s")
    q = Qmp(ctl_sock)
    assert bitmaps(q) == {} and q.ask("query-block")[0]["inserted"]["ro"]
    assert "no bitmaps" in ctl(ctl_sock, "query-block")[0]
    server.stop()


def names():
    """Names that are no UTF-8, or would be commands of a terminal."""
    harness.create("names.qcow2", MIB)
    for name in b"\xff\xfe", b"\x1b[2Jx\xc2\x9by", "é".encode():
        subprocess.run([b"qemu-img", b"bitmap", b"--add", b"names.qcow2",
                        name], check=True)
    server = Server("names.qcow2", CONTROL)
    q = Qmp(ctl_sock)
    assert set(bitmaps(q)) == {"\ufffd\ufffd", "\x1b[2Jx\x9by", "é"}
    assert len(q.ask("query-stats")["dirty_bytes"]) == 3
    out = ctl(ctl_sock, "query-block")[0] + ctl(ctl_sock, "query-stats")[0]
    assert "\\x1b[2Jx\\x9by" in out and "\x1b" not in out and \
        "\x9b" not in out, out
    server.stop()


def paths():
    """Each error is one line, and no file is made or lost."""
    def no(pattern, *params, options=()):
        out = harness.refused("disk.qcow2", *params, options=options,
                              pattern=pattern)
        assert len(out.splitlines()) == 1, out

    no("path must not be empty", "dirty-bitmap-control=")
    no("path too long", "dirty-bitmap-control=" + "x" * 200)
    no("only appear once", CONTROL, CONTROL)
    no("dirty-bitmap-node: requires", "dirty-bitmap-node=vda")
    for bad in "", "1a", "a b", "a/b", "x" * 32:
        no("dirty-bitmap-node: must", CONTROL, "dirty-bitmap-node=" + bad)
    no("bind: %s/nosuch/s: No such file" % harness.tmp,
       "dirty-bitmap-control=nosuch/s")
    no("same file", "dirty-bitmap-control=disk.qcow2")
    no("same file", CONTROL, "dirty-bitmap-listen=" + ctl_sock)
    no("same file", CONTROL, "dirty-bitmap-stats=" + ctl_sock)
    no("same file", CONTROL, options=("-P", ctl_sock))
    with open("precious", "w") as f:
        f.write("x")
    no("in use", "dirty-bitmap-control=precious")
    assert os.path.getsize("precious") == 1

    # A start that fails later leaves neither socket; the other way round
    # neither does one whose control socket cannot be had.
    no("in use", "dirty-bitmap-listen=own.sock",
       "dirty-bitmap-control=precious")
    assert not os.path.exists("own.sock")
    open("refused", "w").close()    # nbdkit's own address
    out = harness.refused("disk.qcow2", CONTROL, "dirty-bitmap-listen=own.sock",
                          pattern="in use")
    os.remove("refused")
    assert not os.path.exists(ctl_sock) and not os.path.exists("own.sock")

    # In use by another process, and left by one that was killed.
    harness.create("two.qcow2", MIB)
    server = Server("disk.qcow2", CONTROL)
    harness.refused("two.qcow2", CONTROL, pattern="in use")
    assert Qmp(ctl_sock).ask("query-name") == {}
    server.kill()
    assert os.path.exists(ctl_sock)
    server = Server("disk.qcow2", CONTROL)
    assert Qmp(ctl_sock).ask("query-name") == {}

    # It is not ours any more.
    os.remove(ctl_sock)
    with open(ctl_sock, "w") as f:
        f.write("another's")
    server.stop()
    assert os.path.getsize(ctl_sock) == 9
    os.remove(ctl_sock)


the_disk()
signals()
wherever()
snapshot()
names()
paths()
