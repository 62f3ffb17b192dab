#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""kill -9 at many instants of a backup, a prune and a restore: each point in
the list is what it was, the next run works, and the bitmap loses nothing: the
next point is the disk at its moment.  The instants are those before each call
that makes something durable, renames or removes a file, and random ones.

POINTS=N kills more often at random; SEED=N replays (as far as time can
be)."""

import os
import subprocess
import time

import backups
import harness
from backups import listed, popen, sound, tool
from harness import Server
from qmp import Qmp

harness.requires("qemu-nbd")
dice = harness.seeded()

MIB = 1 << 20
SIZE = 8 * MIB + 512
POINTS = int(os.environ.get("POINTS", 24))
ctl_sock = os.path.join(harness.tmp, "ctl.sock")

# Before the call with the number KILL_AT the process is killed.
STEPS = br"""
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
static void step (void)
{
  static int n;
  const char *at = getenv ("KILL_AT");
  if (at != NULL && ++n == atoi (at))
    kill (getpid (), SIGKILL);
}
int fsync (int fd) { step (); return syscall (SYS_fsync, fd); }
int fdatasync (int fd) { step (); return syscall (SYS_fdatasync, fd); }
int renameat (int a, const char *b, int c, const char *d)
{ step (); return syscall (SYS_renameat2, a, b, c, d, 0); }
int rename (const char *b, const char *d)
{ return renameat (AT_FDCWD, b, AT_FDCWD, d); }
int unlinkat (int a, const char *b, int c)
{ step (); return syscall (SYS_unlinkat, a, b, c); }
"""


def steps_library():
    path = os.path.join(harness.tmp, "steps.so")
    subprocess.run([*os.environ.get("CC", "cc").split(), "-shared", "-fPIC",
                    "-fno-builtin", "-w", "-D_GNU_SOURCE", "-x", "c", "-",
                    "-o", path], check=True, input=STEPS)
    return path


class Kills:
    def __init__(self):
        harness.create("disk.qcow2", SIZE)
        self.server = Server("disk.qcow2", "dirty-bitmap-control=" + ctl_sock)
        self.q = Qmp(ctl_sock)
        self.client = self.server.connect()
        self.moments = {}       # what the disk was, by the point's number
        self.takes = {}         # seconds that each command takes
        self.whole = 0          # commands that ended before the kill
        self.change()
        self.next_point()

    def change(self):
        for _ in range(dice.randrange(1, 6)):
            count = dice.choice((512, 4096, 70000, MIB))
            self.client.pwrite(dice.randbytes(count),
                               dice.randrange(SIZE - count))

    def disk(self):
        return bytes(self.client.pread(SIZE, 0))

    def backup(self):
        return ["--control=" + ctl_sock, self.server.uri, "repo"]

    def next_point(self):
        data = self.disk()
        tool("--quiet", *self.backup())
        self.moments[listed("repo")[-1]["number"]] = data

    def kill(self, kind, *args):
        """Kill the command at some instant."""
        began = time.monotonic()
        p = popen(*args)
        # Most instants are in what it usually takes.
        time.sleep(dice.random() * 1.2 * self.takes.get(kind, 0.03))
        p.kill()
        status, out, err = p.wait(), p.stdout.read(), p.stderr.read()
        p.stdout.close()
        p.stderr.close()
        assert status in (0, -9), (args, err)
        if status == 0:
            self.whole += 1
            took = time.monotonic() - began
            self.takes[kind] = min(took, self.takes.get(kind, took))

    def dies_at(self, library, n, *args):
        """The command is killed before its step n; false: it has ended."""
        env = dict(backups.ENV, LD_PRELOAD=library, KILL_AT=str(n))
        env["ASAN_OPTIONS"] += ":verify_asan_link_order=0"
        p = subprocess.run([backups.TOOL, *args], env=env,
                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, timeout=harness.PATIENCE)
        backups.sane(args, 0, p.stderr.decode())
        assert p.returncode in (0, -9), (args, p.stderr)
        return p.returncode == -9

    def step_by_step(self):
        library = steps_library()
        for kind, least in ("backup", 7), ("prune", 9), ("restore", 1):
            n = 1
            while self.step(library, kind, n):
                n += 1
            print("%s: %d steps" % (kind, n - 1), flush=True)
            assert n > least, (kind, n)

    def step(self, library, kind, n):
        while len(listed("repo")) < 3:
            self.change()
            self.next_point()
        before = [p["number"] for p in listed("repo")]
        if kind == "backup":
            self.change()
            self.moments[before[-1] + 1] = self.disk()
            died = self.dies_at(library, n, *self.backup())
        elif kind == "prune":
            died = self.dies_at(library, n, "--prune", "--keep=2", "repo")
        else:
            died = self.dies_at(library, n, "--restore", "--force", "repo",
                                "killed.raw")
        self.see_whole(kind, before)
        return died

    def verify(self):
        """Every point, without a change of the repository and after it."""
        tool("--quiet", "--verify", "repo")
        for point in listed("repo"):
            number = point["number"]
            assert backups.raw("repo", point["file"]) == \
                self.moments[number], number
            if dice.randrange(4) == 0:
                tool("--quiet", "--restore", "--force", "repo@%d" % number,
                     "out.raw")
                with open("out.raw", "rb") as f:
                    assert f.read() == self.moments[number]

    def round(self):
        kind = dice.choice(["backup"] * 3 + ["prune"] * 2 + ["restore"])
        before = [p["number"] for p in listed("repo")]
        if kind == "backup":
            self.change()
            self.moments[before[-1] + 1] = self.disk()
            self.kill(kind, *self.backup())
        elif kind == "prune":
            self.kill(kind, "--prune", "--keep=%d" % dice.randrange(1, 4),
                      "repo")
        else:
            self.kill(kind, "--restore", "--force", "repo", "killed.raw")
        self.see_whole(kind, before)

    def see_whole(self, kind, before):
        after = [p["number"] for p in listed("repo")]
        if kind == "prune":
            assert after == before[-len(after):], (before, after)
        else:
            assert after in (before, before + [before[-1] + 1]), (
                kind, before, after)
            assert after == before or kind == "backup"
        self.verify()
        self.change()
        self.next_point()
        sound("repo")
        assert self.q.ask("backup-list") == []
        self.verify_last()
        for name in os.listdir("."):
            if name.startswith("killed.raw.new-"):
                os.unlink(name)

    def verify_last(self):
        last = listed("repo")[-1]
        assert last["type"] == "increment", last
        assert backups.raw("repo", last["file"]) == \
            self.moments[last["number"]]

    def run(self):
        self.step_by_step()
        for n in range(POINTS):
            self.round()
            if len(listed("repo")) > 6:
                tool("--quiet", "--prune", "--keep=3", "repo")
                self.verify()
        self.client.shutdown()
        self.server.stop()
        print("%d kills, of which %d came too late" % (POINTS, self.whole))
        assert POINTS < 20 or self.whole < POINTS * 0.6


Kills().run()
