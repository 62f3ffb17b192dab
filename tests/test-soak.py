# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""A soak: many connections that open, work, and vanish anyhow.

The clients (soak/soak.c) come over a Unix socket and TCP, with TLS and
without, with simple replies, structured ones, or extended headers.  They
end in good order, or are gone in the middle of a handshake, a request, or
a reply; and their processes are killed.  They know what every sector may
hold.

They work in rounds.  After each all of them are gone; then the server
has no thread, no descriptor and no memory more than it had, the disk
holds what was acknowledged (or sent without an answer), and the bitmaps
cover it.  The last round is ended by the server's TERM while all
connections work, and the image is judged by QEMU, and served again.

SECONDS_TO_RUN, CONNECTIONS and SEED in the environment change the
test; make soak runs ten minutes of 200 connections.  Under
AddressSanitizer leaks are looked for at the end.
"""

import os
import statistics
import subprocess
import time

import harness
from harness import CONTEXT, PATIENCE, Server
from qcow2image import Image

seconds = float(os.environ.get("SECONDS_TO_RUN") or 4)
connections = int(os.environ.get("CONNECTIONS") or 40)
rnd = harness.seeded()

SOAK = os.path.join(os.environ.get("builddir", "."), "soak/soak")
SECTOR = 512
NR_SECTORS = max(64, connections) * 2048 + 1234
BITMAPS = {"fine": 512, "usual": 65536, "coarse": 1 << 20}
OFF = "off"
SECONDS_A_ROUND = 20
nr_rounds = max(3, round(seconds / SECONDS_A_ROUND))

# How much more memory than after the first rounds may be in use when
# all clients are gone, in KiB.  The allocator keeps what threads gave
# back, and how many threads there are at once is chance.
WARM_ROUNDS = max(2, nr_rounds // 5)
SLACK = 8 * 1024
# And without sanitizers, how much more than before all of them: caches,
# bitmaps, and what malloc keeps.
REST = 32 * 1024
# AddressSanitizer keeps 0.2 KiB of each thread that has ended, of which a
# connection has four or five; ThreadSanitizer all memory that was ever
# used.  What is lost is seen by LeakSanitizer, what only grows without
# sanitizers.
SLACK_A_LIFE = 1 if harness.PRELOAD else 0


def soak(*args):
    p = subprocess.run([SOAK, *map(str, args)], stdout=subprocess.PIPE,
                       stderr=subprocess.PIPE, timeout=seconds + 300)
    out = p.stdout.decode() + p.stderr.decode()
    assert p.returncode == 0, "soak %s: status %d\n%s" % (
        args[0], p.returncode, out)
    return out.strip()


def links(folder):
    found = []
    for name in os.listdir(folder):
        try:
            found.append(os.readlink(os.path.join(folder, name)))
        except OSError:
            pass                # It was closed meanwhile.
    return found


class Usage:
    """What the server uses, at a moment."""

    def __init__(self, pid):
        with open("/proc/%d/status" % pid) as f:
            status = dict(line.split(":", 1) for line in f)
        self.threads = int(status["Threads"])
        self.rss = int(status["VmRSS"].split()[0])
        # The image is opened once more each time that it has grown.
        self.fds = sum(1 for link in links("/proc/%d/fd" % pid)
                       if not link.endswith("/disk.qcow2"))

    def __str__(self):
        return "%d KiB, %d threads, %d descriptors" % (
            self.rss, self.threads, self.fds)


class Peak:
    def __init__(self):
        self.rss = self.threads = self.fds = 0

    def add(self, usage):
        for name in "rss", "threads", "fds":
            setattr(self, name, max(getattr(self, name),
                                    getattr(usage, name)))


def verify(contents, bits):
    """The contents, from somewhere, and the granules of the bitmaps."""
    soak("verify", "model", contents, "changes")
    with open("changes", "rb") as f:
        changes = f.read()
    assert len(changes) == NR_SECTORS
    nr_changed = changes.count(2)
    for name, granularity in BITMAPS.items():
        dirty = bits(name)
        per = granularity // SECTOR
        for i in range(-(-NR_SECTORS // per)):
            part = changes[i * per:(i + 1) * per]
            if 2 in part:
                assert i in dirty, \
                    "%s: granule %d was changed and is clean" % (name, i)
            elif part.strip(b"\0") == b"":
                assert i not in dirty, \
                    "%s: granule %d was never written and is dirty" % (name, i)
    os.unlink(contents)
    return nr_changed


def verify_live(server):
    harness.run("nbdcopy", server.uri, "contents")
    h = server.connect(*(CONTEXT + name for name in BITMAPS))

    def bits(name):
        return harness.granules(harness.extents(h, CONTEXT + name),
                                BITMAPS[name])

    nr_changed = verify("contents", bits)
    h.shutdown()
    return nr_changed


def run_round(server, *stop):
    """The peak of what the server uses meanwhile."""
    peak = Peak()
    with open("soak.log", "w+") as log:
        p = subprocess.Popen([SOAK, "run", "model", server.socket, str(port),
                              str(int(seconds * 1000 / nr_rounds)),
                              *map(str, stop)], stdout=log, stderr=log)
        try:
            while p.poll() is None:
                if server.process.poll() is None:
                    try:
                        peak.add(Usage(server.pid))
                    except (OSError, KeyError):
                        pass            # It has just ended.
                time.sleep(0.2)
        finally:
            p.kill()
            p.wait()
        log.seek(0)
        said = log.read().strip()
    assert p.returncode == 0, "soak run: status %d\n%s\n%s" % (
        p.returncode, said, server.messages())
    return peak, said


def wait_for_base(server, base):
    """No thread and no descriptor is left of clients that are gone."""
    deadline = time.monotonic() + 2 * PATIENCE
    while True:
        usage = Usage(server.pid)
        if usage.threads == base.threads and usage.fds == base.fds:
            return usage
        assert time.monotonic() < deadline, \
            "all clients are gone, and the server has %s; at the start " \
            "it had %s\n%s" % (usage, base, remains(server.pid))
        time.sleep(0.05)


def remains(pid):
    """What the descriptors are, and where threads wait, as far as the
    kernel tells."""
    found = links("/proc/%d/fd" % pid)
    for tid in os.listdir("/proc/%d/task" % pid):
        try:
            with open("/proc/%d/task/%s/wchan" % (pid, tid)) as f:
                found.append(f.read())
        except OSError:
            pass
    return "\n".join(found)


def judge_memory(resting, peaks, lives):
    """After warming up, memory is flat: both at rest and at work.  What an
    allocator of a sanitizer keeps goes up and down, so no one round is
    judged by itself."""
    warm = max(resting[:WARM_ROUNDS])
    allowed = warm + SLACK + \
        (lives[-1] - lives[WARM_ROUNDS - 1]) * SLACK_A_LIFE
    assert statistics.median(resting[-5:]) <= allowed, \
        "the server at rest grows: %s KiB" % resting
    assert max(peaks[WARM_ROUNDS:]) <= \
        1.3 * max(peaks[:WARM_ROUNDS]) + allowed - warm, \
        "the server at work grows: %s KiB" % peaks


def start():
    """The server, with a thorough look at its memory."""
    os.environ["LSAN_OPTIONS"] = "print_suppressions=0"
    return Server(args=[
        "--tls=on", "--tls-psk=keys", "--filter=" + harness.FILTER, "file",
        "disk.qcow2", "dirty-bitmap-listen=127.0.0.1:%d" % port,
        # Of those that are gone some are still being worked for.
        "dirty-bitmap-max-connections=%d" % (connections * 4 + 16),
        "dirty-bitmap-handshake-timeout=120",
        # A client that is slow because the machine is busy is not to be
        # cut off for others that wait for memory.
        "dirty-bitmap-max-memory=%dM" % (connections * 16 + 256)],
        sanitizer="detect_leaks=1:quarantine_size_mb=4:"
                  "thread_local_quarantine_size_kb=16")


harness.requires("nbdcopy")
if not os.path.exists(SOAK):
    print("skipped: %s was not built" % SOAK)
    raise SystemExit(77)

port = harness.free_port()
with open("keys", "w") as f:
    f.write("alice:00112233445566778899aabbccddeeff\n")
harness.create("disk.qcow2", NR_SECTORS * SECTOR, *BITMAPS.items(), OFF)
harness.run("qemu-img", "bitmap", "--disable", "disk.qcow2", OFF)
off = Image("disk.qcow2").bitmap(OFF).raw()
soak("create", "model", NR_SECTORS, connections, rnd.getrandbits(32))

server = start()
# Whatever is loaded for a first client stays.
verify_live(server)
time.sleep(0.5)
base = Usage(server.pid)
print("before:", base, flush=True)
resting, peaks, lives = [], [], []
for i in range(nr_rounds - 1):
    peak, said = run_round(server)
    usage = wait_for_base(server, base)
    nr_changed = verify_live(server)
    wait_for_base(server, base)
    if not harness.PRELOAD:
        assert usage.rss - base.rss <= REST, "at rest %s, before %s" % (
            usage, base)
    resting.append(usage.rss)
    peaks.append(peak.rss)
    lives.append(int(said.split()[0]))
    print("round %d: %s; at rest %s; peak %d KiB, %d threads, "
          "%d descriptors; %d sectors changed" % (
              i + 1, said, usage, peak.rss, peak.threads, peak.fds,
              nr_changed), flush=True)
    server.alive()
    server.sane()

# TERM, while all work.
peak, said = run_round(server, server.pid)
server.ends()
print("last round: %s" % said, flush=True)

harness.check("disk.qcow2")
image = Image("disk.qcow2")
assert image.bitmap(OFF).raw() == off, "the disabled bitmap has changed"
for name in BITMAPS:
    assert not image.bitmap(name).marked(), "%s is in use" % name
harness.run("qemu-img", "convert", "-O", "raw", "disk.qcow2", "contents")
nr_changed = verify("contents", lambda name: image.bitmap(name).bits())
print("%d sectors changed" % nr_changed)

# It goes on, and nothing is changed by looking at it.
before = harness.sha256("disk.qcow2")
server = start()
verify_live(server)
server.stop()
assert harness.sha256("disk.qcow2") == before

if len(resting) > WARM_ROUNDS and "tsan" not in harness.PRELOAD:
    judge_memory(resting, peaks, lives)
