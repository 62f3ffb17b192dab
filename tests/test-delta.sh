#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# The export delta:BITMAP: what is dirty is the disk's data, also where
# the change was to zeroes, and what is clean is a hole that reads as
# zeroes.  nbdcopy makes an increment of it, and that, put onto the copy
# that was made before, is the disk as it is now.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires nbdcopy qemu-nbd qemu-io

delta ()
{
  echo "nbd+unix:///delta:$1?socket=$sock"
}

# A disk full of data, a copy of it, and a bitmap from then on.
qemu-img create -q -f qcow2 disk.qcow2 16776704
qemu-io -f qcow2 -c 'write -q -P 17 0 16776704' -c 'write -q -P 3 1M 64k' \
        disk.qcow2
qemu-img convert -O raw disk.qcow2 full.before
qemu-img bitmap --add -g 4096 disk.qcow2 b
qemu-img bitmap --add -g 64k disk.qcow2 coarse
qemu-img bitmap --add --disable disk.qcow2 clean

# What was changed: data; zeroes, as data, by request, and by trim; single
# granules with clean ones between; the last bytes of the disk.
change='h.pwrite (b"\1" * 100, 5000)
h.pwrite (bytes (8192), 1 << 20)
h.zero (65536, 2 << 20)
h.zero (65536, 3 << 20, nbd.CMD_FLAG_NO_HOLE)
h.trim (131072, 4 << 20)
for i in range (20):
    h.pwrite (b"\2" * 4096, (6 << 20) + i * 8192)
h.pwrite (b"\3" * 100, 16776704 - 100)
h.flush ()'
dirty_ranges="4096 4096
1048576 8192
2097152 65536
3145728 65536
4194304 131072
$(for i in {0..19}; do echo $((6291456 + 8192 * i)) 4096; done)
16773120 3584"

# data_ranges URI: what base:allocation has as data.
data_ranges ()
{
  nbdinfo --map "$1" | awk '$3 == 0 { print $1, $2 }'
}

# apply MAP INCREMENT FULL: as in the manual page.
apply ()
{
  while read -r offset length type _; do
    if [ "$type" = 0 ]; then
      dd if="$2" of="$3" bs=1M conv=notrunc status=none \
         iflag=skip_bytes,count_bytes oflag=seek_bytes \
         skip="$offset" seek="$offset" count="$length"
    fi
  done < "$1"
}

serve disk.qcow2
shell "$change"
stop_server
qemu-img convert -O raw disk.qcow2 full.now

check_delta ()
{
  same "the map" "$dirty_ranges" "$(data_ranges "$(delta b)")"
  same "other kinds" "0 3" "$(nbdinfo --map "$(delta b)" |
    awk '{ print $3 }' | sort -u | xargs)"
  same "a clean bitmap" "0 16776704 3" \
       "$(nbdinfo --map "$(delta clean)" | awk '{ print $1, $2, $3 }')"
  same "the size" 16776704 "$(nbdinfo --size "$(delta b)")"
  nbdinfo "$(delta b)" > info
  grep -q 'is_read_only: true' info || { cat info; fail "it is not read-only"; }
  grep -q 'can_multi_conn: true' info || { cat info; fail "no multi-conn"; }
  same "the contexts" base:allocation \
       "$(sed -n '/contexts:/,/is_rot/p' info | grep : | grep -v contexts: |
          grep -v is_rot | xargs)"

  # Exactly what a reader must see.
  rm -rf restored increment expected map
  truncate -s 16776704 expected
  echo "$dirty_ranges" | sed 's/$/ 0/' > map
  apply map full.now expected
  nbdcopy --destination-is-zero "$(delta b)" increment
  truncate -s 16776704 increment
  cmp expected increment || fail "the increment is another"
  [ "$(du -k increment | cut -f 1)" -lt 2000 ] || fail "it is not sparse"
  for connections in 1 4; do
    nbdcopy --connections=$connections "$(delta b)" - | cmp - expected ||
      fail "read with $connections connections"
  done

  # Restore.
  cp full.before restored
  nbdinfo --map "$(delta b)" > map
  apply map increment restored
  cmp restored full.now || fail "what was restored is not the disk"

  # QEMU reads it too.
  qemu-img convert -n -f raw -O raw "$(delta b)" increment
  cmp expected increment || fail "QEMU reads another"

  # It cannot be written.
  nbdsh -u "$(delta b)" -c 'import errno
h.set_strict_mode (0)
for f in (lambda: h.pwrite (b"x" * 512, 5000), lambda: h.zero (512, 5000),
          lambda: h.trim (512, 5000)):
    try:
        f ()
        raise SystemExit ("was not refused")
    except nbd.Error as e:
        assert e.errnum in (errno.EPERM, errno.EROFS), e
h.flush ()
assert h.pread (100, 5000) == b"\1" * 100'
}

for options in "" "-r" "dirty-bitmap-server=off" "-r dirty-bitmap-server=off"
do
  echo "options: $options"
  case $options in
    -r*) serve -r disk.qcow2 ${options#-r} ;;
    *) serve disk.qcow2 $options ;;
  esac
  before=$(checksum disk.qcow2)
  check_delta
  stop_server
  same "the file" "$before" "$(checksum disk.qcow2)"
done

# A granule that is written turns into data for a client that is there,
# and one that was written before a read began is in it.
for server in on off; do
  cp disk.qcow2 live.qcow2
  serve live.qcow2 dirty-bitmap-server=$server
  DELTA=$(delta b) shell 'import os
d = nbd.NBD ()
d.add_meta_context ("base:allocation")
d.connect_uri (os.environ["DELTA"])
def status (offset, count):
    found = []
    d.block_status (count, offset, lambda *a: found.extend (a[2]))
    return found
for i in range (100):
    at = (8 << 20) + i * 8192
    assert d.pread (12288, at - 4096) == bytes (12288), i
    assert status (at, 4096) == [4096, 3]
    h.pwrite (b"\7" * 10, at + i)
    assert d.pread (12288, at - 4096) == \
        bytes (4096) + b"\x11" * i + b"\7" * 10 + b"\x11" * (4086 - i) + \
        bytes (4096), i
    assert status (at, 4096) == [4096, 0]
h.shutdown ()
d.shutdown ()'
  stop_server
done

# With a name for the disk, and when some are not offered.
serve disk.qcow2 dirty-bitmap-exportname=disk dirty-bitmap-expose=coarse
[ -n "$(data_ranges "$(delta coarse)")" ] || fail "no delta:coarse"
if nbdinfo --size "$(delta b)" 2>/dev/null; then fail "b is not exposed"; fi
stop_server

# A snapshot has no bitmaps, so no deltas.
qemu-img snapshot -c s disk.qcow2
serve disk.qcow2 dirty-bitmap-snapshot=s dirty-bitmap-delta=on
if nbdinfo --size "$(delta b)" 2>/dev/null; then fail "a delta of a snapshot"; fi
same "the list" 'export="":' "$(nbdinfo --list "$uri" | grep export=)"
stop_server
check_image disk.qcow2
