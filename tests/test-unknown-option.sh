#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# An option of nbdkit that this filter does not know is no reason not to
# start: nbdkit's server answers and a line says why, and the image is
# locked, grows and stops as ever, though it is not clear what on the
# command line is the plugin.  Nothing is written if there may be a -r.
#
# No nbdkit has such an option.  So a filter that does nothing else gives
# one that nbdkit has parsed another name, before ours looks.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires "${CC:-cc}" pkg-config qemu-io

cat > rename.c <<'END'
#include <stdlib.h>
#include <string.h>
#include <nbdkit-filter.h>
__attribute__ ((constructor)) static void
rename_option (int argc, char **argv)
{
  const char *from = getenv ("FROM"), *to = getenv ("TO");
  int i;
  for (i = 1; i < argc; ++i)
    if (strncmp (argv[i], from, strlen (from)) == 0)
      memcpy (argv[i], to, strlen (to));
}
static struct nbdkit_filter filter = { .name = "nofilter" };
NBDKIT_REGISTER_FILTER (filter)
END
# shellcheck disable=SC2046  # words are meant
${CC:-cc} -shared -fPIC $(pkg-config --cflags nbdkit) rename.c \
          -o nbdkit-nofilter-filter.so

qemu-img create -q -f qcow2 pristine.qcow2 64M
qemu-img bitmap --add pristine.qcow2 b

# renamed FROM TO ARGS...: the arguments with the option renamed.
renamed ()
{
  local from=$1 to=$2

  shift 2
  cp pristine.qcow2 disk.qcow2
  FROM=$from TO=$to start_nbdkit "$@" \
      --filter="$FILTER" --filter="$d/nbdkit-nofilter-filter.so" \
      file disk.qcow2
  grep -q "warning: .*not replaced.*option $to" "$log" ||
    fail "the log does not say that $to is unknown"
}

locked ()
{
  if qemu-io -f qcow2 -c 'read 0 512' disk.qcow2 >/dev/null 2>&1; then
    fail "the image is not locked"
  fi
}

# An idle client at the end, too.
cat > client.py <<'END'
import nbd, os, signal, sys, time
h = nbd.NBD ()
h.connect_unix (sys.argv[1])
for i in range (4):
    h.pwrite (b"x" * (4 << 20), i << 22)        # the image has to grow
os.kill (int (open ("pid").read ()), signal.SIGTERM)
assert h.aio_is_ready ()
while not h.aio_is_closed () and not h.aio_is_dead ():
    assert h.poll (10000) == 1, "the server does not end"
END

for option in --export=x "--export x" -ex "-e x" "--export --port -U $sock"; do
  echo "$option"
  # shellcheck disable=SC2086  # words are meant
  case $option in
    --*) renamed --export --new-op $option ;;
    *) renamed -e -y $option ;;
  esac
  locked
  /usr/bin/python3 client.py "$sock"
  server_ends
  check_image disk.qcow2
  same "QEMU's map" "0 16777216" "$(qemu_dirty disk.qcow2 b)"
done

# What may be a -r is one.  It is not, if it is plainly a value.
before=$(checksum pristine.qcow2)
for args in "--export -r" "--export -g -e -vr"; do
  echo "$args"
  # shellcheck disable=SC2086  # words are meant
  renamed --export --new-op $args
  grep -q 'warning: .*read-only.*--new-op' "$log" || fail "no warning"
  shell 'assert h.is_read_only ()'
  stop_server
  same "the file" "$before" "$(checksum disk.qcow2)"
done
renamed --export --new-op --export=-r
shell 'assert not h.is_read_only ()'
stop_server

# It is an error only if one insists, or where TLS may be concerned.
# refuses PATTERN NEW-NAME OPTION... -- PARAMETER...
refuses ()
{
  local pattern=$1 to=$2 options=()

  shift 2
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  FROM=--export TO=$to refused "$pattern" "${options[@]}" \
      --filter="$FILTER" --filter="$d/nbdkit-nofilter-filter.so" \
      file disk.qcow2 "$@"
}
cp pristine.qcow2 disk.qcow2
refuses 'server=on.*--new-op' --new-op --export=x -- dirty-bitmap-server=on
refuses 'server=force.*--new-op' --new-op --export=x -- \
        dirty-bitmap-server=force
refuses 'dirty-bitmap-listen.*--new-op' --new-op --export x -- \
        dirty-bitmap-listen=l
refuses 'dirty-bitmap-listen.*--tls-ne' --tls-ne --export=x -- \
        dirty-bitmap-listen=l
[ ! -e l ] || fail "a socket was left behind"
same "the file" "$before" "$(checksum disk.qcow2)"
