#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# nbdkit -s serves one client on stdin and stdout, which is shown the
# bitmaps.  Where nbdkit's own server answers it is not, but recording
# works.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd

single ()
{
  /usr/bin/python3 - "$@" <<'END'
import nbd, sys
shown, *command = sys.argv[1:]
h = nbd.NBD ()
h.add_meta_context ("qemu:dirty-bitmap:b")
h.connect_command (command)
assert h.can_meta_context ("qemu:dirty-bitmap:b") == (shown == "shown")
h.pwrite (b"x" * 512, 65536)
assert h.pread (512, 65536) == b"x" * 512
if shown == "shown":
    found = []
    h.block_status (h.get_size (), 0, lambda *a: found.extend (a[2]))
    assert found == [65536, 0, 65536, 1, h.get_size () - 131072, 0], found
h.shutdown ()
END
}

try ()
{
  echo "$*"
  rm -f disk.qcow2
  qemu-img create -q -f qcow2 disk.qcow2 10M
  qemu-img bitmap --add disk.qcow2 b
  single "$@" 2>log
  cat log
  # nbdkit may need a moment after its client has left.
  wait_until qemu-img info disk.qcow2
  wait_until eval "[ \"\$(bitmap_flags disk.qcow2 b)\" = auto ]"
  check_image disk.qcow2
  same "QEMU's map" "65536 65536" "$(qemu_dirty disk.qcow2 b)"
}

nbdkit=$(command -v nbdkit)
try shown "$nbdkit" -s --filter="$FILTER" file disk.qcow2
[ ! -s log ] || fail "something was said"
try shown "$nbdkit" -s --filter="$FILTER" file disk.qcow2 \
    dirty-bitmap-server=on
try hidden "$nbdkit" -s --filter="$FILTER" file disk.qcow2 \
    dirty-bitmap-server=off
try hidden "$nbdkit" -s --filter=log --filter="$FILTER" file disk.qcow2 \
    logfile=/dev/null
grep -q outermost log || grep -q 'filter=log' log || fail "the log does not say why"

# Through a shell's pipes.
mkfifo to from
"$nbdkit" -s --filter="$FILTER" file disk.qcow2 dirty-bitmap-delta=on \
          <to >from 2>log &
pids+=($!)
exec 7>to 8<from
printf '\0\0\0\3IHAVEOPT\0\0\0\3\0\0\0\0IHAVEOPT\0\0\0\2\0\0\0\0' >&7
cat <&8 >said
exec 7>&- 8<&-
wait "${pids[0]}" || fail "the exit status is $?"
pids=()
grep -aq 'delta:b' said || { od -c said; fail "LIST was not answered"; }
[ ! -s log ] || { cat log; fail "something was said"; }
