#!/usr/bin/python3
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""dirty-bitmap-image: bitmaps beside the disk of a plugin.

Random changes over several plugins, against a model: the disk has the data,
the image the bits and nothing else, and QEMU reads it.  Clients are offered
what the plugin can do, and see its extents.  Images that do not fit are
refused, and nothing is changed."""

import json
import os
import shutil
import subprocess
import time

import nbd

import harness
from harness import CONTEXT, FILTER, Server, create, refused, run

rng = harness.seeded()
SIZE = (24 << 20) + 3 * 512
GRANULARITY = 4096


def only_bitmaps(image):
    """The image is sound, and no guest cluster of it is allocated."""
    harness.check(image)
    runs = json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2",
                          image))
    assert not any(r["data"] or "offset" in r for r in runs), runs


def granules_of(offset, count):
    if not count:
        return range(0)
    return range(offset // GRANULARITY,
                 (offset + count - 1) // GRANULARITY + 1)


class Model:
    """What the disk has to hold, and which granules were touched."""

    def __init__(self, size):
        self.data = bytearray(size)
        self.dirty = set()
        self.perhaps = set()          # by what was refused

    def touch(self, offset, count):
        self.dirty.update(granules_of(offset, count))

    def may_touch(self, offset, count):
        self.perhaps.update(granules_of(offset, count))

    def compare(self, dirty):
        assert self.dirty <= dirty <= self.dirty | self.perhaps, \
            (self.dirty - dirty, dirty - self.dirty - self.perhaps)


def change(h, model):
    """One random change, of any alignment."""
    size = len(model.data)
    count = rng.choice((1, 511, 512, 4096, 65536, 300000))
    offset = rng.randrange(size - count + 1)
    if rng.random() < 0.4:
        offset -= offset % 512
    fua = nbd.CMD_FLAG_FUA if h.can_fua() and rng.random() < 0.1 else 0
    kind = rng.choice("wwwztf")
    if kind == "w":
        data = bytes([rng.randrange(1, 256)]) * count
        h.pwrite(data, offset, fua)
    elif kind == "z":
        data = bytes(count)
        flags = rng.choice((0, nbd.CMD_FLAG_NO_HOLE))
        if h.can_fast_zero() and rng.random() < 0.3:
            flags |= nbd.CMD_FLAG_FAST_ZERO
        try:
            h.zero(count, offset, fua | flags)
        except nbd.Error as e:
            # QEMU's server may have zeroed a part of it even so.
            assert flags & nbd.CMD_FLAG_FAST_ZERO and e.errno == "ENOTSUP", e
            data = h.pread(count, offset)
            assert all(new in (0, old) for new, old in
                       zip(data, model.data[offset:offset + count]))
            model.data[offset:offset + count] = data
            model.may_touch(offset, count)
            return
    elif kind == "t" and h.can_trim():
        h.trim(count, offset, fua)
        # What was trimmed may read as anything.
        data = h.pread(count, offset)
    else:
        if h.can_flush():
            h.flush()
        return
    model.data[offset:offset + count] = data
    model.touch(offset, count)


def dirty_of(h, name="b"):
    return harness.granules(harness.extents(h, CONTEXT + name), GRANULARITY)


def serve(plugin, *params, options=()):
    return Server(args=[*options, "--filter=" + FILTER, *plugin,
                        "dirty-bitmap-image=tracks.qcow2", "dirty-bitmap=b",
                        "dirty-bitmap-granularity=%d" % GRANULARITY, *params])


def round_trip(plugin, *params, read_back=None, options=()):
    """Two runs over one disk.  read_back: the disk, without us."""
    print(plugin, params, flush=True)
    if os.path.exists("tracks.qcow2"):
        os.unlink("tracks.qcow2")
    model = None
    for _ in range(2):
        s = serve(plugin, *params, options=options)
        h = s.connect(CONTEXT + "b")
        if model is None:
            model = Model(h.get_size())
            model.data = bytearray(b"".join(
                h.pread(min(1 << 20, h.get_size() - at), at)
                for at in range(0, h.get_size(), 1 << 20)))
        elif read_back is None:       # a memory disk has begun anew
            model = Model(h.get_size())
            model.dirty = dirty_of(h)
        model.compare(dirty_of(h))
        for _ in range(150):
            change(h, model)
        model.compare(dirty_of(h))
        for at in range(0, len(model.data), 1 << 20):
            assert h.pread(min(1 << 20, len(model.data) - at), at) == \
                model.data[at:at + (1 << 20)], at
        h.shutdown()
        s.stop()
        only_bitmaps("tracks.qcow2")
        assert harness.flags("tracks.qcow2", "b") == {"auto"}
        model.compare(harness.granules(
            harness.qemu_extents("tracks.qcow2", "b"), GRANULARITY))
        if read_back is not None:
            assert read_back() == model.data


def contents_of(path):
    with open(path, "rb") as f:
        return f.read()


def raw_disk(path="disk.raw", size=SIZE):
    with open(path, "wb") as f:
        f.truncate(size)
        f.seek(1 << 20)
        f.write(b"old" * 100000)
    return path


def round_trips():
    def read_back():
        assert os.path.getsize("disk.raw") == SIZE, "it has grown"
        return contents_of("disk.raw")

    disk = raw_disk()
    round_trip(["file", disk], read_back=read_back)
    round_trip(["file", disk], "dirty-bitmap-crash=mark",
               read_back=read_back)
    # Through the plugin.
    round_trip(["file", disk, "fadvise=random"], read_back=read_back)
    round_trip(["memory", str(SIZE)])

    server = ["qemu-nbd", "-t", "-f", "qcow2", "--discard=unmap",
              "-k", harness.tmp + "/behind.sock", "behind.qcow2"]
    create("behind.qcow2", SIZE)
    behind = subprocess.Popen(server)
    try:
        harness.until(lambda: harness.answers("behind.sock"), "qemu-nbd")
        round_trip(["nbd", "socket=behind.sock"],
                   read_back=lambda: read_nbd("behind.sock"))
    finally:
        behind.terminate()
        behind.wait()


PYTHON_PLUGIN = """
import nbdkit
import os

API_VERSION = 2
fd = None

def open(readonly):
    return os.open("disk.raw", os.O_RDWR)

def close(h):
    os.close(h)

def get_size(h):
    return os.fstat(h).st_size

def pread(h, buf, offset, flags):
    assert os.preadv(h, [buf], offset) == len(buf)

def pwrite(h, buf, offset, flags):
    assert os.pwrite(h, buf, offset) == len(buf)

def can_flush(h):
    return True

def flush(h, flags):
    os.fdatasync(h)
"""

SH_PLUGIN = """#!/bin/sh
unset LD_PRELOAD        # no sanitizer is meant for dd
case $1 in
    get_size) stat -c %s disk.raw ;;
    pread) dd if=disk.raw bs=64k iflag=skip_bytes,count_bytes skip=$4 \
              count=$3 status=none ;;
    pwrite) dd of=disk.raw bs=64k iflag=fullblock oflag=seek_bytes seek=$4 \
               conv=notrunc status=none ;;
    can_write) ;;
    *) exit 2 ;;
esac
"""


def scripts():
    """Plugins of which a part is written by their user."""
    for plugin, text in (("python", PYTHON_PLUGIN), ("sh", SH_PLUGIN)):
        # The python plugin hangs at its start under a sanitizer's preload.
        if plugin == "python" and harness.PRELOAD:
            continue
        with open("plugin." + plugin, "w") as f:
            f.write(text)
        os.chmod("plugin." + plugin, 0o755)
        raw_disk(size=(3 << 20) + 512)
        round_trip([plugin, harness.tmp + "/plugin." + plugin],
                   "dirty-bitmap-server=force",
                   read_back=lambda: contents_of("disk.raw"))


def read_nbd(path):
    h = nbd.NBD()
    h.connect_uri("nbd+unix:///?socket=" + path)
    data = b"".join(h.pread(min(1 << 20, h.get_size() - at), at)
                    for at in range(0, h.get_size(), 1 << 20))
    h.shutdown()
    return data


def filters_below():
    """Filters that split requests, want whole blocks, or change bytes."""
    disk = raw_disk()
    for below in (["--filter=blocksize"],
                  ["--filter=blocksize-policy"], ["--filter=xor"],
                  ["--filter=truncate"]):
        name = below[0].split("=")[1]
        params = {"blocksize": ["minblock=4096", "maxdata=64k",
                                "maxlen=1M"],
                  "blocksize-policy": ["blocksize-minimum=512",
                                       "blocksize-maximum=65536",
                                       "blocksize-error-policy=error"],
                  "xor": ["xor=7", "xorlen=1"],
                  "truncate": ["truncate=%d" % (20 << 20)]}[name]
        if subprocess.run(["nbdkit", *below, "--dump-plugin", "null"],
                          stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL).returncode != 0:
            continue
        print(below, flush=True)
        if os.path.exists("tracks.qcow2"):
            os.unlink("tracks.qcow2")
        s = Server(args=["--filter=" + FILTER, *below, "file", disk, *params,
                         "dirty-bitmap-image=tracks.qcow2", "dirty-bitmap=b",
                         "dirty-bitmap-granularity=%d" % GRANULARITY])
        h = s.connect(CONTEXT + "b")
        model = Model(h.get_size())
        model.data = bytearray(b"".join(
            h.pread(min(1 << 20, h.get_size() - at), at)
            for at in range(0, h.get_size(), 1 << 20)))
        for _ in range(100):
            change(h, model)
        model.compare(dirty_of(h))
        assert h.pread(18 << 20, 1 << 20) == \
            model.data[1 << 20:19 << 20]
        h.shutdown()
        s.stop()
        only_bitmaps("tracks.qcow2")


def abilities(h):
    return {name: getattr(h, name)() for name in
            ("is_read_only", "is_rotational", "can_trim", "can_zero",
             "can_fast_zero", "can_flush", "can_fua", "can_cache")}


def scripted(**answers):
    """The eval plugin: a disk of 1 MiB in a file, which can do what is
    said; a shell script for each callback."""
    with open("scripted.raw", "wb") as f:
        f.truncate(1 << 20)
    disk = harness.tmp + "/scripted.raw"
    scripts = {
        "get_size": "echo 1M",
        "pread": "dd if=%s skip=$4 count=$3 iflag=count_bytes,skip_bytes "
                 "2>/dev/null" % disk,
        "pwrite": "dd of=%s seek=$4 conv=notrunc oflag=seek_bytes "
                  "2>/dev/null" % disk,
    }
    scripts.update(answers)
    return ["eval", *("%s=%s" % s for s in scripts.items())]


def what_a_plugin_can():
    yes, no = "exit 0", "exit 3"
    kinds = [
        ["memory", "1M"],
        ["file", raw_disk()],
        scripted(can_write=no),
        scripted(),
        scripted(can_flush=yes, flush="exit 0"),
        scripted(can_flush=yes, flush="exit 0", can_fua="echo native",
                 can_trim=yes, trim="exit 0", can_zero=yes,
                 zero="echo EOPNOTSUPP >&2; exit 1", can_fast_zero=yes,
                 can_cache="echo native", cache="exit 0",
                 is_rotational=yes),
    ]
    for plugin in kinds:
        print(plugin[0], flush=True)
        for mode in "force", "off":
            plain = Server(args=plugin)
            expected = abilities(plain.connect())
            plain.stop()
            if expected["is_read_only"]:
                create("tracks.qcow2", 1 << 20)
            elif os.path.exists("tracks.qcow2"):
                os.unlink("tracks.qcow2")
            s = Server(args=["--filter=" + FILTER, *plugin,
                             "dirty-bitmap-image=tracks.qcow2",
                             "dirty-bitmap-server=" + mode])
            h = s.connect()
            got = abilities(h)
            s.stop()
            # A file is used without its plugin, and that can tell.
            if plugin[0] == "file":
                expected["can_fast_zero"] = True
            assert got == expected, (plugin, mode, got, expected)


def extents_of_the_plugin():
    """Holes, zeroes that are allocated, and data: as the server behind
    has them."""
    behind = Server(args=["memory", "8M"])
    h = behind.connect("base:allocation")
    h.pwrite(b"x" * 65536, 1 << 20)
    h.pwrite(bytes(65536), 2 << 20)
    h.pwrite(b"x" * 131072, 3 << 20)
    expected = harness.extents(h, "base:allocation")
    assert {kind for _, kind in expected} == {0, 2, 3}, expected
    os.unlink("tracks.qcow2")
    s = serve(["nbd", "socket=" + behind.socket])
    ours = s.connect("base:allocation")
    assert harness.extents(ours, "base:allocation") == expected
    ours.pwrite(b"x", 5 << 20)
    assert harness.extents(ours, "base:allocation") == \
        harness.extents(h, "base:allocation")
    ours.shutdown()
    h.shutdown()
    s.stop()
    behind.stop()


def refusals():
    disk = raw_disk()
    image = "dirty-bitmap-image=bad.qcow2"
    before = harness.sha256(disk)

    def no(pattern, *params, make=None, options=()):
        if os.path.exists("bad.qcow2"):
            os.unlink("bad.qcow2")
        if make is not None:
            make()
        old = harness.sha256("bad.qcow2") if make is not None else None
        refused(disk, image, *params, options=options, pattern=pattern)
        if make is not None:
            assert harness.sha256("bad.qcow2") == old, pattern
        else:
            assert not os.path.exists("bad.qcow2"), pattern

    def make(size, options="", command=None, *bitmaps):
        def do():
            create("bad.qcow2", size, *bitmaps, options=options)
            if command:
                run("qemu-io", "-f", "qcow2", "-c", command, "bad.qcow2")
        return do

    def garbage():
        with open("bad.qcow2", "wb") as f:
            f.write(b"no image" * 1000)

    no("was made for", make=make(SIZE + 512))
    no("was made for", make=make(1 << 20))
    no("data of its own", make=make(SIZE, command="write 1M 1"))
    no("data of its own", make=make(SIZE, command="write -z 1M 64k"))
    no("data of its own", make=make(SIZE, "preallocation=metadata"))
    no("version 2", make=make(SIZE, "compat=0.10"))
    no("backing file",
       make=make(SIZE, "backing_file=disk.raw,backing_fmt=raw"))
    no("not the disk that is served",
       make=make(SIZE, "data_file=other.raw,data_file_raw=on"))
    no("not raw", make=make(SIZE, "data_file=disk2.raw"))
    no("qcow2", make=garbage)
    no("no such file", options=["-r"])
    no("dirty-bitmap-snapshot", "dirty-bitmap-snapshot=1")
    refused(disk, "dirty-bitmap-image=" + disk, pattern="the same file")
    refused(disk, "dirty-bitmap-image=nowhere/b.qcow2",
            pattern="no such file")
    refused(disk, "dirty-bitmap-image=" + harness.tmp, pattern="directory")
    refused(disk, "dirty-bitmap-image=", pattern="must not be empty")

    # QEMU has it open.
    create("bad.qcow2", SIZE)
    holder = subprocess.Popen(
        ["qemu-nbd", "-t", "-f", "qcow2", "-k", harness.tmp + "/hold.sock",
         "bad.qcow2"])
    try:
        harness.until(lambda: harness.answers("hold.sock"), "qemu-nbd")
        refused(disk, image, pattern="lock")
    finally:
        holder.terminate()
        holder.wait()
    # And we have both open.
    os.unlink("bad.qcow2")
    s = Server(disk, image)
    refused(disk, "dirty-bitmap-image=third.qcow2", pattern="lock")
    refused("bad.qcow2", pattern="lock")
    for path, fmt in (disk, "raw"), ("bad.qcow2", "qcow2"):
        out = run("qemu-io", "-f", fmt, "-c", "write 0 512", path, status=1)
        assert "lock" in out, out
    s.stop()
    # A file that cannot be written.
    if os.getuid() == 0 and shutil.which("setpriv"):
        os.chmod(harness.tmp, 0o755)
        os.chmod(disk, 0o666)
        os.chmod("bad.qcow2", 0o644)
        p = subprocess.run(
            ["setpriv", "--reuid=65534", "--clear-groups", "nbdkit", "-f",
             "-U", "-", "--filter=" + FILTER, "file", disk, image, "--run",
             "true"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=harness.environment())
        assert p.returncode != 0 and b"read-only" in p.stdout, p.stdout
    assert harness.sha256(disk) == before


def read_only():
    """Served read-only: both files stay as they are."""
    disk = raw_disk()
    os.unlink("tracks.qcow2")
    s = serve(["file", disk])
    h = s.connect()
    h.pwrite(b"new", 7 << 20)
    h.shutdown()
    s.stop()
    before = [harness.sha256(f) for f in (disk, "tracks.qcow2")]
    for options in ["-r"], ["--filter=readonly"]:
        args = ["--filter=" + FILTER, "file", disk]
        if options != ["-r"]:
            args[1:1] = options
            options = []
            if subprocess.run(["nbdkit", "--filter=readonly",
                               "--dump-plugin", "null"],
                              stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL).returncode != 0:
                continue
        s = Server(args=[*options, *args, "dirty-bitmap-image=tracks.qcow2"])
        h = s.connect(CONTEXT + "b")
        assert h.is_read_only()
        assert dirty_of(h) == {(7 << 20) // GRANULARITY}
        h.shutdown()
        s.stop()
        assert [harness.sha256(f) for f in (disk, "tracks.qcow2")] == before


def times():
    """A warning if the disk was changed last."""
    warning = "was changed after"
    disk = raw_disk()
    os.unlink("tracks.qcow2")

    def served(write):
        s = serve(["file", disk])
        h = s.connect()
        if write:
            h.pwrite(b"x", 1 << 20)
            h.pwrite(b"y", 1 << 20)
            h.flush()
            time.sleep(0.05)
            h.pwrite(b"z", 1 << 20)
        h.shutdown()
        s.stop()
        return warning in s.messages()

    assert not served(True)
    assert not served(False)
    assert not served(True)
    time.sleep(0.05)
    with open(disk, "r+b") as f:
        f.write(b"by another program")
    assert served(False)
    assert served(False)              # nothing has changed that
    assert served(True)
    assert not served(False)


def data_files():
    """An image whose raw data file is the disk: both ways, and QEMU."""
    disk = "data.raw"
    for options in "", ",cluster_size=4k", ",extended_l2=on":
        for name in disk, "shape.qcow2":
            if os.path.exists(name):
                os.unlink(name)
        create("shape.qcow2", SIZE, ("b", GRANULARITY),
               options="data_file=%s,data_file_raw=on%s" % (disk, options))
        model = Model(SIZE)
        for turn in range(6):
            if turn % 3 == 2:         # QEMU's
                data = bytes([turn + 1]) * 70000
                run("qemu-io", "-f", "qcow2", "-c",
                    "write -q -P %d 9M 70000" % (turn + 1), "-c",
                    "write -q -z 12M 192k", "shape.qcow2")
                for offset, data in (9 << 20, data), (12 << 20,
                                                      bytes(192 << 10)):
                    model.data[offset:offset + len(data)] = data
                    model.touch(offset, len(data))
            else:
                s = Server(disk, "dirty-bitmap-image=shape.qcow2") \
                    if turn % 3 else Server("shape.qcow2")
                h = s.connect(CONTEXT + "b")
                model.compare(dirty_of(h))
                for _ in range(60):
                    change(h, model)
                model.compare(dirty_of(h))
                h.shutdown()
                s.stop()
            harness.check("shape.qcow2")
            assert harness.flags("shape.qcow2", "b") == {"auto"}
            assert harness.contents("shape.qcow2") == model.data, turn
            assert contents_of(disk)[:SIZE] == model.data, turn


def server_off():
    """nbdkit's own server answers."""
    disk = raw_disk()
    os.unlink("tracks.qcow2")
    s = serve(["file", disk], "dirty-bitmap-server=off")
    h = s.connect()
    model = Model(SIZE)
    model.data = bytearray(contents_of(disk))
    for _ in range(100):
        change(h, model)
    h.shutdown()
    s.stop()
    assert contents_of(disk) == model.data
    model.compare(harness.granules(
        harness.qemu_extents("tracks.qcow2", "b"), GRANULARITY))


harness.requires("qemu-nbd", "qemu-io")
round_trips()
scripts()
filters_below()
what_a_plugin_can()
extents_of_the_plugin()
refusals()
read_only()
times()
data_files()
server_off()
