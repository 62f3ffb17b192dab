/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Checksums of the files of a repository. */

#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include <xxhash.h>
#ifdef HAVE_XXH3_128BITS_UPDATE_DISPATCH
#include <xxh_x86dispatch.h>
#endif

#include "backup/backup.h"
#include "backup/checksum.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "container/fd.h"

#define PIECE_BYTES (256 << 10)

int
checksum_begin (struct checksum_state *s)
{
  s->bytes = 0;
  s->xxh = XXH3_createState ();
  if (s->xxh == NULL) {
    errno = ENOMEM;
    report_error ("malloc: %m");
    return -1;
  }
  XXH3_128bits_reset (s->xxh);
  return 0;
}

void
checksum_add (struct checksum_state *s, const void *buf, uint64_t count)
{
  XXH3_128bits_update (s->xxh, buf, count);
  s->bytes += count;
}

void
checksum_end (struct checksum_state *s, struct checksum *sum)
{
  XXH128_canonical_t digest;

  XXH128_canonicalFromHash (&digest, XXH3_128bits_digest (s->xxh));
  XXH3_freeState (s->xxh);
  for (unsigned i = 0; i < sizeof digest.digest; ++i)
    sprintf (sum->text + 2 * i, "%02x", digest.digest[i]);
  sum->bytes = s->bytes;
}

/* A part of a file, or what there is of it. */
static int
add_file (struct checksum_state *s, int fd, const char *path, uint64_t begin,
          uint64_t end)
{
  CLEANUP_FREE char *buf = malloc (PIECE_BYTES);
  ssize_t n;

  if (buf == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  for (uint64_t at = begin; at < end; at += n) {
    if (is_interrupted)
      return -1;
    n = fd_pread (fd, buf, min_u64 (PIECE_BYTES, end - at), at);
    if (n == -1) {
      report_error ("%s: %m", path);
      return -1;
    }
    if (n == 0)
      return 0;
    checksum_add (s, buf, n);
  }
  return 0;
}

int
checksum_of (int fd, const char *path, struct checksum *sum)
{
  struct checksum_state s;
  int r;

  if (checksum_begin (&s) == -1)
    return -1;
  r = add_file (&s, fd, path, CHECKSUM_HEAD_BYTES, UINT64_MAX);
  if (r == 0)
    r = add_file (&s, fd, path, 0, CHECKSUM_HEAD_BYTES);
  checksum_end (&s, sum);
  return r;
}
