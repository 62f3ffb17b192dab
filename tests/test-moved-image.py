#!/usr/bin/env python3
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""The image is the file that was opened, whatever happens to its name, and
to the names of the files that it refers to: renamed, removed, replaced,
in a folder that is renamed.  No other file is ever written to.  Where a
filter lies between, so that the plugin has to open it again by name, it
cannot grow any more, and that is said once.
"""

import os
import shutil
import subprocess
import time

import nbd

import harness

MiB = 1 << 20


def rename():
    os.rename("folder/disk", "folder/moved")
    return "folder/moved"


def remove():
    os.link("folder/disk", "kept")
    os.unlink("folder/disk")
    return "kept"


def replace():
    os.link("folder/disk", "kept")
    shutil.copy("other", "new")
    os.rename("new", "folder/disk")
    return "kept"


def replace_folder():
    os.rename("folder", "moved")
    os.mkdir("folder")
    shutil.copy("other", "folder/disk")
    return "moved/disk"


MOVES = rename, remove, replace, replace_folder


def prepare():
    for name in "folder", "moved":
        shutil.rmtree(name, ignore_errors=True)
    for name in "kept", "other":
        if os.path.exists(name):
            os.unlink(name)
    os.mkdir("folder")
    harness.create("folder/disk", 1 << 30, "b")
    # One that could be taken for it: of the same size, with the same
    # beginning.
    shutil.copy("folder/disk", "other")
    harness.run("qemu-img", "bitmap", "--remove", "other", "b")
    harness.run("qemu-img", "bitmap", "--add", "other", "b")


def untouched():
    """What was put in place of the image."""
    if os.path.exists("folder/disk"):
        assert harness.sha256("folder/disk") == harness.sha256("other"), \
            "another file was written to"


def read(path, offset, length):
    """From the guest's disk in the image at path."""
    s = harness.Server(path, options=["-r"])
    h = s.connect()
    data = h.pread(length, offset)
    h.shutdown()
    s.stop()
    return data


def write_until_full(h, start, count):
    n = 0
    try:
        for n in range(count):
            h.pwrite(b"Z" * MiB, start + n * MiB)
        return count
    except nbd.Error as e:
        assert e.errno == "ENOSPC", e
        return n


def serve(between=(), **kwargs):
    return harness.Server(args=["--filter=" + harness.FILTER,
                                *["--filter=" + f for f in between],
                                "file", "folder/disk"], **kwargs)


def moved_while_served(move, between, grown_before):
    prepare()
    s = serve(between)
    h = s.connect()
    if grown_before:
        h.pwrite(b"A" * MiB, 0)
        h.flush()
    path = move()
    n = write_until_full(h, 100 * MiB, 60)
    m = write_until_full(h, 200 * MiB, 60)
    if between:
        assert n < 60 and m < 60, "there is growth by another name"
        assert n > 0 or not grown_before
    else:
        assert (n, m) == (60, 60), s.messages()
    if n > 0:
        h.pwrite(b"Y" * 512, 100 * MiB)
        assert h.pread(1024, 100 * MiB) == b"Y" * 512 + b"Z" * 512
    h.flush()
    h.shutdown()
    s.stop()
    untouched()
    said = [line for line in s.messages().splitlines() if "leads to" in line]
    # Repeated errors are limited to ten a minute.
    assert 1 <= len(said) <= 10 if between else not said, said
    harness.check(path)
    assert harness.flags(path, "b") == {"auto"}
    if n > 0:
        assert read(path, 100 * MiB, 1024) == b"Y" * 512 + b"Z" * 512
        assert read(path, (99 + n) * MiB, MiB) == b"Z" * MiB


def back_in_place():
    """A name that comes back is as good as before."""
    prepare()
    s = serve(["nofilter"])
    h = s.connect()
    assert not os.path.exists("folder/moved")
    rename()
    write_until_full(h, 0, 30)
    os.rename("folder/moved", "folder/disk")
    assert write_until_full(h, 100 * MiB, 60) == 60
    h.shutdown()
    s.stop()
    harness.check("folder/disk")


def moved_while_starting(move, between):
    """After the image was locked and checked, and before the plugin opens
    it: nbdkit writes its pidfile in between, and waits for who reads it."""
    prepare()
    fifo, sock, log = "fifo", os.path.join(harness.tmp, "sock"), "log"
    for name in fifo, sock:
        if os.path.lexists(name):
            os.unlink(name)
    os.mkfifo(fifo)
    with open(log, "w") as f:
        p = subprocess.Popen(
            ["nbdkit", "-f", "-U", sock, "-P", fifo,
             "--filter=" + harness.FILTER, *["--filter=" + b for b in between],
             "file", "folder/disk"],
            stderr=f, env=harness.environment())
    try:
        deadline = time.monotonic() + harness.PATIENCE
        while not os.path.exists(sock):
            assert p.poll() is None and time.monotonic() < deadline, \
                open(log).read()
            time.sleep(0.01)
        path = move()
        before = harness.sha256(path)
        with open(fifo) as f:
            f.read()
        if between:
            assert p.wait(harness.PATIENCE) == 1
            said = open(log).read()
            assert "renamed or replaced" in said or "No such file" in said, said
            assert harness.sha256(path) == before
        else:
            h = nbd.NBD()
            h.connect_unix(sock)
            assert write_until_full(h, 0, 40) == 40
            h.shutdown()
            p.terminate()
            assert p.wait(harness.PATIENCE) == 0, open(log).read()
            harness.check(path)
            assert read(path, 39 * MiB, MiB) == b"Z" * MiB
        untouched()
    finally:
        if p.poll() is None:
            p.kill()
            p.wait()


def what_it_refers_to():
    """Backing and data files."""
    shutil.rmtree("chain", ignore_errors=True)
    os.mkdir("chain")
    os.chdir("chain")
    harness.create("base", 64 * MiB)
    harness.run("qemu-io", "-f", "qcow2", "-c", "write -q -P 66 0 1M", "base")
    harness.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F",
                "qcow2", "-o", "data_file=data", "disk")
    shutil.copy("data", "other-data")
    shutil.copy("base", "other-base")
    s = harness.Server("disk")
    h = s.connect()
    for name in "base", "data":
        os.link(name, name + ".kept")
        os.rename("other-" + name, name)
    before = harness.sha256("base"), harness.sha256("data")
    assert h.pread(512, 0) == b"B" * 512
    h.pwrite(b"C" * 512, 512)
    h.pwrite(b"C" * MiB, 60 * MiB)
    h.flush()
    assert h.pread(1024, 0) == b"B" * 512 + b"C" * 512
    h.shutdown()
    s.stop()
    assert before == (harness.sha256("base"), harness.sha256("data"))
    for name in "base", "data":
        os.rename(name + ".kept", name)
    assert read("disk", 0, 1024) == b"B" * 512 + b"C" * 512
    assert read("disk", 60 * MiB, MiB) == b"C" * MiB
    os.chdir("..")


def reopened_by_a_filter():
    """A filter that opens the plugin anew cannot be watched."""
    prepare()
    said = harness.run("nbdkit", "-f", "-U", "refused",
                       "--filter=" + harness.FILTER, "--filter=retry", "file",
                       "folder/disk", status=1, env=harness.environment())
    assert "--filter=retry reopens the image by its name" in said, said
    s = harness.Server(args=["-r", "--filter=" + harness.FILTER,
                             "--filter=retry", "file", "folder/disk"])
    s.stop()


def descriptors(between):
    """Growth in many steps leaves no descriptors behind."""
    prepare()
    os.unlink("folder/disk")
    harness.create("folder/disk", 1 << 40, options="cluster_size=2M")
    s = serve(between)
    h = s.connect()
    fds = "/proc/%d/fd" % s.pid
    h.pwrite(b"x" * 512, 0)
    before = len(os.listdir(fds))
    for i in range(1, 4000):
        h.pwrite(b"x" * 512, i * 2 * MiB)
    after = len(os.listdir(fds))
    assert after <= before + 2, "%d descriptors, then %d" % (before, after)
    h.flush()
    h.shutdown()
    s.stop()
    harness.check("folder/disk")


def main():
    for move in MOVES:
        moved_while_served(move, [], False)
        moved_while_served(move, ["nofilter"], True)
        moved_while_starting(move, [])
    moved_while_served(replace, [], True)
    moved_while_served(replace, ["nofilter", "noextents"], True)
    for move in rename, replace:
        moved_while_starting(move, ["nofilter"])
    back_in_place()
    what_it_refers_to()
    reopened_by_a_filter()
    descriptors([])
    descriptors(["nofilter"])


main()
