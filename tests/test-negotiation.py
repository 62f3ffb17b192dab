#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Metadata context queries, word for word as qemu-nbd answers them, and
the export's size, flags and block sizes (R9).
"""

import harness
from harness import CONTEXT, Server, nbd

OURS = harness.SERVER == "nbdkit"
harness.create("disk.qcow2", 10 << 20, "one", "two")
server = Server("disk.qcow2")
BASE, ONE, TWO = "base:allocation", CONTEXT + "one", CONTEXT + "two"
DEPTH = "qemu:allocation-depth"


def listed(*queries):
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_uri(server.uri)
    for q in queries:
        h.add_meta_context(q)
    names = []
    h.opt_list_meta_context(names.append)
    h.opt_abort()
    return names


def granted(*queries):
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_uri(server.uri)
    for q in queries:
        h.add_meta_context(q)
    h.opt_go()
    names = [c for c in (BASE, DEPTH, ONE, TWO) if h.can_meta_context(c)]
    h.shutdown()
    return names


TABLE = [
    # Query, what LIST answers, what SET answers.
    ("", [], []),
    ("base:", [BASE], []),
    (BASE, [BASE], [BASE]),
    ("base:foo", [], []),
    ("base", [], []),
    ("qemu:", [DEPTH, ONE, TWO], []),
    (CONTEXT, [ONE, TWO], []),
    (ONE, [ONE], [ONE]),
    (CONTEXT + "on", [], []),
    (CONTEXT + "ones", [], []),
    ("qemu:dirty-bitmap", [], []),
    ("qemu", [], []),
    (DEPTH, [DEPTH], [DEPTH]),
    ("qemu:allocation", [], []),
    ("qemu:allocation-depth:", [], []),
    ("unknown:thing", [], []),
]
for query, list_answer, set_answer in TABLE:
    assert sorted(listed(query)) == list_answer, (query, listed(query))
    assert granted(query) == set_answer, (query, granted(query))
assert sorted(listed()) == [BASE, DEPTH, ONE, TWO]
assert granted() == []
assert granted(TWO, BASE, TWO, "nonsense", BASE) == [BASE, TWO]
assert granted(TWO, DEPTH, BASE) == [BASE, DEPTH, TWO]
assert sorted(listed(TWO, BASE, TWO)) == [BASE, TWO]
if OURS:
    assert listed(TWO, ONE, BASE) == [BASE, ONE, TWO]

h = server.connect()
assert h.get_size() == 10 << 20
assert not h.is_read_only()
for can in (h.can_flush, h.can_fua, h.can_trim, h.can_zero, h.can_fast_zero,
            h.can_df, h.can_cache, h.can_multi_conn):
    assert can(), can
assert h.get_block_size(nbd.SIZE_MINIMUM) == 1
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
preferred = h.get_block_size(nbd.SIZE_PREFERRED)
assert preferred >= 4096 and preferred & (preferred - 1) == 0
h.shutdown()

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(server.uri)
exports = []
h.opt_list(lambda name, description: exports.append(name))
assert exports == [""], exports
h.opt_info()
assert h.get_size() == 10 << 20
h.opt_go()
assert h.pread(512, 0) == bytes(512)
h.shutdown()

# A client of the old kind: no structured replies, so no contexts.
h = nbd.NBD()
h.set_request_structured_replies(False)
h.add_meta_context(ONE)
h.connect_uri(server.uri)
assert not h.get_structured_replies_negotiated()
h.pwrite(b"old", 0)
assert h.pread(3, 0) == b"old"
h.shutdown()

# Read-only: fewer flags, still many connections.
server.stop()
server = Server("disk.qcow2", options=["-r"])
h = server.connect(ONE)
assert h.is_read_only() and h.can_multi_conn() and h.can_cache()
assert not h.can_trim() and not h.can_zero() and not h.can_fast_zero()
assert h.can_meta_context(ONE)
h.shutdown()
server.stop()
