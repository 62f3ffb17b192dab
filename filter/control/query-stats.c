/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* query-stats: what dirty-bitmap-stats writes, as JSON.  A metric without
 * labels is a number.  One with labels is an array of objects: the labels, and
 * the value.  The value is null where there is none yet.
 */

#include <config.h>

#include <stdio.h>
#include <stdlib.h>

#include "common/cleanup.h"
#include "control/internal.h"
#include "stats/stats.h"

struct answer {
  struct stats_output output;
  json_t *object;
  const char *name;             /* of the metric */
  bool failed;
};

static void
add_metric (struct stats_output *o, const char *name, const char *type,
            const char *help)
{
  (void) type;
  (void) help;
  ((struct answer *) o)->name = name;
}

static json_t *
make_value (const struct stats_sample *s)
{
  switch (s->unit) {
  case STATS_NUMBER:
    return json_integer (s->value);
  case STATS_SECONDS:
    return json_real (s->value / 1e9);
  case STATS_NONE:
    break;
  }
  return json_null ();
}

/* Add an object to the array of a metric with labels. */
static int
add_labelled (struct answer *a, const char *name,
              const struct stats_sample *s)
{
  json_t *array = json_object_get (a->object, name);
  json_t *sample = json_object ();

  if (array == NULL) {
    array = json_array ();
    if (json_object_set_new (a->object, name, array) == -1) {
      json_decref (sample);
      return -1;
    }
  }
  for (unsigned i = 0; i < s->nr_labels; ++i)
    if (json_object_set_new (sample, s->label[i].name,
                             qmp_string (s->label[i].text)) == -1) {
      json_decref (sample);
      return -1;
    }
  if (json_object_set_new (sample, "value", make_value (s)) == -1) {
    json_decref (sample);
    return -1;
  }
  return json_array_append_new (array, sample);
}

static void
add_sample (struct stats_output *o, const struct stats_sample *s)
{
  struct answer *a = (struct answer *) o;
  CLEANUP_FREE char *name = NULL;

  if (asprintf (&name, "%s%s", a->name, s->suffix) == -1) {
    name = NULL;
    a->failed = true;
  }
  else if (s->nr_labels > 0 ? add_labelled (a, name, s) == -1
           : json_object_set_new (a->object, name, make_value (s)) == -1)
    a->failed = true;
}

json_t *
command_query_stats (struct call *call)
{
  const struct control_options *o = &call->control->options;
  struct answer a = {
    .output = { .metric = add_metric, .sample = add_sample },
    .object = json_object (),
  };

  if (stats_tell (o->stats, o->disk, &a.output) == 0 && !a.failed)
    return a.object;
  json_decref (a.object);
  return NULL;
}
