# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""What a disk may hold after a crash.

Every sector has its history: the values it was given, in order.  After a
crash it may hold what it had when the last completed flush was issued,
or anything later; and a bitmap must be marked, or have the granules of
every acknowledged change (I2 and I3 of the design).
"""

import harness
from qcow2image import Image

SECTOR = 512
NOTHING = bytes(SECTOR)


class Operation:
    """One request: the sectors it touches, and what they may become."""

    def __init__(self, first, values, changes=True):
        self.first = first
        self.values = values
        self.changes = changes
        self.places = {}

    @property
    def sectors(self):
        return range(self.first, self.first + len(self.values))


class History:
    """The sectors of a disk whose concurrent requests never overlap."""

    def __init__(self, data):
        self.nr_sectors = len(data) // SECTOR
        self.original = data
        self.past = {}          # sector -> [set of values], index 0 first
        self.acked = {}         # sector -> last acknowledged index
        self.durable = {}       # sector -> first index that may be found
        self.changed = set()    # sectors of acknowledged changes
        self.busy = set()

    def before(self, sector):
        return self.past.setdefault(
            sector, [{self.original[sector * SECTOR:(sector + 1) * SECTOR]}])

    def issue(self, op):
        for sector, values in zip(op.sectors, op.values):
            past = self.before(sector)
            if values is None:          # A trim may leave it alone.
                values = past[-1] | {NOTHING}
            op.places[sector] = len(past)
            past.append(values)
            self.busy.add(sector)

    def ack(self, op, fua=False):
        for sector in op.sectors:
            self.busy.discard(sector)
            self.acked[sector] = op.places[sector]
            if fua:
                self.durable[sector] = max(self.durable.get(sector, 0),
                                           op.places[sector])
        self.changed.update(op.sectors)

    def failed(self, op):
        """It may have been done or not, sector by sector."""
        for sector in op.sectors:
            self.busy.discard(sector)
            place = op.places[sector]
            past = self.past[sector]
            past[place] = past[place] | past[place - 1]

    def flush_issued(self):
        return dict(self.acked)

    def flush_acked(self, snapshot):
        for sector, place in snapshot.items():
            self.durable[sector] = max(self.durable.get(sector, 0), place)

    def verify(self, path, disabled=(), disk=None):
        """Check an image against I1, I2 and I3.  disk: the raw disk, if it
        is beside the image."""
        harness.check(path, leaks=True)
        data = harness.disk_contents(path, disk)
        altered = set()
        for sector, past in self.past.items():
            got = data[sector * SECTOR:(sector + 1) * SECTOR]
            allowed = past[self.durable.get(sector, 0):]
            assert any(got in values for values in allowed), \
                "I2: sector %d holds %r..., allowed %r" % (
                    sector, got[:16], [v[:16] for s in allowed for v in s])
            if got not in past[0]:
                altered.add(sector)
        touched = self.past.keys()
        for sector in range(self.nr_sectors):
            if sector not in touched:
                at = sector * SECTOR
                assert data[at:at + SECTOR] == \
                    self.original[at:at + SECTOR], \
                    "sector %d was never written, but has changed" % sector
        return self.verify_bitmaps(path, altered | self.changed, disabled)

    @staticmethod
    def verify_bitmaps(path, changed, disabled):
        """I3; the number of bitmaps that are not marked."""
        clean = 0
        for name, bitmap in Image(path).bitmaps().items():
            if name in disabled:
                assert not bitmap.in_use, "I4: %s is in use" % name
                continue
            if bitmap.marked():
                continue
            clean += 1
            wanted = {s * SECTOR // bitmap.granularity for s in changed}
            missing = wanted - bitmap.bits()
            assert not missing, "I3: %s is unmarked and lacks %s" % (
                name, sorted(missing)[:9])
        return clean
