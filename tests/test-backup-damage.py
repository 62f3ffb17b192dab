#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""A damaged repository: --verify finds each flipped byte, a missing file, a
short one, and a wrong backing file; and a hostile repository.json is refused
with one clear error.  What an interrupted run has left is removed by the
next."""

import copy
import json
import os
import shutil

import backups
import harness
from backups import ended, errors, fails, popen, sound, tool
from harness import Server

dice = harness.seeded()

KIB = 1 << 10
SIZE = 1 << 20
ctl_sock = os.path.join(harness.tmp, "ctl.sock")


def make():
    """Four points: full, increment, full, increment."""
    harness.create("disk.qcow2", SIZE)
    server = Server("disk.qcow2", "dirty-bitmap-control=" + ctl_sock)
    for n in range(4):
        h = server.connect()
        h.pwrite(dice.randbytes(40000), dice.randrange(SIZE - 40000))
        h.shutdown()
        tool("--control=" + ctl_sock, server.uri, "good",
             *(["--bitmap=second"] if n > 1 else []))
    server.stop()
    types = [p["type"] for p in sound("good")]
    assert types == ["full", "increment"] * 2, types


def fresh():
    shutil.rmtree("repo", ignore_errors=True)
    shutil.copytree("good", "repo")


def verify_finds(text, nr_bad):
    status, out, err = ended(popen("--verify", "repo"))
    assert status == 1 and out == "", err
    found = errors(err)
    assert text in found[0], err
    assert found[-1].endswith("repo: %d of 4 points %s damaged" % (
        nr_bad, "is" if nr_bad == 1 else "are")), err
    assert len(found) == nr_bad + 1, err


def flipped_bytes():
    fresh()
    for name in "0001.qcow2", "0004.qcow2":
        path = os.path.join("repo", name)
        size = os.path.getsize(path)
        places = {0, 3, 8, 20, 72, 100, 104, size - 1} | {
            dice.randrange(size) for _ in range(20)}
        for place in places:
            with open(path, "r+b") as f:
                f.seek(place)
                was = f.read(1)
                f.seek(place)
                f.write(bytes([was[0] ^ 1 << dice.randrange(8)]))
            status, out, err = ended(popen("--verify", "repo"))
            assert status == 1, (place, err)
            assert errors(err)[0].endswith(
                "repo/%s: is damaged: its checksum differs" % name), err
            # Nothing is made of it.
            place_of = "repo@" + name[3]
            fails("checksum differs", "--restore", place_of, "out.raw")
            assert not os.path.exists("out.raw")
            with open(path, "r+b") as f:
                f.seek(place)
                f.write(was)
    tool("--verify", "repo")


def files():
    fresh()
    os.unlink("repo/0002.qcow2")
    verify_finds("repo/0002.qcow2: No such file", 1)
    fails("0002.qcow2: No such file", "--restore", "repo@2", "out.raw")
    fresh()
    os.unlink("repo/0001.qcow2")
    verify_finds("repo/0001.qcow2: No such file", 2)
    fresh()
    os.truncate("repo/0003.qcow2", os.path.getsize("repo/0003.qcow2") - 1)
    verify_finds("repo/0003.qcow2: is damaged", 1)
    os.truncate("repo/0003.qcow2", 0)
    verify_finds("repo/0003.qcow2: is damaged", 2)
    for make_one in (os.mkfifo, os.mkdir,
                     lambda path: os.symlink("0001.qcow2", path)):
        fresh()
        os.unlink("repo/0003.qcow2")
        make_one("repo/0003.qcow2")
        verify_finds("repo/0003.qcow2: ", 2)
        fails("repo/0003.qcow2: ", "--prune", "--keep=1", "repo")
    # The checksum is right, and the backing file is not.
    for args in (["-b", "", "-F", "qcow2"], ["-b", "0001.qcow2", "-F", "raw"],
                 ["-b", "0003.qcow2", "-F", "qcow2"],
                 ["-b", "./0001.qcow2", "-F", "qcow2"]):
        fresh()
        harness.run("qemu-img", "rebase", "-u", *args, "0002.qcow2",
                    cwd="repo")
        adopt("0002.qcow2")
        verify_finds("repo/0002.qcow2: its backing file is not 0001.qcow2", 1)
        fails("its backing file is not", "--restore", "repo@2", "out.raw")
    fresh()
    harness.run("qemu-img", "rebase", "-u", "-b", "0001.qcow2", "-F", "qcow2",
                "0003.qcow2", cwd="repo")
    adopt("0003.qcow2")
    verify_finds("repo/0003.qcow2: its backing file is not none", 2)
    # No image, and an image of another disk.
    for content in b"", b"QFI\xfb" + bytes(100), dice.randbytes(70000):
        fresh()
        with open("repo/0004.qcow2", "wb") as f:
            f.write(content)
        adopt("0004.qcow2")
        verify_finds("repo/0004.qcow2: ", 1)
    fresh()
    harness.create("repo/0003.qcow2", 512)
    adopt("0003.qcow2")
    verify_finds("repo/0003.qcow2: ", 2)


def load():
    with open("repo/repository.json") as f:
        return json.load(f)


def store(value):
    text = value if isinstance(value, str) else json.dumps(value)
    with open("repo/repository.json", "w") as f:
        f.write(text)


def adopt(name):
    """Let the list have the checksum of a file as it is."""
    value = load()
    for p in value["points"]:
        if p["file"] == name:
            path = os.path.join("repo", name)
            p["bytes"] = os.path.getsize(path)
            p["xxh128"] = harness.xxh128(path)
    store(value)


COMMANDS = [["--list", "repo"], ["--verify", "repo"],
            ["--restore", "repo", "out.raw"], ["--prune", "--keep=1", "repo"],
            ["nbd+unix:///?socket=/nowhere", "repo"]]


def refused(value, commands=COMMANDS):
    """One error, no crash, and the images are still there."""
    store(value)
    for command in commands:
        status, out, err = ended(popen(*command), command)
        assert status == 1 and out == "" and len(errors(err)) == 1, (
            value, command, out, err)
        assert "repository.json: " in err, (value, command, err)
        assert "\x1b" not in err and "\a" not in err, err
    assert not os.path.exists("out.raw")
    assert {"000%d.qcow2" % n for n in range(1, 5)} <= set(
        os.listdir("repo")), value


WRONG = [None, True, -1, 0, 1.5, 1 << 62, (1 << 63) - 1, "", "x", "\x1b[2J",
         "../../etc/passwd", "a" * 5000, "\u0000", [], {}, [1], {"a": 1}]


def hostile_lists():
    fresh()
    good = load()
    for text in ("", "{", "[]", "null", "1", '"x"', "{}", "\0", "[" * 100000,
                 '{"a":1,"a":2}', '{"dirty-bitmap-backup": 2}',
                 json.dumps(good)[:-1], json.dumps(good) + "x",
                 '{"dirty-bitmap-backup": 99999999999999999999999}'):
        refused(text)
    free = {"bitmap": ["x", "../../etc/passwd", "a" * 5000]}
    for key in good:
        for value in WRONG + ["delete"]:
            bad = copy.deepcopy(good)
            if value == "delete":
                del bad[key]
                if key == "bitmap":
                    continue
            elif value in free.get(key, []) or key == "points" and value == []:
                continue
            else:
                bad[key] = value
            refused(bad, COMMANDS if dice.randrange(4) == 0 else COMMANDS[:1])
    may_be = {"copied-bytes": [0, 1 << 62, (1 << 63) - 1],
              "bytes": [0, 1 << 62, (1 << 63) - 1],
              "disk-bytes": [0, 1 << 62, (1 << 63) - 1]}
    for n in range(4):
        for key in good["points"][n]:
            for value in WRONG + ["delete"]:
                bad = copy.deepcopy(good)
                if value == "delete":
                    del bad["points"][n][key]
                elif any(value is v or type(value) is int and value == v
                         or type(value) is str and value == v
                         for v in may_be.get(key, [])):
                    continue
                else:
                    bad["points"][n][key] = value
                refused(bad, COMMANDS[:1])
    for change in (
            lambda p: p.reverse(), lambda p: p.pop(0), lambda p: p.append(7),
            lambda p: p.append(p[0]), lambda p: p[1].update(number=1),
            lambda p: p[0].update(type="increment"),
            lambda p: p[1].update(file="0003.qcow2"),
            lambda p: p[1].update({"disk-bytes": SIZE + 512})):
        bad = copy.deepcopy(good)
        change(bad["points"])
        refused(bad)
    digits = "0" * 32
    for merging in (None, [], "x", {}, {"number": 1},
                    {"number": 0, "bytes": 1, "xxh128": digits},
                    {"number": 9, "bytes": 1, "xxh128": digits},
                    {"number": 2, "bytes": -1, "xxh128": digits},
                    {"number": 2, "bytes": 1, "xxh128": digits[1:]},
                    {"number": 2, "bytes": 1, "xxh128": digits[1:] + "Z"}):
        bad = copy.deepcopy(good)
        bad["merging"] = merging
        refused(bad, COMMANDS[1:])
    for make_one in os.mkfifo, os.mkdir:
        os.unlink("repo/repository.json")
        make_one("repo/repository.json")
        for command in COMMANDS:
            fails("repository.json", *command)
        if make_one == os.mkfifo:
            os.unlink("repo/repository.json")
        else:
            os.rmdir("repo/repository.json")
        store(good)


def huge_disks():
    """Sizes in the list that no disk has."""
    for size in 1 << 62, (1 << 63) - 1:
        fresh()
        value = load()
        for p in value["points"]:
            p["disk-bytes"] = size
        store(value)
        fails("the disk in it is", "--restore", "repo", "out.raw")
        assert not os.path.exists("out.raw")
    fresh()
    value = load()
    value["points"][3]["bytes"] += 1
    store(value)
    verify_finds("repo/0004.qcow2: is damaged", 1)


def left_over():
    """The next run removes what an earlier one has left, and only that."""
    server = Server("disk.qcow2", "dirty-bitmap-control=" + ctl_sock)
    fresh()
    names = ["0005.qcow2", "0005.qcow2.new", "0002.qcow2.new", "0999.qcow2",
             "123456.qcow2", "repository.json.new"]
    kept = ["0x05.qcow2", "5.qcow2", "00005.qcow2", "0005.qcow2.old", "notes",
            "0005.raw", "repository.json.old"]
    for name in names + kept:
        with open(os.path.join("repo", name), "w") as f:
            f.write("x")
    tool("--list", "repo")
    tool("--verify", "repo")
    assert set(names) < set(os.listdir("repo"))
    tool("--control=" + ctl_sock, server.uri, "repo", "--bitmap=second")
    found = set(os.listdir("repo"))
    assert set(kept) < found
    assert found & set(names) == {"0005.qcow2"}
    for name in kept:
        os.unlink(os.path.join("repo", name))
    assert [p["type"] for p in sound("repo")][-1] == "increment"
    server.stop()


make()
for test in (flipped_bytes, files, hostile_lists, huge_disks, left_over):
    print(test.__name__, flush=True)
    test()
