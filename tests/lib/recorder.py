# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""An NBD server that remembers every change and every flush.

It stands below the filter, as storage (nbdkit's nbd plugin connects to
it), and tells later what could have been on the medium if the power had
failed at some moment.  It serves one byte array of fixed size, and can
be told to fail requests.
"""

import os
import socket
import struct
import threading

import harness

SECTOR = 512
READ, WRITE, DISC, FLUSH, TRIM, _, ZEROES = range(7)
HAS_FLAGS, SEND_FLUSH, SEND_TRIM, SEND_ZEROES = 1, 4, 32, 64


class Recorder:
    def __init__(self, data, punch=True):
        self.original = bytes(data)
        self.data = bytearray(data)
        self.punch = punch
        self.events = []        # (offset, bytes), or None for a flush
        self.fail = lambda command, offset, count: 0
        self.path = os.path.join(harness.tmp, "recorder")
        if os.path.exists(self.path):
            os.unlink(self.path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(8)
        threading.Thread(target=self.accept, daemon=True).start()

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(sock,),
                             daemon=True).start()

    def serve(self, sock):
        try:
            with sock, sock.makefile("rb") as stream:
                if self.handshake(sock, stream):
                    while self.request(sock, stream):
                        pass
        except OSError:
            pass

    def handshake(self, sock, stream):
        sock.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        stream.read(4)
        while True:
            header = stream.read(16)
            if len(header) < 16:
                return False
            option, length = struct.unpack(">8xII", header)
            stream.read(length)

            def reply(kind, payload=b"", option=option):
                sock.sendall(struct.pack(">QIII", 0x3e889045565a9, option,
                                         kind, len(payload)) + payload)
            if option in (6, 7):                # INFO, GO
                flags = HAS_FLAGS | SEND_FLUSH | SEND_ZEROES
                flags |= SEND_TRIM if self.punch else 0
                reply(3, struct.pack(">HQH", 0, len(self.data), flags))
                reply(1)
                if option == 7:
                    return True
            elif option == 2:                   # ABORT
                reply(1)
                return False
            else:
                reply((1 << 31) + 1)

    def request(self, sock, stream):
        header = stream.read(28)
        if len(header) < 28:
            return False
        _, _, command, cookie, offset, count = struct.unpack(">IHHQQI", header)
        payload = stream.read(count) if command == WRITE else b""
        if command == DISC:
            return False
        error = self.fail(command, offset, count)
        result = b""
        if error == 0:
            if command == READ:
                result = bytes(self.data[offset:offset + count])
            elif command == FLUSH:
                self.events.append(None)
            elif command in (TRIM, ZEROES):
                self.change(offset, bytes(count))
            else:
                self.change(offset, payload)
        sock.sendall(struct.pack(">IIQ", 0x67446698, error, cookie) + result)
        return True

    def change(self, offset, data):
        self.data[offset:offset + len(data)] = data
        self.events.append((offset, data))

    def crash(self, when, rnd):
        """The medium after a power cut when `when` events had happened:
        all up to the last flush, and of the rest any subset, torn."""
        flushes = [i for i in range(when) if self.events[i] is None]
        durable = flushes[-1] if flushes else 0
        medium = bytearray(self.original)
        likely = rnd.choice([0, 0.1, 0.5, 0.9, 1])
        for i, event in enumerate(self.events[:when]):
            if event is None:
                continue
            offset, data = event
            if i < durable:
                medium[offset:offset + len(data)] = data
                continue
            whole = rnd.random() < 0.7
            if whole and rnd.random() >= likely:
                continue
            pos = 0
            while pos < len(data):
                n = SECTOR - (offset + pos) % SECTOR
                if whole or rnd.random() < likely:
                    medium[offset + pos:offset + min(pos + n, len(data))] = \
                        data[pos:pos + n]
                pos += n
        return medium
