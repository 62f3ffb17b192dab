#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# dirty-bitmap-exportname and dirty-bitmap-description: the disk has this
# name and no other, clients see both in the list, and an unknown name is
# refused; whichever server answers.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"

qemu-img create -q -f qcow2 disk.qcow2 10M
qemu-img bitmap --add disk.qcow2 b
name='disk één'
text='What the web server writes, Größe 10M'

# The list: names and descriptions.
list ()
{
  /usr/bin/python3 -c 'import nbd, sys
h = nbd.NBD ()
h.set_opt_mode (True)
h.connect_unix (sys.argv[1])
h.opt_list (lambda name, text: print ("%s|%s" % (name, text)))
h.opt_abort ()' "$sock"
}

# can_open NAME: GO works, and a byte can be read.
can_open ()
{
  /usr/bin/python3 -c 'import nbd, sys
h = nbd.NBD ()
h.set_export_name (sys.argv[2])
h.connect_unix (sys.argv[1])
h.pread (1, 0)' "$sock" "$1" >open.log 2>&1
}

# can_open_by_export_name NAME: the oldest way, EXPORT_NAME.
can_open_by_export_name ()
{
  /usr/bin/python3 - "$sock" "$1" <<'END'
import socket, struct, sys
s = socket.socket (socket.AF_UNIX)
s.settimeout (20)
s.connect (sys.argv[1])
name = sys.argv[2].encode ()
s.recv (18, socket.MSG_WAITALL)
s.sendall (struct.pack (">I8sII", 3, b"IHAVEOPT", 1, len (name)) + name)
reply = s.recv (10, socket.MSG_WAITALL)
if len (reply) == 10:
    assert struct.unpack (">Q", reply[:8])[0] == 10 << 20
    sys.exit (0)
assert reply == b"", reply
sys.exit (3)
END
}

opens ()
{
  can_open "$1" || { cat open.log; fail "'$1' cannot be opened"; }
  can_open_by_export_name "$1" || fail "'$1' cannot be opened the old way"
}

does_not_open ()
{
  local status=0

  if can_open "$1"; then fail "'$1' can be opened"; fi
  can_open_by_export_name "$1" || status=$?
  same "the status of '$1'" 3 $status
}

delta="delta:b|what was changed according to the dirty bitmap b"
for server in on off; do
  echo "dirty-bitmap-server=$server"

  serve disk.qcow2 dirty-bitmap-server=$server dirty-bitmap-exportname="$name" \
        dirty-bitmap-description="$text" dirty-bitmap-delta=on
  same "the list" "$name|$text
$delta" "$(list)"
  opens "$name"
  opens delta:b
  for other in "" disk "$name." delta: delta:a delta:bb; do
    does_not_open "$other"
  done
  nbdinfo "nbd+unix:///disk%20%C3%A9%C3%A9n?socket=$sock" > info
  cat info
  grep -F "description: $text" info
  grep -F 'export-size: 10485760' info
  stop_server

  # The empty name alone.
  serve disk.qcow2 dirty-bitmap-server=$server dirty-bitmap-exportname= \
        dirty-bitmap-delta=on
  same "the list" "|
$delta" "$(list)"
  opens ""
  does_not_open x
  stop_server

  # None is given: every name but those of deltas, which are not listed if
  # that was not asked for, and can be opened all the same.
  serve disk.qcow2 dirty-bitmap-server=$server dirty-bitmap-description="$text"
  same "the list" "|$text" "$(list)"
  opens ""
  opens x
  opens "$name"
  opens delta:b
  does_not_open delta:a
  stop_server
  serve disk.qcow2 dirty-bitmap-server=$server dirty-bitmap-delta=off
  same "the list" "|" "$(list)"
  opens delta:b
  stop_server
done

# nbdkit's own -e is what goes into $uri, so --run finds the disk.
out=$(nbdkit -U - -e disk --filter="$FILTER" file disk.qcow2 \
             dirty-bitmap-exportname=disk --run 'nbdinfo --size "$uri"')
same "through --run" 10485760 "$out"

# What is no name or description.
long=$(printf '%4096s' x)
serve disk.qcow2 dirty-bitmap-exportname="$long" \
      dirty-bitmap-description="$long"
opens "$long"
stop_server
refused 'exportname.*4096' --filter="$FILTER" file disk.qcow2 \
        dirty-bitmap-exportname="${long}y"
refused 'description.*4096' --filter="$FILTER" file disk.qcow2 \
        dirty-bitmap-description="${long}y"
refused 'exportname.*delta:' --filter="$FILTER" file disk.qcow2 \
        dirty-bitmap-exportname=delta:b
refused 'exportname.*backup:' --filter="$FILTER" file disk.qcow2 \
        dirty-bitmap-exportname=backup:b
for bytes in '\x80' '\xc3' '\xc0\x80' 'a\xe9' '\xed\xa0\x80' '\xf4\x90\x80\x80'
do
  for parameter in exportname description; do
    refused "$parameter.*UTF-8" --filter="$FILTER" file disk.qcow2 \
            "dirty-bitmap-$parameter=$(printf "$bytes")"
  done
done
check_image disk.qcow2
