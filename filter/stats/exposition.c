/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The statistics in Prometheus's text format.  All lines of a metric stand
 * together, below its HELP and TYPE.
 */

#include <config.h>

#include <inttypes.h>
#include <stdio.h>

#include "common/utf8.h"
#include "stats/stats.h"

#define PREFIX "nbdkit_dirty_bitmap_"

/* Writing to a stream. */
struct exposition {
  struct stats_output output;
  FILE *f;
  const char *name;             /* of the metric */
};

void
stats_write_label (FILE *f, const char *value)
{
  const unsigned char *p = (const unsigned char *) value;

  putc ('"', f);
  while (*p != '\0') {
    const unsigned n = utf8_length (p);

    if (*p == '\n')
      fputs ("\\n", f);
    else if (n == 0 || *p < ' ' || *p == 0x7f || (*p == '\\' && p[1] == 'x'))
      fprintf (f, "\\\\x%02x", *p);
    else if (*p == '\\' || *p == '"')
      fprintf (f, "\\%c", *p);
    else
      fwrite (p, 1, n, f);
    p += n == 0 ? 1 : n;
  }
  putc ('"', f);
}

static void
write_metric (struct stats_output *o, const char *name, const char *type,
              const char *help)
{
  struct exposition *e = (struct exposition *) o;

  e->name = name;
  fprintf (e->f, "# HELP " PREFIX "%s %s\n# TYPE " PREFIX "%s %s\n",
           name, help, name, type);
}

static void
write_sample (struct stats_output *o, const struct stats_sample *s)
{
  const struct exposition *e = (const struct exposition *) o;
  FILE *f = e->f;

  fprintf (f, PREFIX "%s%s", e->name, s->suffix);
  for (unsigned i = 0; i < s->nr_labels; ++i) {
    fprintf (f, "%c%s=", i == 0 ? '{' : ',', s->label[i].name);
    stats_write_label (f, s->label[i].text);
  }
  if (s->nr_labels > 0)
    putc ('}', f);
  switch (s->unit) {
  case STATS_NUMBER:
    fprintf (f, " %" PRIu64 "\n", s->value);
    break;
  case STATS_SECONDS:           /* a decimal point in every locale */
    fprintf (f, " %" PRIu64 ".%09" PRIu64 "\n",
             s->value / 1000000000, s->value % 1000000000);
    break;
  case STATS_NONE:
    fputs (" NaN\n", f);
    break;
  }
}

int
stats_write (struct stats *s, struct disk *d, FILE *f)
{
  struct exposition e = {
    .output = { .metric = write_metric, .sample = write_sample },
    .f = f,
  };

  return stats_tell (s, d, &e.output);
}
