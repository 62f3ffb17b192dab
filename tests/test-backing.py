#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Chains of backing files, against QEMU: what is read, what
base:allocation and qemu:allocation-depth say, and what is in the image
after writing to it.  Of each chain no backing file ever changes.
"""

import os

import harness
from harness import HOLE, ZERO, Server, nbd, run
from qcow2image import Image

harness.requires("qemu-io", "qemu-nbd")
rnd = harness.seeded()
BASE, DEPTH = "base:allocation", "qemu:allocation-depth"
KB, MB = 1 << 10, 1 << 20


class Layer:
    """One file of a chain: its format, its size, options of qemu-img."""

    def __init__(self, size, options="", fmt="qcow2", name=None, says=True):
        self.size = size
        self.options = options
        self.fmt = fmt
        self.name = name or "%s"        # how the one above names it
        self.says = says                # ... and whether with the format


def raw(size, **kwargs):
    return Layer(size, fmt="raw", **kwargs)


def fill(path, layer):
    """Something of everything, in random places."""
    commands = []
    v2 = "0.10" in layer.options
    for _ in range(8):
        unit = rnd.choice([512, 4096, 64 * KB])
        offset = rnd.randrange(layer.size // unit) * unit
        count = min(rnd.choice([512, 20 * KB, 64 * KB, 200 * KB]),
                    layer.size - offset)
        command = rnd.choice(["write -P %d" % rnd.randrange(1, 256)] * 3 +
                             ["write -z", "write -z -u"] +
                             ([] if v2 else ["discard"]))
        commands += ["-c", "%s %d %d" % (command, offset, count)]
    run("qemu-io", "-f", layer.fmt, "-d", "unmap", *commands, path)


def make(prefix, layers):
    """Make a chain, the last layer on top; the paths."""
    paths = []
    for i, layer in enumerate(layers):
        path = "%s-%d.%s" % (prefix, i, layer.fmt)
        if layer.fmt == "raw":
            with open(path, "wb") as f:
                f.truncate(layer.size)
        else:
            backing = []
            if i > 0:
                below = layers[i - 1]
                name = below.name % paths[-1]
                backing = ["-b", name, "-F", below.fmt]
            options = ["-o", layer.options] if layer.options else []
            run("qemu-img", "create", "-q", "-f", "qcow2", *options,
                *backing, path, str(layer.size))
        fill(path, layer)
        if i > 0 and not layers[i - 1].says:
            Image(path).forget_backing_format()
        paths.append(path)
    return paths


def qemu_maps(path):
    """base:allocation and qemu:allocation-depth by qemu-nbd."""
    h = nbd.NBD()
    for context in (BASE, DEPTH):
        h.add_meta_context(context)
    h.connect_systemd_socket_activation(
        ["qemu-nbd", "-r", "-A", "-f", "qcow2", path])
    result = harness.extents(h, BASE), harness.extents(h, DEPTH)
    h.shutdown()
    return result


def compare_maps(h, path):
    """The depth is QEMU's exactly.  So is base:allocation, but that an
    explicit zero cluster is no hole to us (R7), and that QEMU also looks
    for holes in the image's file, which we do in preallocated images only:
    ZERO alone is such a one."""
    base, depth = qemu_maps(path)
    assert harness.extents(h, DEPTH) == depth, (
        harness.extents(h, DEPTH), depth)
    ours = harness.extents(h, BASE)
    assert all(kind in (0, ZERO, HOLE | ZERO) for _, kind in ours)
    for zero, kind in harness.both(ours, base):
        assert zero or kind & HOLE == 0, (ours, base)
        assert not zero or kind != 0, (ours, base)


def read_all(h):
    return b"".join(h.pread(min(MB, h.get_size() - at), at)
                    for at in range(0, h.get_size(), MB))


def look(path):
    server = Server(path, options=["-r"])
    h = server.connect(BASE, DEPTH)
    assert read_all(h) == harness.contents(path), path
    compare_maps(h, path)
    h.shutdown()
    server.stop()
    return server


def write(path):
    """Random writes and zeroes against a model; then QEMU judges."""
    server = Server(path)
    h = server.connect(BASE, DEPTH)
    model = bytearray(read_all(h))
    size = len(model)
    for _ in range(25):
        offset = rnd.randrange(size)
        count = min(rnd.choice([1, 700, 5 * KB, 70 * KB, 300 * KB]),
                    size - offset)
        if rnd.random() < 0.6:
            data = bytes([rnd.randrange(256)]) * count
            h.pwrite(data, offset)
        else:
            data = bytes(count)
            h.zero(count, offset, rnd.choice([0, nbd.CMD_FLAG_NO_HOLE]))
        model[offset:offset + count] = data
    # What is discarded reads as zeroes, or as it was; not as the backing
    # file has it.
    for _ in range(5):
        offset = rnd.randrange(size)
        count = min(200 * KB, size - offset)
        h.trim(count, offset)
        got = h.pread(count, offset)
        assert all(a in (0, b) for a, b in
                   zip(got, model[offset:offset + count]))
        model[offset:offset + count] = got
    assert read_all(h) == model
    h.flush()
    h.shutdown()
    server.stop()
    harness.check(path)
    assert harness.contents(path) == model


CHAINS = {
    "raw": [raw(2 * MB), Layer(2 * MB)],
    "odd-raw": [raw(MB + 12345), Layer(2 * MB)],
    "qcow2": [Layer(2 * MB), Layer(2 * MB)],
    "v2": [Layer(2 * MB, "compat=0.10"), Layer(2 * MB, "compat=0.10")],
    "shorter": [raw(MB // 2), Layer(MB + 512), Layer(3 * MB)],
    "longer": [raw(3 * MB), Layer(2 * MB + 512), Layer(MB)],
    "up-and-down": [Layer(3 * MB), Layer(MB), Layer(3 * MB), Layer(2 * MB)],
    "clusters": [Layer(2 * MB, "cluster_size=2M"),
                 Layer(2 * MB, "cluster_size=512"),
                 Layer(2 * MB, "cluster_size=4k")],
    "deep": [raw(2 * MB)] + [Layer(2 * MB, "cluster_size=%dk" % n)
                             for n in (4, 64, 32, 128, 64)],
    "subclusters": [Layer(2 * MB, "extended_l2=on,cluster_size=128k"),
                    Layer(2 * MB, "extended_l2=on,cluster_size=64k")],
    "file": [raw(2 * MB, name="file:%s"), Layer(2 * MB)],
    "absolute": [Layer(2 * MB, name=harness.tmp + "/%s"),
                 raw(2 * MB, name="file:" + harness.tmp + "/%s")
                 ][::-1] + [Layer(2 * MB)],
    "dots": [Layer(2 * MB, name="./sub/../%s"), Layer(2 * MB)],
}
os.mkdir("sub")

for prefix, layers in CHAINS.items():
    if harness.SERVER != "nbdkit":
        break
    paths = make(prefix, layers)
    look(paths[-1])
    below = [harness.sha256(p) for p in paths[:-1]]
    write(paths[-1])
    look(paths[-1])
    assert below == [harness.sha256(p) for p in paths[:-1]], prefix

# No format in the header: read-only as QEMU, which probes; not to be
# written, wherever in the chain that is.
for prefix, layers in {
        "probe-raw": [raw(2 * MB, says=False), Layer(2 * MB)],
        "probe-qcow2": [Layer(2 * MB, says=False), Layer(2 * MB)],
        "probe-below": [raw(MB, says=False), Layer(MB), Layer(MB)],
}.items():
    paths = make(prefix, layers)
    server = look(paths[-1])
    assert "does not say which format" in server.messages()
    fmt = layers[0].fmt
    out = harness.refused(paths[-1], pattern="only be served read-only")
    assert "qemu-img rebase -u -b '%s' -F %s '%s'" % (
        paths[0], fmt, os.path.join(harness.tmp, paths[1])) in out, out
    run("qemu-img", "rebase", "-u", "-b", paths[0], "-F", fmt, paths[1])
    write(paths[-1])

# A guest wrote the header of an image into its raw disk, which has become
# a backing file: with its format in the header it is what it is, bytes.
run("qemu-img", "create", "-q", "-f", "qcow2", "victim.qcow2", "1M")
with open("victim.qcow2", "rb") as f:
    header = f.read(64 * KB)
with open("guest.raw", "wb") as f:
    f.truncate(MB)
    f.write(header)
run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "guest.raw", "-F", "raw",
    "top.qcow2")
server = Server("top.qcow2")
h = server.connect()
assert h.pread(64 * KB, 0) == header
h.shutdown()
server.stop()

# Formats that QEMU would find and we do not serve are not taken for raw.
for fmt in ("vmdk", "vdi", "vhdx", "vpc", "qed", "parallels"):
    run("qemu-img", "create", "-q", "-f", fmt, "other." + fmt, "1M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "other." + fmt,
        "-F", fmt, "top.qcow2")
    for options in ([], ["-r"]):
        harness.refused("top.qcow2", options=options,
                        pattern="has the format '%s'" % fmt)
    Image("top.qcow2").forget_backing_format()
    for options in ([], ["-r"]):
        harness.refused("top.qcow2", options=options,
                        pattern="looks like %s" % fmt)
