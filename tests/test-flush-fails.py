#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""A disk fails to flush once, and then works again.  Each client that wrote
is told once; then all goes on, and the stop is clean.  So it is where the
file is used without the plugin, through the plugin, and in a data file.
"""

import os
import subprocess
import sys

import harness
from harness import Server, nbd

if harness.SERVER != "nbdkit":
    print("skipped: for our own server")
    sys.exit(77)

SHIM = r"""
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>
int fdatasync (int fd);
int
fdatasync (int fd)
{
  const char *once = getenv ("FAIL_ONCE"), *of = getenv ("FAIL_FILE");
  int (*real) (int) = (int (*) (int)) dlsym ((void *) -1L, "fdatasync");
  struct stat a, b;

  if (once != NULL && of != NULL && fstat (fd, &a) == 0 &&
      stat (of, &b) == 0 && a.st_ino == b.st_ino && unlink (once) == 0) {
    errno = EIO;
    return -1;
  }
  return real (fd);
}
"""

shim = os.path.join(harness.tmp, "shim.so")
subprocess.run([*os.environ.get("CC", "cc").split(), "-shared", "-fPIC",
                "-x", "c", "-", "-o", shim], check=True, input=SHIM.encode())
if harness.PRELOAD:
    harness.PRELOAD += " " + shim
else:
    os.environ["LD_PRELOAD"] = shim
once = os.environ["FAIL_ONCE"] = os.path.join(harness.tmp, "once")


def fails(h, what):
    try:
        h.flush()
    except nbd.Error as e:
        assert e.errno == "EIO", e
        return
    raise AssertionError("%s: a client was not told" % what)


def test(what, of, options="", filters=()):
    for name in "disk.qcow2", "data.raw":
        if os.path.exists(name):
            os.unlink(name)
    os.environ["FAIL_FILE"] = os.path.join(harness.tmp, of)
    harness.create("disk.qcow2", 16 << 20, "b", options=options)
    server = Server(args=["--filter=" + harness.FILTER, *filters, "file",
                          "disk.qcow2"])
    clients = [server.connect() for _ in range(2)]
    for i, h in enumerate(clients):
        h.pwrite(b"1" * 65536, i << 20)
        h.flush()
        h.pwrite(b"2" * 65536, i << 20)
    # The bitmap is in use now: it is the flush that fails, not a mark.
    for i, h in enumerate(clients):
        h.pwrite(b"2" * 65536, i + 4 << 20)
    open(once, "w").close()
    for h in clients:
        fails(h, what)
    assert not os.path.exists(once)
    for i, h in enumerate(clients):
        h.pwrite(b"3" * 65536, i + 8 << 20)
        h.flush()
        h.flush()
    # All of it is in the image, even if nbdkit is killed.
    assert harness.flags("disk.qcow2", "b") == {"auto"}, what
    for h in clients:
        h.shutdown()
    server.stop()
    assert harness.flags("disk.qcow2", "b") == {"auto"}, what
    harness.check("disk.qcow2")
    data = harness.contents("disk.qcow2")
    for i in range(2):
        for at, byte in (i, b"2"), (i + 4, b"2"), (i + 8, b"3"):
            assert data[at << 20:(at << 20) + 65536] == byte * 65536, what


test("without the plugin", "disk.qcow2")
test("through the plugin", "disk.qcow2", filters=["--filter=nofilter"])
test("in a data file", "data.raw",
     options="data_file=data.raw,data_file_raw=on")
