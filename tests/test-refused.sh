#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Images that are not served yet, and why: an error that names the feature,
# and not a byte is written.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires qemu-io

# no PATTERN NBDKIT-OPTIONS...: disk.qcow2 is refused, and stays as it was.
no ()
{
  local pattern=$1 before

  shift
  before=$(checksum disk.qcow2)
  refused "$pattern" "$@" --filter="$FILTER" file disk.qcow2
  same "the file" "$before" "$(checksum disk.qcow2)"
  # As a daemon too the refusal comes before nbdkit has gone.
  if nbdkit -U "$sock" -P "$d/pid" "$@" --filter="$FILTER" file disk.qcow2 \
            2>/dev/null; then
    fail "refused only after nbdkit has become a daemon"
  fi
}

create ()
{
  rm -f disk.qcow2
  qemu-img create -q -f qcow2 "$@" disk.qcow2 10M
}

put ()
{
  PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$tests/lib /usr/bin/python3 -c '
import sys
from qcow2image import Image
Image ("disk.qcow2").put (sys.argv[1], int (sys.argv[2], 0))' "$@"
}

# QEMU makes LUKS only where it can measure its own speed, which it cannot
# on a busy machine: the header alone says it as well.
create
put crypt_method 2
for r in "" -r; do no 'encrypt|LUKS' $r; done
create --object secret,id=s,data=secret \
       -o encrypt.format=aes,encrypt.key-secret=s
for r in "" -r; do no 'encrypt|AES' $r; done

create
put incompatible_features 2
no corrupt
serve -r disk.qcow2
shell 'assert h.pread(512, 0) == bytes(512)'
stop_server

# Unknown incompatible bits: by the name in the feature table, or by
# number.
create
put incompatible_features $((1 << 40))
for r in "" -r; do no '40' $r; done
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$tests/lib /usr/bin/python3 -c '
from qcow2image import Image, MAGIC_FEATURES
image = Image ("disk.qcow2")
at = image.extension_offset (MAGIC_FEATURES)
image.write (at, bytes ([0, 40]) + b"warp drive".ljust (46, b"\0"))'
for r in "" -r; do no 'warp drive' $r; done

# Not qcow2 at all.
echo "not an image" > disk.qcow2
for r in "" -r; do no qcow2 $r; done
: > disk.qcow2
no qcow2
truncate -s 1M disk.qcow2
no qcow2
