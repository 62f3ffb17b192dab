# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""The parts of a qcow2 file that tests look at or damage.

Written from docs/interop/qcow2.rst, apart from the C code, so that the
two can disagree.
"""

import struct

MAGIC_BITMAPS = 0x23852875
MAGIC_FEATURES = 0x6803f857
MAGIC_BACKING_FORMAT = 0xe2792aca

IN_USE = 1
AUTO = 2

# Header fields: name -> (offset, struct format).
FIELDS = {
    "magic": (0, ">I"),
    "version": (4, ">I"),
    "backing_file_offset": (8, ">Q"),
    "backing_file_size": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "crypt_method": (32, ">I"),
    "l1_size": (36, ">I"),
    "l1_table_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"),
    "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible_features": (72, ">Q"),
    "compatible_features": (80, ">Q"),
    "autoclear_features": (88, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
    "compression_type": (104, ">B"),
}

# Fields of the bitmaps extension's data, and of a directory entry.
EXTENSION = {
    "nb_bitmaps": (0, ">I"),
    "reserved": (4, ">I"),
    "bitmap_directory_size": (8, ">Q"),
    "bitmap_directory_offset": (16, ">Q"),
}
ENTRY = {
    "bitmap_table_offset": (0, ">Q"),
    "bitmap_table_size": (8, ">I"),
    "flags": (12, ">I"),
    "type": (16, ">B"),
    "granularity_bits": (17, ">B"),
    "name_size": (18, ">H"),
    "extra_data_size": (20, ">I"),
}


class Image:
    """An image file.  Every method reads the file anew."""

    def __init__(self, path):
        self.path = path

    def read(self, offset, count):
        with open(self.path, "rb") as f:
            f.seek(offset)
            data = f.read(count)
        return data + bytes(count - len(data))

    def write(self, offset, data):
        with open(self.path, "r+b") as f:
            f.seek(offset)
            f.write(data)

    def _get(self, base, table, name):
        offset, fmt = table[name]
        return struct.unpack(fmt, self.read(base + offset,
                                            struct.calcsize(fmt)))[0]

    def _put(self, base, table, name, value):
        offset, fmt = table[name]
        self.write(base + offset, struct.pack(fmt, value))

    def get(self, name):
        return self._get(0, FIELDS, name)

    def put(self, name, value):
        self._put(0, FIELDS, name, value)

    @property
    def cluster_size(self):
        return 1 << self.get("cluster_bits")

    def extensions(self):
        """Yield (magic, offset of the data, length)."""
        pos = self.get("header_length") if self.get("version") >= 3 else 72
        while pos + 8 <= self.cluster_size:
            magic, length = struct.unpack(">II", self.read(pos, 8))
            if magic == 0:
                return
            yield magic, pos + 8, length
            pos += 8 + (length + 7) // 8 * 8

    def end_of_extensions(self):
        """Where the end marker is."""
        pos = self.get("header_length")
        for _, offset, length in self.extensions():
            pos = offset + (length + 7) // 8 * 8
        return pos

    def extension_offset(self, wanted=MAGIC_BITMAPS):
        for magic, offset, _ in self.extensions():
            if magic == wanted:
                return offset
        return None

    def set_backing_name(self, name):
        """QEMU's tools would look for the file, or refuse the name."""
        data = name if isinstance(name, bytes) else name.encode()
        at = self.get("backing_file_offset") or self.end_of_extensions() + 8
        assert at + len(data) <= self.cluster_size
        self.put("backing_file_offset", at)
        self.put("backing_file_size", len(data))
        self.write(at, data)

    def forget_backing_format(self):
        """Images that QEMU made up to 6.0 may not say it."""
        at = self.extension_offset(MAGIC_BACKING_FORMAT)
        self.write(at - 8, struct.pack(">I", 0x12345678))

    def get_ext(self, name):
        return self._get(self.extension_offset(), EXTENSION, name)

    def put_ext(self, name, value):
        self._put(self.extension_offset(), EXTENSION, name, value)

    def bitmaps(self):
        """The directory: name -> Bitmap, in order."""
        result = {}
        if self.extension_offset() is None:
            return result
        pos = self.get_ext("bitmap_directory_offset")
        for _ in range(self.get_ext("nb_bitmaps")):
            bitmap = Bitmap(self, pos)
            result[bitmap.name] = bitmap
            pos += bitmap.entry_size
        return result

    def bitmap(self, name):
        return self.bitmaps()[name]


class Bitmap:
    """A bitmap as the image has it."""

    def __init__(self, image, pos):
        self.image = image
        self.pos = pos
        name_size = self.get("name_size")
        extra = self.get("extra_data_size")
        self.name = image.read(pos + 24 + extra, name_size).decode(
            "utf-8", "surrogateescape")
        self.entry_size = (24 + extra + name_size + 7) // 8 * 8

    def get(self, name):
        return self.image._get(self.pos, ENTRY, name)

    def put(self, name, value):
        self.image._put(self.pos, ENTRY, name, value)

    @property
    def granularity(self):
        return 1 << self.get("granularity_bits")

    @property
    def in_use(self):
        return self.get("flags") & IN_USE != 0

    def marked(self):
        """Does the image say that the bits are not to be trusted?"""
        return self.in_use or self.image.get("autoclear_features") & 1 == 0

    def table(self):
        count = self.get("bitmap_table_size")
        data = self.image.read(self.get("bitmap_table_offset"), 8 * count)
        return list(struct.unpack(">%dQ" % count, data))

    def bits(self):
        """The set granules, as a set of numbers."""
        cs = self.image.cluster_size
        granules = -(-self.image.get("size") // self.granularity)
        result = set()
        for i, entry in enumerate(self.table()):
            first = i * cs * 8
            if entry == 0:
                continue
            if entry == 1:
                result.update(range(first, min(first + cs * 8, granules)))
                continue
            data = self.image.read(entry, cs)
            for j, byte in enumerate(data):
                if byte == 0:
                    continue
                for k in range(8):
                    if byte >> k & 1:
                        result.add(first + j * 8 + k)
        beyond = [n for n in result if n >= granules]
        assert not beyond, "%s has bits past its end: %s" % (self.name, beyond)
        return result

    def raw(self):
        """Entry, table and data, to see whether anything has changed."""
        parts = [self.image.read(self.pos, self.entry_size)]
        for entry in self.table():
            parts.append(struct.pack(">Q", entry))
            if entry > 1:
                parts.append(self.image.read(entry, self.image.cluster_size))
        return b"".join(parts)
