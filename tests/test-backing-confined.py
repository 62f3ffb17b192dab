#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""The header of an image names files, and may be a stranger's: only what
is in the image's folder, or was allowed, is opened, whatever the name,
links and protocols; and nobody else may be writing it.
"""

import os
import shutil
import subprocess
import time

import harness
from harness import FILTER, Server, run
from qcow2image import Image

harness.requires("qemu-io")
ALLOW = "dirty-bitmap-allow-path="
MB = 1 << 20

for folder in ("img", "img/sub", "img2", "other"):
    os.mkdir(folder)
tmp = os.path.realpath(".")


def raw(path, byte):
    with open(path, "wb") as f:
        f.write(bytes([byte]) * 65536)
        f.truncate(MB)


raw("img/base.raw", 1)
raw("img/sub/base.raw", 2)
raw("img2/base.raw", 3)
raw("other/base.raw", 4)


def image(name, fmt="raw", path="img/top.qcow2"):
    """An image with this backing file, whatever it is."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", fmt,
        "-b", "x" * 8, path, str(MB))
    Image(path).set_backing_name(name)
    return path


def data_image(name, path="img/top.qcow2"):
    """An image with this external data file."""
    run("qemu-img", "create", "-q", "-f", "qcow2",
        "-o", "data_file=" + "x" * len(name), path, str(MB))
    os.unlink("x" * len(name))
    with open(path, "r+b") as f:
        at = f.read(65536).index(b"x" * len(name))
        f.seek(at)
        f.write(name.encode())
    return path


def served(path, byte, *params, options=("-r",)):
    server = Server(path, *params, options=options)
    h = server.connect()
    assert h.pread(512, 0) == bytes([byte]) * 512, h.pread(4, 0)
    h.shutdown()
    server.stop()
    return server


def no(path, *params, pattern, named=None):
    for options in ((), ("-r",)):
        before = harness.sha256(path)
        start = time.monotonic()
        out = harness.refused(path, *params, options=options, pattern=pattern)
        assert time.monotonic() - start < 10
        assert named is None or "'%s'" % named in out, out
        assert harness.sha256(path) == before


def refused_late(*args, pattern):
    """Where the image is not seen before nbdkit has its sockets."""
    p = subprocess.run(["nbdkit", "-f", "-U", "late", *args],
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       env=harness.environment(), timeout=harness.PATIENCE)
    out = p.stdout.decode()
    assert p.returncode == 1 and pattern in out, out
    os.unlink("late")


# Inside: by any way to write it.
for name, byte in (("base.raw", 1), ("./base.raw", 1), ("sub/base.raw", 2),
                   ("sub/../base.raw", 1), ("../img/base.raw", 1),
                   (tmp + "/img/base.raw", 1), ("file:" + tmp +
                                                "/img/sub/base.raw", 2)):
    served(image(name), byte)
    served("img/top.qcow2", byte, options=())

# Outside: neither absolute, nor by "..", nor in a folder whose name only
# begins like the image's, nor by symbolic links.
OUT = "dirty-bitmap-allow-path"
os.symlink("../other/base.raw", "img/link.raw")
os.symlink("../other", "img/linked")
os.symlink("sub", "img/inner")
os.symlink(tmp + "/img/sub/base.raw", "img/inner.raw")
served(image("inner/base.raw"), 2)
served(image("inner.raw"), 2)
for name, place in (("../other/base.raw", "img/../other/base.raw"),
                    (tmp + "/other/base.raw", "other/base.raw"),
                    (tmp + "/img2/base.raw", "img2/base.raw"),
                    ("file:" + tmp + "/img2/base.raw", "img2/base.raw"),
                    ("sub/../../other/base.raw",
                     "img/sub/../../other/base.raw"),
                    ("link.raw", "img/link.raw"),
                    ("linked/base.raw", "img/linked/base.raw")):
    no(image(name), pattern=OUT, named=tmp + "/" + place)
    served("img/top.qcow2", 3 if "img2" in name else 4,
           ALLOW + "img2", ALLOW + tmp + "/other")
    no("img/top.qcow2", ALLOW + "img/sub", pattern=OUT)
    no(data_image(name), pattern="current folder" if "file:" in name and
       not name.startswith("file:/") else OUT)

# The folder is that of the path that was given.
image("base.raw", path="other/real.qcow2")
os.symlink("../other/real.qcow2", "img/link.qcow2")
served("img/link.qcow2", 1)
served("other/real.qcow2", 4)

# The allowed folder counts as it is when nbdkit starts.
os.symlink("other", "allowed")
served(image("../other/base.raw"), 4, ALLOW + "allowed")

# What was allowed holds for the whole chain, and relative names in it are
# relative to the file that has them.
image("base.raw", path="other/middle.qcow2")
image(tmp + "/other/middle.qcow2", fmt="qcow2")
served("img/top.qcow2", 4, ALLOW + "other")
image("../img2/base.raw", path="other/middle.qcow2")
no("img/top.qcow2", ALLOW + "other", pattern=OUT,
   named=tmp + "/other/../img2/base.raw")
served("img/top.qcow2", 3, ALLOW + "other", ALLOW + "img2")

# What is no file is not so much as opened.
os.mkfifo("img/fifo")
no(image("fifo"), pattern="neither a file nor a block device")
no(data_image("fifo"), pattern="neither a file nor a block device")
try:
    os.close(os.open("img/fifo", os.O_WRONLY | os.O_NONBLOCK))
except OSError:
    pass
else:
    raise AssertionError("somebody has the FIFO open")
no(image("sub"), pattern="neither a file nor a block device")
no(image("/dev/zero"), pattern=OUT)
no(image("/dev/zero"), ALLOW + "/dev", pattern="neither a file nor a block")
no(image("missing.raw"), pattern="No such file", named=tmp +
   "/img/missing.raw")
no(data_image("missing.raw"), pattern="No such file")
no(image("x" * 1024), pattern="longer")
served(image(""), 0)
no(image(b"a\0b"), pattern="NUL")
no(image("a\nnbdkit: error: b"), pattern="control character 0x0a")

# Names that are not file names.
for name in ('json:{"driver":"raw","file":{"filename":"base.raw"}}',
             "json:{}", "nbd:unix:/run/s", "nbd://localhost/", "ssh://h/f",
             "http://localhost/base.raw", "https://h/f", "rbd:a/b",
             "host_device:/dev/sda", "fat:img", "a:b"):
    for make in (image, data_image):
        path = make(name)
        no(path, pattern="'%s:' are not supported" % name.split(":")[0],
           named=name)
raw("img/a:b", 7)
served(image("./a:b"), 7)
no(image("file:"), pattern="is empty")

# No file twice.
no(image("top.qcow2", fmt="qcow2"), pattern="in use already")
os.link("img/top.qcow2", "img/hard.qcow2")
no(image("hard.qcow2", fmt="qcow2", path="img/hard.qcow2"),
   pattern="in use already")
os.unlink("img/hard.qcow2")
image("two.qcow2", fmt="qcow2", path="img/one.qcow2")
image("one.qcow2", fmt="qcow2", path="img/two.qcow2")
no("img/one.qcow2", pattern="in use already", named=tmp + "/img/one.qcow2")
os.symlink("one.qcow2", "img/loop.qcow2")
image("loop.qcow2", fmt="qcow2", path="img/two.qcow2")
no("img/one.qcow2", pattern="in use already")
no(data_image("top.qcow2"), pattern="in use already")
os.symlink("top.qcow2", "img/top.raw")
no(data_image("top.raw"), pattern="in use already")

# Formats by name, and a format that is a lie.
no(image("base.raw", fmt="qed"), pattern="the format 'qed'")
no(image("base.raw", fmt="qcow2"), pattern="not a qcow2 image")

# An absurd depth.
image("c001.qcow2", fmt="qcow2", path="img/c000.qcow2")
for i in range(1, 202):
    shutil.copy("img/c000.qcow2", "img/c%03d.qcow2" % i)
    Image("img/c%03d.qcow2" % i).set_backing_name("c%03d.qcow2" % (i + 1))
no("img/c000.qcow2", pattern="more than 200 backing files")
raw("img/c201.qcow2", 9)
image("c201.qcow2", path="img/c200.qcow2")
served("img/c001.qcow2", 9)

# The header says nothing about where the data are.
path = data_image("base.raw")
image_ = Image(path)
image_.write(image_.extension_offset(0x44415441) - 8, b"\x12\x34\x56\x78")
no(path, pattern="does not name it")

# A data file of that name in the current folder would be QEMU's.
raw("img/data.raw", 5)
served(data_image("data.raw"), 0)
raw("data.raw", 6)
no("img/top.qcow2", pattern="current folder", named=tmp + "/img/data.raw")
os.unlink("data.raw")

# A filter that keeps the writes to the image does not keep those to the
# data file.
cow = ["--filter=" + FILTER, "--filter=cow", "file", "img/top.qcow2"]
refused_late(*cow, pattern="keeps what is written")
Server(args=["-r", *cow]).stop()
image("base.raw")
server = Server(args=cow)
h = server.connect()
assert h.pread(512, 0) == b"\1" * 512
h.shutdown()
server.stop()

# Locks: nobody else writes it, and we find out if somebody does.
locked = image("base.raw")
for options in ((), ("-r",)):
    server = Server(locked, options=options)
    out = run("qemu-io", "-f", "raw", "-c", "write 0 512", "img/base.raw",
              status=1)
    assert "lock" in out, out
    run("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", "img/base.raw")
    second = Server(image("base.raw", path="img/second.qcow2"))
    second.stop()
    server.stop()
run("qemu-io", "-f", "raw", "-c", "write -P 1 0 512", "img/base.raw")


def with_writer(path, check):
    p = subprocess.Popen(["qemu-io", "-f", "raw", path],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    p.stdin.write(b"read 0 512\n")
    p.stdin.flush()
    while b"ops" not in p.stdout.readline():
        pass
    check()
    p.stdin.close()
    p.wait()


with_writer("img/base.raw", lambda: no(locked, pattern="lock",
                                       named=tmp + "/img/base.raw"))
path = data_image("data.raw")
with_writer("img/data.raw", lambda: no(path, pattern="lock",
                                       named=tmp + "/img/data.raw"))
server = Server(path)
assert "lock" in run("qemu-io", "-f", "raw", "-c", "read 0 512",
                     "img/data.raw", status=1)
server.stop()

# Where the plugin has no path, there is no folder.
below = Server(args=["file", image("base.raw")])
over = ["-r", "--filter=" + FILTER, "nbd", "socket=" + below.socket]
refused_late(*over, ALLOW + "img", pattern="does not serve a local file")
below.stop()
below = Server(args=["file", image(tmp + "/img/base.raw")])
over[-1] = "socket=" + below.socket
refused_late(*over, pattern=OUT)
refused_late(*over, ALLOW + "img2", pattern=OUT)
server = Server(args=[*over, ALLOW + "img"])
h = server.connect()
assert h.pread(512, 0) == b"\1" * 512
h.shutdown()
server.stop()
below.stop()

# A filter between that may change the bytes: the folder is known.
image("base.raw")
server = Server(args=["-r", "--filter=" + FILTER, "--filter=offset", "file",
                      "img/top.qcow2", "offset=0"])
h = server.connect()
assert h.pread(512, 0) == b"\1" * 512
h.shutdown()
server.stop()
