#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Options of nbdkit that the filter's server honours as nbdkit's own does:
# -t, -p 0, and the newer ones where this nbdkit has them.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"

qemu-img create -q -f qcow2 disk.qcow2 1M
qemu-io -f qcow2 -c 'write -q 0 1M' disk.qcow2
qemu-img bitmap --add disk.qcow2 b

# --- -t: the requests of a connection at once.  The plugin notes when two
# of them meet.
cat > overlap.py <<'END'
import nbd, sys
h = nbd.NBD ()
h.connect_unix (sys.argv[1])
buffers = [nbd.Buffer (65536) for _ in range (4)]
cookies = [h.aio_pread (b, i << 16) for i, b in enumerate (buffers)]
order = []
while len (order) < 4:
    h.poll (-1)
    while len (order) < 4 and h.aio_peek_command_completed () > 0:
        cookie = h.aio_peek_command_completed ()
        assert h.aio_command_completed (cookie)
        order.append (cookie)
print ("in order" if order == cookies else "out of order")
END
# overlap OPTION...: does one meet another?
overlap ()
{
  rm -f met
  start_nbdkit "$@" --filter="$FILTER" eval \
      thread_model='echo parallel' \
      get_size="stat -Lc %s $d/disk.qcow2" \
      pread="if [ -e $d/armed ]; then mkdir $d/busy 2>/dev/null ||
                 echo >>$d/met; sleep 0.2; rmdir $d/busy 2>/dev/null; fi
             env -u LD_PRELOAD dd if=$d/disk.qcow2 skip=\$4 count=\$3 \
                iflag=count_bytes,skip_bytes status=none" \
      dirty-bitmap-server=force "${parameters[@]}"
  nbdsh -u "$uri" -c 'h.pread(1 << 20, 0)'       # what tables there are
  touch armed
  order=$(/usr/bin/python3 overlap.py "$sock")
  rm armed
  stop_server
  [ -e met ]
}
parameters=()
overlap || fail "without -t, one request after the other"
overlap -t 4 || fail "-t 4: one request after the other"
! overlap -t 1 || fail "-t 1: two requests at once"
same "-t 1" "in order" "$order"
parameters=(dirty-bitmap-max-requests=1)
! overlap --threads=4 || fail "max-requests=1: two requests at once"

# --- -p 0: the system chooses the ports.
# ports PID: where a process listens, in TCP.
ports ()
{
  /usr/bin/python3 -c '
import os, re, sys
fds = "/proc/%s/fd/" % sys.argv[1]
inodes = set ()
for fd in os.listdir (fds):
    m = re.match (r"socket:\[(\d+)\]", os.readlink (fds + fd))
    if m: inodes.add (m.group (1))
for table in "/proc/net/tcp", "/proc/net/tcp6":
    if not os.path.exists (table): continue
    for line in list (open (table))[1:]:
        w = line.split ()
        if w[3] == "0A" and w[9] in inodes:
            print (table[-1] == "6" and "[::1]" or "127.0.0.1",
                   int (w[1].split (":")[1], 16), sep = ":")' "$1"
}
for option in "-p 0" "--port=0" "--port=0 -i 127.0.0.1"; do
  echo "$option"
  # shellcheck disable=SC2086  # words are meant
  start_nbdkit $option --filter="$FILTER" file disk.qcow2
  ports "$server_pid" >addresses
  [ -s addresses ] || fail "it listens nowhere"
  while read -r address; do
    map b "nbd://$address" >/dev/null || fail "no bitmap at $address"
  done <addresses
  stop_server
  [ ! -s "$log" ] || fail "something was said"
done

# As a daemon, where a warning would go nowhere.
nbdkit -p 0 -P daemon.pid --filter="$FILTER" file disk.qcow2
wait_until test -s daemon.pid
pids+=("$(cat daemon.pid)")
# Not before it has taken the sockets.
wait_until map b "nbd://$(ports "$(cat daemon.pid)" | head -n 1)"
kill "$(cat daemon.pid)"
wait_until process_ended "$(cat daemon.pid)"

# --- Those that nbdkit has had since 1.34 or later.
has ()
{
  nbdkit --long-options | finds -x -e "$1"
}
accepted ()
{
  has "${1%%=*}" || return 0
  echo "$1"
  start_nbdkit "$1" --filter="$FILTER" file disk.qcow2 dirty-bitmap-server=on
  map b >/dev/null
  stop_server
}
for option in --keepalive --keep-alive --timeout=10 --time-out=10s \
              --print-uri --print-url --show-uri --show-url \
              --name=n --log=stderr; do
  accepted "$option"
done
if has --timeout; then
  start_nbdkit --timeout=1 --filter="$FILTER" file disk.qcow2
  /usr/bin/python3 -c '
import socket, sys
s = socket.socket (socket.AF_UNIX)
s.connect (sys.argv[1])
s.settimeout (20)
while s.recv (1000):
    pass' "$sock"
  grep -q handshake "$log"
  stop_server
fi
