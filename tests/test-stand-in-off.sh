#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Where nbdkit's own server answers (server=off, another filter in front,
# a filter that judges clients): no bitmap contexts, a line that says why,
# but the data, the recording and the end are right, also with an idle
# client when TERM comes.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd

cat > client.py <<'END'
import nbd, os, signal, sys, time
pid = int (open ("pid").read ())
h = nbd.NBD ()
if len (sys.argv) > 2:
    h.set_tls (nbd.TLS_REQUIRE)
    h.set_tls_psk_file (sys.argv[2])
    h.set_tls_username ("alice")
h.add_meta_context ("base:allocation")
h.add_meta_context ("qemu:dirty-bitmap:b")
h.connect_unix (sys.argv[1])
assert not h.can_meta_context ("qemu:dirty-bitmap:b")
h.pwrite (b"x" * 100000, 1 << 20)
h.flush ()
h.pwrite (b"y" * 512, 5 << 20)
h.zero (65536, 6 << 20)
h.trim (65536, 7 << 20, nbd.CMD_FLAG_FUA)
h.pwrite (b"z" * 512, 8 << 20)
assert h.pread (512, 5 << 20) == b"y" * 512
assert h.pread (65536, 6 << 20) == bytes (65536)
found = []
h.block_status (3 << 20, 5 << 20, lambda *a: found.extend (a[2]))
assert 512 <= found[0] <= 65536 and found[1] == 0, found
assert sum (found[0::2]) <= 3 << 20, found
# Idle from here on.
os.kill (pid, signal.SIGTERM)
start = time.monotonic ()
def lives ():
    try:
        with open ("/proc/%d/stat" % pid) as f:
            return f.read ().split (")")[1].split ()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
while lives ():
    assert time.monotonic () - start < 3, "the server does not end"
    time.sleep (0.01)
assert time.monotonic () - start < 1.5, "it took too long"
END
(umask 077; echo "alice:$(printf %064d 17)" > keys.psk)

try ()
{
  local tls=$1

  shift
  echo "nbdkit $*"
  rm -f disk.qcow2
  qemu-img create -q -f qcow2 disk.qcow2 64M
  qemu-img bitmap --add disk.qcow2 b
  start_nbdkit "$@"
  /usr/bin/python3 client.py "$sock" $tls
  server_ends
  check_image disk.qcow2
  same flags auto "$(bitmap_flags disk.qcow2 b)"
  same "QEMU's map" "1048576 131072
5242880 65536
6291456 65536
7340032 65536
8388608 65536" "$(qemu_dirty disk.qcow2 b)"
}

# why PATTERN: the log says why.
why ()
{
  grep -E -i -e "$1" "$log" || { cat "$log"; fail "the log does not say '$1'"; }
}

try "" --filter="$FILTER" file disk.qcow2 dirty-bitmap-server=off
try "" --filter=log --filter="$FILTER" file disk.qcow2 logfile=/dev/null
why 'outermost|log'
try "" --filter="$FILTER" --filter=limit file disk.qcow2 limit=5
why limit
try "" --filter="$FILTER" --filter=ip file disk.qcow2 allow=all
why ip
if nbdkit --dump-config | finds '^tls=yes'; then
  try keys.psk --tls=require --tls-psk=keys.psk --filter="$FILTER" \
      file disk.qcow2 dirty-bitmap-server=off
fi

# dirty-bitmap-server=on makes the reason an error at startup.
before=$(checksum disk.qcow2)
refused 'outermost|log' --filter=log --filter="$FILTER" file disk.qcow2 \
        logfile=/dev/null dirty-bitmap-server=on
refused limit --filter="$FILTER" --filter=limit file disk.qcow2 \
        dirty-bitmap-server=on
refused tls-fallback --tls=on --tls-psk=keys.psk --filter="$FILTER" \
        --filter=tls-fallback file disk.qcow2 dirty-bitmap-server=on
same "the file" "$before" "$(checksum disk.qcow2)"
