# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# What every shell test begins with:
#
#     . "${srcdir:-.}/lib/functions.sh"
#
# After that the test is in a temporary directory of its own, $d, which
# is removed at the end together with the servers that it started.
#
#   FILTER         the filter under test
#   ASAN_PRELOAD   libraries to preload into nbdkit, for a filter that
#                  was built with sanitizers
#   SERVER         set to qemu-nbd to run a test against QEMU's server.
#                  That is for those who write tests: what is about the
#                  format and the protocol alone must pass there too.

set -e -u -o pipefail
shopt -s inherit_errexit
export LC_ALL=C

tests=$(cd "${srcdir:-$(dirname "$0")}" && pwd)
FILTER=$(realpath -m "${FILTER:-../filter/.libs/nbdkit-dirty-bitmap-filter.so}")
SERVER=${SERVER:-nbdkit}
export FILTER

d=$(mktemp -d "${TMPDIR:-/tmp}/dirty-bitmap.XXXXXX")
cd "$d"
log=$d/log
sock=$d/sock
uri="nbd+unix:///?socket=$sock"
server_pid=
pids=()

cleanup ()
{
  local status=$?

  trap - EXIT
  set +e
  if [ $status -ne 0 ] && [ $status -ne 77 ] && [ -s "$log" ]; then
    echo "--- the last server said:"
    tail -n 40 "$log"
  fi
  for pid in $server_pid "${pids[@]}"; do
    kill -KILL "$pid" 2>/dev/null
  done
  wait 2>/dev/null
  cd /
  rm -rf "$d"
  exit $status
}
trap cleanup EXIT
trap 'exit 1' INT TERM HUP

# COMMAND | finds PATTERN: as grep -q, but it reads to the end.  Otherwise the
# command may be ended by SIGPIPE, which is an error of the pipe.
finds ()
{
  grep "$@" > /dev/null
}

fail ()
{
  echo "$(basename "$0"): $*"
  exit 1
}

skip ()
{
  echo "$(basename "$0"): skipped: $*"
  exit 77
}

requires ()
{
  local tool

  for tool in "$@"; do
    type "$tool" >/dev/null 2>&1 || skip "$tool is not installed"
  done
}

# With libasan preloaded, stock nbdkit hangs at exit once it has printed
# an errno, because p11-kit's destructor calls freelocale.  So that does
# nothing in these runs.
if [ -n "${ASAN_PRELOAD-}" ]; then
  mkdir "$d/bin"
  echo 'void freelocale (void *l); void freelocale (void *l) { (void) l; }' |
    ${CC:-cc} -shared -fPIC -x c - -o "$d/bin/freelocale.so"
  cat > "$d/bin/nbdkit" <<END
#!/bin/sh -
LD_PRELOAD='$ASAN_PRELOAD $d/bin/freelocale.so' \\
ASAN_OPTIONS='detect_leaks=0:abort_on_error=0' \\
UBSAN_OPTIONS='print_stacktrace=1' \\
exec '$(command -v nbdkit)' "\$@"
END
  chmod +x "$d/bin/nbdkit"
  PATH=$d/bin:$PATH
fi

requires nbdkit nbdinfo qemu-img
/usr/bin/python3 -c 'import nbd' 2>/dev/null || skip "python3-libnbd is missing"
[ "$SERVER" != nbdkit ] || [ -f "$FILTER" ] || fail "$FILTER does not exist"

# Seconds since some moment, with a fraction.
now ()
{
  echo "$EPOCHREALTIME"
}

# elapsed_less START LIMIT: fail if LIMIT seconds have passed.
elapsed_less ()
{
  awk -v a="$1" -v b="$EPOCHREALTIME" -v limit="$2" 'BEGIN {
    if (b - a > limit) { print "took " b - a " seconds"; exit 1 } }' ||
    fail "longer than $2 seconds"
}

# How many hundredths of a second we wait for what is sure to come.
patience=6000

# wait_until COMMAND...: poll until it succeeds.
wait_until ()
{
  local i

  for ((i = 0; i < patience; i += 2)); do
    if "$@" >/dev/null 2>&1; then return 0; fi
    sleep 0.02
  done
  fail "waited in vain: $*"
}

# process_ended PID: also if nobody has asked for its status yet.
process_ended ()
{
  ! grep -q -v ') Z' "/proc/$1/stat" 2>/dev/null
}

# start_nbdkit ARGS...: nbdkit in the foreground of a background job, on
# the Unix socket $sock unless ARGS name another.  Returns when clients
# can connect.
start_nbdkit ()
{
  local where=(-U "$sock") arg i

  for arg in "$@"; do
    case $arg in -p | --port* | -U | --unix* | -s) where=() ;; esac
  done
  rm -f "$d/pid" "$sock"
  nbdkit -f -P "$d/pid" "${where[@]}" "$@" 2>"$log" &
  server_pid=$!
  for ((i = 0; i < patience; i++)); do
    if [ -s "$d/pid" ]; then return 0; fi
    kill -0 $server_pid 2>/dev/null || break
    sleep 0.01
  done
  fail "nbdkit did not start"
}

start_qemu_nbd ()
{
  local opts=() arg disk= name

  for arg in "$@"; do
    case $arg in
      -r) opts+=(-r) ;;
      *=*) ;;
      *) disk=$arg ;;
    esac
  done
  for name in $(bitmap_names "$disk"); do opts+=(-B "$name"); done
  rm -f "$d/pid" "$sock"
  qemu-nbd -t -e 0 -f qcow2 -A --discard=unmap -k "$sock" \
           --pid-file="$d/pid" "${opts[@]}" "$disk" 2>"$log" &
  server_pid=$!
  wait_until test -s "$d/pid"
}

# serve [-r] DISK [PARAMETER=VALUE...]: the usual server.
serve ()
{
  local opts=()

  if [ "$SERVER" = qemu-nbd ]; then
    start_qemu_nbd "$@"
    return
  fi
  while [[ $1 = -* ]]; do opts+=("$1"); shift; done
  start_nbdkit "${opts[@]}" --filter="$FILTER" file "$@"
}

# server_ends [STATUS]: wait until the server has ended; by itself, or
# because of a signal that the test sent.
server_ends ()
{
  local status=0 expected=${1:-0} i pid=$server_pid

  for ((i = 0; i < patience; i++)); do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.01
  done
  if kill -0 "$pid" 2>/dev/null; then fail "the server does not end"; fi
  wait "$pid" || status=$?
  server_pid=
  if grep -E 'ERROR: AddressSanitizer|runtime error:' "$log"; then
    fail "a sanitizer complains"
  fi
  [ $status -eq "$expected" ] ||
    fail "the server's exit status is $status, expected $expected"
}

# stop_server [SIGNAL [STATUS]]
stop_server ()
{
  kill -"${1:-TERM}" "$server_pid"
  server_ends "${2:-0}"
}

kill_server ()
{
  kill -KILL "$server_pid"
  wait "$server_pid" 2>/dev/null || :
  server_pid=
}

# refused PATTERN NBDKIT-ARGS...: nbdkit ends by itself, not with status
# 0 and not by a signal, and its messages match PATTERN.
refused ()
{
  local pattern=$1 status=0

  shift
  timeout -k 1 20 nbdkit -f -U "$d/refused" "$@" 2>"$d/refused.log" || status=$?
  if [ $status -eq 0 ] || [ $status -ge 124 ]; then
    cat "$d/refused.log"
    fail "not refused (status $status): $*"
  fi
  grep -E -i -e "$pattern" "$d/refused.log" >/dev/null || {
    cat "$d/refused.log"
    fail "the error does not match '$pattern': $*"
  }
  if grep -E 'ERROR: AddressSanitizer|runtime error:' "$d/refused.log"; then
    fail "a sanitizer complains"
  fi
}

# The map of a bitmap, one "offset length type" a line: of the server,
# and of an image as qemu-nbd sees it.
map ()
{
  nbdinfo --map="qemu:dirty-bitmap:$1" "${2:-$uri}" |
    awk '{ print $1, $2, $3 }'
}

qemu_map ()
{
  nbdinfo --map="qemu:dirty-bitmap:$2" -- [ qemu-nbd -r -f qcow2 -B "$2" "$1" ] |
    awk '{ print $1, $2, $3 }'
}

# The dirty ranges only, "offset length".
dirty ()
{
  map "$@" | awk '$3 == 1 { print $1, $2 }'
}

qemu_dirty ()
{
  qemu_map "$@" | awk '$3 == 1 { print $1, $2 }'
}

allocation ()
{
  nbdinfo --map=base:allocation "${1:-$uri}" | awk '{ print $1, $2, $3 }'
}

# The bitmaps of an image, and the flags of one ("auto", "auto in-use",
# ...), also while the image is served.
bitmap_names ()
{
  qemu-img info -U --output=json "$1" | /usr/bin/python3 -c '
import json, sys
info = json.load (sys.stdin)["format-specific"]["data"]
for b in info.get ("bitmaps", []):
    print (b["name"])'
}

bitmap_flags ()
{
  qemu-img info -U --output=json "$1" | /usr/bin/python3 -c '
import json, sys
info = json.load (sys.stdin)["format-specific"]["data"]
for b in info.get ("bitmaps", []):
    if b["name"] == sys.argv[1]:
        print (" ".join (sorted (b["flags"])))' "$2"
}

# same WHAT EXPECTED GOT
same ()
{
  [ "$2" = "$3" ] || fail "$1
--- expected:
$2
--- but got:
$3"
}

# same_allocation WHAT EXPECTED: base:allocation is ours to define where
# QEMU looks into the file below.
same_allocation ()
{
  [ "$SERVER" != nbdkit ] || same "$1" "$2" "$(allocation)"
}

# No errors, no leaks.
check_image ()
{
  qemu-img check -f qcow2 "$1" >"$d/check.log" 2>&1 || {
    cat "$d/check.log"
    fail "qemu-img check complains about $1"
  }
}

checksum ()
{
  sha256sum < "$1"
}

# nbdsh with the Python that the distribution's libnbd is for.
nbdsh ()
{
  /usr/bin/python3 -m nbd "$@"
}

# shell CODE...: nbdsh on the server.
shell ()
{
  local code opts=()

  for code in "$@"; do opts+=(-c "$code"); done
  nbdsh -u "$uri" "${opts[@]}"
}

# A TCP port that is free at this moment.
free_port ()
{
  /usr/bin/python3 -c '
import socket
s = socket.socket (socket.AF_INET6)
s.setsockopt (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
s.bind (("::", 0))
print (s.getsockname ()[1])'
}
