#!/usr/bin/python3
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""dirty-bitmap-image, when the two storages do not fare alike.

The bitmaps' file is full: the disk goes on, the bitmap is marked as in use
and the log says so, and once there is space again it is stored.  The file is
removed or replaced while it is open: it is served on, and the new one is left
alone.  The server behind goes away: requests fail, the bitmap has their bits.
Commands of the control socket, and views, are as those of an image, also on
a block device."""

import contextlib
import os
import subprocess

import nbd

import harness
from harness import CONTEXT, FILTER, Server, run, until
from qmp import Qmp

MIB = 1 << 20
SIZE = 64 * MIB
ctl_sock = os.path.join(harness.tmp, "ctl.sock")


def dirty(h, granularity=65536, name="b"):
    return harness.granules(harness.extents(h, CONTEXT + name), granularity)


def raw_disk():
    with open("disk.raw", "wb") as f:
        f.truncate(SIZE)
    with contextlib.suppress(FileNotFoundError):
        os.unlink("tracks.qcow2")
    return "disk.raw"


def serve(disk, *params, image="tracks.qcow2"):
    return Server(disk, "dirty-bitmap-image=" + image, "dirty-bitmap=b",
                  *params)


def can(*command):
    return subprocess.run(command, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL).returncode == 0


def full():
    """A file system that has no room for the bitmap's clusters."""
    os.mkdir("mnt")
    if not can("mount", "-t", "tmpfs", "-o", "size=2M", "none", "mnt"):
        print("no mounts here: a full file system is not tested")
        return
    try:
        for mode in "keep", "mark":
            disk = raw_disk()
            # 64 MiB in granules of 512 bytes are 4 KiB of bits to 16 MiB;
            # with clusters of 512 bytes each MiB needs clusters of its own.
            run("qemu-img", "create", "-q", "-f", "qcow2", "-o",
                "cluster_size=512", "mnt/tracks.qcow2", str(SIZE))
            s = serve(disk, "dirty-bitmap-granularity=512",
                      "dirty-bitmap-crash=" + mode, image="mnt/tracks.qcow2")
            h = s.connect(CONTEXT + "b")
            h.pwrite(b"1" * 512, 0)
            h.flush()
            v = os.statvfs("mnt")
            with open("mnt/filler", "wb") as f:
                f.write(bytes(v.f_bavail * v.f_frsize))
            written = {0}
            for at in range(MIB, SIZE, MIB):
                h.pwrite(b"2" * 512, at)
                written.add(at // 512)
            h.flush()
            assert h.pread(512, 5 * MIB) == b"2" * 512
            assert dirty(h, 512) == written
            assert harness.flags("mnt/tracks.qcow2", "b") == \
                {"auto", "in-use"}, mode
            assert "no space" in s.messages().lower(), s.messages()
            os.unlink("mnt/filler")
            # The next flush stores it, by itself.
            h.pwrite(b"3" * 512, 3 * MIB + 4096)
            written.add((3 * MIB + 4096) // 512)
            h.flush()
            assert harness.flags("mnt/tracks.qcow2", "b") == {"auto"}, mode
            h.shutdown()
            s.stop()
            harness.check("mnt/tracks.qcow2")
            assert harness.granules(
                harness.qemu_extents("mnt/tracks.qcow2", "b"), 512) == \
                written
            with open(disk, "rb") as f:
                f.seek(9 * MIB)
                assert f.read(512) == b"2" * 512
            os.unlink("mnt/tracks.qcow2")

        # There is no room to create it: no file is left.
        with open("mnt/filler", "wb") as f:
            f.write(bytes(2 * MIB - 8192))
        out = harness.refused(raw_disk(), "dirty-bitmap-image=mnt/new.qcow2",
                              pattern="no space")
        assert "new.qcow2" in out, out
        assert os.listdir("mnt") == ["filler"], os.listdir("mnt")
    finally:
        run("umount", "-l", "mnt")
        os.rmdir("mnt")


def vanished():
    """The file loses its name while it is served."""
    disk = raw_disk()
    s = serve(disk)
    h = s.connect(CONTEXT + "b")
    h.pwrite(b"a", MIB)
    fd = os.open("tracks.qcow2", os.O_RDONLY)
    os.unlink("tracks.qcow2")
    with open("tracks.qcow2", "wb") as f:
        f.write(b"another file")
    h.pwrite(b"b", 2 * MIB)
    h.flush()
    assert dirty(h) == {16, 32}
    h.shutdown()
    s.stop()
    with open("tracks.qcow2", "rb") as f:
        assert f.read() == b"another file"
    run("cp", "/proc/%d/fd/%d" % (os.getpid(), fd), "kept.qcow2")
    os.close(fd)
    harness.check("kept.qcow2")
    assert harness.granules(harness.qemu_extents("kept.qcow2", "b"),
                            65536) == {16, 32}


def server_behind_goes():
    """The plugin's server is killed: requests fail, bits stay."""
    harness.create("behind.qcow2", SIZE)
    behind = subprocess.Popen(
        ["qemu-nbd", "-t", "-f", "qcow2", "-k",
         harness.tmp + "/behind.sock", "behind.qcow2"])
    try:
        until(lambda: harness.answers("behind.sock"), "qemu-nbd")
        with contextlib.suppress(FileNotFoundError):
            os.unlink("tracks.qcow2")
        s = Server(args=["--filter=" + FILTER, "nbd", "socket=behind.sock",
                         "dirty-bitmap-image=tracks.qcow2",
                         "dirty-bitmap=b"])
        h = s.connect(CONTEXT + "b")
        h.pwrite(b"a", MIB)
        h.flush()
        behind.kill()
        behind.wait()
        for call in (lambda: h.pwrite(b"b", 2 * MIB), h.flush,
                     lambda: h.pread(1, MIB)):
            try:
                call()
            except nbd.Error:
                continue
            raise AssertionError("it succeeded")
        assert {16} <= dirty(h) <= {16, 32}
        h.shutdown()
        s.stop(status=None)
        harness.check("tracks.qcow2", leaks=True)
        assert harness.flags("tracks.qcow2", "b") == {"auto"}
    finally:
        behind.kill()
        behind.wait()


def control(disk):
    """A backup by a view, and what is said of the disk."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink("tracks.qcow2")
    s = serve(disk, "dirty-bitmap-control=" + ctl_sock)
    q = Qmp(ctl_sock)
    h = s.connect(CONTEXT + "b")
    h.pwrite(b"old" * 100000, MIB)
    before = h.pread(4 * MIB, 0)
    inserted = q.ask("query-block")[0]["inserted"]
    assert inserted["drv"] == inserted["image"]["format"] == "raw", inserted
    assert inserted["image"]["virtual-size"] == SIZE
    assert inserted["image"]["filename"].endswith(disk)
    assert [b["name"] for b in inserted["dirty-bitmaps"]] == ["b"]
    r = q.ask("backup-begin", bitmap="b")
    assert r["export"] == "backup:b", r
    h.pwrite(b"new" * 200000, MIB + 1000)
    h.zero(MIB, 0)
    v = nbd.NBD()
    v.add_meta_context(CONTEXT + "b")
    v.connect_uri("nbd+unix:///backup:b?socket=" + s.socket)
    assert v.pread(4 * MIB, 0) == before
    assert dirty(v) == set(range(16, 21)), dirty(v)
    v.shutdown()
    q.ask("backup-end", bitmap="b", success=True)
    h.shutdown()                      # its bitmap is another one now
    h = s.connect(CONTEXT + "b")
    assert dirty(h) == set(range(26)), dirty(h)
    h.flush()
    q.ask("block-dirty-bitmap-add", node="disk", name="c", persistent=True)
    h.pwrite(b"c", 40 * MIB)
    h.flush()
    assert harness.flags("tracks.qcow2", "c") == {"auto"}
    d = nbd.NBD()
    d.connect_uri("nbd+unix:///delta:c?socket=" + s.socket)
    assert d.pread(1, 40 * MIB) == b"c"
    d.shutdown()
    h.shutdown()
    q.close()
    s.stop()
    harness.check("tracks.qcow2")
    assert harness.granules(harness.qemu_extents("tracks.qcow2", "c"),
                            65536) == {640}


def block_device():
    """A loop device: nothing is said of a file's time or place."""
    raw_disk()
    p = subprocess.run(["losetup", "-f", "--show", "disk.raw"],
                       stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if p.returncode != 0:
        print("no loop devices here: no block device is tested")
        return
    device = p.stdout.decode().strip()
    try:
        control(device)
        with open("disk.raw", "rb") as f:
            f.seek(40 * MIB)
            assert f.read(1) == b"c"
        s = serve(device)
        assert s.messages() == "", s.messages()
        h = s.connect()
        h.trim(MIB, 40 * MIB)
        h.zero(MIB, 41 * MIB, nbd.CMD_FLAG_NO_HOLE)
        h.pwrite(b"fua", 50 * MIB, nbd.CMD_FLAG_FUA)
        h.shutdown()
        s.stop()
        with open("disk.raw", "rb") as f:
            f.seek(50 * MIB)
            assert f.read(3) == b"fua"
    finally:
        run("losetup", "-d", device)


harness.requires("qemu-nbd")
full()
vanished()
server_behind_goes()
control(raw_disk())
block_device()
