#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Storage that runs full while a client writes: a file system, a limit on
the size of files, a block device, an export of fixed size.  Requests fail
with ENOSPC, and flushes succeed.  What was acknowledged is in the image
after a flush and a kill, after a stop, and after there was space again.
Every bitmap has all changes or is marked; if one is marked after a stop,
the exit status and a message say so.

(unit/disk/test-space.c tries every point of many workloads.)
"""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time

import harness
from harness import Server, nbd, run

SIZE = 16 << 20
SECTOR = 512
GRANULARITIES = {"fine": 512, "b": 65536}
FUA, NO_HOLE = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE
dice = harness.seeded()


def can(*command):
    return subprocess.run(command, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL).returncode == 0


class FileSystem:
    """A file system of 8 MiB, of which a filler leaves some."""

    @contextlib.contextmanager
    def mounted(self):
        os.mkdir("mnt")
        self.mount()
        try:
            yield
        finally:
            run("umount", "-l", "mnt")
            os.rmdir("mnt")

    @contextlib.contextmanager
    def prepared(self, image):
        with self.mounted():
            self.path = "mnt/disk"
            run("cp", "--sparse=always", image, self.path)
            yield self.path

    def serve(self):
        server = Server(self.path)
        s = os.statvfs("mnt")
        free = s.f_bavail * s.f_frsize
        with open("mnt/filler", "wb") as f:
            f.write(bytes(max(0, free - dice.randrange(3 << 20))))
        return server

    def make_space(self, _):
        os.unlink("mnt/filler")


class Tmpfs(FileSystem):
    def mount(self):
        run("mount", "-t", "tmpfs", "-o", "size=8M", "none", "mnt")


class Ext4(FileSystem):
    """With blocks smaller than the memory's pages."""

    def mount(self):
        with open("ext4", "wb") as f:
            f.truncate(12 << 20)
        run("mkfs.ext4", "-q", "-F", "-b", "1024", "-O", "^has_journal",
            "-m", "0", "ext4")
        run("mount", "-o", "loop", "ext4", "mnt")


class Limit:
    """What a process may write to a file, in bytes from its beginning."""

    @contextlib.contextmanager
    def prepared(self, image):
        self.path = "limited"
        shutil.copy(image, self.path)
        yield self.path

    def serve(self):
        server = Server(self.path)
        limit = os.path.getsize(self.path) + dice.randrange(3 << 20)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE,
                         (limit, resource.RLIM_INFINITY))
        return server

    def make_space(self, server):
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE,
                         (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class Loop:
    """A block device that is a little larger than the image."""

    @contextlib.contextmanager
    def prepared(self, image):
        shutil.copy(image, "loop")
        os.truncate("loop", (os.path.getsize("loop") + 4095) // 4096 * 4096 +
                    dice.randrange(700) * 4096)
        self.path = run("losetup", "-f", "--show", "loop").strip()
        try:
            yield self.path
        finally:
            run("losetup", "-d", self.path)

    def serve(self):
        return Server(self.path)

    make_space = None


class Export:
    """nbdkit's nbd plugin, over an export of fixed size."""

    @contextlib.contextmanager
    def prepared(self, image):
        self.path = "exported"
        shutil.copy(image, self.path)
        os.truncate(self.path, os.path.getsize(self.path) +
                    dice.randrange(3 << 20) // 512 * 512)
        self.below = Server(args=["file", self.path])
        try:
            yield self.path
        finally:
            self.below.stop()

    def serve(self):
        return Server(args=["--filter=" + harness.FILTER, "nbd",
                            "socket=" + self.below.socket])

    make_space = None


class Client:
    """Random requests, and what the disk has to hold."""

    def __init__(self, h):
        self.h = h
        self.disk = bytearray(h.pread(SIZE, 0))
        self.changed = {name: set() for name in GRANULARITIES}
        self.failed = 0

    def change(self, request, offset, new, flags):
        end = offset + len(new)
        for name, granularity in GRANULARITIES.items():
            self.changed[name].update(range(offset // granularity,
                                            -(-end // granularity)))
        try:
            request(flags)
            self.disk[offset:end] = new
        except nbd.Error as e:
            assert e.errno == "ENOSPC", e
            self.failed += 1
            self.adopt(offset, new)

    def adopt(self, offset, new):
        """Of a request that failed each sector is old or new."""
        got = self.h.pread(len(new), offset)
        for i in range(0, len(new), SECTOR):
            sector = got[i:i + SECTOR]
            assert sector in (new[i:i + SECTOR],
                              self.disk[offset + i:offset + i + SECTOR])
        self.disk[offset:offset + len(new)] = got

    def step(self):
        kind = dice.choice(["write"] * 20 + ["zero", "keep", "trim", "flush"])
        align = dice.choice((512, 4096, 65536))
        offset = dice.randrange(SIZE // align) * align
        count = dice.randrange(1, max(2, 131072 // align)) * align
        count = min(count, SIZE - offset)
        flags = FUA if dice.random() < 0.03 else 0
        if kind == "flush":
            self.h.flush()
        elif kind == "write":
            data = os.urandom(16) * (count // 16)
            self.change(lambda f: self.h.pwrite(data, offset, f), offset,
                        data, flags)
        elif kind == "trim":
            # Whole clusters, so that it is known what becomes of it.
            offset -= offset % 65536
            count = min(65536, SIZE - offset)
            self.change(lambda f: self.h.trim(count, offset, f), offset,
                        bytes(count), flags)
        else:
            flags |= NO_HOLE if kind == "keep" else 0
            self.change(lambda f: self.h.zero(count, offset, f), offset,
                        bytes(count), flags)

    def work(self):
        for _ in range(400):
            self.step()
            if self.failed >= 8:
                break
        else:
            raise AssertionError("the storage does not run full")
        # What is there can be written.
        self.change(lambda f: self.h.pwrite(b"x" * 512, 0, f), 0, b"x" * 512,
                    0)
        assert self.h.pread(SIZE, 0) == self.disk


def verify(path, client, marked):
    """The image has the client's data; which bitmaps are marked."""
    if not os.path.isfile(path):
        shutil.copyfile(path, "copy")
        path = "copy"
    assert harness.contents(path) == client.disk, "data are lost"
    harness.check(path, leaks=True)
    found = set()
    for name, granularity in GRANULARITIES.items():
        if "in-use" in harness.flags(path, name):
            found.add(name)
            continue
        dirty = harness.granules(harness.qemu_extents(path, name),
                                 granularity)
        assert client.changed[name] <= dirty, "%s lacks bits" % name
    assert marked or not found, found
    return found


def flush_and_kill(storage, server, client, path):
    client.h.flush()
    server.kill()
    verify(path, client, True)


def stop(storage, server, client, path):
    client.h.shutdown()
    server.stop(status=None)
    marked = verify(path, client, True)
    assert (server.process.returncode != 0) == bool(marked), server.messages()
    for name in marked:
        assert "bitmap '%s' could not be stored" % name in server.messages()


def space_again(storage, server, client, path):
    storage.make_space(server)
    before = client.failed
    for _ in range(40):
        client.step()
    assert client.failed == before, "it fails though there is space"
    client.h.shutdown()
    server.stop()
    verify(path, client, False)
    harness.check(path)


def image(options, size):
    harness.create("image", SIZE, *GRANULARITIES.items(), options=options)
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 %d" % size, "image")
    return "image"


harness.requires("qemu-io", "qemu-nbd")
if harness.SERVER != "nbdkit":
    raise SystemExit("this is not for another server")
storages = [Limit(), Export()]
if os.geteuid() == 0 and can("unshare", "-m", "true"):
    storages.append(Tmpfs())
    with open("probe", "wb") as probe:
        probe.truncate(1 << 20)
    if can("sh", "-c", "losetup -d $(losetup -f --show probe)"):
        storages.append(Loop())
        if shutil.which("mkfs.ext4"):
            storages.append(Ext4())
for storage in storages:
    for end in flush_and_kill, stop, space_again:
        if end == space_again and storage.make_space is None:
            continue
        name = image(*dice.choice((("cluster_size=64k", 4096),
                                   ("cluster_size=4k", 512 << 10),
                                   ("cluster_size=4k,refcount_bits=64", 4096),
                                   ("cluster_size=512", 64 << 10),
                                   ("cluster_size=16k,extended_l2=on",
                                    1 << 20))))
        with storage.prepared(name) as path:
            server = storage.serve()
            client = Client(server.connect())
            client.work()
            end(storage, server, client, path)
            print("%s, %s: %d failed" % (type(storage).__name__,
                                         end.__name__, client.failed))
