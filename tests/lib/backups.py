# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""dirty-bitmap-backup, and what it leaves in a repository."""

import json
import os
import subprocess

import harness

TOOL = os.path.join(os.environ.get("abs_top_builddir", ".."), "tools",
                    "dirty-bitmap-backup")
ENV = dict(os.environ, ASAN_OPTIONS="abort_on_error=0",
           UBSAN_OPTIONS="print_stacktrace=1")


def popen(*args, **kwargs):
    kwargs.setdefault("stdout", subprocess.PIPE)
    kwargs.setdefault("stderr", subprocess.PIPE)
    return subprocess.Popen([TOOL, *args], stdin=subprocess.DEVNULL,
                            env=ENV, **kwargs)


def sane(args, status, err):
    assert status in (0, 1), (args, status, err)
    assert "Sanitizer" not in err and "runtime error" not in err, err


def ended(p, args=()):
    """Its exit status, and what it printed."""
    out, err = (text.decode() for text in p.communicate(
        timeout=harness.PATIENCE))
    sane(args, p.returncode, err)
    return p.returncode, out, err


def tool(*args):
    """It succeeds; what it prints on stdout and stderr."""
    status, out, err = ended(popen(*args), args)
    assert status == 0, (args, err)
    assert "error" not in err, err
    return out, err


def errors(err):
    return [line for line in err.splitlines() if " error: " in line]


def fails(text, *args):
    """It fails, with one error, which has this text.  All of stderr."""
    status, out, err = ended(popen(*args), args)
    assert status == 1, (args, out, err)
    assert out == "", out
    one_error(text, err)
    return err


def one_error(text, err):
    found = errors(err)
    assert len(found) == 1 and text in found[0], (text, err)


def result(*args):
    """What it prints as JSON."""
    return json.loads(tool("--json", *args)[0])


def listed(repository):
    return result("--list", repository)


def raw(repository, name="0001.qcow2"):
    """The disk of a point, as qemu-img restores it."""
    path = os.path.join(harness.tmp, "point.raw")
    harness.run("qemu-img", "convert", "-O", "raw",
                os.path.join(repository, name), path)
    with open(path, "rb") as f:
        data = f.read()
    os.unlink(path)
    return data


def contents(repository):
    """Each file, byte by byte."""
    found = {}
    for name in os.listdir(repository):
        with open(os.path.join(repository, name), "rb") as f:
            found[name] = f.read()
    return found


def sound(repository):
    """The files are those of the list, as it tells them, and QEMU has no
    complaint.  The list."""
    points = listed(repository)
    names = {p["file"] for p in points}
    assert set(os.listdir(repository)) == names | {"repository.json"}, (
        os.listdir(repository), names)
    last = None
    for p in points:
        path = os.path.join(repository, p["file"])
        assert os.path.getsize(path) == p["bytes"]
        assert harness.xxh128(path) == p["xxh128"]
        info = json.loads(harness.run("qemu-img", "info", "--output=json",
                                      path))
        if p["type"] == "full":
            assert "backing-filename" not in info, info
        else:
            assert info["backing-filename"] == last, info
            assert info["backing-filename-format"] == "qcow2", info
        out = harness.run("qemu-img", "check", path)
        assert "No errors were found" in out and "leak" not in out, out
        last = p["file"]
    return points
