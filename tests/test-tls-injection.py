#!/usr/bin/python3 -B
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""What somebody between client and server can put before a client's TLS:
plaintext behind STARTTLS must not be executed as if the client had sent
it encrypted, and what was negotiated before STARTTLS must not hold after
it.  Whether TLS is required or the client's choice.
"""

import socket
import ssl
import struct
import time

import harness
from harness import FILTER, Server, sha256

harness.requires("certtool")
OPT, REPLY = 0x49484156454F5054, 0x0003E889045565A9
LIST, STARTTLS, GO, STRUCTURED, SET_META = 3, 5, 7, 8, 10
ACK, TLS_REQD, INVALID = 1, 0x80000005, 0x80000003
NO_NAME = struct.pack(">IH", 0, 0)
CONTEXT = b"qemu:dirty-bitmap:b"
QUERY = struct.pack(">III", 0, 1, len(CONTEXT)) + CONTEXT

for name, template in (("ca", "cn = ca\nca\ncert_signing_key\n"),
                       ("server", "cn = localhost\ndns_name = localhost\n"
                                  "tls_www_server\nsigning_key\n")):
    with open(name + ".info", "w", encoding="ascii") as f:
        f.write(template + "expiration_days = 2\n")
    harness.run("certtool", "--generate-privkey", "--key-type=ecdsa",
                "--outfile", name + "-key.pem")
harness.run("certtool", "--generate-self-signed", "--template", "ca.info",
            "--load-privkey", "ca-key.pem", "--outfile", "ca-cert.pem")
harness.run("certtool", "--generate-certificate", "--template", "server.info",
            "--load-ca-certificate", "ca-cert.pem",
            "--load-ca-privkey", "ca-key.pem",
            "--load-privkey", "server-key.pem",
            "--outfile", "server-cert.pem")


def option(number, payload=b"", length=None):
    return struct.pack(">QII", OPT, number,
                       len(payload) if length is None else length) + payload


def request(command, offset, data):
    return struct.pack(">IHHQQI", 0x25609513, 0, command, 1, offset,
                       len(data)) + data


class Client:
    def __init__(self):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.settimeout(harness.PATIENCE)
        self.s.connect(server.socket)
        self.read(18)
        self.s.sendall(struct.pack(">I", 3))

    def read(self, count):
        data = b""
        while len(data) < count:
            more = self.s.recv(count - len(data))
            assert more, "the server hung up"
            data += more
        return data

    def reply(self):
        magic, _, kind, length = struct.unpack(">QIII", self.read(20))
        assert magic == REPLY, "not an option reply"
        return kind, self.read(length)

    def ask(self, number, payload=b""):
        """Send an option; the last reply's type, and the others."""
        self.s.sendall(option(number, payload))
        infos = []
        while True:
            kind, data = self.reply()
            if kind == ACK or kind & 0x80000000:
                return kind, infos
            infos.append(data)

    def rest(self):
        """All that still comes, until the server hangs up."""
        data = b""
        try:
            while more := self.s.recv(65536):
                data += more
        except ConnectionError:
            pass
        return data

    def encrypt(self):
        context = ssl.create_default_context(cafile="ca-cert.pem")
        self.s = context.wrap_socket(self.s, server_hostname="localhost")


def contexts_work():
    c = Client()
    assert c.ask(STARTTLS) == (ACK, [])
    c.encrypt()
    assert c.ask(STARTTLS)[0] == INVALID
    assert c.ask(STRUCTURED)[0] == ACK
    kind, contexts = c.ask(SET_META, QUERY)
    assert kind == ACK and contexts[0][4:] == CONTEXT, contexts
    assert c.ask(GO, NO_NAME)[0] == ACK
    c.s.sendall(request(7, 0, b"")[:-4] + struct.pack(">I", 65536))
    magic, _, kind, _, length = struct.unpack(">IHHQI", c.read(20))
    assert magic == 0x668e33ef and kind == 5
    c.read(length)


def behind_starttls(plaintext):
    """In one piece with it: none of it is answered or done."""
    c = Client()
    c.s.sendall(option(STARTTLS) + plaintext)
    assert c.rest() == b"", "an answer to what was injected"


def after_the_answer(plaintext):
    """Where TLS was to begin: nothing but an alert may come."""
    c = Client()
    assert c.ask(STARTTLS) == (ACK, [])
    try:
        c.s.sendall(plaintext)
        c.s.shutdown(socket.SHUT_WR)    # or it might wait for a whole record
    except OSError:
        pass
    rest = c.rest()
    assert rest == b"" or rest[:1] == b"\x15", rest


def in_pieces(plaintext):
    """STARTTLS cut in the middle, its second half with more behind it."""
    whole = option(STARTTLS) + plaintext
    c = Client()
    c.s.sendall(whole[:9])
    time.sleep(0.05)
    c.s.sendall(whole[9:])
    assert c.rest() == b"", "an answer to what was injected"


write = option(GO, NO_NAME) + request(1, 0, b"injected" * 64)
injections = [
    option(LIST), option(STRUCTURED), option(STRUCTURED) +
    option(SET_META, QUERY), write, option(STARTTLS), b"\0", b"\x16\x03\x01",
    option(LIST, length=1000), write + bytes(100000),
]
for mode in "on", "require":
    harness.create("disk.qcow2", 1 << 20, "b")
    before = sha256("disk.qcow2")
    server = Server(args=["--tls=" + mode, "--tls-certificates=" + harness.tmp,
                          "--filter=" + FILTER, "file", "disk.qcow2"])
    contexts_work()
    for injection in injections:
        behind_starttls(injection)
        after_the_answer(injection)
        in_pieces(injection)
    contexts_work()

    # With data STARTTLS is refused, and is no STARTTLS.
    c = Client()
    assert c.ask(STARTTLS, b"data")[0] == INVALID
    assert c.ask(LIST)[0] == (ACK if mode == "on" else TLS_REQD)

    # What the one in the middle negotiated is gone.
    c = Client()
    expected = ACK if mode == "on" else TLS_REQD
    assert c.ask(STRUCTURED)[0] == expected
    assert c.ask(SET_META, QUERY)[0] == expected
    assert c.ask(STARTTLS)[0] == ACK
    c.encrypt()
    kind, infos = c.ask(GO, NO_NAME)
    assert kind == ACK
    flags = [struct.unpack(">QH", i[2:])[1] for i in infos
             if i[:2] == b"\0\0"]
    assert flags and flags[0] & 1 << 7 == 0, "DF without structured replies"
    # A READ is answered with a simple reply, and is what was there.
    c.s.sendall(request(0, 0, b"")[:-4] + struct.pack(">I", 512))
    assert c.read(16)[:8] == struct.pack(">II", 0x67446698, 0)
    assert c.read(512) == bytes(512)
    c.s.close()
    server.stop()
    assert sha256("disk.qcow2") == before, "the disk was changed"
