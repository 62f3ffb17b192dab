#!/usr/bin/env python3
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Storage that takes only whole blocks: block devices of 512 and 4096 bytes
a block, nbdkit's blocksize filter and policy, NBD servers with a minimum
block size.  Images with clusters of any size, and requests of any range,
work there; the image ends where it ends, be that a whole block or not.
"""

import os
import random
import subprocess
import sys
import time

import nbd

import harness

MiB = 1 << 20
SIZE = 6 * MiB
dice = random.Random(int(os.environ.get("SEED", 1)))
devices = []


def attach(path, block, size=16 * MiB):
    with open(path, "wb") as f:
        f.truncate(size)
    p = subprocess.run(["losetup", "-b", str(block), "-f", "--show", path],
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if p.returncode != 0:
        return None
    devices.append(p.stdout.decode().strip())
    return devices[-1]


def detach():
    while devices:
        subprocess.run(["losetup", "-d", devices.pop()], check=False)


def work(s, model, rounds):
    """Requests of any range, and what is then on the disk."""
    h = s.connect()
    h.set_strict_mode(0)
    for i in range(rounds):
        n = dice.choice((1, 100, 512, 3000, 4096, 20000, 65536))
        at = dice.randrange(0, SIZE - n)
        if dice.random() < 0.5:
            at -= at % 512
        kind = dice.randrange(6)
        try:
            if kind < 3:
                data = bytes([dice.randrange(256)]) * n
                h.pwrite(data, at)
                model[at:at + n] = data
            elif kind == 3:
                h.zero(n, at, dice.choice((0, nbd.CMD_FLAG_NO_HOLE)))
                model[at:at + n] = bytes(n)
            elif kind == 4:
                h.trim(n, at)
                model[at:at + n] = h.pread(n, at)
            else:
                assert h.pread(n, at) == model[at:at + n], (i, n, at)
        except nbd.Error as e:
            raise AssertionError("%d bytes at %d, request of kind %d: %s\n%s" %
                                 (n, at, kind, e, s.messages())) from None
    h.flush()
    assert h.pread(SIZE, 0) == model
    h.shutdown()


def contents(image):
    """The guest's disk, as QEMU reads it."""
    harness.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image,
                "contents")
    with open("contents", "rb") as f:
        return f.read()


def serve_twice(image, between=(), params=(), rounds=80):
    """Serve the image, write to it, and see that the filter and QEMU read
    what was written."""
    args = ["--filter=" + harness.FILTER, *["--filter=" + f for f in between],
            "file", image, *params]
    model = bytearray(contents(image))
    s = harness.Server(args=args)
    work(s, model, rounds)
    s.stop()
    errors = [m for m in s.messages().splitlines() if "error" in m]
    assert len(errors) <= 2, s.messages()
    s = harness.Server(args=["-r", *args])
    h = s.connect()
    assert h.pread(SIZE, 0) == model, (args, "read-only")
    h.shutdown()
    s.stop()
    harness.check(image)
    assert contents(image) == model, args
    assert harness.flags(image, "b") in (None, {"auto"})


def make(image, cluster):
    harness.create(image, SIZE, "b", options="cluster_size=%d" % cluster)
    harness.run("qemu-io", "-f", "qcow2", "-c", "write -q -P 5 0 1M",
                "-c", "write -q -P 6 5M 700k", image)


def on_block_devices(block):
    device = attach("blk", block)
    if device is None:
        return False
    for cluster in (65536, 512) if block == 512 else (2048, 512):
        make(device, cluster)
        serve_twice(device)
    serve_twice(device, ["nofilter"])
    serve_twice(device, ["blocksize"], ["minblock=4096"])

    # A data file, and a raw backing file.
    data = attach("blk2", block, SIZE)
    for name in "disk", "overlay":
        if os.path.exists(name):
            os.unlink(name)
    harness.run("qemu-img", "create", "-q", "-f", "qcow2", "-o",
                "data_file=%s,cluster_size=512" % data, "disk", str(SIZE))
    model = bytearray(SIZE)
    s = harness.Server("disk", "dirty-bitmap-allow-path=/dev")
    work(s, model, 150)
    s.stop()
    harness.check("disk")
    assert contents("disk") == model
    harness.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", data, "-F",
                "raw", "-o", "cluster_size=2048", "overlay")
    with open(data, "rb") as f:
        model = bytearray(f.read(SIZE))
    s = harness.Server("overlay", "dirty-bitmap-allow-path=/dev")
    work(s, model, 150)
    s.stop()
    harness.check("overlay")
    detach()
    return True


STACKS = (
    (["blocksize"], ["minblock=512"]),
    (["blocksize"], ["minblock=4096"]),
    (["blocksize"], ["minblock=65536", "maxdata=65536"]),
    (["blocksize-policy"], ["blocksize-minimum=512",
                            "blocksize-error-policy=error"]),
    (["blocksize-policy"], ["blocksize-minimum=4096",
                            "blocksize-preferred=4096",
                            "blocksize-maximum=1M",
                            "blocksize-error-policy=error"]),
    (["noparallel", "blocksize-policy"],
     ["serialize=requests", "blocksize-minimum=65536",
      "blocksize-preferred=65536", "blocksize-error-policy=error"]))


def odd_files():
    """Files whose end is no whole block, as QEMU leaves them: there the L1
    table lies, or the bitmaps' directory."""
    for i, (between, params) in enumerate(STACKS):
        for bitmaps in (), ("b",):
            cluster = (512, 65536)[(i + len(bitmaps)) % 2]
            if os.path.exists("disk"):
                os.unlink("disk")
            harness.create("disk", SIZE, *bitmaps,
                           options="cluster_size=%d" % cluster)
            assert cluster == 512 or os.path.getsize("disk") % 512 != 0
            before = harness.sha256("disk")
            s = harness.Server(args=["--filter=" + harness.FILTER,
                                     *["--filter=" + f for f in between],
                                     "file", "disk", *params])
            h = s.connect()
            assert h.pread(SIZE, 0) == bytes(SIZE)
            h.shutdown()
            s.stop()
            assert harness.sha256("disk") == before, "it was not written to"
            serve_twice("disk", between, params)


def reads_last_bytes(server):
    h = server.connect()
    h.set_strict_mode(0)
    try:
        return len(h.pread(512, h.get_size() - 512)) == 512
    except nbd.Error:
        return False


def over_nbd():
    """An NBD server with a minimum block size, over a file that has whole
    blocks, and over one that has not: its last bytes cannot be had, but
    from nbdkit 1.48."""
    def serve_below():
        return harness.Server(args=[
            "--filter=blocksize-policy", "file", "disk",
            "blocksize-minimum=4096", "blocksize-preferred=4096",
            "blocksize-error-policy=error"])

    os.unlink("disk")
    harness.create("disk", SIZE, "b", options="cluster_size=512")
    with open("disk", "r+b") as f:
        f.truncate(8 * MiB)
    below = serve_below()
    model = bytearray(SIZE)
    s = harness.Server(args=["--filter=" + harness.FILTER, "nbd",
                             "socket=" + below.socket])
    work(s, model, 300)
    s.stop()
    below.stop()
    harness.check("disk")
    assert contents("disk") == model

    with open("disk", "r+b") as f:
        f.truncate(8 * MiB + 512)
    below = serve_below()
    args = ["--filter=" + harness.FILTER, "nbd", "socket=" + below.socket]
    if reads_last_bytes(below):
        s = harness.Server(args=args)
        work(s, model, 100)
        s.stop()
        harness.check("disk")
        assert contents("disk") == model
    else:
        said = harness.run("nbdkit", "-f", "-U", "refused", *args, status=1,
                           env=harness.environment())
        assert "whole blocks of 4096 bytes" in said, said
    below.stop()


def main():
    odd_files()
    over_nbd()
    try:
        if not (on_block_devices(512) and on_block_devices(4096)):
            print("skipped: there are no loop devices")
            sys.exit(77)
    finally:
        time.sleep(0.1)
        detach()


main()
