# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""The servers that are measured: this filter and its peers."""

import os
import signal
import socket
import struct
import subprocess
import time

import images

PATIENCE = 60


class Failed(Exception):
    """A server that failed has no figures."""


_interrupted = False


def end_on_signals():
    """INT and TERM end the program when it would start its next server:
    one that is just being started is not left behind.  A second one
    ends it at once."""
    def interrupted(*_):
        global _interrupted
        if _interrupted:
            raise KeyboardInterrupt
        _interrupted = True
    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, interrupted)


class Server:
    """One server over one file, on a Unix socket."""

    def __init__(self, command, sock, cpus):
        if _interrupted:
            raise KeyboardInterrupt
        images.remove(sock)
        self.sock = sock
        self.command = command
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, cpus))

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def connect(self):
        deadline = self.began + PATIENCE
        while True:
            s = socket.socket(socket.AF_UNIX)
            try:
                s.connect(self.sock)
                s.settimeout(PATIENCE)
                return s
            except OSError:
                s.close()
                if self.process.poll() is not None:
                    raise Failed("did not start: " + " ".join(self.command))
                if time.monotonic() > deadline:
                    raise Failed("no socket from: " + " ".join(self.command))
                time.sleep(0.001)

    def first_answer(self):
        """Seconds from the start to the answer of a first read."""
        with self.connect() as s, s.makefile("rwb") as f:
            f.read(18)
            f.write(struct.pack(">IQII", 3, 0x49484156454F5054, 1, 0))
            f.flush()
            f.read(10)
            f.write(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 512))
            f.flush()
            magic, error, _ = struct.unpack(">IIQ", f.read(16))
            f.read(512)
            answered = time.monotonic()
            if magic != 0x67446698 or error:
                raise Failed("a bad answer from: " + " ".join(self.command))
            f.write(struct.pack(">IHHQQI", 0x25609513, 0, 2, 2, 0, 0))
        return answered - self.began

    def first_greeting(self):
        """As far as a client gets in plain text where TLS is required."""
        with self.connect() as s, s.makefile("rwb") as f:
            if f.read(18)[:8] != b"NBDMAGIC":
                raise Failed("no greeting from: " + " ".join(self.command))
            f.write(struct.pack(">IQII", 3, 0x49484156454F5054, 2, 0))
            f.flush()
            f.read(20)

    def resident_bytes(self):
        with open("/proc/%d/status" % self.process.pid) as f:
            for line in f:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) << 10
        raise Failed("no VmRSS")

    def stop(self):
        """Seconds from the signal to the end."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(PATIENCE) != 0:
            raise Failed("ended badly: " + " ".join(self.command))
        return time.monotonic() - began


class Place:
    """What a command line is made of: the files of one server.  disk says
    where the guest's data are: in the image, in the raw file beside it
    ("beside"), or in that file behind another server ("behind")."""

    def __init__(self, sock, image, raw, size, keys=None, disk=None):
        self.sock, self.image, self.raw = sock, image, raw
        self.size, self.keys, self.disk = size, keys, disk

    @property
    def behind(self):
        return self.sock + ".behind"

    def plugin(self):
        """The plugin and its parameters, and the filter's for that."""
        if self.disk == "beside":
            return ["file", self.raw, "dirty-bitmap-image=" + self.image]
        if self.disk == "behind":
            return ["nbd", "socket=" + self.behind,
                    "dirty-bitmap-image=" + self.image]
        return ["file", self.image]


class Side:
    """Something that serves.  command (options, place) is its command
    line, needs the program in it that must be there, group the column
    of the table of bars to which it is a candidate."""

    def __init__(self, title, needs, command, group=None):
        self.title, self.needs, self.command = title, needs, command
        self.group = group


def qemu_nbd(*options, image_options=None):
    def command(_, at):
        tls = []
        if at.keys:
            tls = ["--object", "tls-creds-psk,id=tls,endpoint=server,dir=" +
                   os.path.dirname(at.keys), "--tls-creds", "tls"]
        if image_options:
            image = ["--image-opts", "driver=qcow2,%s,file.driver=file,"
                     "file.filename=%s" % (image_options, at.image)]
        else:
            image = ["-f", "qcow2", at.image]
        return ["qemu-nbd", "-t", "-e", "32", "-B", images.BITMAP, *options,
                *tls, "-k", at.sock, *image]
    return command


def nbdkit(at, *args):
    tls = ["--tls=require", "--tls-psk=" + at.keys] if at.keys else []
    return ["nbdkit", "-f", "-U", at.sock, *tls, *args]


def the_filter(*parameters, build=None):
    return lambda o, at: nbdkit(at, "--filter=" + (build or o.filter),
                                *at.plugin(), *parameters)


# The L2 tables of the image of 1 TiB, all of them.
L2_CACHE = "l2-cache-size=128M"

SIDES = {
    "filter": Side("this filter", "nbdkit", the_filter()),
    "none": Side("this filter, no bitmap", "nbdkit", the_filter()),
    "mark": Side("this filter, dirty-bitmap-crash=mark", "nbdkit",
                 the_filter("dirty-bitmap-crash=mark"), "mark"),
    "qemu": Side("qemu-nbd -B", "qemu-nbd", qemu_nbd(), "best"),
    "io_uring": Side("qemu-nbd -B --aio=io_uring", "qemu-nbd",
                     qemu_nbd("--aio=io_uring"), "best"),
    "native": Side("qemu-nbd -B --aio=native --cache=none", "qemu-nbd",
                   qemu_nbd("--aio=native", "--cache=none"), "best"),
    "unsafe": Side("qemu-nbd -B --cache=unsafe", "qemu-nbd",
                   qemu_nbd("--cache=unsafe"), "best"),
    "l2cache": Side("qemu-nbd -B, " + L2_CACHE, "qemu-nbd",
                    qemu_nbd(image_options=L2_CACHE), "best"),
    "l2cache-io_uring": Side("qemu-nbd -B --aio=io_uring, " + L2_CACHE,
                             "qemu-nbd",
                             qemu_nbd("--aio=io_uring",
                                      image_options=L2_CACHE), "best"),
    "l2cache-native": Side("qemu-nbd -B --aio=native --cache=none, " +
                           L2_CACHE, "qemu-nbd",
                           qemu_nbd("--aio=native", "--cache=none",
                                    image_options=L2_CACHE), "best"),
    "raw": Side("nbdkit file, a raw copy", "nbdkit",
                lambda o, at: nbdkit(at, "file", at.raw), "raw"),
    "nbd": Side("nbdkit nbd, without the filter", "nbdkit",
                lambda o, at: nbdkit(at, "nbd", "socket=" + at.behind),
                "nbd"),
    "bare": Side("a bare responder without a disk", None,
                 lambda o, at: [o.echo, at.sock, str(at.size)], "bare"),
}

def add_build(name, path):
    """Another build of the filter takes part, under this name."""
    SIDES[name] = Side(name, "nbdkit", the_filter(build=path), "build")


# What --peers may name besides.
GROUPS = {
    "best": [s for s in SIDES if SIDES[s].group == "best" and s != "qemu"],
}
GROUPS["all"] = ["qemu", *GROUPS["best"], "raw", "bare", "mark", "nbd"]
