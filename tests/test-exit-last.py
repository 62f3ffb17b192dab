#!/usr/bin/python3
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""dirty-bitmap-exit-last: nbdkit ends when the last client that had opened the
disk is gone, and the bitmaps are stored; clients that only looked do not
count.  dirty-bitmap-when-full=wait: a client that is one too many waits until
another has gone."""

import threading
import time

import nbd

import harness
from harness import Server, create, extents, refused

CONTEXT = "qemu:dirty-bitmap:b"


def options_only(s):
    """A client that lists the exports and goes."""
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_uri(s.uri)
    names = []
    h.opt_list(lambda name, _: names.append(name))
    h.opt_abort()
    assert names == [""], names


create("d.qcow2", 1 << 20, "b")
s = Server("d.qcow2", "dirty-bitmap-exit-last=on")
options_only(s)
h = nbd.NBD()
h.connect_uri(s.uri)
other = s.connect(CONTEXT)
h.pwrite(b"x" * 512, 0)
h.shutdown()
del h
time.sleep(0.2)
s.alive()
assert extents(other, CONTEXT)[0] == (65536, 1)
# Not even a goodbye.
del other
s.ends()
harness.check("d.qcow2")
assert harness.qemu_extents("d.qcow2", "b")[0] == (65536, 1)

# By default it stays.
s = Server("d.qcow2", "dirty-bitmap-exit-last=off")
s.connect(CONTEXT).shutdown()
time.sleep(0.2)
s.alive()
s.stop()

refused("d.qcow2", "dirty-bitmap-exit-last=on", "dirty-bitmap-server=off",
        pattern="dirty-bitmap-exit-last")
refused("d.qcow2", "dirty-bitmap-exit-last=on",
        options=["--filter=exitlast"], pattern="dirty-bitmap-exit-last")

# One after the other, and none is refused.
s = Server("d.qcow2", "dirty-bitmap-max-connections=1",
           "dirty-bitmap-when-full=wait")
h = s.connect()
assert not h.can_multi_conn()
got = []


def second():
    got.append(s.connect().pread(512, 0))


t = threading.Thread(target=second)
t.start()
time.sleep(1.5)
assert not got
assert h.pread(1, 0) == b"x"
h.shutdown()
del h
t.join(harness.PATIENCE)
assert got == [b"x" * 512], got
for i in range(100):
    s.connect().shutdown()
s.stop()

s = Server("d.qcow2", "dirty-bitmap-max-connections=2",
           "dirty-bitmap-when-full=close")
clients = [s.connect(), s.connect()]
assert clients[0].can_multi_conn()
try:
    s.connect()
except nbd.Error:
    pass
else:
    raise AssertionError("a third client was let in")
s.stop()
