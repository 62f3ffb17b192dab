#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# The bench: it holds figures against the bars rightly, keeps what it
# measured, and measures at all, its peers or another build of the filter.

. "${srcdir:-.}/lib/functions.sh"
requires "${PYTHON:-python3}" qemu-img

top=$(cd "$tests/.." && pwd)
built=${abs_top_builddir:-$top}/bench
bench ()
{
  "${PYTHON:-python3}" -B "$top/bench/side-by-side" "$@"
}

# Figures with known ratios.  Five rounds, of which one is far off; a
# second run with fewer rounds, which does not count; a last line that
# was cut off.
"${PYTHON:-python3}" - > figures <<'EOF'
import json

def measured(run, filesystem, row, side, rounds, **figures):
    for n in range(rounds):
        scale = 100 if n == 2 and rounds > 2 else 1
        print(json.dumps({
            "run": run, "row": row, "side": side,
            "circumstances": {
                "date": "-", "filesystem": filesystem, "cpus": 2,
                "kernel": "-", "rounds": 5, "seconds": 1, "load": 0,
                "versions": []},
            "figures": {name.replace("_", " "): [figure * scale, unit]
                        for name, (figure, unit) in figures.items()}}))

def rate(run, filesystem, row, side, rounds, ops, server):
    measured(run, filesystem, row, side, rounds, **{
        "": (ops, "op/s"), "server_CPU": (server, "µs/op"),
        "client_CPU": (1, "µs/op")})

rate("a", "tmpfs", "read16", "filter", 5, 350, 3.0)
rate("a", "tmpfs", "read16", "qemu", 5, 100, 10.0)
rate("a", "tmpfs", "read16", "io_uring", 5, 180, 10.0)
rate("a", "tmpfs", "read16", "unsafe", 5, 170, 10.0)
rate("a", "tmpfs", "read16", "raw", 5, 250, 3.0)
rate("a", "tmpfs", "read16", "build", 5, 700, 6.0)
rate("b", "tmpfs", "read16", "filter", 4, 10, 3.0)
rate("b", "tmpfs", "read16", "qemu", 4, 100, 10.0)
rate("b", "tmpfs", "marking", "filter", 5, 96, 3.0)
rate("b", "tmpfs", "marking", "none", 5, 100, 3.0)
measured("b", "tmpfs", "life", "filter", 2, start_to_first_answer=(1, "s"),
         resident_memory=(60, "MiB"))
measured("b", "tmpfs", "life", "qemu", 2, start_to_first_answer=(5, "s"),
         resident_memory=(100, "MiB"))
rate("c", "ext4", "flush1", "filter", 5, 120, 3.0)
rate("c", "ext4", "flush1", "qemu", 5, 100, 3.0)
rate("c", "ext4", "flush1", "raw", 5, 140, 3.0)
rate("c", "ext4", "write16", "filter", 5, 120, 3.0)
rate("c", "ext4", "write16", "qemu", 5, 100, 3.0)
rate("c", "ext4", "write16", "raw", 5, 100, 3.0)
print('{"run": "d", "ro', end="")
EOF

bench --judge --from figures > judged
# Title, ratio, verdict.
expect ()
{
  grep -F "| $1 | $2 | $3 (" judged | finds "| $4 |\$" ||
    { cat judged; fail "not so: $*"; }
}
title='random read 4 KiB, depth 16'
expect "$title" qemu 3.50 met
expect "$title" 'best: io_uring' 1.94 missed
expect "$title" raw 1.40 met
expect "$title: server CPU" qemu 0.30 met
expect "$title: server CPU" raw 1.00 missed
expect 'random write 4 KiB, depth 16, 8 bitmaps' none 0.96 missed
expect '16 TiB image: start to first answer' qemu 5.00 '(met, rounds: 2)'
expect '16 TiB image: resident memory' qemu 0.60 '(met, rounds: 2)'
title='write and flush pairs 4 KiB, depth 1, one CPU'
expect "$title" qemu 1.20 met
expect "$title" raw 0.86 missed
# On a disk it is not held against qemu-nbd.
title='random write 4 KiB, depth 16'
expect "$title" raw 1.20 met
expect "$title: server CPU" raw 1.00 missed
[ "$(grep -c '^| .*| \(met\|missed\) |$' judged)" = 10 ] ||
  { cat judged; fail "other rows were judged too"; }

# Another build is as many times as good as its figures are better.
grep -qxF "| random read 4 KiB, depth 16 | 2.00 (2.00..2.00) |" judged &&
  grep -qxF "| random read 4 KiB, depth 16: server CPU | 0.50 (0.50..0.50) |" \
       judged || { cat judged; fail "not so: another build"; }

status=0
bench --strict --from figures > judged || status=$?
[ $status = 1 ] || fail "--strict: $status"

# A bad figure is told of, if it is not at the end.
echo >> figures
! bench --from figures > out 2>&1 || fail "a broken line was passed over"

# Figures of its own, for as little as a run can be.
for tool in load echo; do
  [ -x "$built/$tool" ] || { echo "bench/$tool is not built"; exit 0; }
done
if [ -n "${ASAN_PRELOAD-}" ]; then
  echo "nothing is measured with sanitizers"
  exit 0
fi
bench --filter="$FILTER" --load="$built/load" --echo="$built/echo" \
      --dir="$d" --size=1048576 --rounds=1 --seconds=0.02 \
      --peers=qemu,raw,bare --json=kept read16 marking > measured 2> log ||
  { cat log measured; fail "the bench failed"; }
for peer in 'this filter, no bitmap' 'nbdkit file' 'a bare responder'; do
  grep -q "^Against $peer" measured ||
    { cat log measured; fail "no figures: $peer"; }
done
if type qemu-nbd >/dev/null 2>&1; then
  grep -q '^Against qemu-nbd -B, ' measured || fail "no figures: qemu-nbd"
fi
bench --from kept > again
cmp measured again || fail "what was kept is not what was measured"

# Another build takes turns with the filter, and no peer.
bench --filter="$FILTER" --other="twin=$FILTER" --load="$built/load" \
      --dir="$d" --size=8388608 --rounds=1 --seconds=0.02 \
      --json=twins flush16 seqwrite4m > measured 2> log ||
  { cat log measured; fail "the bench failed with another build"; }
[ "$(grep -c '^| .* | [0-9.]* ([0-9.]*) |$' measured)" = 4 ] ||
  { cat measured; fail "no figures of the other build"; }
! grep '^Against' measured || fail "there were peers, too"
bench --from twins > again
cmp measured again || fail "what was kept of the other build is lost"
! bench --filter="$FILTER" --other="qemu=$FILTER" --load="$built/load" \
  2> log || fail "a build may be called as a peer is"
[ -z "$(find "$d" -name 'side-by-side.*')" ] || fail "images were left"

# What backups take.  Whether the bars are reached says nothing here.
"${PYTHON:-python3}" -B "$top/bench/backup" --dir . --rounds 1 \
  --tool "$built/../tools/dirty-bitmap-backup" --filter "$FILTER" \
  --size $((64 << 20)) --thin $((1 << 30)) > backup || [ $? -eq 1 ] ||
  fail "bench/backup failed"
grep -q '^| increment | [1-9]' backup &&
  grep -q '^| increment, thin disk | nbdcopy, thin disk | [0-9.]* | ≥ 0.9 |' \
    backup && [ "$(wc -l < backup)" -eq 18 ] ||
  { cat backup; fail "no figures: backup"; }

# What views cost.
"${PYTHON:-python3}" -B "$top/bench/views" --load "$built/load" \
  --filter "$FILTER" --dir . --rounds 1 --writes 500 --seconds 0.3 > views ||
  fail "bench/views failed"
for row in '^| a view, each write the first' '^| a backup with a view begins' \
           '^backup-begin, 16 TiB, 100000 dirty granules'; do
  grep -q "$row" views || { cat views; fail "no figures: $row"; }
done
