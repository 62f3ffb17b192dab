# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""A client of a control socket, ours or QEMU's, and QEMU's server."""

import json
import os
import socket
import subprocess
import time

import harness

CTL = os.path.join(os.environ.get("abs_top_builddir", ".."), "tools",
                   "nbdkit-dirty-bitmap-ctl")


class Qmp:
    """A connection.  It has sent nothing yet, unless negotiate is true.

    QEMU may greet a client twice that connects while QEMU starts."""

    def __init__(self, path, negotiate=True, is_qemu=False):
        deadline = time.monotonic() + harness.PATIENCE
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(harness.PATIENCE)
            try:
                self.socket.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < deadline, path
                self.socket.close()
                time.sleep(0.01)
        self.buffer = b""
        self.events = []
        self.is_qemu = is_qemu
        self.greeting = self.message()
        if negotiate:
            assert self.ask("qmp_capabilities") == {}

    def send(self, data):
        if not isinstance(data, (bytes, str)):
            data = json.dumps(data)
        if isinstance(data, str):
            data = data.encode()
        self.socket.sendall(data)

    def message(self):
        """The next message, or None at the end."""
        while b"\r\n" not in self.buffer:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                assert self.buffer == b"", self.buffer
                return None
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\r\n")
        return json.loads(line)

    def reply(self):
        """The next message that is no event."""
        while True:
            message = self.message()
            if self.is_qemu and message is not None and "QMP" in message:
                continue
            if message is None or "event" not in message:
                return message
            self.events.append(message)

    def execute(self, command, **arguments):
        """The whole reply."""
        request = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        self.send(request)
        return self.reply()

    def ask(self, command, **arguments):
        """What it returns."""
        reply = self.execute(command, **arguments)
        assert "return" in reply, reply
        return reply["return"]

    def error(self, data):
        """The class and text of the error that data gets."""
        self.send(data)
        reply = self.reply()
        assert "error" in reply, reply
        return reply["error"]["class"], reply["error"]["desc"]

    def ended(self):
        """It is at its end; the events that came before."""
        while True:
            message = self.message()
            if message is None:
                return self.events
            self.events.append(message)

    def close(self):
        self.socket.close()


def bitmaps(q, command="query-named-block-nodes"):
    """{name: entry} of the disk's node, without the name."""
    nodes = [n.get("inserted", n) for n in q.ask(command)]
    [node] = [n for n in nodes if n["drv"] == "qcow2"]
    return {b.pop("name"): b for b in node.get("dirty-bitmaps", [])}


def entry(granularity=65536, count=0, **changes):
    """An entry of a new bitmap, or with changes."""
    return {"recording": True, "persistent": True, "busy": False,
            "granularity": granularity, "count": count, **changes}


def arguments(what, name, **more):
    """Of the command block-dirty-bitmap-WHAT."""
    key = "target" if what == "merge" else "name"
    return {"node": "disk", key: name, **more}


def change(q, what, name, **more):
    """The command block-dirty-bitmap-WHAT succeeds."""
    assert q.ask("block-dirty-bitmap-" + what,
                 **arguments(what, name, **more)) == {}


def refuse(q, text, what, name, **more):
    """It fails, with this text."""
    assert q.error({"execute": "block-dirty-bitmap-" + what,
                    "arguments": arguments(what, name, **more)}) == (
        "GenericError", text)


def action(what, name=None, **more):
    """An action of a transaction."""
    if what == "abort":
        return {"type": what, "data": {}}
    return {"type": "block-dirty-bitmap-" + what,
            "data": arguments(what, name, **more)}


class StorageDaemon:
    """QEMU's server over an image, with its control socket.  Its node is the
    disk."""

    def __init__(self, image, path, readonly=False):
        mode = ",read-only=" + ("on" if readonly else "off")
        self.process = subprocess.Popen(
            ["qemu-storage-daemon",
             "--blockdev", "file,node-name=f,filename=" + image + mode,
             "--blockdev", "qcow2,node-name=disk,file=f" + mode,
             "--chardev", "socket,id=c,server=on,wait=off,path=" + path,
             "--monitor", "chardev=c"], stdin=subprocess.DEVNULL)
        harness.servers.append(self)


def ctl(*args, status=0, stdin=b""):
    """What nbdkit-dirty-bitmap-ctl prints, on stdout and stderr."""
    p = subprocess.run([CTL, *args], input=stdin, stdout=subprocess.PIPE,
                       stderr=subprocess.PIPE, timeout=harness.PATIENCE)
    out, err = p.stdout.decode(), p.stderr.decode()
    assert p.returncode == status, (args, p.returncode, out, err)
    assert (err == "") == (status == 0), err
    return out, err
