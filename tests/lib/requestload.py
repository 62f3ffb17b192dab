# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Random requests, several in flight at once on several connections."""

import time

import imagematrix
from diskmodel import Operation
from harness import nbd
from imagematrix import K, M


class Load:
    def __init__(self, rnd, model, places):
        self.rnd = rnd
        self.model = model
        self.places = places
        self.big = model.size > 32 * M
        self.ours = True        # is it our server, or QEMU's?

    def draw(self):
        rnd, model = self.rnd, self.model
        verb = rnd.choice(["write"] * 6 + ["zero"] * 3 + ["trim"] * 2 +
                          ["read"] * 3 + ["flush", "cache"])
        if verb == "flush" or (not self.ours and (
                verb == "cache" or model.may_crash and
                verb in ("zero", "trim"))):
            # A cache request can make QEMU 7.2 abort; and it uses freed
            # clusters anew before it is durable that they are free.
            return Operation("flush")
        longest = rnd.choice([1, 512, 4 * K, 64 * K, model.cluster,
                              3 * model.cluster, M, 3 * M])
        unit = rnd.choice([1, 512, 512, model.cluster])
        if model.may_crash:
            unit = max(unit, 512)
        offset, count = imagematrix.draw_range(rnd, self.places, unit,
                                               min(longest, 6 * M))
        if count == 0 or (model.may_crash and count % 512):
            return Operation("flush")
        if not model.may_crash and rnd.random() < 0.2:
            # Just over the edges of clusters and granules.
            before, after = rnd.choice([(0, 1), (1, 0), (1, 1)])
            end = min(offset + count + after, model.size)
            offset = max(offset - before, 0)
            count = end - offset
        op = Operation(verb, offset, count)
        if verb == "write":
            op.data = (rnd.randbytes(min(count, 4 * K)) *
                       (count // (4 * K) + 1))[:count]
        elif verb == "zero":
            op.no_hole = rnd.random() < 0.3
            # QEMU may zero a part before it refuses.
            op.fast = self.ours and rnd.random() < 0.2
        if verb in ("zero", "trim") and self.big and not op.no_hole and \
                not model.may_crash and model.version > 2 and \
                model.sure_trim and rnd.random() < 0.1:
            # Across L2 tables.
            op.count = min(op.count + rnd.randrange(model.size),
                           model.size - offset, 3 << 30)
        op.fua = op.changes and rnd.random() < 0.1
        return op

    def batch(self):
        """Requests to be in flight at once."""
        rnd = self.rnd
        apart = self.model.may_crash or rnd.random() < 0.7
        ops = []
        for _ in range(rnd.choice([1, 1, 2, 4, 8, 16])):
            op = self.draw()
            if not any(self.clash(op, other, apart) for other in ops):
                ops.append(op)
        return ops

    def clash(self, op, other, apart):
        """Must these not be in flight together?"""
        if op.verb == "flush" or other.verb == "flush":
            return False
        if not self.ours and not op.verb == other.verb == "read":
            # QEMU is to be sound here.  In a discard it does not wait for
            # a write to the same cluster, and then refers to a free one.
            return op.overlaps(other, self.model.cluster)
        return apart and op.overlaps(other)

    def issue(self, h, op):
        """Send a request; its cookie and buffer."""
        flags = nbd.CMD_FLAG_FUA if op.fua else 0
        if op.verb == "write":
            return h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(op.data)),
                                op.offset, flags=flags), None
        if op.verb == "zero":
            flags |= nbd.CMD_FLAG_NO_HOLE if op.no_hole else 0
            flags |= nbd.CMD_FLAG_FAST_ZERO if op.fast else 0
            return h.aio_zero(op.count, op.offset, flags=flags), None
        if op.verb == "trim":
            return h.aio_trim(op.count, op.offset, flags=flags), None
        if op.verb == "cache":
            return h.aio_cache(op.count, op.offset), None
        if op.verb == "read":
            buffer = nbd.Buffer(op.count)
            return h.aio_pread(buffer, op.offset), buffer
        return h.aio_flush(), None

    def send(self, conns, ops):
        sent = []
        for op in ops:
            h = self.rnd.choice(conns)
            sent.append((h, op, *self.issue(h, op)))
        return sent

    def wait(self, sent):
        conns = {id(h): h for h, *_ in sent}.values()
        deadline = time.monotonic() + 60
        while any(h.aio_in_flight() for h in conns):
            assert time.monotonic() < deadline, "a request is not answered"
            for h in conns:
                if h.aio_in_flight():
                    h.poll(1)
        for h, op, cookie, buffer in sent:
            try:
                assert h.aio_command_completed(cookie)
            except nbd.Error as e:
                op.error = e.errno
            if buffer is not None:
                op.data = bytes(buffer.to_bytearray())
            # Only fast zeroing may be refused.
            assert op.error is None or \
                (op.error in ("ENOTSUP", "EOPNOTSUPP") and op.fast), str(op)
