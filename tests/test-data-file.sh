#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# External data files: the guest's data go there, metadata and bitmaps to
# the image.  With data_file_raw the data file is the disk, byte for byte.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-nbd qemu-io

# work MODEL: writes of all kinds, to the server and to a raw file.
work ()
{
  shell "
M = 1 << 20
model = open('$1', 'r+b')
def put(data, offset):
    model.seek(offset)
    model.write(data)
for data, offset in ((b'a' * 65536, 0), (b'b' * 1000, M + 77),
                     (b'c' * (3 * M), 5 * M - 512)):
    h.pwrite(data, offset)
    put(data, offset)
h.flush()
for count, offset, flags in ((100000, 5 * M, 0), (M, 6 * M, nbd.CMD_FLAG_NO_HOLE),
                             (M, 12 * M, 0)):
    h.zero(count, offset, flags)
    put(bytes(count), offset)
h.trim(65536, 0)
put(bytes(65536), 0)
h.pwrite(b'd' * 512, 16 * M - 512, nbd.CMD_FLAG_FUA)
put(b'd' * 512, 16 * M - 512)
model.close()
model = open('$1', 'rb').read()
assert h.pread(16 * M, 0) == model"
}

for raw in off on; do
  rm -f disk.qcow2 data.raw model.raw
  qemu-img create -q -f qcow2 -o data_file=data.raw,data_file_raw=$raw \
           disk.qcow2 16M
  qemu-img bitmap --add disk.qcow2 b
  qemu-img create -q -f raw model.raw 16M
  serve disk.qcow2
  work model.raw
  stop_server
  check_image disk.qcow2
  size=$(stat -c %s disk.qcow2)
  [ "$size" -lt 1048576 ] || fail "guest data are in the image: $size bytes"
  qemu-img compare -q -f qcow2 -F raw disk.qcow2 model.raw ||
    fail "QEMU reads something else"
  if [ $raw = on ]; then
    cmp data.raw model.raw
    same "the size of the data file" 16777216 "$(stat -c %s data.raw)"
    [ "$(PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$tests/lib /usr/bin/python3 -c '
from qcow2image import Image
print (Image ("disk.qcow2").get ("autoclear_features") & 2)')" = 2 ] ||
      fail "the data file is not raw any more"
  fi
  same "flags" auto "$(bitmap_flags disk.qcow2 b)"
  dirty="0 65536
1048576 65536
5177344 3211264
12582912 1048576
16711680 65536"
  same "the bitmap" "$dirty" "$(qemu_dirty disk.qcow2 b)"

  # Read-only: both files stay as they are.
  before=$(checksum disk.qcow2)$(checksum data.raw)
  serve -r disk.qcow2
  same "the bitmap" "$dirty" "$(dirty b)"
  shell 'assert h.pread(16 << 20, 0) == open("model.raw", "rb").read()
assert h.is_read_only()'
  stop_server
  same "the files" "$before" "$(checksum disk.qcow2)$(checksum data.raw)"

  # And back: QEMU writes, we go on, and QEMU again.
  qemu-io -f qcow2 -c 'write -q -P 7 2M 2M' -c 'discard 5M 1M' \
          -c 'write -q -z 10M 70k' disk.qcow2 >/dev/null
  qemu-img convert -f qcow2 -O raw disk.qcow2 model.raw
  serve disk.qcow2
  shell 'assert h.pread(16 << 20, 0) == open("model.raw", "rb").read()'
  work model.raw
  kill_server
  status=0
  qemu-img check -q -f qcow2 disk.qcow2 >check.log 2>&1 || status=$?
  if [ $status -ne 0 ] && [ $status -ne 3 ]; then # 3: leaks
    cat check.log
    fail "qemu-img check after a kill: status $status"
  fi
  qemu-img compare -q -f qcow2 -F raw disk.qcow2 model.raw ||
    fail "a write with FUA did not make all before it durable"
done

# An image over an image that has a data file.
qemu-img create -q -f qcow2 -b disk.qcow2 -F qcow2 over.qcow2
before=$(checksum disk.qcow2)$(checksum data.raw)
serve over.qcow2
shell 'assert h.pread(16 << 20, 0) == open("model.raw", "rb").read()
h.pwrite(b"z" * 100, 5 << 20)'
stop_server
check_image over.qcow2
same "the files below" "$before" "$(checksum disk.qcow2)$(checksum data.raw)"
qemu-io -f raw -c 'write -q -P 122 5M 100' model.raw
qemu-img compare -q -f qcow2 -F raw over.qcow2 model.raw ||
  fail "QEMU reads something else"
