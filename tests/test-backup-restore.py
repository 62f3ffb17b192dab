#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""dirty-bitmap-backup --restore to files, a block device, and NBD servers,
with and without zeroes; what the program prints on a terminal and elsewhere;
and a full disk: one error, and nothing is left."""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import stat
import struct
import subprocess
import termios
import time

import backups
import harness
from backups import ended, errors, fails, one_error, popen, sound, tool
from harness import Server
from qmp import Qmp

harness.requires("qemu-nbd")
dice = harness.seeded()

MIB = 1 << 20
SIZE = 20 * MIB + 512
ctl_sock = os.path.join(harness.tmp, "ctl.sock")


def read(path):
    with open(path, "rb") as f:
        return f.read()


def make():
    """A full point and an increment with zeroes where there were data."""
    harness.create("disk.qcow2", SIZE)
    server = Server("disk.qcow2", "dirty-bitmap-control=" + ctl_sock)
    h = server.connect()
    moments = []
    for n in range(2):
        if n == 0:
            h.pwrite(dice.randbytes(9 * MIB), MIB)
        else:
            h.zero(4 * MIB, 3 * MIB)
            h.pwrite(b"end", SIZE - 3)
        moments.append(b"".join(bytes(h.pread(min(MIB, SIZE - at), at))
                                for at in range(0, SIZE, MIB)))
        tool("--control=" + ctl_sock, server.uri, "repo")
    h.shutdown()
    server.stop()
    return moments


def to_files():
    for name, args in (("a.raw", []), ("b.img", []), ("c.qcow2", []),
                       ("d", ["--format=qcow2"]),
                       ("e.qcow2", ["--format=raw"]),
                       ("f.qcow2", ["--compress"])):
        is_qcow2 = (name + str(args)).endswith("qcow2']") or (
            name.endswith("qcow2") and "--format=raw" not in args)
        for n in 1, 2:
            tool("--restore", *args, "repo@%d" % n, name,
                 *(["--force"] if n == 2 else []))
            assert (harness.contents(name) if is_qcow2
                    else read(name)) == moments[n - 1]
            mode = stat.S_IMODE(os.stat(name).st_mode)
            assert mode == 0o666 & ~umask, oct(mode)
        if is_qcow2:
            harness.check(name)
        fails("exists already; --force overwrites it", "--restore", *args,
              "repo", name)
        assert read(name)[:4] == (b"QFI\xfb" if is_qcow2 else bytes(4))
    # Holes stay holes.
    assert os.stat("a.raw").st_blocks * 512 < 12 * MIB
    os.mkdir("folder")
    os.mkfifo("pipe")
    os.symlink("nowhere", "link")
    fails("exists already", "--restore", "repo", "link")
    for name in "folder", "pipe", "/dev/null":
        fails("is not a regular file", "--restore", "--force",
              "repo", name)
        fails("exists already", "--restore", "repo", name)
    fails("must be qcow2 or raw: vdi", "--restore", "--format=vdi", "repo",
          "g")
    fails("No such file", "--restore", "repo", "no/where")
    fails("no point 3", "--restore", "repo@3", "g")
    fails("not the number of a point: x", "--restore", "repo@x", "g")
    fails("not the number of a point: ", "--restore", "repo@", "g")
    assert not os.path.exists("g")
    # A folder's name may have an @.
    shutil.copytree("repo", "repo@1")
    os.mkdir("repo@2")
    tool("--restore", "--force", "repo@1", "a.raw")
    assert read("a.raw") == moments[1]
    fails("not a repository", "--restore", "--force", "repo@2", "a.raw")
    tool("--restore", "--force", "repo@1@1", "a.raw")
    assert read("a.raw") == moments[0]
    shutil.rmtree("repo@1")
    shutil.rmtree("repo@2")
    assert not [n for n in os.listdir(".") if ".new-" in n], os.listdir(".")


def to_nbd():
    target = "target.raw"
    servers = {
        "nbdkit": ["file", target],
        "no zeroes": ["--filter=nozero", "file", target],
        "emulated": ["--filter=nozero", "file", target,
                     "zeromode=emulate"],
        "small requests": ["--filter=blocksize-policy", "file", target,
                           "blocksize-maximum=64K",
                           "blocksize-error-policy=error"],
        "simple replies": ["--no-sr", "file", target],
    }
    for name, args in servers.items():
        for n in 2, 1:
            with open(target, "wb") as f:
                f.write(b"\xff" * SIZE)
            server = Server(args=args)
            tool("--restore", "repo@%d" % n, server.uri)
            server.stop()
            assert read(target) == moments[n - 1], name
    harness.create("target.qcow2", SIZE)
    server = Server("target.qcow2", kind="qemu-nbd")
    tool("--restore", "repo", server.uri)
    server.stop()
    assert harness.contents("target.qcow2") == moments[1]

    server = Server(args=["-r", "file", target])
    fails("read-only", "--restore", "repo", server.uri)
    server.stop()
    server = Server(args=["null", "size=%d" % (SIZE + 512)])
    fails("the export has %d bytes, and the disk %d" % (SIZE + 512, SIZE),
          "--restore", "repo", server.uri)
    server.stop()
    fails("nowhere", "--restore", "repo", "nbd+unix:///?socket=/nowhere")
    server = Server(args=["--filter=error", "file", target,
                          "error-pwrite=ENOSPC", "error-pwrite-rate=100%"])
    fails("No space left", "--restore", "repo", server.uri)
    server.stop()
    # It is gone in the middle, or does not answer.
    for how in signal.SIGKILL, signal.SIGSTOP:
        server = Server(args=["--filter=delay", "file", target,
                              "wdelay=3"])
        p = popen("--restore", "repo@1", server.uri)
        time.sleep(0.4)
        os.kill(server.pid, how)
        if how == signal.SIGSTOP:
            time.sleep(0.3)
            p.send_signal(signal.SIGINT)
        status, out, err = ended(p)
        assert status == 1, err
        if how == signal.SIGSTOP:
            assert errors(err) == [] and "interrupted" in err, err
        else:
            one_error("", err)
        server.process.kill()
        server.process.wait()


def to_device():
    def loop(size):
        with open("backing", "wb") as f:
            f.write(b"\xff" * size)
        p = subprocess.run(["losetup", "-f", "--show", "backing"],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return p.stdout.decode().strip() if p.returncode == 0 else None

    device = loop(SIZE + 1024) if shutil.which("losetup") else None
    if device is None:
        print("    no loop devices here")
        return
    try:
        fails("exists already", "--restore", "repo", device)
        fails("must be raw", "--restore", "--force", "--format=qcow2", "repo",
              device)
        tool("--restore", "--force", "repo", device)
        assert stat.S_ISBLK(os.stat(device).st_mode)
        assert read(device)[:SIZE] == moments[1]
        assert read(device)[SIZE:] == b"\xff" * 1024
    finally:
        harness.run("losetup", "-d", device)
    device = loop(SIZE - 512)
    try:
        fails("the device has %d bytes, and the disk %d" % (SIZE - 512, SIZE),
              "--restore", "--force", "repo", device)
    finally:
        harness.run("losetup", "-d", device)


def on_terminal(*args, columns=100, at_bar=lambda: None):
    """What it prints there.  at_bar is called when it shows a bar."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns,
                                                       0, 0))
    p = popen(*args, stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    text = b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:
            break
        if not data:
            break
        text += data
        if b"%" in text:
            at_bar()
    os.close(master)
    p.communicate()
    text = text.decode()
    backups.sane(args, p.returncode, text)
    return p.returncode, text


def screen(text):
    """The lines that stay, with what is on each."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            if part.startswith("\x1b[K"):
                shown = part[3:]
            elif part:
                shown = part.replace("\x1b[K", "")
        lines.append(shown)
    return lines


def output():
    with open("large.raw", "wb") as f:
        f.write(b"\1" * (96 * MIB))
    server = Server(args=["--filter=rate", "file", "large.raw", "rate=300M"])
    for columns in 100, 30:
        status, text = on_terminal(server.uri, "term", columns=columns)
        assert status == 0, text
        bars = re.findall(r"\r *(\d+) %", text)
        assert len(bars) > 3 and sorted(map(int, bars)) == list(
            map(int, bars)), text
        if columns == 100:
            assert re.search(r"\r 50 % \[#{20}\.{20}\] ", text) or \
                "#" in text, text
        for part in re.findall(r"\r([^\r\n]*)\x1b\[K", text):
            assert len(part) < max(columns, 6), (columns, part)
        lines = screen(text)
        assert any(re.match("dirty-bitmap-backup: copied 96 MiB of 96 MiB, ",
                            line) for line in lines), lines
        assert not any("%" in line for line in lines), lines
        shutil.rmtree("term")
    # An error has a line of its own.
    server.stop()
    server = Server(args=["--filter=error", "--filter=rate", "file",
                          "large.raw", "rate=80M", "error-pread=EIO",
                          "error-pread-rate=100%", "error-file=broken"])
    status, text = on_terminal(server.uri, "term",
                               at_bar=lambda: open("broken", "w").close())
    os.unlink("broken")
    assert status == 1, text
    assert re.search(r"\r *\d+ % ", text), text
    lines = [line for line in screen(text) if "error" in line]
    assert len(lines) == 1 and lines[0].startswith(
        "dirty-bitmap-backup: error: cannot read "), text
    server.kill()
    # Elsewhere there are lines.
    server = Server(args=["file", "large.raw"])
    out, err = tool(server.uri, "term")
    assert out == "" and "\r" not in err and "\x1b" not in err, err
    assert "copied 96 MiB of 96 MiB, " in err, err
    assert re.search("point 1, full: 96 MiB of the disk, stored in 96 MiB",
                     err), err
    for quiet in (["--quiet", "--verify", "term"],
                  ["--quiet", "--restore", "term", "g.raw"],
                  ["--quiet", "--prune", "--keep=1", "term"]):
        assert tool(*quiet) == ("", ""), quiet
        assert on_terminal(*quiet, *(["--force"] if "g.raw" in quiet
                                     else [])) == (0, ""), quiet
    assert json.loads(tool("--json", "--verify", "term")[0]) == {
        "points": 1, "damaged": 0}
    assert json.loads(tool("--json", "--prune", "--keep=1", "term")[0]) == {
        "removed": 0, "points": 1}
    [point] = backups.listed("term")
    assert point["number"] == 1 and point["disk-bytes"] == 96 * MIB, point
    out, err = tool("--list", "term")
    assert err == "" and re.fullmatch(
        r"point  time +type +disk +copied +stored +file\n"
        r"1 +\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ +full +96 MiB +96 MiB +96 MiB +"
        r"0001\.qcow2\n", out), out
    with open("/dev/full", "w") as f:
        p = popen("--list", "term", stdout=f)
        status, out, err = p.wait(), None, p.stderr.read().decode()
    assert status == 1 and "No space left" in err, err
    server.stop()
    shutil.rmtree("term")


def full_disk():
    """At each size of the disk that is too small."""
    os.mkdir("mnt")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16M", "none",
                       "mnt"], stderr=subprocess.DEVNULL).returncode:
        print("    cannot mount")
        return
    try:
        on_full_disk()
    finally:
        harness.run("umount", "-l", "mnt")


def fill(spare):
    """Leave so many bytes."""
    s = os.statvfs("mnt")
    with open("mnt/filler", "wb") as f:
        f.write(bytes(max(0, s.f_bavail * s.f_frsize - spare)))


def on_full_disk():
    server = Server("disk.qcow2", "dirty-bitmap-control=" + ctl_sock)
    q = Qmp(ctl_sock)
    tool("--control=" + ctl_sock, server.uri, "mnt/repo")
    h = server.connect()
    h.pwrite(dice.randbytes(3 * MIB), 2 * MIB)
    [name] = [b["name"] for b in q.ask("query-block")[0]["inserted"][
        "dirty-bitmaps"] if b["name"].startswith("backup-")][-1:]
    before = backups.contents("mnt/repo")

    def dirty():
        context = harness.CONTEXT + name
        c = server.connect(context)
        found = harness.granules(harness.extents(c, context), 65536)
        c.shutdown()
        return found

    bits = dirty()
    sizes = [0, 4096, 65536, MIB, 3 * MIB, 3 * MIB + 4 * 65536,
             3 * MIB + 5 * 65536]
    failed = 0
    for spare in sizes + [3 * MIB + 6 * 65536 + 4096 * n for n in (0, 1)]:
        fill(spare)
        status, out, err = ended(popen("--control=" + ctl_sock, server.uri,
                                       "mnt/repo"))
        os.unlink("mnt/filler")
        assert q.ask("backup-list") == []
        if status == 0:
            continue
        failed += 1
        one_error("No space left on device", err)
        assert backups.contents("mnt/repo") == before, os.listdir("mnt/repo")
        assert dirty() == bits
    assert failed >= len(sizes) - 2, failed
    data = b"".join(bytes(h.pread(min(MIB, SIZE - at), at))
                    for at in range(0, SIZE, MIB))
    h.shutdown()
    if len(backups.listed("mnt/repo")) == 1:
        tool("--control=" + ctl_sock, server.uri, "mnt/repo")
    server.stop()
    sound("mnt/repo")

    # A prune that merges, and restores.
    before = backups.contents("mnt/repo")
    for spare in 0, 4096, 65536, 2 * MIB:
        fill(spare)
        err = fails("No space left on device", "--prune", "--keep=1",
                    "mnt/repo")
        for args in (["mnt/o.raw"], ["mnt/o.qcow2"]):
            fails("No space left on device", "--restore", "mnt/repo", *args)
        os.unlink("mnt/filler")
        assert backups.contents("mnt/repo") == before
        assert os.listdir("mnt") == ["repo"]
    shutil.rmtree("big", ignore_errors=True)
    tool("--restore", "mnt/repo", "whole.raw")
    assert read("whole.raw") == data


umask = os.umask(0)
os.umask(umask)
moments = make()
for test in (to_files, to_nbd, to_device, output, full_disk):
    print(test.__name__, flush=True)
    test()
