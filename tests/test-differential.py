#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Random requests to images of every kind that QEMU makes, served by us
and by QEMU in turns, against a model and against each other: the data,
the kinds of extents, every bitmap bit by bit, the snapshots, and what
qemu-img check says.  Servers are stopped, or killed.

Each turn is an image made of one row of a covering array of the options
(imagematrix.py), and a few sessions on it.

SEED=N replays a run, SEED=N TURN=M one turn of it; ROUNDS=N is the number
of turns, ROUNDS=0 all rows.  ONLY='cluster=512 backing=None' fixes options
(the seed counts for the rows that are left).  KEEP=DIR keeps the files of
a turn that failed.
"""

import os
import random
import shutil
import sys
import time

import comparison
import harness
import imagematrix
import pairwise
from comparison import BASE, DEPTH
from diskmodel import Bitmap
from harness import CONTEXT, Server
from imagematrix import DISK
from qcow2image import Image
from requestload import Load

ROUNDS = int(os.environ.get("ROUNDS", "12"))
SEED = int(os.environ.get("SEED", random.SystemRandom().getrandbits(32)))
TURN = os.environ.get("TURN")


class Turn(Load):
    """One image, and what is done to it."""

    def __init__(self, row, rnd):
        self.row = row
        super().__init__(rnd, *imagematrix.build(row, rnd))
        self.log = []
        self.server = None
        self.leaks = False      # a server was killed, so there may be some
        self.counts = {"operations": 0, "sessions": 0, "kills": 0}
        self.names = 0

    def note(self, text):
        self.log.append(text)

    # -----------------------------------------------------------------
    # Requests.

    def requests(self, conns, batches):
        for _ in range(batches):
            ops = self.batch()
            self.note("; ".join(map(str, ops)))
            self.wait(self.send(conns, ops))
            self.counts["operations"] += len(ops)
            self.model.done(
                ops, lambda offset, count: conns[0].pread(count, offset))
            self.look(conns)

    def look(self, conns):
        """With no request in flight, sometimes, on any connection."""
        rnd = self.rnd
        if rnd.random() >= 0.15:
            return
        h = rnd.choice(conns)
        if self.ours and rnd.random() < 0.5:
            comparison.kinds(harness.extents(h, BASE), self.model,
                             "in the middle")
        elif self.ours:
            comparison.bitmaps(h, self.model, "in the middle")
        else:
            comparison.bitmaps(h, self.model, "in the middle, QEMU", False)
        self.counts["operations"] += 1

    # -----------------------------------------------------------------
    # Sessions.

    def connect(self):
        contexts = [BASE, DEPTH] + [CONTEXT + n for n in self.model.bitmaps]
        return [self.server.connect(*contexts)
                for _ in range(self.rnd.choice([1, 1, 2, 3]))]

    def plain(self):
        """Is it clear what kind a request makes a cluster?"""
        row = self.row
        return row["backing"] is None and row["data_file"] is None and \
            not row["extended_l2"]

    def our_session(self):
        rnd, model = self.rnd, self.model
        params = []
        if rnd.random() < 0.5:
            params.append("dirty-bitmap-cache-size=1M")
        if model.version > 2 and rnd.random() < 0.1:
            self.our_bitmap(params)
        self.keeps = rnd.random() < 0.5
        if not self.keeps:
            params.append("dirty-bitmap-crash=mark")
        model.may_crash = rnd.random() < 0.2
        model.flushed()
        self.note("--- nbdkit " + " ".join(params))
        self.fixed = self.fixed_parts()
        self.ours = True
        self.server = Server(DISK, *params, kind="nbdkit")
        conns = self.connect()
        self.start_of_ours(conns[0])
        self.requests(conns, rnd.randint(1, 16))
        extents = harness.extents(conns[0], BASE)
        comparison.kinds(extents, model, "at the end")
        comparison.disk(conns[0], model.disk, "at the end", extents)
        comparison.bitmaps(conns[0], model, "at the end")
        if model.may_crash:
            self.kill(conns)
        else:
            depths = harness.extents(conns[0], DEPTH)
            self.stop(conns)
            self.compare_at_rest("after a stop", extents, depths)

    def our_bitmap(self, params):
        name = self.new_name()
        granularity = imagematrix.draw_granularity(self.rnd, self.model.size)
        params += ["dirty-bitmap=" + name,
                   "dirty-bitmap-granularity=%d" % granularity]
        self.model.bitmaps[name] = Bitmap(self.model.size, granularity)

    def start_of_ours(self, h):
        model = self.model
        extents = harness.extents(h, BASE)
        model.kinds = None
        comparison.kinds(extents, model, "at the start")
        comparison.disk(h, model.disk, "at the start", extents)
        comparison.bitmaps(h, model, "at the start")
        if self.plain():
            comparison.adopt_kinds(extents, model)

    def fixed_parts(self):
        """What must not change under us: the bytes of disabled bitmaps,
        and the size of a raw data file."""
        parts = {}
        if self.model.version > 2:
            found = Image(DISK).bitmaps()
            parts = {name: found[name].raw()
                     for name, b in self.model.usable().items()
                     if not b.enabled}
        if self.row["data_file"] == "raw":
            parts["size"] = os.path.getsize(DISK + ".data")
        return parts

    def check_fixed(self):
        assert not self.ours or self.fixed_parts() == self.fixed, \
            "I4: a disabled bitmap has changed, or a raw data file's size"

    def qemu_session(self):
        rnd, model, row = self.rnd, self.model, self.row
        model.kinds = None
        self.ours = False
        if rnd.random() < 0.3:
            self.qemu_io_session()
            return
        model.may_crash = rnd.random() < 0.12 and not row["compression"]
        model.flushed()
        self.note("--- qemu-nbd")
        self.server = Server(DISK, kind="qemu-nbd")
        conns = self.connect()
        self.requests(conns, rnd.randint(1, 8))
        comparison.disk(conns[0], model.disk, "at the end of QEMU's")
        comparison.bitmaps(conns[0], model, "at the end of QEMU's", False)
        if model.may_crash:
            self.kill(conns)
        else:
            self.stop(conns)
            self.compare_at_rest("after QEMU")

    def qemu_io_session(self):
        self.note("--- qemu-io")
        model, rnd = self.model, self.rnd
        told = imagematrix.fill(DISK, model.disk, rnd, self.row, self.places,
                                self.row["compression"])
        self.note("; ".join(told))
        self.counts["operations"] += len(told)
        if model.version > 2:
            found = Image(DISK).bitmaps()
            for name, bitmap in model.usable().items():
                if not bitmap.enabled:
                    continue
                dirty = bytearray(len(bitmap.dirty))
                for n in found[name].bits():
                    dirty[n] = 1
                bitmap.adopt(dirty, "after qemu-io: " + name, False)
        self.compare_at_rest("after qemu-io")

    def stop(self, conns):
        for h in conns:
            if self.rnd.random() < 0.7:
                h.shutdown()
        self.server.stop()
        self.check_fixed()

    def kill(self, conns):
        """SIGKILL, perhaps with requests in flight."""
        rnd, model = self.rnd, self.model
        flying = self.batch() if rnd.random() < 0.7 else []
        self.note("--- killed: " + "; ".join(map(str, flying)))
        self.send(conns, flying)
        if flying:
            time.sleep(rnd.choice([0, 0.0005, 0.002, 0.01]))
        self.server.kill()
        self.check_fixed()
        self.counts["kills"] += 1
        self.leaks = True
        comparison.check(DISK, True, "after a kill")
        h = comparison.qemu(DISK, model.__class__(model.disk, 512, 2))
        model.crashed(flying, lambda offset, count: h.pread(count, offset))
        h.shutdown()
        self.bitmaps_after_kill()
        model.kinds = None
        self.compare_at_rest("after a kill")
        if rnd.random() < 0.5 and not (model.snapshots and model.bitmaps):
            # QEMU 7.2 loses the snapshots of an image that has bitmaps.
            harness.run("qemu-img", "check", "-q", "-r", "all", "-f",
                        "qcow2", DISK, status=None)
            self.leaks = False
            comparison.check(DISK, False, "after a kill and a repair")

    def bitmaps_after_kill(self):
        """I3: marked, or complete.  Bits past what we know are those of
        the requests that were in flight."""
        if self.model.version < 3:
            return
        found = Image(DISK).bitmaps()
        for name, bitmap in self.model.usable().items():
            if found[name].marked():
                assert bitmap.enabled or not self.ours, \
                    "I4: %s is in use" % name
                bitmap.broken = True
                continue
            dirty = bytearray(len(bitmap.dirty))
            for n in found[name].bits():
                dirty[n] = 1
            # Bits ahead are more than was changed.
            bitmap.adopt(dirty, "I3: " + name, self.ours and not (
                self.keeps and bitmap.enabled))
        for bitmap in self.model.bitmaps.values():
            bitmap.maybe = []

    def compare_at_rest(self, where, extents=None, depths=None):
        model = self.model
        comparison.check(DISK, self.leaks, where)
        comparison.bits(DISK, model, where)
        theirs = comparison.qemu_view(DISK, model, where)
        if extents is not None:
            comparison.extents_with_qemu(DISK, extents, where)
        if depths is not None:
            assert depths == theirs, "%s: %s is %s, for QEMU %s" % (
                where, DEPTH, depths, theirs)
        if self.row["data_file"] == "raw":
            comparison.raw_data_file(DISK + ".data", model, where)
        for name, snapshot in model.snapshots.items():
            if self.rnd.random() < 0.3:
                self.our_snapshot(name, snapshot)

    def our_snapshot(self, name, snapshot):
        server = Server(DISK, "dirty-bitmap-snapshot=" + name, kind="nbdkit",
                        options=["-r"])
        h = server.connect(BASE)
        comparison.disk(h, snapshot, "snapshot " + name)
        h.shutdown()
        server.stop()

    # -----------------------------------------------------------------
    # What qemu-img does between sessions.

    def new_name(self):
        self.names += 1
        return "n%d" % self.names

    def bitmap_command(self, action, name, *args):
        self.note("qemu-img bitmap %s %s %s" % (action, name, args))
        harness.run("qemu-img", "bitmap", action, *args, DISK, name)

    def manage_bitmaps(self):
        model, rnd = self.model, self.rnd
        for name, bitmap in model.bitmaps.items():
            if bitmap.broken and rnd.random() < 0.7:
                self.bitmap_command("--remove", name)
                imagematrix.add_bitmap(DISK, model, name, bitmap.granularity,
                                       bitmap.enabled)
        usable = model.usable()
        if rnd.random() < 0.5 or not usable:
            return
        name = rnd.choice(sorted(usable))
        bitmap = usable[name]
        action = rnd.choice(["add", "remove", "clear", "enable", "disable",
                             "merge"])
        if action == "add":
            imagematrix.add_bitmap(
                DISK, model, self.new_name(),
                imagematrix.draw_granularity(rnd, model.size),
                rnd.random() < 0.8)
        elif action == "remove" and len(model.bitmaps) > 1:
            self.bitmap_command("--remove", name)
            del model.bitmaps[name]
        elif action == "clear":
            self.bitmap_command("--clear", name)
            bitmap.clear()
        elif action in ("enable", "disable"):
            self.bitmap_command("--" + action, name)
            bitmap.enabled = action == "enable"
        elif action == "merge" and len(usable) > 1:
            other = rnd.choice(sorted(set(usable) - {name}))
            self.bitmap_command("--merge", name, other)
            bitmap.merge(usable[other])

    def snapshot_command(self, option, name):
        self.note("qemu-img snapshot %s %s" % (option, name))
        harness.run("qemu-img", "snapshot", option, name, DISK)

    def manage_snapshots(self):
        model, rnd = self.model, self.rnd
        if self.row["snapshots"] == 0 or rnd.random() < 0.4:
            return
        action = rnd.choice(["create", "delete", "apply"])
        if action == "create" and len(model.snapshots) < 2:
            name = self.new_name()
            self.snapshot_command("-c", name)
            model.snapshots[name] = model.disk.copy()
        elif action == "delete" and model.snapshots:
            name = rnd.choice(sorted(model.snapshots))
            self.snapshot_command("-d", name)
            del model.snapshots[name]
        elif action == "apply" and model.snapshots and \
                not model.bitmaps and self.row["refcount_bits"] > 2:
            name = rnd.choice(sorted(model.snapshots))
            self.snapshot_command("-a", name)
            model.disk = model.snapshots[name].copy()

    def run(self):
        ours = self.row["first"] == "us"
        for _ in range(self.rnd.randint(3, 5)):
            if ours:
                self.our_session()
            else:
                self.qemu_session()
            self.counts["sessions"] += 1
            self.manage_bitmaps()
            self.manage_snapshots()
            ours = self.rnd.random() < 0.65


def report(number, turn, row):
    print("\nreplay: SEED=%d TURN=%d %s" % (SEED, number, sys.argv[0]))
    print("options: %s" % row)
    if turn is not None:
        print("size %d; what was done:" % turn.model.size)
        print("\n".join(turn.log))
        if turn.server is not None:
            print("the last server said:\n" + turn.server.messages())
    if os.environ.get("KEEP"):
        shutil.copytree(harness.tmp, os.environ["KEEP"], dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("sock*"))
    sys.stdout.flush()


def one_turn(number, row):
    turn = None
    rnd = random.Random("%d/%d" % (SEED, number))
    start = time.monotonic()
    try:
        turn = Turn(row, rnd)
        turn.run()
    except BaseException:
        report(number, turn, row)
        raise
    print("turn %d: %s, %d operations, %d sessions, %d kills, %.1f s" % (
        number, " ".join("%s=%s" % item for item in row.items()),
        *turn.counts.values(), time.monotonic() - start), flush=True)
    for name in os.listdir("."):
        os.unlink(name)
    return turn.counts


def main():
    print("SEED=%d" % SEED, flush=True)
    harness.requires("qemu-io", "qemu-nbd")
    options = dict(imagematrix.OPTIONS)
    for fixed in os.environ.get("ONLY", "").split():
        name, value = fixed.split("=")
        options[name] = [v for v in options[name] if str(v) == value]
    rows = pairwise.rows(options, imagematrix.possible, random.Random(SEED))
    rounds = ROUNDS or len(rows)
    turns = [int(TURN)] if TURN else range(rounds)
    total = {}
    for number in turns:
        counts = one_turn(number, rows[number % len(rows)])
        for name, n in counts.items():
            total[name] = total.get(name, 0) + n
    print("%d turns of %d rows: %s" % (len(turns), len(rows), total))


main()
