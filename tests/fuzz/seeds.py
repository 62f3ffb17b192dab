# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""Make the inputs that fuzzing begins with, by QEMU's tools.

    seeds.py FOLDER             all seeds, in FOLDER/TARGET/NAME
    seeds.py pack IMAGE [BACKING [DATA-FILE]] > INPUT
    seeds.py unpack INPUT FOLDER
                                the files that an input is made of: image,
                                backing, data-file, program

fuzz.h tells what an input is.
"""

import itertools
import json
import os
import random
import struct
import subprocess
import sys
import tempfile

UNIT = 8
MAX_FILE = 64 << 20
IMAGE, BACKING, DATA_FILE, PROGRAM = range(4)
NAMES = ('image', 'backing', 'data-file', 'program')


# ----------------------------------------------------------------------
# Inputs.

def run(file, offset, data):
    return struct.pack('>IH', file << 30 | offset // UNIT, len(data)) + data


def pack(file, data):
    """A file as runs: what is not zero, but for short gaps."""
    out = b''
    at = 0
    data = data.ljust((len(data) + UNIT - 1) // UNIT * UNIT, b'\0')
    while at < len(data):
        # 16 bytes of head, of which a run would have 6.
        if not any(data[at:at + UNIT]):
            at += UNIT
            continue
        end = at
        while end < len(data) and any(data[end:end + 4 * UNIT]) and \
                end - at < 4096:
            end += UNIT
        chunk = data[at:end]
        out += run(file, at, chunk)
        at = end
    return out + run(file, len(data), b'')


def unpack(data):
    files = [bytearray() for _ in NAMES]
    at = 0
    while at + 6 <= len(data):
        place, length = struct.unpack_from('>IH', data, at)
        at += 6
        offset = (place & 0x3fffffff) * UNIT % MAX_FILE
        chunk = data[at:at + length][:MAX_FILE - offset]
        at += length
        file = files[place >> 30]
        if len(file) < offset + len(chunk):
            file.extend(bytes(offset + len(chunk) - len(file)))
        file[offset:offset + len(chunk)] = chunk
    return files


# ----------------------------------------------------------------------
# Images.

def sh(*words):
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def qemu_io(image, *commands):
    sh('qemu-io', '-f', 'qcow2',
       *itertools.chain(*(('-c', c) for c in commands)), image)


def read(path):
    with open(path, 'rb') as f:
        return f.read()


class Images:
    """Images of all kinds, in a temporary folder."""

    def __init__(self, folder):
        self.folder = folder
        self.kinds = {}         # name: (image, backing, data file)

    def path(self, name):
        return os.path.join(self.folder, name)

    def create(self, name, size, options='', *commands, below=None,
               data_file=None):
        image = self.path(name)
        words = ['qemu-img', 'create', '-q', '-f', 'qcow2']
        if options:
            words += ['-o', options]
        if below:
            words += ['-b', below[0], '-F', below[1]]
        sh(*words, image, size)
        if commands:
            qemu_io(image, *commands)
        self.kinds[name] = (image, self.path(below[0]) if below else None,
                            data_file)
        return image

    def plain(self):
        for bits in (1, 2, 4, 8, 16, 32, 64):
            self.create('refcount-bits-%d' % bits, '64k',
                        'cluster_size=512,refcount_bits=%d' % bits,
                        'write -P 1 0 1k', 'write -P 2 33k 512',
                        'write -z 5k 2k', 'write -P 3 8k 512')
        for size in ('512', '1k', '4k', '64k', '2M'):
            self.create('cluster-' + size, '256k' if size != '2M' else '8M',
                        'cluster_size=' + size,
                        'write -P 1 700 300', 'write -z 64k 64k',
                        'discard 128k 64k')
        self.create('version-2', '128k', 'compat=0.10,cluster_size=512',
                    'write -P 5 512 1k', 'write -P 6 100k 1k')
        self.create('many-l2-tables', '1M', 'cluster_size=512',
                    *('write -P 1 %dk 512' % (32 * i) for i in range(0, 32, 3)))
        self.create('large-disk', '1T', 'cluster_size=64k',
                    'write -P 1 600G 1k')
        self.create('many-l2-slices', '512M', 'cluster_size=64k',
                    'write -P 1 0 512', 'write -P 1 40M 512',
                    'write -P 1 511M 512')
        self.create('odd-size', '65000', 'cluster_size=4k',
                    'write -P 1 63k 488')
        self.create('falloc', '64k', 'cluster_size=4k,preallocation=falloc')
        self.create('metadata', '1M', 'cluster_size=4k,preallocation=metadata')
        self.create('lazy', '64k', 'cluster_size=512,lazy_refcounts=on',
                    'write -P 1 1k 1k')
        # The refcount table is full, so it is to grow.
        self.create('reftable-to-grow', '4M', 'cluster_size=512,'
                    'refcount_bits=64', 'write -P 1 0 512')

    def compressed(self):
        raw = self.path('text.raw')
        rng = random.Random(1)
        with open(raw, 'wb') as f:
            f.write(b'some words that repeat, ' * 700)
            f.write(bytes(rng.randrange(4) for _ in range(8192)))
            f.write(bytes(32768))
        for kind, size in itertools.product(('zlib', 'zstd'),
                                            ('4k', '64k')):
            name = 'compressed-%s-%s' % (kind, size)
            sh('qemu-img', 'convert', '-q', '-c', '-f', 'raw', '-O', 'qcow2',
               '-o', 'cluster_size=%s,compression_type=%s' % (size, kind),
               raw, self.path(name))
            self.kinds[name] = (self.path(name), None, None)
        os.unlink(raw)

    def extended(self):
        for size in ('16k', '64k'):
            self.create('extended-l2-' + size, '1M',
                        'cluster_size=%s,extended_l2=on' % size,
                        'write -P 1 512 1k', 'write -z 20k 4k',
                        'write -P 2 40k 512', 'write -P 3 70k 3k',
                        'discard 70k 2k',
                        'write -z 256k 128k')

    def snapshots(self):
        for name, size in (('snapshot', '512'), ('snapshots', '4k')):
            image = self.create(name, '64k', 'cluster_size=' + size,
                                'write -P 1 0 1k', 'write -P 1 5k 512')
            sh('qemu-img', 'snapshot', '-c', 'first', image)
            qemu_io(image, 'write -P 2 5k 512', 'write -z 16k 8k')
            if name == 'snapshots':
                sh('qemu-img', 'snapshot', '-c', 'second', image)
                qemu_io(image, 'write -P 3 0 512', 'discard 4k 4k')

    def backing(self):
        with open(self.path('base.raw'), 'wb') as f:
            f.write(b'raw below ' * 10 + bytes(5000) + b'end')
        self.create('base.qcow2', '32k', 'cluster_size=512',
                    'write -P 9 1k 512', 'write -z 4k 2k', 'write -P 8 31k 512')
        here = os.getcwd()
        os.chdir(self.folder)
        for size in ('32k', '8k', '64k'):
            self.create('over-qcow2-' + size, size, 'cluster_size=512',
                        'write -P 1 1k 700', 'write -z 2k 512',
                        below=('base.qcow2', 'qcow2'))
            self.create('over-raw-' + size, size, 'cluster_size=4k',
                        'write -P 1 1k 700', below=('base.raw', 'raw'))
        self.create('extended-over-raw', '32k',
                    'cluster_size=16k,extended_l2=on', 'write -P 1 1k 700',
                    below=('base.raw', 'raw'))
        os.chdir(here)

    def data_files(self):
        here = os.getcwd()
        os.chdir(self.folder)
        for raw in ('off', 'on'):
            name = 'data-file-raw-' + raw
            self.create(name, '64k', 'cluster_size=4k,data_file=%s.data,'
                        'data_file_raw=%s' % (name, raw),
                        'write -P 1 4k 512', 'write -z 16k 8k',
                        data_file=self.path(name + '.data'))
        os.chdir(here)

    def bitmaps(self):
        image = self.create('bitmaps', '256k', 'cluster_size=512')
        for name, g in (('monday', 512), ('tuesday', 4096), ('off', 512)):
            sh('qemu-img', 'bitmap', '--add', '-g', str(g), image, name)
        qemu_io(image, 'write -P 1 0 512', 'write -P 2 200k 1k')
        sh('qemu-img', 'bitmap', '--disable', image, 'off')
        image = self.create('bitmaps-64k', '64M', 'cluster_size=64k')
        sh('qemu-img', 'bitmap', '--add', image, 'fine', '-g', '512')
        qemu_io(image, 'write -P 1 0 512', 'write -P 2 60M 1k')
        sh('qemu-img', 'bitmap', '--add', image, 'new')
        # One that is in use, the image having no other fault.
        data = bytearray(read(self.kinds['bitmaps'][0]))
        at = data.rindex(b'monday') - 24
        assert data[at + 15] == 2
        data[at + 15] = 3
        with open(self.path('bitmap-in-use'), 'wb') as f:
            f.write(data)
        self.kinds['bitmap-in-use'] = (self.path('bitmap-in-use'), None, None)

    def all(self):
        self.plain()
        self.compressed()
        self.extended()
        self.snapshots()
        self.backing()
        self.data_files()
        self.bitmaps()
        return self.kinds


def pack_files(files):
    return b''.join(pack(i, read(path)) for i, path in enumerate(files)
                    if path and os.path.exists(path))


# ----------------------------------------------------------------------
# Programs of fuzz-image-write.

WRITE, ZERO, TRIM, FLUSH, READ, FAIL, RECLAIM, KILL = range(8)
SECTORS, FROM_END, CLUSTER = 0x80, 0x40, 0x20


def step(what, how=0, count=0, offset=0):
    return struct.pack('>BBHI', what, how, count, offset)


PROGRAMS = {
    'all': [step(WRITE, 0, 700, 300), step(WRITE, SECTORS, 3, 9),
            step(ZERO, SECTORS, 40, 8), step(FLUSH),
            step(WRITE, CLUSTER, 0, 5000), step(TRIM, SECTORS, 64, 0),
            step(WRITE, FROM_END, 1, 0), step(READ, 0, 9000, 0),
            step(ZERO, SECTORS | 1, 30, 5), step(RECLAIM),
            step(WRITE, 0, 60000, 1000), step(FLUSH),
            step(TRIM, CLUSTER, 0, 2000)],
    'kill': [step(WRITE, 0, 2000, 100), step(FLUSH),
             step(TRIM, SECTORS, 8, 0), step(WRITE, 0, 2000, 4000),
             step(FLUSH, 1), step(ZERO, SECTORS, 8, 16), step(KILL)],
    'fail': [step(WRITE, 0, 2000, 100), step(FAIL, 4),
             step(WRITE, SECTORS, 8, 16), step(FLUSH), step(FAIL, 2),
             step(ZERO, SECTORS, 90, 1), step(WRITE, CLUSTER, 0, 77),
             step(FLUSH), step(TRIM, SECTORS, 500, 0), step(FAIL, 3),
             step(FLUSH)],
    'fill': [step(WRITE, SECTORS, 128, 128 * i) for i in range(36)]
    + [step(FLUSH), step(TRIM, SECTORS, 60000, 0), step(FLUSH)]
    + [step(WRITE, SECTORS, 128, 128 * i) for i in range(3)],
}


# ----------------------------------------------------------------------
# fuzz-bitmaps.

def bitmaps_input(cluster_bits, sectors, bitmaps, marks, extension=None):
    """bitmaps: (name, granularity bits, flags, table), table being a
    character an entry: 0, 1 or a data cluster of this letter."""
    size = 1 << cluster_bits
    disk = sectors * 512
    l1 = -(-disk // (size * size // 8))
    at = -(-(3 * size + 8 * l1) // size) * size
    directory_at = at
    directory = b''
    out = b''
    at += size
    for name, granularity, flags, table in bitmaps:
        bits = -(-disk // (1 << granularity))
        entries = -(-(-(-bits // 8)) // size)
        table_at = at
        at += -(-8 * entries // size) * size
        words = b''
        for letter in table[:entries].ljust(entries, '0'):
            entry = int(letter) if letter in '01' else at
            words += struct.pack('>Q', entry)
            if letter not in '01':
                out += run(IMAGE, at, letter.encode() * min(size, 64))
                at += size
        out += run(IMAGE, table_at, words)
        entry = struct.pack('>QIIBBHI', table_at, entries, flags, 1,
                            granularity, len(name), 0) + name
        directory += entry.ljust(-(-len(entry) // 8) * 8, b'\0')
    if extension is None:
        extension = struct.pack('>IIIIQQ', 0x23852875, 24, len(bitmaps), 0,
                                len(directory), directory_at)
    program = struct.pack('>II', cluster_bits - 9, sectors)
    program += b''.join(struct.pack('>II', *m) for m in marks)
    return (run(PROGRAM, 0, program) + run(IMAGE, 104, extension)
            + run(IMAGE, directory_at, directory) + out)


def bitmaps_seeds():
    marks = [(0, 1), (100, 60), (0, 0), (5000, 9), (1, 1), (0, 0),
             (1000000, 1 << 20)]
    yield 'one', bitmaps_input(9, 20000, [(b'a', 9, 2, 'a01')], marks)
    yield 'three', bitmaps_input(9, 20001, [
        (b'monday', 9, 2, 'xy0z1'), (b'off', 10, 0, 'q1'),
        (b'in use', 9, 3, '0u')], marks)
    yield 'large', bitmaps_input(16, 2000000, [
        (b'fine', 9, 2, '0'), (b'medium', 16, 2, 'm'),
        (b'coarse', 31, 0, '1')], marks)
    yield 'long-name', bitmaps_input(13, 2000000, [
        (b'\xc3\xa4' * 500, 12, 2, 'k')], marks)
    yield 'idle', bitmaps_input(12, 300, [(b'idle', 9, 2, 'i')], [(0, 0)])
    yield 'empty', bitmaps_input(9, 100, [], [(0, 1)], extension=b'')
    yield 'no-disk', bitmaps_input(9, 0, [(b'a', 9, 2, '')], [(0, 1)])


# ----------------------------------------------------------------------
# fuzz-server.

def option(number, data=b''):
    return struct.pack('>QII', 0x49484156454f5054, number, len(data)) + data


def go(number=7, infos=(), name=b''):
    return option(number, struct.pack('>I', len(name)) + name
                  + struct.pack('>H', len(infos))
                  + b''.join(struct.pack('>H', i) for i in infos))


def contexts(number, *queries, name=b''):
    data = struct.pack('>I', len(name)) + name
    data += struct.pack('>I', len(queries))
    for query in queries:
        data += struct.pack('>I', len(query)) + query
    return option(number, data)


def request(command, offset=0, length=0, flags=0, data=b'', cookie=1):
    return struct.pack('>IHHQQI', 0x25609513, flags, command, cookie, offset,
                       length or len(data)) + data


def extended(command, offset=0, length=0, flags=0, data=b'', cookie=1):
    if data:
        flags |= 32
    return struct.pack('>IHHQQQ', 0x21e41c71, flags, command, cookie, offset,
                       length or len(data)) + data


def selection(length, *ids):
    return struct.pack('>Q%dI' % len(ids), length, *ids)


def server_seeds():
    flags = struct.pack('>I', 3)
    structured = option(8)
    every = [request(0, 0, 512), request(1, 4096, data=b'w' * 100),
             request(3), request(4, 8192, 4096), request(5, 0, 65536),
             request(6, 512, 70000, flags=2), request(7, 0, 1 << 20),
             request(7, 5000, 60000, flags=8), request(0, 0, 1 << 20),
             request(0, 100, 300000, flags=4), request(99, 0, 1),
             request(0, 1 << 40, 5), request(1, 0, data=b'f' * 10, flags=1),
             request(6, 0, 1 << 20, flags=17), request(2)]
    requests = b''.join(every)
    yield 'simple', flags + go() + requests
    yield 'structured', flags + structured + go(infos=(1, 2, 3)) + requests
    yield 'contexts', (flags + structured + contexts(
        10, b'base:allocation', b'qemu:dirty-bitmap:monday',
        b'qemu:dirty-bitmap:tuesday') + go() + requests)
    yield 'lists', (flags + option(3) + structured + contexts(9)
                    + contexts(9, b'base:', b'qemu:', b'qemu:dirty-bitmap:')
                    + go(6) + go(6, (0, 1, 2, 3), b'name')
                    + option(5) + option(77, b'what') + option(2))
    yield 'export-name', flags + option(1, b'old') + requests
    yield 'zeroes', struct.pack('>I', 1) + option(1) + request(0, 0, 10)
    yield 'other-name', (flags + structured
                         + contexts(10, b'base:allocation', name=b'one')
                         + go(name=b'two') + request(7, 0, 512))
    yield 'depth', (flags + structured
                    + contexts(10, b'qemu:allocation-depth')
                    + go() + request(7, 0, 70000))
    yield 'parallel', (flags + structured + go()
                       + b''.join(request(0, 4096 * i, 300000, cookie=i)
                                  + request(3) for i in range(20)))
    yield 'errors', (flags + structured
                     + contexts(10, b'base:allocation') + go()
                     + b''.join(request(i % 8, 4096 * i + 4090, 1,
                                        data=b'e' if i % 8 == 1 else b'')
                                for i in range(30)))
    headers = option(11)
    every = [extended(0, 0, 512), extended(1, 4096, data=b'w' * 100),
             extended(3), extended(4, 8192, 1 << 19), extended(5, 0, 65536),
             extended(6, 512, 70000, flags=2), extended(7, 0, 1 << 20),
             extended(7, 5000, 60000, flags=8),
             extended(7, 0, data=selection(1 << 20, 3, 0)),
             extended(7, 512, data=selection(4096, 2), flags=8),
             extended(7, 0, data=selection(512, 2, 2)),
             extended(7, 0, data=selection(1 << 63, 9)),
             extended(7, 0, data=b'short'),
             extended(0, 0, data=b'a payload of a READ'),
             extended(99, 0, data=b'x' * 1000), extended(4, 1, (1 << 64) - 1),
             extended(0, 100, 300000, flags=4), extended(2)]
    yield 'extended', (flags + headers + contexts(
        10, b'base:allocation', b'qemu:dirty-bitmap:monday',
        b'qemu:dirty-bitmap:tuesday') + go(6) + go() + b''.join(every))
    yield 'extended-late', (flags + structured + contexts(
        10, b'base:allocation', b'qemu:allocation-depth') + headers
        + structured + headers + go() + extended(7, 0, 1 << 20)
        + extended(1, 0, 100))
    yield 'extended-compact', flags + headers + go() + request(0, 0, 512)
    yield 'extended-long', flags + headers + go() + extended(
        4, 0, 1 << 32, flags=32)
    yield 'half', flags + structured + go() + request(1, 0, 5000)[:28]


# ----------------------------------------------------------------------

def save(folder, target, name, data):
    os.makedirs(os.path.join(folder, target), exist_ok=True)
    with open(os.path.join(folder, target, name), 'wb') as f:
        f.write(data)


COMMANDS = ('backup-list', 'query-block', 'query-block-exports', 'query-commands',
            'query-name', 'query-named-block-nodes', 'query-stats',
            'query-status', 'query-version', 'quit', 'nosuch')

BITMAP = 'block-dirty-bitmap-'
CHANGES = (
    ('add', {'name': 'a', 'granularity': 512, 'persistent': True}),
    ('add', {'name': 'r', 'disabled': True}),
    ('disable', {'name': 'monday'}), ('enable', {'name': 'a'}),
    ('merge', {'target': 'a', 'bitmaps': ['monday', {'node': 'disk',
                                                     'name': 'r'}]}),
    ('clear', {'name': 'monday', 'force': True}),
    ('remove', {'name': 'broken'}),
    ('remove', {'name': 'a'}), ('remove', {'name': 'r'}),
)


def execute(command, **arguments):
    return json.dumps({'execute': command, 'arguments': arguments}).encode()


def change_seeds():
    """Commands that change bitmaps, and leave hardly a trace."""
    data = [(BITMAP + what, {'node': 'disk', **more})
            for what, more in CHANGES]
    actions = [{'type': t, 'data': d} for t, d in data]
    abort = {'type': 'abort', 'data': {}}
    yield 'changes', b''.join(execute(c, **d) for c, d in data)
    yield 'transaction', execute('transaction', actions=actions)
    yield 'abort', execute('transaction', actions=actions[:4] + [abort],
                           properties={'completion-mode': 'individual'})
    yield 'grouped', execute('transaction', actions=[abort] + actions,
                             properties={'completion-mode': 'grouped'})
    yield 'elsewhere', b''.join(execute(c, **{**d, 'node': 'x'})
                                for c, d in data) + execute(
        BITMAP + 'merge', node='disk', target='monday',
        bitmaps=['monday', {'node': 'x', 'name': 'a'}, 5])


def backup_seeds():
    """Backups, with views and without."""
    look = execute('backup-list') + execute('query-block-exports')
    begin = [{'type': 'backup-begin', 'data': {'bitmap': b, **more}}
             for b, more in (('monday', {}), ('a', {'fail-after': 9}),
                             ('r', {'view': False}))]
    ends = [execute('backup-end', bitmap=a['data']['bitmap'], success=success,
                    **more)
            for a, success, more in zip(begin, (True, False, True),
                                        ({}, {}, {'clear': False}))]
    yield 'backups', b''.join(execute(a['type'], **a['data']) for a in begin
                              ) + look + b''.join(ends) + look
    yield 'group', execute('gate-close', timeout=50) + execute(
        'transaction', actions=begin) + execute('gate-open') + ends[0]
    yield 'views', (execute('backup-begin', bitmap='monday') + ends[0]) * 9
    yield 'fail-after', b''.join(
        execute('backup-begin', bitmap='monday', **more)
        for more in ({'fail-after': 0}, {'fail-after': 604801},
                     {'fail-after': 9, 'view': False}, {'fail-after': 'x'}))


def control_seeds():
    """What a client says after the greeting."""
    begin = b'{"execute":"qmp_capabilities"}\n'
    yield 'empty', b''
    yield 'capability', b'{"execute":"qmp_capabilities",' \
        b'"arguments":{"enable":["oob"]}}'
    for command in COMMANDS:
        yield command, begin + b'{"execute":"%s","id":[1,{"a":"\\u00e9"}]}' % (
            command.encode())
    yield 'flat', begin + b"{'execute':'query-named-block-nodes'," \
        b"'arguments':{'flat':true}}"
    yield 'all', begin + b''.join(b'{"execute":"%s"}' % c.encode()
                                  for c in COMMANDS)
    yield 'errors', begin + b'[]{}"a\'b"12 nul {"a":1,"a":2}]\x1b{"a":[1,-2.5e3'
    for name, data in change_seeds():
        yield name, begin + data
    for name, data in backup_seeds():
        yield name, begin + data
    yield 'deep', begin + b'{"a":' * 33 + b'1' + b'}' * 33


def make_all(folder):
    with tempfile.TemporaryDirectory() as tmp:
        for name, files in Images(tmp).all().items():
            data = pack_files(files)
            save(folder, 'image-read', name, data)
            for program, steps in PROGRAMS.items():
                save(folder, 'image-write', name + '-' + program,
                     data + run(PROGRAM, 0, b''.join(steps)))
    for name, data in bitmaps_seeds():
        save(folder, 'bitmaps', name, data)
    for name, data in control_seeds():
        save(folder, 'control', name, data)
    for name, data in server_seeds():
        save(folder, 'server', name, data)


def main(args):
    if len(args) >= 2 and args[0] == 'pack':
        sys.stdout.buffer.write(pack_files(args[1:]))
    elif len(args) == 3 and args[0] == 'unpack':
        os.makedirs(args[2], exist_ok=True)
        for name, data in zip(NAMES, unpack(read(args[1]))):
            with open(os.path.join(args[2], name), 'wb') as f:
                f.write(data)
    elif len(args) == 1:
        make_all(args[0])
    else:
        sys.exit(__doc__)


if __name__ == '__main__':
    main(sys.argv[1:])
