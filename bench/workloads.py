# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""What the servers are loaded with, row by row."""

import images

MIB = 1 << 20
GIB = 1 << 30
CONTEXT = "qemu:dirty-bitmap:" + images.BITMAP


class Row:
    """One workload.

    unit is per second, or "s" for a time, where less is better.  load
    are the load program's options.  pin: client and server share a CPU.
    plain: its peers may be servers without a format (raw, bare).  reads:
    it changes nothing.  mib: of one request, where the unit is MiB/s.
    """

    def __init__(self, title, image, unit, *load, pin=False, per="op",
                 plain=False, reads=False, tls=False, mib=1):
        self.title, self.image, self.unit, self.load = title, image, unit, load
        self.pin, self.per, self.plain = pin, per, plain
        self.reads, self.tls, self.mib = reads, tls, mib


def rw(title, workload, depth, connections=1, pin=False, image="full",
       **more):
    return Row(title, image, "op/s", "--workload=" + workload,
               "--depth=%d" % depth, "--connections=%d" % connections,
               pin=pin, plain=image == "full", reads=workload == "randread",
               **more)


def seq(title, workload, mib=1, **more):
    return Row(title, "full", "MiB/s", "--workload=" + workload, "--depth=8",
               "--block=%d" % (mib * MIB), plain=True,
               reads=workload == "seqread", mib=mib, **more)


def alloc(title, depth, count):
    return Row(title, "sparse", "op/s", "--workload=randwrite",
               "--depth=%d" % depth, "--count=%d" % count, pin=depth == 1)


def first(title, workload, depth, *load, pin=False, unit="op/s"):
    """On an image whose bitmap is empty before each run.  No warming up:
    what is first written is what counts."""
    return Row(title, "clean", unit, "--workload=" + workload,
               "--depth=%d" % depth, *load, pin=pin, plain=True)


def clean_granules(title, workload, depth, count, *load, **more):
    """Each request writes to another granule."""
    return first(title, workload, depth, "--once=%d" % (1 << 16),
                 "--count=%d" % count, *load, **more)


def below(image, title, key, **more):
    """The row that ROWS has under this key, on a disk that is not in the
    image."""
    row = ROWS[key]
    return Row(row.title + title, image, row.unit, *row.load, pin=row.pin,
               reads=row.reads, mib=row.mib, **more)


def walk(title, image, request, context=CONTEXT):
    return Row(title, image, "s", "--workload=map", "--request=%d" % request,
               "--context=" + context, per="extent", pin=True, reads=True)


ROWS = {
    "read1": rw("random read 4 KiB, depth 1, one CPU", "randread", 1,
                pin=True),
    "write1": rw("random write 4 KiB, depth 1, one CPU", "randwrite", 1,
                 pin=True),
    "read16": rw("random read 4 KiB, depth 16", "randread", 16),
    "write16": rw("random write 4 KiB, depth 16", "randwrite", 16),
    "read16x4": rw("random read 4 KiB, depth 16, 4 connections",
                   "randread", 16, 4),
    "write16x4": rw("random write 4 KiB, depth 16, 4 connections",
                    "randwrite", 16, 4),
    "mixed16": rw("mixed 70/30 4 KiB, depth 16", "randmixed", 16),
    "flush1": rw("write and flush pairs 4 KiB, depth 1, one CPU",
                 "writeflush", 1, pin=True),
    "flush16": rw("write and flush pairs 4 KiB, depth 16", "writeflush", 16),
    "seqread": seq("sequential read 1 MiB, depth 8", "seqread"),
    "seqwrite": seq("sequential write 1 MiB, depth 8", "seqwrite"),
    "seqread4m": seq("sequential read 4 MiB, depth 8", "seqread", 4),
    "seqwrite4m": seq("sequential write 4 MiB, depth 8", "seqwrite", 4),
    "tls-read16": rw("random read 4 KiB, depth 16, TLS", "randread", 16,
                     tls=True),
    "tls-write16": rw("random write 4 KiB, depth 16, TLS", "randwrite", 16,
                      tls=True),
    "tls-seqread": seq("sequential read 1 MiB, depth 8, TLS", "seqread",
                       tls=True),
    "tls-seqwrite": seq("sequential write 1 MiB, depth 8, TLS", "seqwrite",
                        tls=True),
    "marking": rw("random write 4 KiB, depth 16, 8 bitmaps", "randwrite", 16,
                  image="marked"),
    "clean-flush1": clean_granules(
        "write and flush pairs 4 KiB, clean granules, depth 1, one CPU",
        "writeflush", 1, 1000, pin=True),
    "clean-flush16": clean_granules(
        "write and flush pairs 4 KiB, clean granules, depth 16",
        "writeflush", 16, 4000),
    "clean-fua1": clean_granules(
        "FUA writes 4 KiB, clean granules, depth 1, one CPU",
        "randwrite", 1, 1000, "--fua", pin=True),
    "clean-fua16": clean_granules(
        "FUA writes 4 KiB, clean granules, depth 16", "randwrite", 16, 4000,
        "--fua"),
    "first-write16": first(
        "first random write 4 KiB, depth 16", "randwrite", 16,
        "--once=4096", "--pass"),
    "first-seq4k": first(
        "first sequential write 4 KiB, depth 16", "seqwrite", 16,
        "--pass"),
    "first-seq1m": first(
        "first sequential write 1 MiB, depth 8", "seqwrite", 8,
        "--block=%d" % MIB, "--pass", unit="MiB/s"),
    "alloc1": alloc("allocating random write 4 KiB, depth 1, one CPU", 1,
                    30000),
    "alloc16": alloc("allocating random write 4 KiB, depth 16", 16, 30000),
    "read1t": rw("random read 4 KiB over 1 TiB, depth 16", "randread", 16,
                 image="big"),
    "map64m": walk("bitmap walk, 64 MiB requests, one CPU", "fragmented",
                   64 * MIB),
    "map1g": walk("bitmap walk, 1 GiB requests, one CPU", "fragmented", GIB),
    "map4g": walk("bitmap walk, 4 GiB requests, one CPU", "fragmented",
                  4 * GIB - 65536),
    "base1g": walk("base:allocation walk, 1 GiB requests, one CPU", "holey",
                   GIB, "base:allocation"),
    "life": Row("16 TiB image: start, stop, memory", "huge", "s"),
}


for _key in ("read1", "write1", "read16", "write16", "read16x4", "write16x4",
             "seqread", "seqwrite"):
    ROWS["beside-" + _key] = below("beside", ", raw disk", _key)
    ROWS["behind-" + _key] = below("behind", ", over nbdkit nbd", _key)


def figure_title(row, name):
    """The title of one of a row's figures: a row has several where its
    own title says so before a colon."""
    title = ROWS[row].title
    return title.split(":")[0] + ": " + name if name else title
