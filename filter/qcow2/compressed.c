/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Compressed clusters (qcow2.rst, "Compressed Clusters Descriptor").
 *
 * They are only read.  A write over one puts a normal cluster in its
 * place (write.c), and its sectors are released.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <zlib.h>
#include <zstd.h>

#include "qcow2/internal.h"

#define SECTOR 512

void
compressed_location (const struct qcow2 *q, uint64_t descriptor,
                     uint64_t *host, uint64_t *bytes)
{
  const unsigned x = 62 - (q->cluster_bits - 8);
  const uint64_t sectors =
    ((descriptor & ~(OFLAG_COPIED | OFLAG_COMPRESSED)) >> x) + 1;

  *host = descriptor & ((UINT64_C (1) << x) - 1);
  /* The first sector may have begun with the end of another cluster. */
  *bytes = sectors * SECTOR - (*host & (SECTOR - 1));
}

static int
inflate_cluster (void *out, size_t out_len, void *in, size_t in_len)
{
  z_stream strm = { .next_in = in, .avail_in = in_len,
                    .next_out = out, .avail_out = out_len };
  int r;

  /* Raw deflate, with any window size. */
  if (inflateInit2 (&strm, -15) != Z_OK)
    return -1;
  r = inflate (&strm, Z_FINISH);
  inflateEnd (&strm);
  /* The rest of the last sector is not part of the cluster. */
  return (r == Z_STREAM_END || r == Z_BUF_ERROR) && strm.avail_out == 0
    ? 0 : -1;
}

static int
zstd_cluster (void *out, size_t out_len, const void *in, size_t in_len)
{
  ZSTD_inBuffer input = { in, in_len, 0 };
  ZSTD_outBuffer output = { out, out_len, 0 };
  ZSTD_DCtx *ctx = ZSTD_createDCtx ();
  size_t r = 1;

  if (ctx == NULL)
    return -1;
  /* A cluster consists of one or more frames. */
  while (output.pos < output.size) {
    const size_t in_before = input.pos, out_before = output.pos;

    r = ZSTD_decompressStream (ctx, &output, &input);
    if (ZSTD_isError (r) ||
        (input.pos == in_before && output.pos == out_before))
      break;
  }
  ZSTD_freeDCtx (ctx);
  return output.pos == output.size && !ZSTD_isError (r) ? 0 : -1;
}

int
compressed_read (struct qcow2 *q, uint64_t descriptor, void *buf)
{
  CLEANUP_FREE void *in = NULL;
  uint64_t host, bytes;
  int r;

  /* At most twice the size of a cluster, because of the width of the field. */
  compressed_location (q, descriptor, &host, &bytes);
  in = malloc (bytes);
  if (in == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  if (container_pread (q->container, in, bytes, host) == -1) {
    report_error ("cannot read a compressed cluster at host offset %#" PRIx64
                  ": %m", host);
    return -1;
  }
  if (q->header.compression_type == 0)
    r = inflate_cluster (buf, q->cluster_size, in, bytes);
  else
    r = zstd_cluster (buf, q->cluster_size, in, bytes);
  if (r == -1) {
    report_error ("the compressed cluster at host offset %#" PRIx64
                  " is damaged", host);
    errno = EIO;
  }
  return r;
}
