#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""dirty-bitmap-stats: what clients asked for is counted exactly, by the
filter's server and by nbdkit's, in a format that can be read strictly, at
the times that the manual page says, and nothing about it harms serving.
"""

import math
import os
import signal
import socket
import stat
import struct
import subprocess
import threading
import time

import harness
from harness import CONTEXT, FILTER, Server, lives, until
from statsfile import PREFIX, Stats, identity, refresh

COMMANDS = ("read", "write", "flush", "trim", "cache", "write_zeroes",
            "block_status", "unknown")
MIB = 1 << 20


def served(path):
    """The file, which was not there, is written at the start."""
    until(lambda: os.path.exists(path), "the file at the start")


def consistent(stats, wall):
    """What must hold whatever was done, in wall seconds."""
    for command in COMMANDS:
        results = sum(
            value for labels, value in stats.all("requests_total").items()
            if ("command", command) in labels)
        name = "request_duration_seconds"
        n = stats(name + "_count", command=command)
        assert n == results, "%s: %s, %s" % (command, n, results)
        quantiles = [stats(name, command=command, quantile=q)
                     for q in ("0.5", "0.9", "0.99", "0.999")]
        total = stats(name + "_sum", command=command)
        if n == 0:
            assert all(map(math.isnan, quantiles)) and total == 0
            continue
        assert 0 < quantiles[0] and quantiles[-1] <= wall, quantiles
        assert quantiles == sorted(quantiles), quantiles
        assert 0 < total <= wall * n
        # Half of them took at least the median, but for its precision.
        assert total >= quantiles[0] * n / 2 * 63 / 64
    allocated = stats("clusters_allocated_total")
    assert stats("clusters_freed_total") <= allocated


def fails(call, *args):
    try:
        call(*args)
    except Exception:
        return
    raise AssertionError("it did not fail: %s" % (args,))


def requests(off):
    """Known numbers of requests, through either server."""
    harness.create("disk.qcow2", 8 * MIB + 512, ("b", 65536), ("c", 4096))
    path = "off.prom" if off else "on.prom"
    began = time.monotonic()
    server = Server("disk.qcow2", "dirty-bitmap-stats=" + path,
                    "dirty-bitmap-crash=mark",
                    *["dirty-bitmap-server=off"] * off)
    served(path)
    before = Stats(path)
    consistent(before, 0)
    assert before("connections") == 0
    h = server.connect("base:allocation")
    h.set_strict_mode(0)
    for i in range(20):
        h.pwrite(b"w" * 1000, i * 65536)
    for i in range(7):
        h.pread(512, i * 512)
    h.flush()
    h.flush()
    h.flush()
    h.trim(65536, 65536)
    h.cache(3 * 65536, 0)
    h.zero(12345, 4 * MIB)
    h.pwrite(b"x", 8 * MIB + 511)            # the last granule, a short one
    harness.block_status(h, "base:allocation", MIB, 0)
    if not off:
        # nbdkit's server refuses these by itself.
        fails(h.pread, 512, 8 * MIB + 1)
        fails(h.pread, 512, 8 * MIB + 1)
        fails(h.pwrite, b"12", 8 * MIB + 511)
    stats = refresh(server.pid, path)

    def succeeded(command, n, length=None):
        assert stats("requests_total", command=command,
                     result="success") == n, command
        if length is not None:
            assert stats("request_bytes_total", command=command) == length

    succeeded("write", 21, 20001)
    succeeded("read", 7, 7 * 512)
    succeeded("flush", 3)
    succeeded("trim", 1, 65536)
    succeeded("cache", 1, 3 * 65536)
    succeeded("write_zeroes", 1, 12345)
    succeeded("block_status", 1, MIB)
    succeeded("unknown", 0)
    failed = {labels: n for labels, n in stats.all("requests_total").items()
              if ("result", "success") not in labels}
    assert failed == ({} if off else {
        (("command", "read"), ("result", "EINVAL")): 2,
        (("command", "write"), ("result", "ENOSPC")): 1}), failed
    consistent(stats, time.monotonic() - began)
    assert stats("connections") == stats("connections_accepted_total") == 1
    assert stats("connections_refused_total") == 0

    # Twenty granules, the zeroed one, and the short one at the end.
    assert stats("dirty_bytes", bitmap="b") == 21 * 65536 + 512
    assert stats("dirty_bytes", bitmap="c") == 20 * 4096 + 65536 - 4096 + \
        16384 + 512, stats("dirty_bytes", bitmap="c")
    assert stats("granularity_bytes", bitmap="b") == 65536
    assert stats("granularity_bytes", bitmap="c") == 4096
    assert stats("recording", bitmap="b") == 1
    assert stats("disk_size_bytes") == 8 * MIB + 512
    assert stats("image_size_bytes") == os.path.getsize("disk.qcow2")
    grown = stats("image_grown_bytes_total")
    assert stats("image_size_bytes") - before("image_size_bytes") == grown > 0
    assert stats("cluster_size_bytes") == 65536
    # Clusters of data, an L2 table, two of bits.
    assert stats("clusters_allocated_total") == 21 + 1 + 2, \
        stats("clusters_allocated_total")
    # What was trimmed comes free with the next flush.
    assert stats("clusters_freed_total") == 0
    # The first flush writes the bitmaps; the others find nothing new.
    assert stats("flushes_total", result="success") == 3
    assert stats("syncs_total", result="success") == 1
    assert stats("sync_bytes_total", result="success") > 1024
    for name in "flushes_total", "syncs_total", "barriers_total":
        assert stats(name, result="failure") == 0
    assert stats("flush_seconds_total", result="success") >= \
        stats("sync_seconds_total", result="success") > 0
    assert stats("barriers_total", result="success") >= 3
    assert stats("barrier_seconds_total") > 0
    assert stats("cache_misses_total", cache="l2") == 1
    assert stats("cache_hits_total", cache="l2") >= 20 + 7
    assert stats("memory_bytes", use="l2_cache") == 4096
    assert stats("memory_bytes", use="bitmaps") == 1024
    assert stats("resident_memory_bytes") > MIB
    assert abs(stats("start_time_seconds") - time.time()) < 60

    # Reading the same again looks up the same again.
    hits = stats("cache_hits_total", cache="l2")
    for _ in range(50):
        h.pread(512, 0)
    again = refresh(server.pid, path)
    assert again("cache_hits_total", cache="l2") - hits == 50
    assert again("cache_misses_total", cache="l2") == 1
    assert again("requests_total", command="read", result="success") == 57
    assert again("syncs_total", result="success") == 1

    # The map that clients see has as many dirty bytes.
    if not off:
        h2 = server.connect(CONTEXT + "c")
        dirty = sum(length for length, kind
                    in harness.extents(h2, CONTEXT + "c") if kind)
        assert dirty == again("dirty_bytes", bitmap="c")
        assert refresh(server.pid, path)("connections") == 2
        h2.shutdown()
    h.shutdown()
    until(lambda: refresh(server.pid, path)("connections") == 0,
          "connections end")
    server.stop()

    # The end has been counted too: what became free, what was written.
    last = Stats(path)
    consistent(last, time.monotonic() - began)
    assert last("connections") == 0
    assert last("connections_accepted_total") == (1 if off else 2)
    assert last("clusters_freed_total") == 1, last("clusters_freed_total")
    assert last("syncs_total", result="success") == 2
    assert last("image_size_bytes") == os.path.getsize("disk.qcow2")
    assert last("dirty_bytes", bitmap="b") == 21 * 65536 + 512
    harness.check("disk.qcow2")


def readonly():
    """Refused writes; commands that there are not; bitmaps that record not,
    or are not offered."""
    harness.create("disk.qcow2", MIB, "b", "hidden")
    harness.run("qemu-img", "bitmap", "--disable", "disk.qcow2", "b")
    server = Server("disk.qcow2", "dirty-bitmap-stats=ro.prom",
                    options=["-r"])
    served("ro.prom")
    h = server.connect()
    h.set_strict_mode(0)
    fails(h.pwrite, b"x", 0)
    fails(h.trim, 512, 0)
    s = socket.socket(socket.AF_UNIX)
    s.connect(server.socket)
    s.sendall(struct.pack(">I", 3) + struct.pack(
        ">QIIIH", 0x49484156454F5054, 7, 6, 0, 0))
    s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 99, 7, 0, 0))
    got = b""
    while b"\x67\x44\x66\x98" not in got:
        got += s.recv(4096)
    stats = refresh(server.pid, "ro.prom")
    assert stats("requests_total", command="write", result="EPERM") == 1
    assert stats("requests_total", command="trim", result="EPERM") == 1
    assert stats("requests_total", command="unknown", result="EINVAL") == 1
    assert stats("request_bytes_total", command="write") == 0
    assert stats("recording", bitmap="b") == 0
    assert stats("connections") == 2
    s.close()
    server.stop()
    consistent(Stats("ro.prom"), harness.PATIENCE)

    server = Server("disk.qcow2", "dirty-bitmap-stats=ro.prom",
                    "dirty-bitmap-expose=b")
    server.connect().pwrite(b"x", 0)
    server.stop()
    stats = Stats("ro.prom")
    assert stats("dirty_bytes", bitmap="hidden") == 65536
    assert stats("dirty_bytes", bitmap="b") == 0
    assert stats("recording", bitmap="hidden") == 1
    assert stats("recording", bitmap="b") == 0


def refused_connections():
    """Where there is room for one."""
    harness.create("disk.qcow2", MIB, "b")
    server = Server("disk.qcow2", "dirty-bitmap-stats=full.prom",
                    "dirty-bitmap-max-connections=1")
    served("full.prom")
    h = server.connect()
    for _ in range(3):
        fails(server.connect)
    stats = refresh(server.pid, "full.prom")
    assert stats("connections") == stats("connections_accepted_total") == 1
    assert stats("connections_refused_total") == 3
    h.shutdown()
    server.stop()


def names():
    """Bitmaps' names are any bytes, and stay different."""
    labels = {
        b'a"b': 'a"b', b"a\\b": "a\\b", b"a\nb": "a\nb", b"{},=": "{},=",
        b"\xff": "\\xff", b"\\xff": "\\x5cxff", b"\xc3\xa4": "\u00e4",
        b"\xc0\x80": "\\xc0\\x80", b"\xed\xa0\x80": "\\xed\\xa0\\x80",
        b"\xf4\x90\x80\x80": "\\xf4\\x90\\x80\\x80",
        b"\xf0\x9f\x98\x80": "\U0001f600", b"\xe2\x82": "\\xe2\\x82",
        b"\r\t\x1b\x7f": "\\x0d\\x09\\x1b\\x7f", b'"} 1\n#': '"} 1\n#',
        b"\\": "\\", b"\\\\xff": "\\\\x5cxff",
    }
    harness.create("disk.qcow2", MIB)
    for name in labels:
        subprocess.run([b"qemu-img", b"bitmap", b"--add", b"disk.qcow2", name],
                       check=True)
    server = Server("disk.qcow2", "dirty-bitmap-stats=names.prom")
    server.connect().pwrite(b"x", 0)
    server.stop()
    stats = Stats("names.prom")
    want = {(("bitmap", label),): 65536 for label in labels.values()}
    assert stats.all("dirty_bytes") == want, stats.all("dirty_bytes")


def times():
    """At an interval; whole at any moment; with the mode of nbdkit's umask,
    which is always 022."""
    harness.create("disk.qcow2", MIB, "b")
    os.mkdir("metrics")
    path = "metrics/disk.prom"
    server = Server("disk.qcow2", "dirty-bitmap-stats=" + path,
                    "dirty-bitmap-stats-interval=1")
    served(path)
    assert os.stat(path).st_mode & 0o777 == 0o644
    h = server.connect()
    h.pwrite(b"x", 0)

    def written():
        return Stats(path)("requests_total", command="write",
                           result="success") == 1

    until(written, "the interval")
    before = identity(path)
    until(lambda: identity(path) != before, "the next interval")

    # Whoever reads it while it is written again and again, and sees what
    # else is there, as node_exporter does.
    stop = threading.Event()
    problems = []

    def read():
        while not stop.is_set():
            try:
                if any(n != "disk.prom" and n.endswith(".prom")
                       for n in os.listdir("metrics")):
                    raise AssertionError("another .prom")
                Stats(path)
            except Exception as e:
                problems.append(e)
                return

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(100):
        os.kill(server.pid, signal.SIGUSR1)
        time.sleep(0.002)
    stop.set()
    reader.join()
    assert not problems, problems
    assert h.pread(1, 0) == b"x"
    server.stop()
    assert os.listdir("metrics") == ["disk.prom"], os.listdir("metrics")


def large_writes():
    """The time of all parts of a large write counts."""
    harness.create("disk.qcow2", 8 * MIB, "b")
    server = Server(args=[
        "--filter=" + harness.FILTER, "--filter=delay", "file", "disk.qcow2",
        "wdelay=100ms", "dirty-bitmap-stats=large.prom"])
    served("large.prom")
    h = server.connect()
    began = time.monotonic()
    h.pwrite(b"x" * 2 * MIB, 0)
    wall = time.monotonic() - began
    # The connection may become eager after some parts, and have the rest
    # written at once, but not before the fourth.
    stats = refresh(server.pid, "large.prom")
    total = stats("request_duration_seconds_sum", command="write")
    assert 0.35 <= total <= wall, (total, wall)
    server.kill()                   # The delay filter fails at the end.


def later_failures():
    """Are told once, and harm nobody."""
    harness.create("disk.qcow2", MIB, "b")
    os.mkdir("folder")
    server = Server("disk.qcow2", "dirty-bitmap-stats=folder/f.prom")
    served("folder/f.prom")
    h = server.connect()
    os.rename("folder", "away")

    def warnings():
        return server.messages().count("cannot be written")

    os.kill(server.pid, signal.SIGUSR1)
    until(warnings, "the warning")
    for _ in range(5):
        os.kill(server.pid, signal.SIGUSR1)
        time.sleep(0.01)
        h.pwrite(b"x", 0)
        h.flush()
    os.rename("away", "folder")
    assert refresh(server.pid, "folder/f.prom")(
        "requests_total", command="flush", result="success") == 5
    assert warnings() == 1, server.messages()
    os.rename("folder", "away")
    server.stop()
    assert warnings() == 2
    harness.check("disk.qcow2")


def appears_later():
    """What was put there after the start is not replaced, be it a file or
    a socket."""
    harness.create("disk.qcow2", MIB, "b")
    server = Server("disk.qcow2", "dirty-bitmap-stats=later.prom")
    served("later.prom")
    with open("precious", "w") as f:
        f.write("not to be lost\n")
    os.rename("precious", "later.prom")
    os.kill(server.pid, signal.SIGUSR1)
    until(lambda: "later.prom: exists, does not hold" in server.messages(),
          "the warning")
    os.remove("later.prom")
    os.kill(server.pid, signal.SIGUSR1)
    served("later.prom")

    os.remove("later.prom")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("later.prom")
    os.kill(server.pid, signal.SIGUSR1)
    until(lambda: "later.prom: is not a regular file" in server.messages(),
          "the warning")
    assert stat.S_ISSOCK(os.stat("later.prom").st_mode)
    server.stop()
    assert not [n for n in os.listdir(".") if n.endswith(".tmp")]


def refusals():
    """What cannot be created, or had better not be replaced."""
    harness.create("disk.qcow2", MIB, "b")
    harness.create("other.qcow2", MIB)
    os.mkdir("dir")
    os.mkfifo("fifo")
    os.symlink("other.qcow2", "link.prom")
    with open("text", "w") as f:
        f.write("# HELP something_else\n")
    before = [harness.sha256(p) for p in
              ("disk.qcow2", "other.qcow2", "text")]
    for path, why in (("disk.qcow2", "the same file"),
                      ("other.qcow2", "not replaced"),
                      ("link.prom", "not replaced"),
                      ("text", "not replaced"),
                      ("dir", "not a regular file"),
                      ("fifo", "not a regular file"),
                      ("/dev/null", "not a regular file"),
                      ("nosuch/f.prom", "No such file"),
                      ("text/f.prom", "Not a directory"),
                      ("/proc/f.prom", "cannot be created")):
        out = harness.refused("disk.qcow2", "dirty-bitmap-stats=" + path,
                              pattern=why)
        errors = [line for line in out.splitlines() if "error" in line]
        assert len(errors) == 1 and "dirty-bitmap-stats" in errors[0], out
    assert before == [harness.sha256(p) for p in
                      ("disk.qcow2", "other.qcow2", "text")]

    # An empty file that is in use is neither, here behind the image.
    open("base.raw", "w").close()
    harness.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw",
                "-F", "raw", "top.qcow2", "1M")
    harness.refused("top.qcow2", "dirty-bitmap-stats=base.raw",
                    pattern="base.raw: is locked")
    assert os.path.getsize("base.raw") == 0

    # An empty file, and one of ours, are.
    open("empty.prom", "w").close()
    for _ in range(2):
        Server("disk.qcow2", "dirty-bitmap-stats=empty.prom").stop()
        assert Stats("empty.prom")("connections_accepted_total") == 0


def processes():
    """As a daemon, from another folder; with --run; and USR1 as ever where
    there are no statistics."""
    harness.create("disk.qcow2", MIB, "b")
    subprocess.run(["nbdkit", "-U", "dsock", "-P", "daemon.pid",
                    "--filter=" + FILTER, "file", "disk.qcow2",
                    "dirty-bitmap-stats=d.prom"], check=True,
                   env=harness.environment(), stdin=subprocess.DEVNULL)
    until(lambda: os.path.exists("daemon.pid") and
          os.path.getsize("daemon.pid"), "the daemon")
    with open("daemon.pid") as f:
        pid = int(f.read())
    try:
        served("d.prom")
        refresh(pid, "d.prom")
    finally:
        os.kill(pid, signal.SIGTERM)
    until(lambda: not lives(pid), "its end")

    harness.run("nbdkit", "-U", "-", "--filter=" + FILTER, "file",
                "disk.qcow2", "dirty-bitmap-stats=run.prom", "--run",
                "while [ ! -e run.prom ]; do sleep 0.01; done;"
                "old=$(stat -c %i%Y run.prom); kill -USR1 $PPID;"
                "for i in $(seq 500); do"
                "  [ \"$(stat -c %i%Y run.prom)\" = \"$old\" ] || exit 0;"
                "  sleep 0.01; done; exit 1", env=harness.environment())

    server = Server("disk.qcow2")
    server.process.send_signal(signal.SIGUSR1)
    assert server.process.wait(harness.PATIENCE) == -signal.SIGUSR1


def debug():
    """-v names each connection, and the debug flag each request."""
    harness.create("disk.qcow2", MIB, "b")
    for flag in "dirty-bitmap", "dirty_bitmap":
        server = Server("disk.qcow2",
                        options=["-v", "-D", flag + ".request=1"])
        h = server.connect(CONTEXT + "b")
        # libnbd knows extended headers from 1.18 on.
        form, write_flags = "structured", "0"
        if hasattr(h, "get_extended_headers_negotiated"):
            assert h.get_extended_headers_negotiated()
            form, write_flags = "extended", "0x20"  # PAYLOAD_LEN
        h.pwrite(b"x" * 10, 0)
        h.pread(3, 5)
        h.shutdown()
        h = server.connect()
        h.set_strict_mode(0)
        fails(h.pread, 1, MIB)
        server.stop()
        log = server.messages()
        for line in (
                "nbd: connection 1 opened: pid %d, uid %d, export \"\", "
                "%s replies, no TLS, 1 metadata contexts" % (
                    os.getpid(), os.getuid(), form),
                "nbd: connection 1: option ",
                "nbd: connection 1: request 1, cookie 0x1: command 1 "
                "(write), flags " + write_flags + ", offset 0, length 10",
                "nbd: connection 1: request 2, cookie 0x2: command 0 (read)",
                "nbd: connection 1 closed: the client disconnected: "
                "2 requests, 3 bytes read, 10 written",
                "nbd: connection 2: request 1, cookie 0x1: command 0, "
                "offset 1048576, length 1: past the end",
                "nbd: connection 2 closed: the server stops: 1 requests, "
                "0 bytes read, 0 written"):
            assert line in log, "%s\nis not in\n%s" % (line, log)

    # Without the flag there are the connections alone, and nothing in a
    # name breaks their lines.
    server = Server("disk.qcow2", options=["-v"])
    h = server.connect()
    h.pread(1, 0)
    h.shutdown()
    s = socket.socket(socket.AF_UNIX)
    s.connect(server.socket)
    name = b"a\n\x1b\"\\\xff" + b"z" * 100
    s.sendall(struct.pack(">I", 3) + struct.pack(
        ">QII", 0x49484156454F5054, 1, len(name)) + name)
    s.recv(18 + 8 + 2, socket.MSG_WAITALL)
    s.close()
    s = socket.socket(socket.AF_UNIX)
    s.connect(server.socket)
    s.recv(18, socket.MSG_WAITALL)
    s.close()
    until(lambda: "connection 3 closed in the handshake" in
          server.messages() and "connection 2 closed: the client closed it"
          in server.messages(), "their ends")
    server.stop()
    log = server.messages()
    assert "cookie" not in log and ": option" not in log, log
    # Newer versions of nbdkit escape our backslashes.
    assert 'export "a\\x0a\\x1b\\x22\\x5c\\xffzzz' in log.replace(
        "\\\\", "\\"), log
    assert "z" * 60 not in log and "\x1b" not in log, log


for off in False, True:
    requests(off)
readonly()
refused_connections()
names()
times()
large_writes()
later_failures()
appears_later()
refusals()
processes()
debug()
