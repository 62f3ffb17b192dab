# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Images for side-by-side.

Those that a client could only make by a million requests (a fragmented
bitmap, a fragmented mapping) are written here from the format's
description, cluster by cluster; the others are qemu-img's.
"""

import array
import itertools
import os
import random
import struct
import subprocess
import sys

BITMAP = "bench"
GRANULARITY_BITS = 16
COPIED = 1 << 63


def qemu_img(*args):
    subprocess.run(["qemu-img", *args], check=True,
                   stdout=subprocess.DEVNULL)


def qcow2(path, size, preallocation="off", bitmaps=(BITMAP,)):
    qemu_img("create", "-q", "-f", "qcow2", "-o",
             "preallocation=" + preallocation, path, str(size))
    for bitmap in bitmaps:
        qemu_img("bitmap", "--add", path, bitmap)


def clear(path, bitmap=BITMAP):
    qemu_img("bitmap", "--clear", path, bitmap)


def raw(path, size):
    qemu_img("create", "-q", "-f", "raw", "-o", "preallocation=full",
             path, str(size))


def _big_endian(values):
    a = array.array("Q", values)
    if sys.byteorder == "little":
        a.byteswap()
    return a.tobytes()


def _clusters(nr_bytes, cluster):
    return -(-nr_bytes // cluster)


def _bits(nr_granules, runs):
    """The bitmap's bytes, with the granules of each (start, length) set."""
    bits = bytearray(_clusters(nr_granules, 8))
    for start, length in runs:
        for g in range(start, start + length):
            bits[g >> 3] |= 1 << (g & 7)
    return bytes(bits)


def _mapping(per_table, allocated, data):
    """The L2 tables, as {index in L1: bytes}, for the guest clusters in
    the sorted list allocated, whose host clusters begin at data[0] and
    are data[1] bytes each."""
    tables = {}
    for n, guest in enumerate(allocated):
        table = tables.setdefault(guest // per_table, [0] * per_table)
        table[guest % per_table] = (data[0] + n * data[1]) | COPIED
    return {i: _big_endian(t) for i, t in tables.items()}


def write(path, size, runs=(), allocated=(), cluster_bits=16):
    """A qcow2 image of version 3 with one enabled bitmap."""
    cluster = 1 << cluster_bits
    nr_granules = _clusters(size, 1 << GRANULARITY_BITS)
    bits = _bits(nr_granules, runs)
    per_table = cluster // 8
    l1_size = _clusters(_clusters(size, cluster), per_table)
    nr_tables = len({guest // per_table for guest in allocated})
    pieces = [bits[i:i + cluster] for i in range(0, len(bits), cluster)]
    stored = [piece for piece in pieces if any(piece)]

    # How many clusters of each kind, in the order of the file.
    n = {"header": 1, "refcount table": 1, "refcount blocks": 1,
         "l1": _clusters(l1_size * 8, cluster), "l2": nr_tables,
         "directory": 1,
         "bitmap table": _clusters(len(pieces) * 8, cluster),
         "bitmap": len(stored), "data": len(allocated)}
    while True:
        blocks = _clusters(sum(n.values()), cluster // 2)
        table = _clusters(blocks * 8, cluster)
        if (blocks, table) == (n["refcount blocks"], n["refcount table"]):
            break
        n["refcount blocks"], n["refcount table"] = blocks, table
    at, used = {}, 0
    for kind, clusters in n.items():
        at[kind] = used * cluster
        used += clusters

    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, cluster_bits, size, 0,
        l1_size, at["l1"], at["refcount table"], n["refcount table"], 0, 0,
        0, 0, 1, 4, 104)
    name = BITMAP.encode()
    entry = struct.pack(">QIIBBHI", at["bitmap table"], len(pieces), 2, 1,
                        GRANULARITY_BITS, len(name), 0) + name
    entry += bytes(-len(entry) % 8)
    header += struct.pack(">IIIIQQ", 0x23852875, 24, 1, 0, len(entry),
                          at["directory"])
    header += bytes(8)

    free = itertools.count(at["bitmap"], cluster)
    table_of_bitmap = [next(free) if any(piece) else 0 for piece in pieces]

    tables = _mapping(per_table, allocated, (at["data"], cluster))
    l1 = [0] * l1_size
    for k, i in enumerate(sorted(tables)):
        l1[i] = (at["l2"] + k * cluster) | COPIED
    parts = {
        "header": header,
        "refcount table": _big_endian(
            at["refcount blocks"] + i * cluster
            for i in range(n["refcount blocks"])),
        "refcount blocks": b"\0\1" * used,
        "l1": _big_endian(l1),
        "l2": b"".join(tables[i] for i in sorted(tables)),
        "directory": entry,
        "bitmap table": _big_endian(table_of_bitmap),
        "bitmap": b"".join(stored),
    }
    with open(path, "wb") as f:
        for kind, data in parts.items():
            f.seek(at[kind])
            f.write(data)
        f.seek(at["data"])
        for _ in allocated:
            f.write(b"\xaa" * cluster)
        f.truncate(used * cluster)


def fragmented(path, size, nr_extents):
    """Half of nr_extents are dirty runs of one to three granules, spread
    at random."""
    rng = random.Random(1)
    nr_granules = size >> GRANULARITY_BITS
    period = nr_granules / (nr_extents / 2)
    runs = []
    for i in range(nr_extents // 2):
        first, after = int(i * period), int((i + 1) * period)
        length = rng.randint(1, min(3, after - first - 1))
        runs.append((first + rng.randint(0, after - first - 1 - length),
                     length))
    write(path, size, runs=runs)


def scattered(path, size, nr_granules):
    rng = random.Random(2)
    picked = rng.sample(range(size >> GRANULARITY_BITS), nr_granules)
    write(path, size, runs=((g, 1) for g in picked))


def holey(path, nr_extents):
    """Every second cluster of 4 KiB is there."""
    write(path, nr_extents << 12, allocated=range(0, nr_extents, 2),
          cluster_bits=12)


def check(path):
    """Say nothing, or fail."""
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path],
                   check=True)


def remove(path):
    if os.path.exists(path):
        os.unlink(path)
