#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Starts that cannot be right are refused, with one error that names the
# cause, before any file is touched; and one that fails late, whatever
# fails, leaves no socket of dirty-bitmap-listen behind.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires "${CC:-cc}" pkg-config

qemu-img create -q -f qcow2 disk.qcow2 10M
qemu-img bitmap --add disk.qcow2 b
before=$(checksum disk.qcow2)

# no PATTERN NBDKIT-ARGS...
no ()
{
  refused "$@"
  [ "$(grep -c '' refused.log)" -eq 1 ] ||
    fail "not one line: $(cat refused.log)"
  same "the image" "$before" "$(checksum disk.qcow2)"
}
our=(--filter="$FILTER" file disk.qcow2)

# --- Parameters that contradict each other.
no 'dirty-bitmap-granularity' "${our[@]}" dirty-bitmap-granularity=64k
no 'dirty-bitmap-granularity' -r "${our[@]}" dirty-bitmap-granularity=64k
for bound in max-connections=9 max-requests=9 max-memory=1G \
             handshake-timeout=9 idle-timeout=9; do
  no "dirty-bitmap-${bound%=*}.*dirty-bitmap-server=off" "${our[@]}" \
     dirty-bitmap-$bound dirty-bitmap-server=off
done
start_nbdkit "${our[@]}" dirty-bitmap-server=off dirty-bitmap-listen=own \
             dirty-bitmap-max-connections=9
stop_server
start_nbdkit "${our[@]}" dirty-bitmap=b dirty-bitmap-granularity=64k
stop_server

# --- Each file has one use, by whatever name.
mkdir sub
ln -s disk.qcow2 symlink
ln disk.qcow2 hardlink
ln -s .. sub/up
no 'image and -P' -P disk.qcow2 "${our[@]}"
no 'image and -P' -P symlink "${our[@]}"
no 'image and -P' -P hardlink "${our[@]}"
no 'image and -P' --pidfile=sub/up/disk.qcow2 "${our[@]}"
no 'image and -P' -P disk.qcow2 --filter="$FILTER" file file=./hardlink
no 'image and dirty-bitmap-listen' "${our[@]}" dirty-bitmap-listen=disk.qcow2
no 'image and dirty-bitmap-stats' "${our[@]}" dirty-bitmap-stats=disk.qcow2
no 'listen and dirty-bitmap-stats' "${our[@]}" \
   dirty-bitmap-listen=x dirty-bitmap-stats=x
no 'listen and dirty-bitmap-stats' "${our[@]}" \
   dirty-bitmap-listen=x dirty-bitmap-stats=sub/up/x
no '-P and dirty-bitmap-stats' -P x "${our[@]}" dirty-bitmap-stats="$d/x"
no '-P and dirty-bitmap-listen' -P x "${our[@]}" dirty-bitmap-listen=./x
no '-U and dirty-bitmap-listen' "${our[@]}" dirty-bitmap-listen=refused
no '-U and dirty-bitmap-stats' "${our[@]}" dirty-bitmap-stats=refused
no '-P and -U' -P ./refused "${our[@]}"
(umask 077; echo "alice:$(printf %064d 17)" > keys)
no '-P and --tls-psk' -P keys --tls-psk=keys "${our[@]}"
[ ! -e x ] && [ ! -e refused ] || fail "files were made: $(ls)"

# Nor is a backing file, which is named in the image alone, for a number.
cp disk.qcow2 base.qcow2
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
refused '-P.*in use' -P base.qcow2 --filter="$FILTER" file overlay.qcow2
same "the backing file" "$before" "$(checksum base.qcow2)"

# --- What fails after get_ready, where nbdkit calls nothing of the filter
# any more.
cat > fails.c <<'END'
#include <nbdkit-filter.h>
static int after_fork (nbdkit_backend *b) { (void) b; nbdkit_error ("on purpose"); return -1; }
static struct nbdkit_filter filter = { .name = "fails", .after_fork = after_fork };
NBDKIT_REGISTER_FILTER (filter)
END
# shellcheck disable=SC2046  # words are meant
${CC:-cc} -shared -fPIC $(pkg-config --cflags nbdkit) fails.c -o fails.so
truncate -s 1M raw
nbdkit -f -U below -P below.pid file raw &
pids+=($!)
wait_until test -s below.pid
touch refused                   # nbdkit's own address, in use
refused 'in use' "${our[@]}" dirty-bitmap-listen=own
rm refused
[ ! -e own ] || fail "the address is in use: the socket was left behind"

# late PATTERN NBDKIT-ARGS...: in the foreground, and as a daemon.
late ()
{
  local i pattern=$1

  shift
  refused "$pattern" "$@" dirty-bitmap-listen=own
  rm -f refused
  [ ! -e own ] || fail "the socket was left behind: $pattern"
  nbdkit -U refused "$@" dirty-bitmap-listen=own 2>/dev/null || :
  wait_until test ! -e own
  rm -f refused
}
late 'nowhere' --filter=log "${our[@]}" logfile="$d/nowhere/log"
late 'nowhere' -P "$d/nowhere/pid" "${our[@]}"
late 'on purpose' --filter="$d/fails.so" "${our[@]}"
late 'on purpose' --filter="$FILTER" --filter="$d/fails.so" file disk.qcow2
late 'not a qcow2 image' --filter="$FILTER" nbd socket="$d/below"
late 'nbd_connect' --filter="$FILTER" nbd socket="$d/nowhere/socket"

# --- But it is there as long as it is served, whatever process ends.
rm -f "$sock"
nbdkit -U "$sock" -P daemon.pid "${our[@]}" dirty-bitmap-listen=own
wait_until test -s daemon.pid
pids+=("$(cat daemon.pid)")
own="nbd+unix:///?socket=$d/own"
wait_until map b "$own"
kill "$(cat daemon.pid)"
wait_until process_ended "$(cat daemon.pid)"
[ ! -e own ] || fail "the daemon left the socket behind"

status=0
nbdkit -U - "${our[@]}" dirty-bitmap-listen=own \
       --run "(sleep 0); nbdinfo --map=qemu:dirty-bitmap:b '$own' && exit 3" \
       >out || status=$?
same "the exit status of --run" 3 $status
[ ! -e own ] || fail "the socket was left behind after --run"
