/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The files that the header names: the backing file, with its format, and
 * the external data file (qcow2.rst, "Header", "Header extensions").  This
 * file only reports them; the caller that opens the image decides what to do
 * about them.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "qcow2/internal.h"

/* QEMU's limit for the name of a backing file. */
#define MAX_BACKING_NAME 1023

/* NUL bytes may pad the text.  QEMU would not see anything after a NUL. */
static int
copy_text (const char *what, struct header_text from, char **to)
{
  size_t length;

  if (from.length == 0)
    return 0;
  length = strnlen ((const char *) from.text, from.length);
  for (size_t i = length; i < from.length; ++i)
    if (from.text[i] != '\0') {
      report_error ("the %s of the image contains a NUL byte", what);
      errno = EINVAL;
      return -1;
    }
  if (length == 0)
    return 0;
  *to = strndup ((const char *) from.text, length);
  if (*to == NULL) {
    report_error ("strndup: %m");
    return -1;
  }
  return 0;
}

static int
get_backing_name (const struct qcow2 *q, struct header_text *name)
{
  const uint8_t *p = q->hs.cluster;
  const uint64_t offset = get_be64 (p + HEADER_BACKING_OFFSET);
  const uint32_t length = get_be32 (p + HEADER_BACKING_SIZE);

  if (offset == 0)
    return 0;
  /* As in QEMU, without a name there is no backing file. */
  if (length > MAX_BACKING_NAME ||
      range_exceeds (offset, length, q->cluster_size)) {
    report_error ("the name of the image's backing file, %" PRIu32 " bytes at "
                  "%#" PRIx64 ", is longer than %u bytes or lies outside of "
                  "the first cluster", length, offset, MAX_BACKING_NAME);
    errno = EINVAL;
    return -1;
  }
  *name = (struct header_text) { p + offset, length };
  return 0;
}

bool
references_backing (const struct qcow2 *q)
{
  struct header_text name = { 0 };
  struct report_hold hold;
  int r;

  report_hold_begin (&hold);
  r = get_backing_name (q, &name);
  report_hold_end (&hold);
  return r == -1 || (name.length > 0 && name.text[0] != '\0');
}

static int
copy_references (const struct qcow2 *q, struct qcow2_references *r)
{
  struct header_text backing = { 0 };

  r->has_data_file = q->has_data_file;
  r->data_file_raw = q->data_file_raw;
  if (get_backing_name (q, &backing) == -1 ||
      copy_text ("backing file name", backing, &r->backing_name) == -1)
    return -1;
  if (r->backing_name != NULL &&
      copy_text ("backing file format", q->hs.ext.backing_format,
                 &r->backing_format) == -1)
    return -1;
  return r->has_data_file
    ? copy_text ("data file name", q->hs.ext.data_file,
                 &r->data_file_name) : 0;
}

int
qcow2_read_references (struct container *c, struct qcow2_references *r)
{
  struct qcow2 q = { .container = c, .readonly = true };
  int result = -1;

  memset (r, 0, sizeof *r);
  if (header_load (&q) == 0)
    result = copy_references (&q, r);
  if (result == -1)
    qcow2_free_references (r);
  header_free (&q);
  return result;
}

void
qcow2_free_references (struct qcow2_references *r)
{
  const int err = errno;

  free (r->backing_name);
  free (r->backing_format);
  free (r->data_file_name);
  memset (r, 0, sizeof *r);
  errno = err;
}
