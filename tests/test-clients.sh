#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# The clients that users have, in the versions that are installed here:
# qemu-io, qemu-img, nbdinfo, nbdcopy and libnbd's Python module read,
# write and ask.  Those that can do so negotiate extended headers, which is
# seen in the server's log: QEMU's from 8.2 on, libnbd's from 1.18 on.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires nbdcopy qemu-io
[ "$SERVER" = nbdkit ] || skip "for our own server's log"

# form COMMAND EXTENDED-SINCE: of the replies that COMMAND, which tells its
# version, is to negotiate.
form ()
{
  local version

  version=$($1 --version | grep -oE '[0-9]+\.[0-9]+(\.[0-9]+)?' | head -n 1)
  [ -n "$version" ] || fail "$1 does not tell its version"
  echo "$1 is of version $version" >&2
  if [ "$(printf '%s\n' "$2" "$version" | sort -V | head -n 1)" = "$2" ]; then
    echo extended
  else
    echo structured
  fi
}

qemu_form=$(form qemu-img 8.2)
libnbd_form=$(form nbdinfo 1.18)

# begin WHAT: a server, over a new disk.
begin ()
{
  echo "--- $1"
  rm -f disk.qcow2
  qemu-img create -q -f qcow2 disk.qcow2 64M
  qemu-img bitmap --add disk.qcow2 b
  start_nbdkit -v -D dirty-bitmap.request=1 --filter="$FILTER" file disk.qcow2
}

# end FORM COMMAND...: all connections used that form, and each COMMAND of
# the protocol, a regular expression, was seen.
end ()
{
  local form=$1 command

  shift
  stop_server
  grep 'nbd: connection [0-9]* opened' "$log" > opened ||
    fail "no connection was opened"
  ! grep -v ", $form replies," opened ||
    fail "a client did not negotiate $form replies"
  for command in "$@"; do
    grep -qE "nbd: connection [0-9]+: request .*\(($command)\)" "$log" ||
      fail "the client sent no $command"
  done
  check_image disk.qcow2
}

begin "qemu-io"
qemu-io -f raw \
  -c 'write -P 5 1M 3M' -c 'write -P 6 -f 8M 512' -c 'write -z 2M 64k' \
  -c 'write -z -u 3M 64k' -c 'discard 16M 1M' -c flush \
  -c 'read -P 5 1M 1M' -c 'read -P 0 2M 64k' -c 'read -P 0 3M 64k' \
  -c 'read -P 6 8M 512' -c 'read -P 0 16M 48M' \
  "nbd+unix:///?socket=$sock" > out 2>&1 || { cat out; fail "qemu-io"; }
! grep -E 'failed|error' out || { cat out; fail "qemu-io"; }
end "$qemu_form" read write flush trim 'write zeroes'
same "the bitmap" "1048576 3145728
8388608 65536
16777216 1048576" "$(qemu_dirty disk.qcow2 b)"

head -c 20000000 /dev/urandom > data
truncate -s 64M data

begin "qemu-img, writing"
qemu-img convert -n -f raw -O raw data "nbd+unix:///?socket=$sock"
end "$qemu_form" write 'write zeroes' flush
qemu-img compare -q -f raw -F qcow2 data disk.qcow2
qemu_dirty disk.qcow2 b > dirty
[ "$(awk '$1 == 0 { print $2 }' dirty)" -ge 20000000 ] ||
  { cat dirty; fail "less is dirty than was written"; }

# begin_full WHAT: over a disk that has data, and 4 MiB of it dirty.
begin_full ()
{
  begin "$1"
  stop_server
  qemu-img convert -f raw -O qcow2 data disk.qcow2
  qemu-img bitmap --add disk.qcow2 b
  qemu-io -f qcow2 -c 'write -q -P 9 4M 4M' disk.qcow2
  rm -f now
  qemu-img convert -f qcow2 -O raw disk.qcow2 now
  start_nbdkit -v -D dirty-bitmap.request=1 --filter="$FILTER" file disk.qcow2
}

begin_full "qemu-img, reading"
qemu-img info "$uri" | grep 'virtual size: 64 MiB'
qemu-img convert -f raw -O raw "$uri" back
cmp now back
qemu-img compare -q -f raw -F raw "$uri" now
image=driver=raw,file.driver=nbd,file.server.type=unix,file.server.path=$sock
image+=,file.x-dirty-bitmap=qemu:dirty-bitmap:b
qemu-img map --output=json --image-opts "$image" > map.json
# QEMU tells what is dirty as what is no data.
/usr/bin/python3 - <<'END'
import json
found = [(e["start"], e["length"]) for e in json.load (open ("map.json"))
         if not e["data"]]
assert found == [(4 << 20, 4 << 20)], found
END
end "$qemu_form" read 'block status'

begin_full "nbdinfo"
nbdinfo --list "$uri" > list
grep "newstyle-fixed without TLS, using $libnbd_form packets" list
grep 'qemu:dirty-bitmap:b' list
same "the size" 67108864 "$(nbdinfo --size "$uri")"
same "what is dirty" "4194304 4194304" "$(dirty b)"
nbdinfo --can trim "$uri"
nbdinfo --map --totals "$uri" > totals
grep -E '^ *[0-9]+ .* data' totals
end "$libnbd_form" 'block status'

begin_full "nbdcopy"
for options in "--connections=1 --request-size=65536" \
               "--connections=4 --request-size=33554432"; do
  rm -f back
  # shellcheck disable=SC2086  # words are meant
  nbdcopy $options "$uri" back
  cmp now back
done
end "$libnbd_form" read 'block status'
begin "nbdcopy, writing"
nbdcopy --flush --connections=4 data "$uri"
end "$libnbd_form" write 'write zeroes|trim' flush
qemu-img compare -q -f raw -F qcow2 data disk.qcow2
qemu_dirty disk.qcow2 b > dirty
[ "$(awk '$1 == 0 { print $2 }' dirty)" -ge 20000000 ] ||
  { cat dirty; fail "less is dirty than was written"; }

begin "libnbd's Python module, as strict as it is by default and not at all"
for strict in 'h.get_strict_mode()' 0; do
  FORM=$libnbd_form nbdsh -c "h.set_strict_mode($strict)" \
      -c 'h.add_meta_context("qemu:dirty-bitmap:b")' \
      -c "h.connect_uri('$uri')" -c '
import os
extended = os.environ["FORM"] == "extended"
assert h.get_structured_replies_negotiated ()
if hasattr (h, "get_extended_headers_negotiated"):
    assert h.get_extended_headers_negotiated () == extended
else:
    assert not extended
h.pwrite (b"\7" * 3000000, 1 << 20)
h.pwrite (b"\10" * 10, 5 << 20, nbd.CMD_FLAG_FUA)
h.zero (100000, 6 << 20, nbd.CMD_FLAG_NO_HOLE)
h.trim (65536, 7 << 20)
h.cache (65536, 0)
h.flush ()
assert h.pread (3000000, 1 << 20) == b"\7" * 3000000
assert h.pread_structured (10, 5 << 20, lambda *a: None,
                           nbd.CMD_FLAG_DF) == b"\10" * 10
assert h.pread (100000, 6 << 20) == bytes (100000)
found = []
h.block_status (64 << 20, 0, lambda *a: found.extend (a[2]))
assert found[:4] == [1 << 20, 0, 3014656, 1], found
try:
    h.pread (1, 64 << 20)
except nbd.Error as e:
    assert e.errno in ("EINVAL", "ENOSPC"), e
else:
    raise SystemExit ("a read past the end was served")
assert h.pread (10, 5 << 20) == b"\10" * 10
'
done
end "$libnbd_form" read write flush trim 'write zeroes' cache 'block status'
