# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""What the tests in Python have in common: a temporary directory,
servers, images, and questions to QEMU's tools.

The environment is that of functions.sh: FILTER, ASAN_PRELOAD, SERVER,
and SEED for tests that roll dice.
"""

import atexit
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

try:
    import nbd
except ImportError:
    print("skipped: libnbd's Python module is not installed")
    sys.exit(77)

FILTER = os.path.realpath(
    os.environ.get("FILTER", "../filter/.libs/nbdkit-dirty-bitmap-filter.so"))
SERVER = os.environ.get("SERVER", "nbdkit")
PRELOAD = os.environ.get("ASAN_PRELOAD", "")
CONTEXT = "qemu:dirty-bitmap:"
HOLE, ZERO = 1, 2

# Sanitizers and busy machines are slow.
PATIENCE = 60

tmp = tempfile.mkdtemp(prefix="dirty-bitmap.")
servers = []


def _cleanup():
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
    os.chdir("/")
    shutil.rmtree(tmp, ignore_errors=True)


atexit.register(_cleanup)
os.chdir(tmp)


def requires(*tools):
    for tool in tools:
        if shutil.which(tool) is None:
            print("skipped: %s is not installed" % tool)
            sys.exit(77)


requires("nbdkit", "qemu-img")
if SERVER == "nbdkit" and not os.path.exists(FILTER):
    sys.exit("%s does not exist" % FILTER)


def seeded():
    """The dice.  Run again with SEED=... to see the same again."""
    seed = int(os.environ.get("SEED", random.SystemRandom().getrandbits(32)))
    print("SEED=%d" % seed, flush=True)
    return random.Random(seed)


def no_freelocale():
    """With libasan preloaded, stock nbdkit hangs at exit once it has
    printed an errno, because p11-kit's destructor calls freelocale.  So
    that frees nothing in these runs, and keeps a pointer to the locale,
    which LeakSanitizer would report.  Nor does dlclose do anything: when
    leaks are looked for, at exit, nbdkit has unloaded its filters, in
    whose names they are to be reported, and LeakSanitizer may itself
    crash."""
    path = os.path.join(tmp, "freelocale.so")
    if not os.path.exists(path):
        subprocess.run(
            [*os.environ.get("CC", "cc").split(), "-shared", "-fPIC",
             "-x", "c", "-", "-o", path], check=True,
            input=b"static void *volatile kept[4096]; "
                  b"static unsigned n;"
                  b"void freelocale (void *l);"
                  b"void freelocale (void *l) "
                  b"{ kept[__atomic_fetch_add (&n, 1, 0) % 4096] = l; }"
                  b"int dlclose (void *h);"
                  b"int dlclose (void *h) { (void) h; return 0; }")
    return path


def environment(sanitizer="detect_leaks=0"):
    """nbdkit's, with options for AddressSanitizer."""
    env = dict(os.environ)
    if PRELOAD:
        env["LD_PRELOAD"] = PRELOAD + " " + no_freelocale()
        env["ASAN_OPTIONS"] = sanitizer + ":abort_on_error=0"
        env["UBSAN_OPTIONS"] = "print_stacktrace=1"
    return env


def run(*args, status=0, **kwargs):
    """Run a command; its output.  None for a status that may be any."""
    p = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       timeout=120, **kwargs)
    out = p.stdout.decode("utf-8", "replace")
    if status is not None and p.returncode != status:
        raise AssertionError("%s: status %d\n%s" %
                             (" ".join(args), p.returncode, out))
    return out


def create(path, size, *bitmaps, options=""):
    """An image with bitmaps, each NAME or (NAME, GRANULARITY)."""
    opts = ["-o", options] if options else []
    run("qemu-img", "create", "-q", "-f", "qcow2", *opts, path, str(size))
    for bitmap in bitmaps:
        name, gran = bitmap if isinstance(bitmap, tuple) else (bitmap, None)
        run("qemu-img", "bitmap", "--add",
            *(["-g", str(gran)] if gran else []), path, name)


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def xxh128(path):
    """The checksum of a repository's file, as the manual tells."""
    return run("sh", "-c", '{ tail -c +4097 "$1"; head -c 4096 "$1"; } | '
               "xxh128sum", "sh", path).split()[0]


def check(path, leaks=False):
    """qemu-img check: no errors, and no leaks unless they are allowed."""
    p = subprocess.run(["qemu-img", "check", "-f", "qcow2", "--output=json",
                        path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    allowed = (0, 3) if leaks else (0,)
    assert p.returncode in allowed, \
        "qemu-img check %s: status %d\n%s\n%s" % (
            path, p.returncode, p.stdout.decode(), p.stderr.decode())


def flags(path, name):
    """The flags of a bitmap, also while the image is served."""
    info = json.loads(run("qemu-img", "info", "-U", "--output=json", path))
    for b in info["format-specific"]["data"].get("bitmaps", []):
        if b["name"] == name:
            return set(b["flags"])
    return None


def free_port():
    """A TCP port that is free at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def contents(path):
    """The guest's disk, as QEMU reads it from the image."""
    raw = os.path.join(tmp, "contents.raw")
    run("qemu-img", "convert", "-U", "--image-opts", "-O", "raw",
        "driver=qcow2,file.driver=file,file.filename=" + path, raw)
    with open(raw, "rb") as f:
        data = f.read()
    os.unlink(raw)
    return data


def disk_contents(image, disk=None):
    """The guest's disk: in the image, or in a raw file beside it."""
    if disk is None:
        return contents(image)
    with open(disk, "rb") as f:
        return f.read()


class Server:
    """A server on a Unix socket.

    Server(disk, "param=value", options=["-r"]) is
    nbdkit -r --filter=dirty-bitmap file disk param=value;
    Server(args=[...]) is nbdkit with these arguments;
    Server(disk, kind="qemu-nbd") is QEMU's server with all usable bitmaps.
    """

    count = 0

    def __init__(self, disk=None, *params, options=(), args=None,
                 kind=SERVER, **sanitizer):
        Server.count += 1
        self.socket = os.path.join(tmp, "sock%d" % Server.count)
        self.log = os.path.join(tmp, "log%d" % Server.count)
        self.uri = "nbd+unix:///?socket=" + self.socket
        pidfile = self.socket + ".pid"
        if kind == "qemu-nbd" and args is None:
            info = json.loads(run("qemu-img", "info", "--output=json", disk))
            command = ["qemu-nbd", "-t", "-e", "0", "-f", "qcow2", "-A",
                       "--discard=unmap", "-k", self.socket,
                       "--pid-file=" + pidfile]
            for b in info["format-specific"]["data"].get("bitmaps", []):
                if "in-use" not in b["flags"]:
                    command += ["-B", b["name"]]
            command += list(options) + [disk]
        else:
            if args is None:
                args = [*options, "--filter=" + FILTER, "file", disk, *params]
            command = ["nbdkit", "-f", "-U", self.socket, "-P", pidfile, *args]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log,
                                            env=environment(**sanitizer)
                                            if command[0] == "nbdkit"
                                            else None)
        servers.append(self)
        self.pid = self.process.pid
        deadline = time.monotonic() + PATIENCE
        while not os.path.exists(pidfile) or os.path.getsize(pidfile) == 0:
            if self.process.poll() is not None:
                raise AssertionError("the server did not start:\n" +
                                     self.messages())
            assert time.monotonic() < deadline, "the server hangs at start"
            time.sleep(0.005)

    def messages(self):
        with open(self.log, "rb") as f:
            return f.read().decode("utf-8", "replace")

    def connect(self, *contexts):
        h = nbd.NBD()
        for context in contexts:
            h.add_meta_context(context)
        h.connect_uri(self.uri)
        return h

    def stop(self, sig=signal.SIGTERM, status=0):
        """Stop it, and return how long that took.  A status of None is
        any that is not a signal."""
        start = time.monotonic()
        self.process.send_signal(sig)
        return self.ends(status, start)

    def ends(self, status=0, start=None):
        start = start or time.monotonic()
        try:
            got = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError("the server does not end:\n" +
                                 self.messages()) from None
        self.sane()
        assert got >= 0, "the server died of a signal:\n" + self.messages()
        assert status is None or got == status, "the server's exit status is %d\n%s" % (
            got, self.messages())
        return time.monotonic() - start

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.sane()

    def sane(self):
        for line in self.messages().splitlines():
            assert "Sanitizer:" not in line and \
                "runtime error:" not in line, self.messages()

    def alive(self):
        assert self.process.poll() is None, \
            "the server is gone (status %s)\n%s" % (self.process.returncode,
                                                    self.messages())


def refused(disk, *params, options=(), pattern=""):
    """nbdkit refuses the image by itself; what it says."""
    p = subprocess.run(["nbdkit", "-f", "-U", os.path.join(tmp, "refused"),
                        *options, "--filter=" + FILTER, "file", disk, *params],
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       stdin=subprocess.DEVNULL, timeout=PATIENCE,
                       env=environment())
    out = p.stdout.decode("utf-8", "replace")
    assert p.returncode == 1, "%s: status %d, not 1\n%s" % (
        disk, p.returncode, out)
    assert "Sanitizer" not in out and "runtime error" not in out, out
    assert pattern.lower() in out.lower(), out
    return out


def answers(sock):
    """Does an NBD server serve clients there?  QEMU's binds its socket before
    it opens the image, and a signal that ends it is lost until it serves."""
    try:
        h = nbd.NBD()
        h.connect_unix(sock)
        h.shutdown()
        return True
    except nbd.Error:
        return False


def until(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain: " + what
        time.sleep(0.01)


def listens(path):
    """Does a server listen on the socket?  It binds it a moment before.  To
    connect would tell, too, but some servers end after the first client."""
    with open("/proc/net/unix") as f:
        return any(line.rstrip("\n").endswith(" " + path) and
                   int(line.split()[3], 16) & 0x10000 for line in f)


def lives(pid):
    """Has the process not ended?  It may end at any moment."""
    try:
        with open("/proc/%d/stat" % pid) as f:
            return f.read().split(")")[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def both(ours, theirs):
    """The kinds in two maps of one disk, wherever one of them changes."""
    kinds = []
    for extents in ours, theirs:
        at, changes = 0, {}
        for n, kind in extents:
            changes[at] = kind
            at += n
        kinds.append(changes)
    now = [None, None]
    for at in sorted(kinds[0].keys() | kinds[1].keys()):
        now = [k.get(at, old) for k, old in zip(kinds, now)]
        yield now


def merge(extents):
    """Join neighbours of one type: [(length, type)]."""
    result = []
    for length, kind in extents:
        if result and result[-1][1] == kind:
            result[-1] = (result[-1][0] + length, kind)
        else:
            result.append((length, kind))
    return result


def block_status(h, context, count, offset, cmd_flags=0):
    """One request: [(length, type)] of one context."""
    found = []

    def extent(name, _, entries, error):
        if name == context:
            found.extend(zip(entries[0::2], entries[1::2]))

    h.block_status(count, offset, extent, cmd_flags)
    return found


def extents(h, context, step=1 << 31):
    """The whole disk in a context: [(length, type)], merged."""
    size = h.get_size()
    result = []
    offset = 0
    while offset < size:
        got = block_status(h, context, min(step, size - offset), offset)
        assert got, "no %s" % context
        result += got
        offset += sum(length for length, _ in got)
    assert offset == size
    return merge(result)


def granules(runs, granularity):
    """The dirty granules of a map, as a set of numbers."""
    result = set()
    offset = 0
    for length, kind in runs:
        if kind:
            result.update(range(offset // granularity,
                                -(-(offset + length) // granularity)))
        offset += length
    return result


def qemu_extents(path, name):
    """The map of a bitmap as qemu-nbd serves it."""
    h = nbd.NBD()
    h.add_meta_context(CONTEXT + name)
    h.connect_systemd_socket_activation(
        ["qemu-nbd", "-r", "-f", "qcow2", "-B", name, path])
    result = extents(h, CONTEXT + name)
    h.shutdown()
    return result
