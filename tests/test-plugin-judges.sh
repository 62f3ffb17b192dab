#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# A plugin that judges clients (.preconnect) goes on judging them: over one
# that may do so nbdkit's own server answers, with the line that says why.
# dirty-bitmap-server=force is the user's word that it does not.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
requires "${CC:-cc}" pkg-config

qemu-img create -q -f qcow2 disk.qcow2 16M
qemu-img bitmap --add disk.qcow2 b
cp disk.qcow2 pristine.qcow2

script=(get_size="stat -Lc %s $d/disk.qcow2"
        pread="env -u LD_PRELOAD dd if=$d/disk.qcow2 skip=\$4 count=\$3 iflag=count_bytes,skip_bytes status=none"
        can_write="exit 0"
        pwrite="env -u LD_PRELOAD dd of=$d/disk.qcow2 seek=\$4 oflag=seek_bytes conv=notrunc status=none"
        can_flush="exit 0" flush="exit 0")
judge='test ! -e '"$d/no"'; exit'

cat > judge.sh <<END
#!/bin/sh -
case \$1 in
  preconnect) $judge ;;
  get_size) ${script[0]#*=} ;;
  pread) ${script[1]#*=} ;;
  can_write | can_flush | flush) exit 0 ;;
  pwrite) ${script[3]#*=} ;;
  *) exit 2 ;;
esac
END
chmod +x judge.sh

cat > judge.c <<END
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>
#include <sys/stat.h>
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>
#define THREAD_MODEL NBDKIT_THREAD_MODEL_SERIALIZE_ALL_REQUESTS
static int fd;
static int judge (int readonly) { return -(access ("$d/no", F_OK) == 0); }
static void *begin (int readonly) { fd = open ("$d/disk.qcow2", O_RDWR | O_CLOEXEC); return fd == -1 ? NULL : &fd; }
static int64_t size (void *h) { struct stat s; return fstat (fd, &s) == -1 ? -1 : s.st_size; }
static int rd (void *h, void *b, uint32_t n, uint64_t o, uint32_t f) { return pread (fd, b, n, o) == n ? 0 : -1; }
static int wr (void *h, const void *b, uint32_t n, uint64_t o, uint32_t f) { return pwrite (fd, b, n, o) == n ? 0 : -1; }
static int fl (void *h, uint32_t f) { return fdatasync (fd); }
static struct nbdkit_plugin plugin = {
  .name = "judge", .preconnect = judge, .open = begin, .get_size = size,
  .pread = rd, .pwrite = wr, .flush = fl,
};
NBDKIT_REGISTER_PLUGIN (plugin)
END
# shellcheck disable=SC2046  # words are meant
${CC:-cc} -shared -fPIC $(pkg-config --cflags nbdkit) judge.c \
          -o nbdkit-judge-plugin.so

# judged WHAT NBDKIT-ARGS...
judged ()
{
  local what=$1

  shift
  echo "judged: $what"
  cp pristine.qcow2 disk.qcow2
  start_nbdkit --filter="$FILTER" "$@"
  grep -q "warning: .*not replaced.*plugin.*$what.*judge" "$log" ||
    fail "the log does not say why"
  touch no
  if nbdinfo "$uri" 2>/dev/null; then fail "$what: it was let in"; fi
  rm no
  shell 'h.pwrite(b"x" * 512, 65536)'
  if map b 2>/dev/null; then fail "$what: nbdkit's server shows bitmaps"; fi
  stop_server
  same "$what: QEMU's map" "65536 65536" "$(qemu_dirty disk.qcow2 b)"

  # To insist is not to vouch.
  refused "dirty-bitmap-server=on.*$what" --filter="$FILTER" "$@" \
          dirty-bitmap-server=on
  start_nbdkit --filter="$FILTER" "$@" dirty-bitmap-server=force
  same "$what: dirty" "65536 65536" "$(dirty b)"
  stop_server
  # nbdkit says so when a plugin asks for an export name.
  ! grep -vE 'no (connection|context) in this thread' "$log" ||
    fail "something was said"
}

truncate -s +8M pristine.qcow2          # to write into
judged judge "$d/nbdkit-judge-plugin.so"
judged eval eval preconnect="$judge" "${script[@]}"
judged sh sh "$d/judge.sh"

# Where it refuses the client, force means that nobody asks it.
cp pristine.qcow2 disk.qcow2
touch no
start_nbdkit --filter="$FILTER" "$d/nbdkit-judge-plugin.so" \
             dirty-bitmap-server=force
nbdinfo "$uri" >info
stop_server
rm no

# What is known to judge is not overruled.
refused 'dirty-bitmap-server=force.*ip' --filter="$FILTER" --filter=ip \
        file disk.qcow2 allow=all dirty-bitmap-server=force

# noparallel: one client at a time, or its requests in order.
start_nbdkit --filter="$FILTER" --filter=noparallel file disk.qcow2 \
             serialize=connections
grep -q 'not replaced.*noparallel' "$log"
stop_server
start_nbdkit --filter="$FILTER" --filter=noparallel file disk.qcow2 \
             dirty-bitmap-server=on
same dirty "" "$(dirty b)"
stop_server

# Some that are known to judge nobody.
head -c 65536 disk.qcow2 >part1
tail -c +65537 disk.qcow2 >part2
start_nbdkit --filter="$FILTER" split part1 part2 dirty-bitmap-server=on
same dirty "" "$(dirty b)"
stop_server
