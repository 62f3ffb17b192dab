# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""A folder with the images, and servers and clients over them."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile

import images
import serving
import workloads
from serving import Failed
from workloads import GIB, MIB

MARKED = ["bench%d" % n for n in range(8)]


def add_options(parser):
    parser.add_argument("--filter", help="the filter's shared object")
    parser.add_argument("--load", help="the load program built here")
    parser.add_argument("--echo", help="the bare responder built here")
    parser.add_argument("--dir", default="/dev/shm",
                        help="folder for the images (default: in memory)")
    parser.add_argument("--size", type=int, default=GIB,
                        help="bytes of the preallocated image "
                        "(default: 1 GiB)")


def check_options(parser, o):
    if o.size < MIB or o.size % 4096:
        parser.error("cannot use --size=%d" % o.size)
    for name in "filter", "load", "echo":
        path = getattr(o, name)
        if path is None and name != "echo":
            parser.error("--%s is missing" % name)
        if path is not None:
            setattr(o, name, os.path.realpath(path))
            if not os.path.exists(path):
                parser.error("%s: not there" % path)


class Rig:
    def __init__(self, options):
        self.o = options
        self.cpus = os.sched_getaffinity(0)
        self.one_cpu = {max(self.cpus)}
        self.dir = tempfile.mkdtemp(prefix="side-by-side.", dir=options.dir)
        self.sock = os.path.join(self.dir, "sock")
        self.raw = os.path.join(self.dir, "raw")
        self.keys = None
        self.made = None
        self.told = {}          # what the walks of each row found

    def remove(self):
        shutil.rmtree(self.dir)

    def filesystem(self):
        return subprocess.run(["stat", "-f", "-c", "%T", self.dir],
                              check=True, stdout=subprocess.PIPE,
                              text=True).stdout.strip()

    def path(self, image):
        return os.path.join(self.dir, image + ".qcow2")

    def cpus_of(self, row):
        return self.one_cpu if row.pin else self.cpus

    # Servers and clients.

    def command(self, side, image, tls=False):
        # The filter has bitmaps, its peer "none" has the same without.
        if image == "marked" and side == "none":
            image = "unmarked"
        return serving.SIDES[side].command(self.o, serving.Place(
            self.sock, self.path(image), self.raw, self.o.size,
            self.make_keys() if tls else None, disk=image))

    def server(self, side, row):
        return serving.Server(self.command(side, row.image, row.tls),
                              self.sock, self.cpus_of(row))

    @contextlib.contextmanager
    def behind(self, row):
        """The server whose disk the nbd plugin serves, on all CPUs."""
        if row.image != "behind":
            yield
            return
        sock = self.sock + ".behind"
        with serving.Server(["qemu-nbd", "-t", "-e", "32", "-f", "raw", "-k",
                             sock, self.raw], sock, self.cpus) as server:
            server.connect().close()
            yield
            server.stop()

    def client(self, server, row, *args):
        """Load the server: what the load program printed."""
        uri = "nbd+unix:///?socket=" + self.sock
        if row.tls:
            server.first_greeting()
            uri = "nbds+unix://bench@/?socket=%s&tls-psk-file=%s" % (
                self.sock, self.keys)
        else:
            server.first_answer()
        done = subprocess.run(
            [self.o.load, "--uri=" + uri,
             "--server-pid=%d" % server.process.pid, *args],
            stdout=subprocess.PIPE, text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, self.cpus_of(row)))
        if done.returncode != 0:
            raise Failed("the load failed on: " + " ".join(server.command))
        return json.loads(done.stdout)

    def make_keys(self):
        if self.keys is None:
            folder = os.path.join(self.dir, "keys")
            os.mkdir(folder, 0o700)
            self.keys = os.path.join(folder, "keys.psk")
            subprocess.run(["psktool", "-u", "bench", "-p", self.keys],
                           check=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
        return self.keys

    def unusable(self, side):
        """Why the side cannot be had here, or None."""
        needs = serving.SIDES[side].needs
        if needs and not shutil.which(needs):
            return needs + " is not installed"
        if side == "bare":
            return None if self.o.echo else "no --echo"
        if "qemu-nbd" != needs:
            return None
        images.qcow2(self.path("probe"), MIB)
        command = self.command(side, "probe")
        images.remove(self.sock)
        try:
            with serving.Server(command, self.sock, self.cpus) as server:
                server.first_answer()
                server.stop()
        except Failed as e:
            return str(e)
        finally:
            images.remove(self.path("probe"))
        return None

    # Images.  Only those of one row are kept: a folder in memory is not
    # large.

    def files(self):
        return [os.path.join(self.dir, f) for f in os.listdir(self.dir)
                if f.endswith(".qcow2") or f == "raw"]

    def make_full(self, image, bitmaps):
        """All there, and all dirty in the bitmaps."""
        images.qcow2(self.path(image), self.o.size, "full", bitmaps)
        row = workloads.Row("", image, "s")
        with serving.Server(self.command("filter", image), self.sock,
                            self.cpus) as server:
            self.client(server, row, "--workload=seqwrite",
                        "--block=%d" % MIB,
                        "--count=%d" % -(-self.o.size // MIB))
            server.stop()

    def make_beside(self, image):
        """A raw disk, and an image beside it in which all of it is dirty."""
        path = self.path(image)
        images.raw(self.raw, self.o.size)
        images.qcow2(path, self.o.size)
        place = serving.Place(self.sock, path, self.raw, self.o.size,
                              disk="beside")
        with serving.Server(serving.SIDES["filter"].command(self.o, place),
                            self.sock, self.cpus) as server:
            self.client(server, workloads.Row("", image, "s"),
                        "--workload=seqwrite", "--block=%d" % MIB,
                        "--count=%d" % -(-self.o.size // MIB))
            server.stop()

    def make(self, image, raw=False):
        """Have the image, and for servers without a format a raw file."""
        if self.made != image:
            for path in self.files():
                images.remove(path)
            self.made = image
            self.make_image(image)
        if raw and not os.path.exists(self.raw):
            images.raw(self.raw, self.o.size)

    def make_image(self, image):
        path = self.path(image)
        if image == "full":
            self.make_full(image, [images.BITMAP])
        elif image == "marked":
            self.make_full("marked", MARKED)
            self.make_full("unmarked", [])
        elif image in ("beside", "behind"):
            self.make_beside(image)
        elif image == "clean":
            images.qcow2(path, self.o.size, "full")
        elif image == "sparse":
            images.qcow2(path, 64 * GIB)
        elif image == "big":
            images.qcow2(path, 1024 * GIB, "metadata")
        elif image == "fragmented":
            images.fragmented(path, 1024 * GIB, 1200000)
        elif image == "holey":
            images.holey(path, 1000000)
        elif image == "huge":
            images.scattered(path, 16384 * GIB, 100000)

    def settle(self, cold=False):
        """Nobody has to write back what the one before left; with cold
        nobody finds the image in the page cache either."""
        for path in self.files():
            fd = os.open(path, os.O_RDWR)
            try:
                os.fdatasync(fd)
                if cold:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def check(self):
        for path in self.files():
            if path != self.raw:
                images.check(path)

    # Measuring.

    def measure(self, side, row, seconds, cold=False):
        """One run: {name: (figure, unit)}."""
        if row.image in ("sparse", "huge"):
            self.made = None
            self.make(row.image)
        if row.image == "clean":
            images.clear(self.path(row.image))
        self.settle(cold)
        if row.image == "huge":
            return self.measure_life(side, row)
        with self.behind(row), self.server(side, row) as server:
            got = self.client(server, row, "--seconds=%g" % seconds,
                              *row.load)
            server.stop()
        self.compare_maps(row, got)
        per_op = got["seconds"] / got["ops"]
        scale = 1e6 / got["ops"]
        if row.unit == "s":
            figure = per_op
            scale /= got["extents"] / 1e3
        else:
            figure = 1 / per_op
            if row.unit == "MiB/s":
                figure *= row.mib
        unit = "µs/op" if row.per == "op" else "ns/extent"
        return {"": (figure, row.unit),
                "server CPU": (got["server_cpu"] * scale, unit),
                "client CPU": (got["client_cpu"] * scale, unit)}

    def measure_life(self, side, row):
        with self.server(side, row) as server:
            started = server.first_answer()
            self.client(server, row, "--workload=randwrite",
                        "--depth=16", "--count=1000")
            resident = server.resident_bytes()
            stopped = server.stop()
        return {"start to first answer": (started, "s"),
                "stop, after 1000 writes": (stopped, "s"),
                "resident memory": (resident / MIB, "MiB")}

    def compare_maps(self, row, got):
        """All must tell the same of a bitmap, or one is wrong."""
        if "extents" in got and "--context=" + workloads.CONTEXT in row.load:
            told = (got["extents"], got["set_bytes"], got["hash"])
            if self.told.setdefault(row.title, told) != told:
                raise Failed("%s: the servers tell different bitmaps" %
                             row.title)
