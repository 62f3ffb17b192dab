#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""The house is as docs/ARCHITECTURE.md says: a room includes headers of
rooms below it, and calls functions of rooms below it, never of those
above; the files of nbd/ and qcow2/ do not call each other in circles; and each
invariant (I1...) and wire rule (R1...) that the code or a test cites is
defined there."""

import os
import re
import subprocess
import sys

# From the roof down.  "" is the roof.
ROOMS = ["", "image", "nbdkit", "control", "nbd", "stats", "disk", "bitmap", "qcow2",
         "container", "common"]
LEVEL = {room: i for i, room in enumerate(ROOMS)}

top = os.environ.get("top_srcdir", ".")
build = os.environ.get("top_builddir", ".")


def files(folder, *endings):
    for base, _, names in os.walk(os.path.join(top, folder)):
        for name in sorted(names):
            if name.endswith(endings):
                yield os.path.join(base, name)


def read(path):
    with open(path, encoding="utf-8", errors="replace") as f:
        return f.read()


def room(path, folder):
    head, _, _ = os.path.relpath(path, folder).rpartition(os.sep)
    return head.split(os.sep)[0] if head != "." else ""


def upward_includes():
    """[(file, header)] of which the header's room is above the file's."""
    found = []
    source = os.path.join(top, "filter")
    for path in files("filter", ".c", ".h"):
        here = room(path, source)
        assert here in LEVEL, "%s is in no room that is known" % path
        for header in re.findall(r'^#include "([^"]+)"', read(path), re.M):
            if header.endswith(".h") and \
               os.path.exists(os.path.join(source, header)) and \
               LEVEL[header.rpartition("/")[0]] < LEVEL[here]:
                found.append((os.path.relpath(path, source), header))
    return found


def symbols(path):
    """The names that an object file defines for others, and needs."""
    defined, needed = set(), set()
    out = subprocess.run(["nm", "-g", path], stdout=subprocess.PIPE,
                         check=True).stdout.decode()
    for line in out.splitlines():
        kind, name = line.split()[-2:]
        (needed if kind in "Uwv" else defined).add(name)
    return defined, needed


def objects():
    """{object of the filter: (room, defined, needed)}."""
    result = {}
    objects = os.path.join(build, "filter")
    for base, _, names in os.walk(objects):
        if os.path.basename(base) != ".libs":
            continue
        here = os.path.relpath(os.path.dirname(base), objects)
        for name in names:
            # Of a file that has moved, an old object may be left.
            source = re.sub(r"^lib\w*_la-|\.o$", "", name) + ".c"
            if name.endswith(".o") and os.path.exists(
                    os.path.join(top, "filter", here, source)):
                result[os.path.normpath(os.path.join(here, name))] = (
                    "" if here == "." else here,
                    *symbols(os.path.join(base, name)))
    return result


def upward_calls(found):
    home = {name: where for where, defined, _ in found.values()
            for name in defined}
    return [(path, name) for path, (where, _, needed) in found.items()
            for name in needed
            if name in home and LEVEL[home[name]] < LEVEL[where]]


def arrows(found, here):
    """{object file of a room: the others of the room that it calls}."""
    own = {path: names for path, (where, *names) in found.items()
           if where == here and
           os.path.exists(os.path.join(top, "filter", path[:-2] + ".c"))}
    assert len(own) > 5, "%s has hardly any object file" % here
    home = {name: path for path, (defined, _) in own.items()
            for name in defined}
    return {path: {home[name] for name in needed if name in home} - {path}
            for path, (_, needed) in own.items()}


def circle(calls):
    """The files that call each other in circles."""
    def reached(path):
        seen, todo = set(), list(calls[path])
        while todo:
            at = todo.pop()
            if at not in seen:
                seen.add(at)
                todo += calls[at]
        return seen
    return sorted(path for path in calls if path in reached(path))


CITED = re.compile(r"\b([IR](?:1[0-9]|[1-9]))\b")


def defined_rules():
    text = read(os.path.join(top, "docs", "ARCHITECTURE.md"))
    rules = re.findall(r"^- \*\*([IR]\d+)\*\* ", text, re.M)
    assert len(rules) == len(set(rules)), "a rule is defined twice"
    return set(rules)


def undefined_rules(defined):
    found, nr = [], 0
    for folder in "filter", "tests":
        for path in files(folder, ".c", ".h", ".py", ".sh", ".pod"):
            for rule in CITED.findall(read(path)):
                nr += 1
                if rule not in defined:
                    found.append((path, rule))
    assert nr > 50, "only %d rules are cited: are they still found?" % nr
    return found


def missing_in_index(defined):
    """What tests/README.md should name and does not, or names in vain."""
    text = read(os.path.join(top, "tests", "README.md"))
    words = set(re.findall(r"[\w./-]*[\w/-]", text))
    tests = {os.path.relpath(path, os.path.join(top, "tests"))
             for path in files("tests", ".c", ".sh", ".py")
             if os.path.basename(path).startswith("test-")}
    tests = {re.sub(r"\.c$", "", test) for test in tests}
    assert len(tests) > 100, "only %d tests: are they still found?" % len(tests)
    manual = read(os.path.join(top, "filter",
                               "nbdkit-dirty-bitmap-filter.pod"))
    parameters = set(re.findall(r"^=item B<(dirty-bitmap[a-z-]*)=", manual,
                                re.M))
    assert parameters, "no parameter is found in the manual"
    named = {word for word in words
             if re.search(r"(^|/)test-\w[\w-]*(\.sh|\.py)?$", word)}
    return sorted(((tests | parameters | defined) - words) |
                  (named - tests))


assert upward_includes() == [], upward_includes()
found = objects()
if not found:
    print("skipped: the filter's objects are not in %s" % build)
    sys.exit(77)
assert {where for where, _, _ in found.values()} == set(ROOMS), \
    "a room has no object file: are they still found?"
assert upward_calls(found) == [], upward_calls(found)
calls = {here: arrows(found, here) for here in ["nbd", "qcow2"]}
for here in calls:
    assert circle(calls[here]) == [], circle(calls[here])
defined = defined_rules()
assert undefined_rules(defined) == [], undefined_rules(defined)
assert missing_in_index(defined) == [], missing_in_index(defined)
# What is looked for would be found.
assert missing_in_index(defined | {"I99"}) == ["I99"]
assert undefined_rules(defined - {"I3"}) != []
calls["qcow2"]["qcow2/gate.o"].add("qcow2/flush.o")
assert "qcow2/gate.o" in circle(calls["qcow2"])
calls["nbd"]["nbd/socket.o"].add("nbd/server.o")
assert "nbd/stream.o" in circle(calls["nbd"])
LEVEL["disk"], LEVEL["nbd"] = LEVEL["nbd"], LEVEL["disk"]
assert upward_includes() != [] and upward_calls(found) != []
