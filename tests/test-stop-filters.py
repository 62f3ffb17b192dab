#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Filters below that sleep (delay, rate, retry, retry-request) fail every
request once nbdkit quits.  By then everything is stored, whatever ends
nbdkit: each of its signals, several of them, the end of the command of
--run or of the client of -s, and filters above that let it quit when a
client has gone.
"""

import os
import shutil
import signal
import subprocess
import time

import harness
from harness import Server, lives, nbd

FILTER = "--filter=" + harness.FILTER
DELAY = [FILTER, "--filter=delay", "file", "disk.qcow2", "wdelay=30ms"]


def create():
    harness.create("disk.qcow2", 64 << 20, ("b", 65536))


CHANGED = {80, 81, 320}         # granules


def write(h):
    """Changes of which nothing is flushed; some clusters are given up."""
    h.pwrite(b"x" * 131072, 5 << 20)
    h.trim(65536, 5 << 20)
    h.pwrite(b"y" * 512, 20 << 20)


def dirty(path):
    return harness.granules(harness.qemu_extents(path, "b"), 65536)


def stored(leaks=False):
    harness.check("disk.qcow2", leaks)
    assert harness.flags("disk.qcow2", "b") == {"auto"}, "it is in use"
    assert dirty("disk.qcow2") == CHANGED, dirty("disk.qcow2")


def quiet(server):
    for line in server.messages().splitlines():
        for word in ("cannot write", "could not", "may be lost"):
            assert word not in line, server.messages()


def by_signal(args, sig=signal.SIGTERM, again=0, idle=True):
    create()
    server = Server(args=args)
    h = server.connect()
    write(h)
    if not idle:
        h.shutdown()
    for _ in range(again):
        server.process.send_signal(sig)
        time.sleep(0.02)
    server.stop(sig)
    quiet(server)
    stored()


def flaky(sleeper):
    """Storage of which a write fails now and then."""
    script = os.path.join(harness.tmp, "flaky.sh")
    with open(script, "w") as f:
        f.write("""#!/usr/bin/env bash
cd %s
unset LD_PRELOAD        # no sanitizer is meant for dd
case $1 in
  get_size) stat -Lc %%s disk.qcow2 ;;
  can_write | can_flush | flush) ;;
  thread_model) echo parallel ;;
  pread) dd iflag=skip_bytes,count_bytes skip=$4 count=$3 \\
            if=disk.qcow2 status=none ;;
  pwrite) if rm fail 2>/dev/null; then echo EIO >&2; exit 1; fi
          dd oflag=seek_bytes conv=notrunc seek=$4 of=disk.qcow2 \\
             status=none ;;
  *) exit 2 ;;
esac
""" % harness.tmp)
    os.chmod(script, 0o755)
    create()
    os.truncate("disk.qcow2", 2 << 20)
    delay = "retry-delay=1" if sleeper == "retry" else "retry-request-delay=1"
    server = Server(args=[FILTER, "--filter=" + sleeper, "sh", script, delay])
    h = server.connect()
    h.pwrite(b"x" * 65536, 5 << 20)
    h.pwrite(b"x" * 65536, 81 << 16)
    h.pwrite(b"y" * 512, 20 << 20)
    # The first write at the end fails, and is tried again a second later.
    open("fail", "w").close()
    server.stop()
    assert not os.path.exists("fail")
    stored()


def last_client(above, *params, vanish=False):
    """The filter above lets nbdkit quit when its only client has gone."""
    create()
    if os.path.exists("event"):
        os.unlink("event")
    server = Server(args=["--filter=" + above, *DELAY, *params])
    if vanish:
        code = ("import nbd, os; h = nbd.NBD(); h.connect_uri('%s');"
                "h.pwrite(b'x' * 131072, 5 << 20); h.trim(65536, 5 << 20);"
                "h.pwrite(b'y' * 512, 20 << 20); os._exit(0)" % server.uri)
        subprocess.run(["/usr/bin/python3", "-c", code], check=True)
    else:
        h = server.connect()
        write(h)
        open("event", "w").close()      # for exitwhen
        h.shutdown()
    server.ends()
    quiet(server)
    stored()


def is_stored():
    """Does a copy of the image, taken now, have the bits of the changes?"""
    if harness.flags("disk.qcow2", "b") != {"auto"}:
        return False
    shutil.copy("disk.qcow2", "copy.qcow2")
    return dirty("copy.qcow2") >= CHANGED


def stuck(crash):
    """A request sleeps for longer than anybody waits: what was acknowledged
    is stored meanwhile, and the end comes when nbdkit's sleep is ended.
    Then some versions of delay fail writes, so what bits ahead have too many
    is tidied before."""
    create()
    harness.run("qemu-io", "-f", "qcow2", "-c", "write 40M 64k", "disk.qcow2")
    harness.run("qemu-img", "bitmap", "--clear", "disk.qcow2", "b")
    server = Server(args=[FILTER, "--filter=delay", "file", "disk.qcow2",
                          "delay-cache=60", "dirty-bitmap-crash=" + crash])
    h = server.connect()
    write(h)
    h.aio_cache(65536, 40 << 20)
    time.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 30
    while not is_stored():
        server.alive()
        assert time.monotonic() < deadline, "nothing is stored meanwhile"
        time.sleep(0.1)
    server.alive()
    # The cluster that was trimmed is given back when the request has ended,
    # which some versions of delay have no write come to: it is leaked then.
    server.ends(None)
    leaked = server.process.returncode == 1
    assert server.process.returncode == leaked
    if leaked:
        assert "cannot write a refcount block" in server.messages()
    stored(leaked)


SLEEPS = 40     # seconds


def sleeping_flush(*params):
    """A client's flush sleeps for longer than anybody waits, and what is to be
    stored has to wait for it: nbdkit ends it after the same 5 seconds."""
    script = os.path.join(harness.tmp, "noflush.sh")
    with open(script, "w") as f:
        f.write("""#!/usr/bin/env bash
cd %s
unset LD_PRELOAD        # no sanitizer is meant for dd
case $1 in
  get_size) stat -Lc %%s disk.qcow2 ;;
  can_write | can_flush) ;;
  thread_model) echo parallel ;;
  flush) if rm fail 2>/dev/null; then touch failed; echo EIO >&2; exit 1; fi
         ;;
  pread) dd iflag=skip_bytes,count_bytes skip=$4 count=$3 \\
            if=disk.qcow2 status=none ;;
  pwrite) dd oflag=seek_bytes conv=notrunc seek=$4 of=disk.qcow2 \\
             status=none ;;
  *) exit 2 ;;
esac
""" % harness.tmp)
    os.chmod(script, 0o755)
    create()
    os.truncate("disk.qcow2", 2 << 20)
    server = Server(args=[FILTER, "--filter=retry", "sh", script,
                          "retry-delay=%d" % SLEEPS, *params])
    h = server.connect()
    h.pwrite(b"x" * 131072, 5 << 20)
    h.pwrite(b"y" * 512, 20 << 20)
    open("fail", "w").close()
    h.aio_flush()
    harness.until(lambda: os.path.exists("failed"), "the flush")
    time.sleep(0.3)
    os.unlink("failed")
    # nbdkit's status is 1 if the client was not told of the failure.
    took = server.stop(status=None)
    assert 4 < took < SLEEPS / 2, took
    stored()


def single(how):
    create()
    h = nbd.NBD()
    pidfile = os.path.join(harness.tmp, "single.pid")
    env = ["%s=%s" % item for item in harness.environment().items()]
    h.connect_command(["env", *env, "nbdkit", "-s", "-P", pidfile, *DELAY])
    write(h)
    with open(pidfile) as f:
        pid = int(f.read())
    if how == "signal":
        os.kill(pid, signal.SIGTERM)
    elif how == "disconnect":
        h.shutdown()
    else:
        del h
    deadline = time.monotonic() + harness.PATIENCE
    while lives(pid):
        assert time.monotonic() < deadline, "nbdkit -s does not end"
        time.sleep(0.02)
    stored()


def captive(status):
    create()
    code = ("h.pwrite(b'x' * 131072, 5 << 20); h.trim(65536, 5 << 20);"
            "h.pwrite(b'y' * 512, 20 << 20)")
    p = subprocess.run(["nbdkit", "-U", "-", *DELAY, "--run",
                        "/usr/bin/python3 -m nbd -u \"$uri\" -c \"%s\"; "
                        "exit %d" % (code, status)],
                       stdin=subprocess.DEVNULL, env=harness.environment(),
                       timeout=60)
    assert p.returncode == status
    stored()


if harness.SERVER == "nbdkit":
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        by_signal(DELAY, sig)
    by_signal(DELAY, again=5)
    by_signal(DELAY + ["dirty-bitmap-server=off"], again=5)
    by_signal(DELAY + ["dirty-bitmap-server=off"], idle=False)
    by_signal(["--filter=log", *DELAY, "logfile=/dev/null"])
    by_signal([FILTER, "--filter=rate", "file", "disk.qcow2", "rate=8M",
               "burstiness=0.1"])
    flaky("retry")
    flaky("retry-request")
    last_client("exitlast")
    last_client("exitlast", vanish=True)
    last_client("exitwhen", "exit-when-file-created=event")
    for how in ("signal", "disconnect", "vanish"):
        single(how)
    captive(0)
    captive(7)
    stuck("mark")
    stuck("keep")
    sleeping_flush()
    sleeping_flush("dirty-bitmap-server=off")
