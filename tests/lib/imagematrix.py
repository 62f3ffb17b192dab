# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""The images that QEMU makes: the options, which of them go together, and
an image of each row of options with the model of what is in it."""

import os
import re

import harness
from diskmodel import Bitmap, Disk, Model

K, M = 1 << 10, 1 << 20
DISK = "disk.qcow2"

OPTIONS = {
    "cluster": [512, 1 * K, 4 * K, 16 * K, 64 * K, 2 * M],
    "version": [2, 3],
    "refcount_bits": [1, 2, 4, 8, 16, 32, 64],
    "lazy": [False, True],
    "compression": [None, "zlib", "zstd"],
    "preallocation": ["off", "metadata", "falloc", "full"],
    "extended_l2": [False, True],
    "backing": [None, "raw", "qcow2", "chain"],
    "backing_size": ["equal", "shorter", "longer"],
    "snapshots": [0, 1, 2],
    "data_file": [None, "plain", "raw"],
    "size": ["small", "odd", "tables"],
    "bitmaps": ["none", "one", "several"],
    "first": ["us", "qemu"],
}


def possible(row):
    """Does qemu-img make this image?  row may lack options."""
    def has(name, *values):
        return name in row and row[name] in values

    def set_to(name, *others):
        return name in row and row[name] not in others

    v2 = has("version", 2)
    backed = set_to("backing", None)
    allocated = set_to("preallocation", "off")
    no = [
        v2 and set_to("refcount_bits", 16),
        v2 and (has("lazy", True) or has("extended_l2", True) or
                has("compression", "zstd") or set_to("data_file", None) or
                set_to("bitmaps", "none")),
        has("extended_l2", True) and has("cluster", 512, 1 * K, 4 * K),
        set_to("data_file", None) and (set_to("compression", None) or
                                       set_to("snapshots", 0)),
        backed and has("data_file", "raw"),
        has("backing", None) and set_to("backing_size", "equal"),
        backed and allocated and has("extended_l2", False),
        # Compressed clusters share host clusters, and a snapshot doubles
        # the count.
        has("refcount_bits", 1) and set_to("snapshots", 0),
        has("refcount_bits", 2, 4) and set_to("snapshots", 0) and
        set_to("compression", None),
        # Gigabytes; QEMU allocates all of a raw data file's clusters.
        (allocated or has("data_file", "raw")) and has("size", "tables") and
        has("cluster", 64 * K, 2 * M),
    ]
    return not any(no)


def coverage(row):
    """The bytes that an L2 table maps."""
    return row["cluster"] ** 2 // (16 if row["extended_l2"] else 8)


def draw_size(row, rnd):
    if row["size"] == "small":
        return rnd.randrange(1, 128) * 512
    if row["size"] == "odd":
        return rnd.randrange(2, 17) * 512 * K + rnd.randrange(1, 128, 2) * 512
    return 3 * coverage(row) + rnd.choice([1, 3, 129]) * 512


def windows(row, size):
    """Where things happen: all of the disk, or of a large one the
    surroundings of what divides L2 tables, and the end."""
    if size <= 32 * M:
        return [(0, size)]
    near = max(2 * row["cluster"], M)
    middles = [*range(0, size, coverage(row)), size]
    return [(max(0, m - near), min(size, m + near)) for m in middles]


def draw_range(rnd, places, unit, longest):
    """A range in one of the windows, in units."""
    start, end = rnd.choice(places)
    if rnd.random() < 0.8:
        longest = min(longest, (end - start) // 3)
    count = rnd.randint(1, max(longest // unit, 1)) * unit
    offset = start + rnd.randrange(max(end - start - count, 1))
    offset -= offset % unit
    return (offset, min(count, end - offset)) if offset < end else (0, 0)


class DestroyedByQemu(AssertionError):
    """qemu-io of QEMU 7.2 finds, once in a great while, that it is about to
    overwrite metadata of an image that only it has ever opened."""


def qemu_io(path, commands, *options):
    """Run commands, of which compressed writes may fail."""
    if not commands:
        return
    args = [word for c in commands for word in ("-c", c)]
    out = harness.run("qemu-io", "-f", "qcow2", *options, *args, path,
                      status=None)
    if "Marking image as corrupt" in out:
        raise DestroyedByQemu(out)
    assert "Pattern verification failed" not in out, out
    results = re.findall(r"^(wrote|read|discard|.*failed:)", out, re.M)
    assert len(results) == len(commands), (commands, out)
    for command, result in zip(commands, results):
        assert "failed" not in result or "write -c" in command, out


def fill(path, disk, rnd, row, places, compressed):
    """Put some data into an image, by QEMU."""
    commands, changes = [], []
    cs = row["cluster"]
    for _ in range(rnd.randint(1, 8)):
        pack = compressed and rnd.random() < 0.7
        unit = cs if pack else 512
        # A write of several compressed clusters may be done by half.
        longest = cs if pack else max(4 * cs, 64 * K)
        offset, count = draw_range(rnd, places, unit, longest)
        if count == 0 or count % 512 or (
                pack and count % cs and offset + count < disk.size):
            continue
        if rnd.random() < 0.2 and not pack and row["version"] > 2:
            commands.append("write -z -u %d %d" % (offset, count))
            changes.append((offset, bytes(count)))
            continue
        byte = rnd.randrange(1, 256)
        commands.append("write %s -P %d %d %d" % (
            "-c" if pack else "", byte, offset, count))
        changes.append((offset, bytes([byte]) * count))
    qemu_io(path, commands)
    adopt(path, disk, changes)
    return commands


def adopt(path, disk, changes):
    """What was written is what QEMU reads there: a compressed write fails
    where there was something, and once in a great while, with clusters of
    512 bytes, qemu-io of QEMU 7.2 has written some bytes of its heap."""
    if not changes:
        return
    h = harness.nbd.NBD()
    h.connect_systemd_socket_activation(["qemu-nbd", "-r", "-f", "qcow2",
                                         path])
    for offset, data in changes:
        disk.write(offset, h.pread(len(data), offset))
    h.shutdown()


def cut(disk, size):
    """What an overlay of this size has."""
    result = Disk(size)
    result.pages = dict(disk.pages)
    if size < disk.size:
        result.zero(size, disk.size - size)
    return result


def create(path, size, options, backing=None):
    for old in (path, path + ".data"):
        if os.path.exists(old):
            os.unlink(old)
    below = ["-b", backing[0], "-F", backing[1]] if backing else []
    harness.run("qemu-img", "create", "-q", "-f", "qcow2", "-o",
                ",".join("%s=%s" % o for o in options.items()), *below, path,
                str(size))


def create_backing(row, size, rnd, places):
    """The backing files; (name, format) of the nearest, and the disk."""
    if row["backing"] is None:
        return None, Disk(size)
    other = {"equal": size, "longer": size + rnd.randrange(1, 300) * 512,
             "shorter": max(size // 2 // 512, 1) * 512}[row["backing_size"]]
    names = {"raw": ["raw"], "qcow2": ["qcow2"],
             "chain": [rnd.choice(["raw", "qcow2"]), "qcow2"]}[row["backing"]]
    near, disk = None, Disk(other)
    for depth, kind in enumerate(names):
        name = "base%d.%s" % (depth, kind)
        if kind == "raw":
            with open(name, "wb") as f:
                f.truncate(other)
                for _ in range(rnd.randint(1, 6)):
                    offset, count = draw_range(rnd, places, 512, 128 * K)
                    count = min(count, other - offset)
                    if count > 0:
                        data = bytes([rnd.randrange(1, 256)]) * count
                        f.seek(offset)
                        f.write(data)
                        disk.write(offset, data)
        else:
            if depth:
                other = rnd.choice([size, other, max(other - 512, 512)])
                disk = cut(disk, other)
            create(name, other, {
                "cluster_size": rnd.choice([row["cluster"], 64 * K])
                if size <= 32 * M else row["cluster"]}, near)
            inside = [(a, min(b, other)) for a, b in places if a < other]
            fill(name, disk, rnd, {**row, "version": 3}, inside,
                 row["compression"] is not None)
        near = (name, kind)
    return near, cut(disk, size)


def draw_granularity(rnd, size):
    return rnd.choice([512, 4 * K, 64 * K, 2 * M] if size <= 32 * M
                      else [M, 2 * M, 64 * M])


def add_bitmap(path, model, name, granularity, enabled=True):
    harness.run("qemu-img", "bitmap", "--add", "-g", str(granularity),
                *([] if enabled else ["--disable"]), path, name)
    model.bitmaps[name] = Bitmap(model.size, granularity, enabled)


def build(row, rnd):
    """Make the image; (model, windows)."""
    for _ in range(3):
        try:
            return build_once(row, rnd)
        except DestroyedByQemu as e:
            print("made anew, since QEMU has destroyed it:", e, flush=True)
    return build_once(row, rnd)


def build_once(row, rnd):
    size = draw_size(row, rnd)
    places = windows(row, size)
    backing, disk = create_backing(row, size, rnd, places)
    options = {
        "cluster_size": row["cluster"],
        "compat": "1.1" if row["version"] == 3 else "0.10",
        "refcount_bits": row["refcount_bits"],
        "preallocation": row["preallocation"],
    }
    if row["version"] == 3:
        options["lazy_refcounts"] = "on" if row["lazy"] else "off"
        options["extended_l2"] = "on" if row["extended_l2"] else "off"
        options["compression_type"] = row["compression"] or "zlib"
    if row["data_file"] is not None:
        options["data_file"] = DISK + ".data"
        options["data_file_raw"] = "on" if row["data_file"] == "raw" else "off"
    create(DISK, size, options, backing)
    model = Model(disk, row["cluster"], row["version"])
    model.sure_trim = row["data_file"] is None and (
        row["version"] == 3 or backing is None)
    if row["compression"] or rnd.random() < 0.6:
        fill(DISK, disk, rnd, row, places, row["compression"])
    for i in range(row["snapshots"]):
        name = "s%d" % i
        harness.run("qemu-img", "snapshot", "-c", name, DISK)
        model.snapshots[name] = disk.copy()
        if rnd.random() < 0.6:
            fill(DISK, disk, rnd, row, places, row["compression"])
    if row["bitmaps"] != "none":
        add_bitmap(DISK, model, "b0", draw_granularity(rnd, size))
    if row["bitmaps"] == "several":
        for i, granularity in enumerate(
                [512, 4 * K, 64 * K] if size <= 32 * M
                else [M, 2 * M, 64 * M]):
            add_bitmap(DISK, model, "b%d" % (i + 1), granularity, i != 1)
    return model, places
