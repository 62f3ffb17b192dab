# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""The file of dirty-bitmap-stats."""

import os
import signal

import exposition
from harness import until

PREFIX = "nbdkit_dirty_bitmap_"


class Stats:
    def __init__(self, path):
        with open(path, "rb") as f:
            data = f.read()
        self.samples = exposition.parse(data, PREFIX)

    def __call__(self, name, **labels):
        return self.samples[PREFIX + name, frozenset(labels.items())]

    def get(self, name, **labels):
        return self.samples.get((PREFIX + name, frozenset(labels.items())), 0)

    def all(self, name):
        return {tuple(sorted(labels)): value
                for (n, labels), value in self.samples.items()
                if n == PREFIX + name}


def identity(path):
    st = os.stat(path)
    return st.st_ino, st.st_mtime_ns


def refresh(pid, path):
    """Ask for the file; what it says then."""
    before = identity(path)
    os.kill(pid, signal.SIGUSR1)
    until(lambda: os.path.exists(path) and identity(path) != before,
          "USR1 writes the file")
    return Stats(path)
