#!/usr/bin/python3
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""nbdkit-dirty-bitmap-qemu-nbd takes qemu-nbd's command lines: those that
virtnbdbackup, oVirt and scripts write are given to both programs, on one
image, and nbdinfo has to say the same of both servers.  --fork returns when
clients are answered, with the process ID in its file.  What cannot be mapped
is an error that names the option.  Names may have any characters."""

import json
import os
import signal
import subprocess
import time

import nbd

import harness
from harness import FILTER, create, run, until

harness.requires("qemu-nbd", "nbdinfo", "qemu-io")
DROP_IN = os.path.join(os.environ.get("abs_top_builddir", ".."), "tools",
                       "nbdkit-dirty-bitmap-qemu-nbd")

# nbdkit with the filter under test, which is not installed.
with open("nbdkit-with-filter", "w") as f:
    f.write("""#!/bin/bash
for a; do
  if [ "$a" = --filter=dirty-bitmap ]; then a=--filter=$FILTER_UNDER_TEST; fi
  args+=("$a")
done
export "${ENVIRONMENT[@]}"
exec nbdkit "${args[@]}"
""".replace("${ENVIRONMENT[@]}", '" "'.join(
    "%s=%s" % v for v in harness.environment().items()
    if v[0] in ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS")) or "_=_"))
os.chmod("nbdkit-with-filter", 0o755)
ENV = dict(os.environ, FILTER_UNDER_TEST=FILTER,
           NBDKIT=os.path.join(harness.tmp, "nbdkit-with-filter"))
SOCK = os.path.join(harness.tmp, "nbd.sock")
PIDFILE = os.path.join(harness.tmp, "nbd.pid")


def pid_of(path=PIDFILE):
    with open(path) as f:
        return int(f.read())


def uri(name=""):
    return "nbd+unix:///%s?socket=%s" % (name, SOCK)


def what_it_says(name, contexts):
    """What a client learns: the export, and a map of each context."""
    [e] = json.loads(run("nbdinfo", "--json", uri(name)))["exports"]
    says = {k: e.get(k) for k in ("export-name", "description", "export-size",
                                  "is_read_only")}
    says["contexts"] = sorted(c for c in e["contexts"] if c in contexts)
    for c in contexts:
        if c.startswith("qemu:"):
            says[c] = json.loads(run("nbdinfo", "--json", "--map=" + c,
                                     uri(name)))
    return says


def start(program, args, forks):
    for path in SOCK, PIDFILE:
        if os.path.exists(path):
            os.unlink(path)
    p = subprocess.Popen([program, *args], env=ENV, stdin=subprocess.DEVNULL,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if forks:
        out = p.communicate(timeout=harness.PATIENCE)[0]
        assert p.returncode == 0, (program, args, out)
    else:
        until(lambda: harness.listens(SOCK), "the socket of %s %s: %s" % (
            program, args, p.poll() is not None and p.stdout.read()))
    return p


def compare(args, name="", contexts=(), forks=False, write=False):
    said = []
    for program in "qemu-nbd", DROP_IN:
        p = start(program, args, forks)
        pid = pid_of() if "--pid-file" in " ".join(args) else p.pid
        said.append(what_it_says(name, contexts))
        if write:
            h = nbd.NBD()
            h.connect_uri(uri(name))
            h.pwrite(bytes(65536), 512 << 10)
            h.flush()
            h.shutdown()
        if harness.lives(pid):
            os.kill(pid, signal.SIGTERM)
        until(lambda: not harness.lives(pid), "the end of the server")
        if not forks:
            assert p.wait() == 0, p.stdout.read()
            p.stdout.close()
    assert said[0] == said[1], (args, said)
    assert all(c in said[0]["contexts"] for c in contexts), said[0]


def make(path):
    create(path, 1 << 20, "b", "two")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 1 64k 100k", path)
    run("qemu-img", "bitmap", "--clear", path, "two")


make("disk.qcow2")
with open("disk.raw", "wb") as f:
    f.write(b"\1" * (1 << 20))
create("base.qcow2", 1 << 20)
run("qemu-io", "-f", "qcow2", "-c", "write -q -P 3 0 1M", "base.qcow2")
run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F",
    "qcow2", "top.qcow2")
run("qemu-io", "-f", "qcow2", "-c", "write -q -P 4 64k 64k", "top.qcow2")
tmp = harness.tmp
disk = os.path.join(tmp, "disk.qcow2")
B, DEPTH = "qemu:dirty-bitmap:b", "qemu:allocation-depth"


def vdsm(fmt, path, **more):
    return "json:" + json.dumps({
        "driver": fmt, "file": {"driver": "file", "filename": path}, **more})


# virtnbdbackup: offline backup with and without a bitmap, and restore.
for last, contexts in ("--bitmap=b", (B,)), ("--", ()):
    compare(["-r", "--format=qcow2", "-x", "sda", disk, "-k", SOCK, "-t",
             "-e 2", "--fork", "--detect-zeroes=on", "--pid-file=" + PIDFILE,
             last], "sda", contexts, forks=True)
compare(["-r", "--format=raw", "-x", "sda", os.path.join(tmp, "disk.raw"),
         "-k", SOCK, "-t", "-e 2", "--fork", "--detect-zeroes=on",
         "--pid-file=" + PIDFILE, "--"], "sda", forks=True)
compare(["--discard=unmap", "--format=qcow2", "-x", "sda", disk, "-k", SOCK,
         "--fork", "-t", "--pid-file", PIDFILE], "sda", forks=True, write=True)

# vdsm, which waits for the socket.
usual = ["--socket", SOCK, "--persistent", "--shared=8", "--export-name=",
         "--cache=none", "--aio=native", "--read-only"]
compare(usual + ["--bitmap=b", vdsm("qcow2", disk)], contexts=(B,))
compare(usual + [vdsm("raw", os.path.join(tmp, "disk.raw"))])
compare(usual[:-1] + ["--discard=unmap", vdsm("qcow2", disk)], write=True)
compare(usual + ["-A", vdsm("qcow2", os.path.join(tmp, "top.qcow2"),
                            backing=None)], contexts=(DEPTH,))
compare(usual + ["-A", vdsm("qcow2", os.path.join(tmp, "top.qcow2"))],
        contexts=(DEPTH,))

# ovirt-imageio.
compare(["--export-name=", "--persistent", "--shared=8", "--socket=" + SOCK,
         "--cache=none", "--aio=native", "--discard=unmap",
         "--detect-zeroes=unmap", "--bitmap=b", "--read-only",
         "--allocation-depth", vdsm("qcow2", disk)], contexts=(B, DEPTH))

# KubeVirt, which waits for the socket.
compare(["-r", "-t", "-f", "raw", "-k", SOCK, "disk.raw"])
compare(["-t", "-f", "raw", "-k", SOCK, "disk.raw"], write=True)

# Scripts: bundles, abbreviations, image options, several bitmaps.
compare(["-rtk" + SOCK, "-fqcow2", "-Bb", "--bitm", "two", "-D", "a text",
         disk], contexts=(B, "qemu:dirty-bitmap:two"))
compare(["-r", "--pers", "--sock", SOCK, "--exp=x y", "--image-opts",
         "driver=qcow2,file.driver=file,file.filename=" + disk], "x%20y")

# Names.
for name in ("a,b.qcow2", "a b.qcow2", "a:b.qcow2", "-r.qcow2", "a=b.qcow2",
             "é\"\\.qcow2"):
    make("plain.qcow2")
    os.rename("plain.qcow2", name)
    for form in (["--", name], [vdsm("qcow2", name)],
                 ["--image-opts", "driver=qcow2,file.driver=file,"
                  "file.filename=" + name.replace(",", ",,")]):
        fmt = ["-f", "qcow2"] if form[0] == "--" else []
        p = start(DROP_IN, ["-r", "-k", SOCK, *fmt, "-B", "b", *form], False)
        says = what_it_says("", ())   # and nbdinfo was the last client
        assert says["export-size"] == 1 << 20, name
        p.kill()
        p.wait()

# Without -t the server ends after the client, and with it stays.
p = start(DROP_IN, ["-k", SOCK, "-f", "qcow2", disk], False)
h = nbd.NBD()
h.connect_uri(uri())
h.pwrite(b"y" * 512, 0)
assert p.poll() is None
h.shutdown()
assert p.wait(harness.PATIENCE) == 0
harness.check(disk)
p = start(DROP_IN, ["-k", SOCK, "-f", "raw", "disk.raw"], False)
h = nbd.NBD()
h.connect_uri(uri())
h.shutdown()
assert p.wait(harness.PATIENCE) == 0

# Detected zeroes, and a snapshot.
run("qemu-img", "snapshot", "-c", "snap", disk)
for text in "snap", "snapshot.name=snap", "snapshot.id=1":
    p = start(DROP_IN, ["-t", "-l", text, "-k", SOCK, "-f", "qcow2", disk],
              False)
    assert what_it_says("", ())["is_read_only"]
    p.terminate()
    assert p.wait(harness.PATIENCE) == 0
p = start(DROP_IN, ["-k", SOCK, "-f", "qcow2", "--discard=unmap",
                    "--detect-zeroes=unmap", disk], False)
h = nbd.NBD()
h.connect_uri(uri())
h.pwrite(bytes(65536), 0)
h.shutdown()
assert p.wait(harness.PATIENCE) == 0
first = json.loads(run("qemu-img", "map", "--output=json", disk))[0]
assert first["zero"] and not first["data"], first

# What cannot be mapped, or is wrong: one line, and status 1.
for args, text in (
        (["-c", "/dev/nbd0"], "-c"), (["-d", "/dev/nbd0"], "-d"),
        (["--connect=/dev/nbd0"], "--connect"), (["-L"], "-L"),
        (["-o", "1"], "-o"), (["--offset=1"], "--offset"), (["-s"], "-s"),
        (["-T", "x"], "-T"), (["--trace=x"], "--trace"),
        (["--tls-authz=x"], "--tls-authz"), (["--tls-creds=x"], "--tls-creds"),
        (["--object", "secret,id=x,data=y", "--tls-creds=x"], "--object"),
        (["-f", "vmdk"], "-f"), (["--format=vdi"], "--format"),
        (["--cache=writethrough"], "--cache"), (["--cache=x"], "--cache"),
        (["--detect-zeroes=unmap"], "--detect-zeroes"),
        (["-e", "x"], "-e"), (["-p", "0"], "-p"), (["-k", "x"], "-k"),
        (["--s", "1"], "ambiguous"), (["--nonsense"], "--nonsense"),
        (["-Z"], "-Z"), (["--read-only=1"], "--read-only"),
        (["-B"], None), (["other"], "more than one"),
        (["--pid-file", disk, "--fork"], "--pid-file")):
    before = harness.sha256(disk)
    tail = [] if args == ["-B"] else [disk]
    p = subprocess.run([DROP_IN, *tail, *args], env=ENV, timeout=30,
                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT, universal_newlines=True)
    assert p.returncode == 1, (args, p.stdout)
    assert len(p.stdout.splitlines()) == 1, (args, p.stdout)
    assert text is None or text in p.stdout, (args, p.stdout)
    assert harness.sha256(disk) == before
for name, text in (("json:{", "not JSON"), ("missing", "missing"),
                   (vdsm("qcow2", disk, offset=1), "offset"),
                   (vdsm("qcow2", disk, backing="x"), "backing"),
                   ("disk.raw", "--format")):
    out = run(DROP_IN, "-r", "-k", SOCK, name, status=1, env=ENV)
    assert text in out, out
# nbdkit's own errors.
for more in [], ["--fork"]:
    out = run(DROP_IN, "-r", "-k", SOCK, "-B", "none", *more, disk, status=1,
              env=ENV)
    assert "none" in out, out
out = run(DROP_IN, "-k", SOCK, vdsm("qcow2", "top.qcow2", backing=None),
          status=1, env=ENV)
assert "dirty-bitmap-backing" in out, out

# TCP, and TLS with keys: clients without TLS are refused.
os.mkdir("keys")
with open("keys/keys.psk", "w") as f:
    f.write("alice:00112233445566778899aabbccddeeff\n")
port = harness.free_port()
out = run(DROP_IN, "-t", "-r", "-f", "qcow2", "-p", str(port), "-b",
          "127.0.0.1", "--object", "tls-creds-psk,id=t,endpoint=server,"
          "dir=keys", "--tls-creds", "t", "--fork", "--pid-file=tcp.pid", disk,
          env=ENV)
assert out == "", out
pid = pid_of("tcp.pid")
out = run("nbdinfo", "nbd://127.0.0.1:%d" % port, status=1)
assert "TLS" in out, out
out = run("nbdinfo", "--size", "nbds://alice@127.0.0.1:%d?tls-psk-file=%s" % (
    port, os.path.join(tmp, "keys/keys.psk")))
assert out.strip() == str(1 << 20), out
os.kill(pid, signal.SIGTERM)
until(lambda: not harness.lives(pid), "the end of the server")

# Socket activation, as libnbd does it.
out = run("nbdinfo", "--size", "--", "[", DROP_IN, "-r", "-f", "qcow2", disk,
          "]", env=ENV)
assert out.strip() == str(1 << 20), out

# As ovirt-imageio reads it.
line = run(DROP_IN, "--version").splitlines()[0]
assert tuple(map(int, line.split(None, 2)[1].split("."))) >= (5, 2, 0), line
assert "--persistent" in run(DROP_IN, "--help")
