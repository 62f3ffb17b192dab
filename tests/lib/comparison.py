# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""An image, as a server or a tool shows it, against the model."""

import json
import os
import shutil
import subprocess

import harness
from diskmodel import HOLE, PAGE, SECTOR, UNKNOWN, ZERO, differs, ones
from harness import CONTEXT, nbd
from qcow2image import Image

STEP = 4 << 20
BASE = "base:allocation"
DEPTH = "qemu:allocation-depth"


def disk(h, wanted, where, extents=None):
    """Every byte; of a large disk those that may be other than zero."""
    if wanted.size <= 32 << 20:
        ranges = [(at, min(STEP, wanted.size - at))
                  for at in range(0, wanted.size, STEP)]
    else:
        ranges = [(i * PAGE, min(PAGE, wanted.size - i * PAGE))
                  for i in sorted(wanted.pages)]
        at = 0
        for length, kind in extents or harness.extents(h, BASE):
            if not kind & ZERO:
                assert length <= 256 << 20, "%s: too much data" % where
                ranges += [(start, min(STEP, at + length - start))
                           for start in range(at, at + length, STEP)]
            at += length
    for offset, count in ranges:
        got = h.pread(count, offset)
        data = wanted.read(offset, count)
        bad = differs(got, [data])
        assert bad is None, "%s: byte %d is %d, not %d" % (
            where, offset + bad, got[bad], data[bad])


def map_of(h, name, bitmap):
    """A bitmap as a server has it."""
    dirty = bytearray(len(bitmap.dirty))
    at = 0
    for length, kind in harness.extents(h, CONTEXT + name):
        if kind:
            bitmap.fill(dirty, at, length)
        at += length
    return dirty


def bitmaps(h, model, where, exact=True):
    for name, bitmap in model.bitmaps.items():
        offered = h.can_meta_context(CONTEXT + name)
        assert offered != bitmap.broken, "%s: %s is%s offered" % (
            where, name, "" if offered else " not")
        if offered:
            bitmap.adopt(map_of(h, name, bitmap), "%s: %s" % (where, name),
                         exact)


def kinds(extents, model, where):
    """base:allocation: no lie about zeroes, and of each cluster the kind
    that the requests made it.  In an image that counts as preallocated,
    data that have no storage are told as zeroes."""
    at = 0
    for length, kind in extents:
        assert kind in (0, ZERO, HOLE | ZERO), "%s: type %d" % (where, kind)
        assert not kind or model.disk.is_zero(at, length), \
            "%s: [%d, %d) is not zero, but of type %d" % (
                where, at, at + length, kind)
        if model.kinds is not None:
            for i in range(at // model.cluster,
                           (at + length - 1) // model.cluster + 1):
                wanted = model.kinds[i]
                assert wanted in (UNKNOWN, kind) or \
                    {wanted, kind} == {0, ZERO}, \
                    "%s: cluster %d has type %d, not %d" % (
                        where, i, kind, wanted)
        at += length


def adopt_kinds(extents, model):
    model.kinds = bytearray(-(-model.size // model.cluster))
    at = 0
    for length, kind in extents:
        first, end = at // model.cluster, -(-(at + length) // model.cluster)
        model.kinds[first:end] = bytes([kind]) * (end - first)
        at += length


def allowed_kinds(entry):
    """What base:allocation may be for an entry of qemu-img map.  We look
    for holes in raw data files, and QEMU does not."""
    if entry["data"] and not (entry["depth"] and entry["zero"]):
        return {0, ZERO}
    if entry["depth"] == 0 and entry["present"]:
        return {ZERO}
    # A backing file that has zeroes there may be taken for data.
    return {0, ZERO, HOLE | ZERO} if entry["present"] else {ZERO, HOLE | ZERO}


def extents_with_qemu(path, extents, where):
    """base:allocation against qemu-img map of the image at rest."""
    entries = json.loads(harness.run("qemu-img", "map", "--output=json",
                                     "-f", "qcow2", path))
    at, i = 0, 0
    for length, kind in extents:
        end = at + length
        while at < end:
            entry = entries[i]
            assert kind in allowed_kinds(entry), \
                "%s: at %d type %d, but QEMU has %s" % (
                    where, at, kind, entry)
            at = min(end, entry["start"] + entry["length"])
            i += at == entry["start"] + entry["length"]


def check(path, leaks, where):
    """qemu-img check has nothing to say, but of leaks if there may be.
    An image that is marked dirty must be in order once it is repaired."""
    if Image(path).get("version") > 2 and \
            Image(path).get("incompatible_features") & 1:
        assert leaks, "%s: the image is marked dirty" % where
        shutil.copyfile(path, "repaired.qcow2")
        path = "repaired.qcow2"
        harness.run("qemu-img", "check", "-q", "-r", "all", "-f", "qcow2",
                    path, status=None)
        leaks = False
    p = subprocess.run(["qemu-img", "check", "-f", "qcow2", path],
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                       timeout=120)
    assert p.returncode in ((0, 3) if leaks else (0,)) and \
        (leaks or not p.stderr), "%s: qemu-img check: status %d\n%s%s" % (
            where, p.returncode, p.stdout.decode(), p.stderr.decode())


def bits(path, model, where):
    """The bitmaps in the file, bit by bit."""
    if model.version < 3:
        return
    found = Image(path).bitmaps()
    assert set(found) == set(model.bitmaps), "%s: bitmaps %s, not %s" % (
        where, sorted(found), sorted(model.bitmaps))
    for name, bitmap in model.bitmaps.items():
        where_bitmap = "%s: %s in the file" % (where, name)
        assert found[name].in_use == bitmap.broken, \
            where_bitmap + (" is not in use" if bitmap.broken else
                            " is in use")
        if bitmap.broken:
            continue
        assert found[name].get("flags") & 2 == (2 if bitmap.enabled else 0), \
            where_bitmap + ": enabled or not"
        assert found[name].granularity == bitmap.granularity
        got, wanted = found[name].bits(), set(ones(bitmap.dirty))
        assert got == wanted, "%s: too many %s, missing %s" % (
            where_bitmap, sorted(got - wanted)[:9], sorted(wanted - got)[:9])


def qemu(path, model, *options):
    """A connection to qemu-nbd, which ends with it."""
    args = ["qemu-nbd", "-r", "-f", "qcow2", "-A", *options]
    h = nbd.NBD()
    h.add_meta_context(BASE)
    h.add_meta_context(DEPTH)
    for name in model.usable() if not options else ():
        h.add_meta_context(CONTEXT + name)
        args += ["-B", name]
    h.connect_systemd_socket_activation([*args, path])
    return h


def qemu_view(path, model, where):
    """What QEMU reads of the image at rest; allocation depths."""
    where += ", read by QEMU"
    h = qemu(path, model)
    disk(h, model.disk, where)
    bitmaps(h, model, where)
    depths = harness.extents(h, DEPTH)
    h.shutdown()
    for name, snapshot in model.snapshots.items():
        h = qemu(path, model, "-l", name)
        disk(h, snapshot, "%s, snapshot %s" % (where, name))
        h.shutdown()
    return depths


def raw_data_file(path, model, where):
    """The data file of data_file_raw is the disk (QEMU may round its
    size up).  What was under way in a crash may be in the one and not be
    seen in the other."""
    size = model.size
    with open(path, "rb") as f:
        assert os.fstat(f.fileno()).st_size >= size, \
            "%s: the data file is too short" % where
        ranges = [(i * PAGE, min((i + 1) * PAGE, size))
                  for i in model.disk.pages]
        at = 0
        while at < size:
            try:
                at = os.lseek(f.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = min(os.lseek(f.fileno(), at, os.SEEK_HOLE), size)
            ranges += [(start, min(start + PAGE, end))
                       for start in range(at, end, PAGE)]
            at = end
        for start, end in ranges:
            got = os.pread(f.fileno(), end - start, start)
            wanted = model.disk.read(start, end - start)
            if got == wanted:
                continue
            bad = {(start + i) // SECTOR for i in range(end - start)
                   if got[i] != wanted[i]} - model.torn
            assert not bad, "%s: sectors %s of the data file" % (
                where, sorted(bad)[:9])
