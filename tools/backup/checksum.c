/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Checksums of the files of a repository. */

#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include <gnutls/crypto.h>
#include <gnutls/gnutls.h>

#include "backup/backup.h"
#include "backup/checksum.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "container/fd.h"

#define PIECE_BYTES (1 << 20)

static int
hash_file (gnutls_hash_hd_t hash, int fd, const char *path, uint64_t *bytes)
{
  CLEANUP_FREE char *buf = malloc (PIECE_BYTES);
  ssize_t n;

  if (buf == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  *bytes = 0;
  while ((n = fd_pread (fd, buf, PIECE_BYTES, *bytes)) > 0) {
    if (is_interrupted)
      return -1;
    if (gnutls_hash (hash, buf, n) < 0) {
      report_error ("%s: cannot compute the checksum", path);
      return -1;
    }
    *bytes += n;
  }
  if (n == 0)
    return 0;
  report_error ("%s: %m", path);
  return -1;
}

int
checksum_of (int fd, const char *path, struct checksum *sum)
{
  uint8_t digest[CHECKSUM_CHARS / 2];
  gnutls_hash_hd_t hash;
  int r;

  if (gnutls_hash_init (&hash, GNUTLS_DIG_SHA256) < 0) {
    report_error ("%s: cannot compute the checksum", path);
    return -1;
  }
  r = hash_file (hash, fd, path, &sum->bytes);
  gnutls_hash_deinit (hash, digest);
  for (unsigned i = 0; i < sizeof digest; ++i)
    sprintf (sum->text + 2 * i, "%02x", digest[i]);
  return r;
}
