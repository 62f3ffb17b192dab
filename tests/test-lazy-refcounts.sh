#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Images with lazy refcounts that QEMU has left dirty, being killed: they
# are repaired when they are opened for writing, and only then.  We never
# leave one dirty.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-io

# incompatible features: bit 0 is the mark.
is_dirty ()
{
  qemu-img info -U --output=json "$1" | finds '"dirty-flag": true'
}

# create OPTIONS: disk.qcow2, with compressed clusters in it.
create ()
{
  rm -f disk.qcow2
  truncate -s 0 disk.raw
  truncate -s 16M disk.raw
  seq 100000 200000 | dd of=disk.raw bs=1M seek=1 conv=notrunc 2>/dev/null
  qemu-img convert -t unsafe -c -f raw -O qcow2 -o "lazy_refcounts=on$1" \
           disk.raw disk.qcow2
}

# crash COMMAND...: qemu-io, killed after these and a flush, which writes
# L2 tables, but no refcounts.
crash ()
{
  local opts=() command

  for command in "$@"; do opts+=(-c "$command"); done
  { qemu-io -t unsafe -f qcow2 "${opts[@]}" -c flush -c 'sigraise 9' disk.qcow2 \
      >/dev/null 2>&1 && fail "qemu-io lives"; } 2>/dev/null || :
  is_dirty disk.qcow2 || fail "not dirty"
  # Now and then QEMU has written its refcounts by then.
  if ! qemu-img check -q disk.qcow2 >/dev/null 2>&1; then
    wrong=$((wrong + 1))
  fi
}
wrong=0

contents ()
{
  qemu-img convert -U --image-opts -t unsafe -O raw \
           driver=qcow2,file.driver=file,file.filename="$1" contents.raw
  checksum contents.raw
}

# What QEMU has left is served as it is with -r, repaired without, and the
# disk is the same.
repairs ()
{
  local before disk

  before=$(checksum disk.qcow2)
  disk=$(contents disk.qcow2)
  serve -r disk.qcow2
  shell 'assert h.pread(65536, 2 << 20) == b"\1" * 65536'
  stop_server
  same "the file after -r" "$before" "$(checksum disk.qcow2)"

  serve disk.qcow2
  shell 'assert h.pread(65536, 2 << 20) == b"\1" * 65536'
  grep -q 'marked dirty and has been repaired' "$log" || fail "it says nothing"
  stop_server
  check_image disk.qcow2
  if is_dirty disk.qcow2; then fail "still dirty"; fi
  same "the disk" "$disk" "$(contents disk.qcow2)"

  # And it goes on as any other.
  before=$(checksum disk.qcow2)
  serve disk.qcow2
  stop_server
  same "the file" "$before" "$(checksum disk.qcow2)"
  serve disk.qcow2
  shell 'h.pwrite(b"z" * 100000, 1 << 20)' 'h.flush()' 'h.trim(1 << 20, 2 << 20)'
  if is_dirty disk.qcow2; then fail "dirty while it is served"; fi
  stop_server
  check_image disk.qcow2
}

for options in "" ,cluster_size=512 ,cluster_size=4k,refcount_bits=1 \
               ,extended_l2=on,refcount_bits=64; do
  create "$options"
  crash 'write -P 1 2M 1M' 'write -P 2 1100k 300k' 'write -z 8M 1M'
  repairs

  create "$options"
  qemu-img bitmap --add disk.qcow2 b
  qemu-img bitmap --add -g 512 --disable disk.qcow2 c
  qemu-io -t unsafe -f qcow2 -c 'write -q -P 1 2M 1M' disk.qcow2
  crash 'write -P 2 1100k 300k' 'discard 4M 1M' 'write -P 3 6M 3M'
  repairs
  # The bitmaps are where they were, as QEMU has left them.
  same "flags" "auto in-use" "$(bitmap_flags disk.qcow2 b)"
  qemu-img bitmap --remove disk.qcow2 b
  qemu-img bitmap --remove disk.qcow2 c
  check_image disk.qcow2
done

# A snapshot.
create ""
qemu-io -t unsafe -f qcow2 -c 'write -q -P 1 2M 1M' disk.qcow2
qemu-img snapshot -c s disk.qcow2
crash 'write -P 2 1100k 300k' 'write -P 3 6M 3M'
repairs

[ $wrong -ge 5 ] || fail "only $wrong images had wrong refcounts"

# A server of ours, killed: the mark is not there, whatever the image asks
# for, and no refcount is too low.
create ""
serve disk.qcow2
shell 'h.pwrite(b"z" * (4 << 20), 8 << 20)' 'h.flush()'
kill_server
if is_dirty disk.qcow2; then fail "we have left it dirty"; fi
qemu-img check -q disk.qcow2 >/dev/null || [ $? -eq 3 ] || fail "errors"

# What is more than wrong refcounts is refused at once, by a daemon too,
# and stays as it was.
create ""
qemu-io -t unsafe -f qcow2 -c 'write -q -P 1 2M 1M' disk.qcow2
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$tests/lib /usr/bin/python3 -c '
from qcow2image import Image
image = Image ("disk.qcow2")
table = int.from_bytes (image.read (image.get ("l1_table_offset"), 8), "big")
table &= 0x00fffffffffffe00
image.write (table + 32 * 8, image.read (table + 33 * 8, 8))
image.put ("incompatible_features", 1)'
before=$(checksum disk.qcow2)
refused 'marked dirty.*used for two things.*qemu-img check -r all' \
        --filter="$FILTER" file disk.qcow2
if nbdkit -U "$sock" -P "$d/pid" --filter="$FILTER" file disk.qcow2 \
          2>/dev/null; then
  fail "refused only after nbdkit has become a daemon"
fi
same "the file" "$before" "$(checksum disk.qcow2)"
serve -r disk.qcow2
shell 'assert h.pread(65536, 0x210000) == b"\1" * 65536'
stop_server
