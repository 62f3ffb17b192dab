#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""dirty-bitmap-backup --map: the picture is well-formed, and each cell of it
looks as the extents say that libnbd gets; the figures are theirs, too.  It is
small for a million extents, and for as many changes as it can show.  Names
may be anything; no file is overwritten unless that is wanted."""

import json
import os
import re
import stat
import subprocess
import sys
import time
import unicodedata
import xml.etree.ElementTree as ET

import backups
import harness
from backups import fails, tool
from harness import CONTEXT, HOLE, ZERO, Server, extents
from qcow2image import Image

harness.requires("qemu-nbd")
sys.path.append(os.path.join(os.environ.get("top_srcdir", ".."), "bench"))
import images

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
COLUMNS, MAX_ROWS = 128, 32
BASE = "base:allocation"
SVG = "{http://www.w3.org/2000/svg}"
MAX_BYTES = 1000000
SOON = 60 if not os.environ.get("UNDER_SANITIZERS") else 300


def cell_bytes(size):
    """The least power of two with which there are few enough cells."""
    n = 1
    while -(-size // n) > COLUMNS * MAX_ROWS:
        n *= 2
    return n


def shares(runs, size, kind_of):
    """Of each cell, {kind: bytes}."""
    step = cell_bytes(size)
    cells = [{} for _ in range(0, size, step)]
    at = 0
    for length, flags in runs:
        end, kind = at + length, kind_of(flags)
        while at < end:
            n = min(end, (at // step + 1) * step) - at
            cell = cells[at // step]
            cell[kind] = cell.get(kind, 0) + n
            at += n
    return cells


def allocation(flags):
    return "hole" if flags & HOLE else "zero" if flags & ZERO else "marked"


def dirty(flags):
    return "marked" if flags & 1 else "clean"


def look(cell, letter):
    """The class of the cell's path, and how thick a line it is."""
    whole, marked = sum(cell.values()), cell.get("marked", 0)
    if marked:
        shade = 5 if marked == whole else \
            1 + sum(marked > whole // n for n in (100, 10, 2))
        return letter + str(shade), None
    if cell.get("zero"):
        return "z", ".375" if cell["zero"] > whole // 2 else ".125"
    return "r", None


class Picture:
    def __init__(self, data):
        assert len(data) < MAX_BYTES, len(data)
        self.root = ET.fromstring(data)
        assert self.root.tag == SVG + "svg"
        for element in self.root.iter():
            assert element.tag in {SVG + tag for tag in (
                "svg", "title", "style", "rect", "g", "path", "text",
                "tspan")}, element.tag
            assert not any("href" in name or name.startswith("on")
                           for name in element.attrib), element.attrib
        self.inside()
        self.texts = ["".join(t.itertext())
                      for t in self.root.iter(SVG + "text")]
        self.grids = [self.grid(g) for g in self.root.iter(SVG + "g")
                      if "scale" in g.get("transform", "")]

    def inside(self):
        """Nothing is beyond the picture's ends, and no grid over another."""
        width, height = (float(self.root.get(name))
                         for name in ("width", "height"))
        for element in self.root.iter(SVG + "text"):
            assert float(element.get("y")) < height - 10, element.attrib
        boxes = []
        for g in self.root.iter(SVG + "g"):
            m = re.fullmatch(
                r"translate\((\S+) (\S+)\) scale\((\S+) (\S+)\)",
                g.get("transform", ""))
            if m:
                x, y, x_scale, y_scale = (float(n) for n in m.groups())
                boxes.append((x, y, x + COLUMNS * x_scale,
                              y + len(g.findall(SVG + "g")) * y_scale))
                assert boxes[-1][2] < width and boxes[-1][3] < height - 10
        for n, a in enumerate(boxes):
            for b in boxes[:n]:
                assert a[0] >= b[2] or a[2] <= b[0] or a[1] >= b[3] or \
                    a[3] <= b[1], (a, b)

    @staticmethod
    def grid(g):
        """[[look of each cell] of each row]"""
        rows = []
        for n, row in enumerate(g.findall(SVG + "g")):
            y = float(re.fullmatch(r"translate\(0 (\S+)\)",
                                   row.get("transform"))[1])
            assert n < y < n + 1
            assert row.find(SVG + "title").text
            cells = {}
            for path in row.findall(SVG + "path"):
                kind = path.get("class"), path.get("stroke-width")
                parts = re.findall(r"M(\d+) 0h(\d+)", path.get("d"))
                assert path.get("d") == "".join("M%s 0h%s" % p for p in parts)
                for first, length in parts:
                    for x in range(int(first), int(first) + int(length)):
                        assert cells.get(x, ("r", None))[0] == "r", "twice"
                        cells[x] = kind
            assert sorted(cells) == list(range(len(cells)))
            rows.append([cells[x] for x in sorted(cells)])
        return rows


def draw(server, *args, uri=None):
    """The picture, and the figures."""
    if os.path.exists("map.svg"):
        os.unlink("map.svg")
    out, err = tool("--map", "--json", *args, uri or server.uri, "map.svg")
    assert err == "", err
    with open("map.svg", "rb") as f:
        return Picture(f.read()), json.loads(out)


def sum_of(runs, kind_of, kind):
    return sum(length for length, flags in runs if kind_of(flags) == kind)


def compare(server, names, uri=None):
    """The picture and the figures are those of the server's extents."""
    picture, figures = draw(server, uri=uri)
    h = server.connect(BASE, *(CONTEXT + name for name in names))
    size = h.get_size()
    base = extents(h, BASE)
    bitmaps = {name: extents(h, CONTEXT + name) for name in names}
    h.shutdown()
    assert figures["disk-bytes"] == size
    assert figures["allocation"] == {
        key + "-bytes": sum_of(base, allocation, kind)
        for key, kind in (("data", "marked"), ("zero", "zero"),
                          ("hole", "hole"))}, figures
    assert {b["name"]: b["dirty-bytes"] for b in figures["bitmaps"]} == {
        name: sum_of(runs, dirty, "marked")
        for name, runs in bitmaps.items()}, figures
    assert figures["bitmaps-left-out"] == 0
    expected = [[look(c, "a") for c in shares(base, size, allocation)]]
    for b in figures["bitmaps"]:
        expected.append([look(c, "d")
                         for c in shares(bitmaps[b["name"]], size, dirty)])
    assert len(picture.grids) == len(expected)
    for grid, cells in zip(picture.grids, expected):
        assert len(grid) <= MAX_ROWS
        assert all(len(row) == COLUMNS for row in grid[:-1])
        assert [cell for row in grid for cell in row] == cells
    return picture, figures


def full_of_kinds():
    """Data, zeroes and holes, dirty and clean, whole cells and parts."""
    size = GIB + 5 * 512
    harness.create("disk.qcow2", size, "one", ("two", 4096))
    server = Server("disk.qcow2")
    h = server.connect()
    h.pwrite(b"x" * (3 * MIB), 100 * MIB)
    for n in range(20):
        h.pwrite(b"y" * (2000 * (n + 1)), 200 * MIB + n * 700000)
        h.zero(64 << 10, 300 * MIB + n * 900000)
    h.zero(100 * MIB, 400 * MIB)
    h.zero(320 << 10, 700 * MIB)
    h.zero(192 << 10, 800 * MIB)
    h.shutdown()
    picture, figures = compare(server, ["one", "two"])
    looks = {cell for row in picture.grids[0] for cell in row}
    assert {"a5", "a3", "z", "r"} <= {name for name, _ in looks}, looks
    assert {".375", ".125"} <= {width for _, width in looks}, looks
    assert {"0", "256 MiB", "Allocation", "Data 4.62 MiB, 0.5 %",
            "Data in a cell:", "Dirty in a cell:"} <= set(
                picture.texts), picture.texts
    assert "Map of a disk of 1 GiB" in picture.texts
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", figures["time"])
    server.stop()


def sizes():
    """Of any size, and of none."""
    for size in 512, 1536, 64 << 10, MIB, 9 * MIB + 512, 3 * TIB + 512:
        harness.create("disk.qcow2", size, "b")
        server = Server("disk.qcow2")
        h = server.connect()
        h.pwrite(b"x" * 512, 0)
        h.pwrite(b"x" * 512, size - 512)
        h.shutdown()
        picture, _ = compare(server, ["b"])
        assert size < 4096 or len(picture.grids[0]) > MAX_ROWS / 2
        server.stop()
    server = Server(args=["memory", "0"])
    picture, figures = draw(server)
    assert picture.grids == []
    assert figures["disk-bytes"] == 0 and "0 bytes: there is nothing to draw" \
        in picture.texts
    server.stop()


def without_contexts():
    """The picture says so."""
    server = Server(args=["--no-sr", "memory", "10M"])
    picture, figures = draw(server)
    assert figures["allocation"] is None and figures["bitmaps"] == []
    assert any("no base:allocation" in t for t in picture.texts)
    assert "The server offers no dirty bitmap." in picture.texts
    assert picture.grids == []
    server.stop()


def many_bitmaps():
    """No two neighbours of the cells look the same in 16 bitmaps; four more
    are left out."""
    harness.create("disk.qcow2", GIB, *("b%02d" % n for n in range(20)))
    server = Server("disk.qcow2")
    h = server.connect()
    step = cell_bytes(GIB)
    for offset in range(0, GIB, 2 * step):
        h.zero(step, offset)
        h.zero(step // 4, offset + step)
    h.shutdown()
    picture, figures = draw(server)
    print("16 bitmaps: %d bytes" % os.path.getsize("map.svg"), flush=True)
    assert figures["bitmaps-left-out"] == 4
    assert [b["dirty-bytes"] for b in figures["bitmaps"]] == \
        [GIB // 8 * 5] * 16
    assert len(picture.grids) == 17
    for grid in picture.grids[1:]:
        assert grid == [[("d5", None), ("d3", None)] * 64] * MAX_ROWS
    assert "The server offers 4 more bitmaps." in picture.texts
    server.stop()


def a_million_extents():
    images.fragmented("large.qcow2", 16 * TIB, 1000000)
    server = Server("large.qcow2", options=["-r"])
    start = time.monotonic()
    picture, figures = draw(server)
    seconds = time.monotonic() - start
    print("a million extents: %.1f s, %d bytes" %
          (seconds, os.path.getsize("map.svg")), flush=True)
    assert seconds < SOON
    h = server.connect(CONTEXT + images.BITMAP)
    runs = extents(h, CONTEXT + images.BITMAP, 1 << 30)
    h.shutdown()
    # Neighbours of those dirty are clean.
    assert len(runs) >= 999999, len(runs)
    assert figures["bitmaps"] == [{"name": images.BITMAP,
                                   "dirty-bytes": sum_of(runs, dirty,
                                                         "marked")}]
    assert [cell for row in picture.grids[1] for cell in row] == [
        look(c, "d") for c in shares(runs, 16 * TIB, dirty)]
    server.stop()
    os.unlink("large.qcow2")


def contexts_that_lag():
    """qemu-nbd tells in one reply of one context less than of another."""
    size = 512 * MIB
    harness.create("disk.qcow2", size, ("fine", 512))
    server = Server("disk.qcow2")
    h = server.connect()
    # Clusters of bits are for 256 MiB each.
    for at in range(0, size, 256 * MIB):
        h.pwrite(b"x", at)
    h.shutdown()
    server.stop()
    image = Image("disk.qcow2")
    first, second = image.bitmap("fine").table()
    image.write(first, b"\x55" * image.cluster_size)
    image.write(second, b"\x0f" * image.cluster_size)
    server = Server("disk.qcow2", kind="qemu-nbd", options=["-r"])
    _, figures = compare(server, ["fine"])
    assert figures["bitmaps"][0]["dirty-bytes"] == size // 2
    server.stop()


def not_utf8():
    """Bytes that are no UTF-8 become U+FFFD, and "?" in JSON."""
    harness.create("disk.qcow2", MIB)
    subprocess.run(["qemu-img", "bitmap", "--add", "disk.qcow2",
                    b"n\xff\xc3(\xed\xa0\x80"], check=True)
    server = Server("disk.qcow2")
    picture, figures = draw(server)
    assert [b["name"] for b in figures["bitmaps"]] == ["n??(???"], figures
    assert "n\ufffd\ufffd(\ufffd\ufffd\ufffd" in picture.texts
    server.stop()


def hostile_names():
    names = ["<b>&amp;\"'", "]]>--><script>alert(1)</script>", "a\x01b\x7f\n",
             "\u202eevil\u2066", "\u05e9\u05dc\u05d5\u05dd", "  two  spaces ",
             "begins" + "x" * 500 + "ends", "\U0001f468\u200d\U0001f467" * 40,
             "\ufffe\uffff"]
    harness.create("disk.qcow2", MIB, *names)
    export = "<&\u05d0" + "y" * 300
    server = Server("disk.qcow2", "dirty-bitmap-exportname=" + export)
    uri = "nbd+unix:///%s?socket=%s" % ("%3C%26%D7%90" + "y" * 300,
                                        server.socket)
    picture, figures = draw(server, uri=uri)
    assert [b["name"] for b in figures["bitmaps"]] == names, figures
    assert figures["export"] == export
    text = "".join(picture.root.itertext())
    for c in text:
        assert c == "\n" or unicodedata.category(c) != "Cc", repr(c)
        assert not "\u202a" <= c <= "\u202e" and not \
            "\u2066" <= c <= "\u2069" and c not in "\ufffe\uffff"
    assert {names[0], names[4], names[5], "a\ufffdb\ufffd\ufffd"} <= set(
        picture.texts), picture.texts
    shown = [t for t in picture.texts if t.startswith("begins")]
    assert len(shown) == 1 and len(shown[0]) < 40 and "\u2026" in shown[0] \
        and shown[0].endswith("ends"), shown
    # All of it is a tooltip.
    assert names[6] in [t.text for t in picture.root.iter(SVG + "title")]
    server.stop()


def files():
    harness.create("disk.qcow2", MIB, "b")
    server = Server("disk.qcow2")
    os.mkdir("folder")
    place = os.path.join("folder", "x.svg")
    os.umask(0o022)
    assert tool("--map", "--quiet", server.uri, place) == ("", "")
    assert stat.S_IMODE(os.stat(place).st_mode) == 0o644
    with open(place, "w") as f:
        f.write("mine")
    fails("exists already", "--map", server.uri, place)
    with open(place) as f:
        assert f.read() == "mine"
    tool("--map", "--force", server.uri, place)
    Picture(open(place, "rb").read())
    for name in "folder", "/dev/null":
        fails("is not a regular file", "--map", "--force", server.uri, name)
    fails("No such file", "--map", server.uri, "nowhere/x.svg")
    with open("/dev/full", "w") as full:
        p = backups.popen("--map", server.uri, "-", stdout=full)
        err = p.communicate(timeout=harness.PATIENCE)[1].decode()
    assert p.returncode == 1 and "No space left" in err, err
    out, err = tool("--map", server.uri, "-")
    assert err == "" and not os.path.exists("-")
    assert Picture(out.encode()).grids
    server.stop()
    fails("", "--map", server.uri, os.path.join("folder", "y.svg"))
    assert os.listdir("folder") == ["x.svg"]
    for args in ("--map", "u"), ("--map", "--json", "u", "-"), \
            ("--map", "--list", "u", "x"), ("--map", "--bitmap=b", "u", "x"), \
            ("--list", "--force", "x"):
        p = subprocess.run([backups.TOOL, *args], capture_output=True,
                           text=True, env=backups.ENV)
        assert p.returncode == 1 and "--help" in p.stderr, (args, p.stderr)


def a_file_that_comes_meanwhile():
    server = Server(args=["--filter=delay", "memory", "1M",
                          "delay-extents=2"])
    os.mkdir("other")
    place = os.path.join("other", "x.svg")
    p = backups.popen("--map", server.uri, place)
    time.sleep(0.5)
    with open(place, "w") as f:
        f.write("mine")
    status, _, err = backups.ended(p)
    assert status == 1
    backups.one_error("File exists", err)
    with open(place) as f:
        assert f.read() == "mine"
    assert os.listdir("other") == ["x.svg"]
    server.stop()


full_of_kinds()
sizes()
without_contexts()
many_bitmaps()
a_million_extents()
contexts_that_lag()
hostile_names()
not_utf8()
files()
a_file_that_comes_meanwhile()
