/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Backups by a control socket. */

#include <config.h>

#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "backup/control.h"
#include "common/report.h"

/* If we die, the server ends the backup after so many seconds. */
#define FAIL_AFTER 60

static const char *
last_error (const struct control *c)
{
  return c->client.error != NULL ? c->client.error : "out of memory";
}

static json_t *
call (struct control *c, const char *command, json_t *arguments)
{
  json_t *result = arguments == NULL ? NULL
    : qmp_client_call (&c->client, command, arguments);

  json_decref (arguments);
  if (result == NULL)
    report_error ("%s: %s", command, last_error (c));
  return result;
}

int
control_open (struct control *c, const char *path, const char *bitmap)
{
  c->bitmap = bitmap;
  if (qmp_client_open (&c->client, path) == 0)
    return 0;
  report_error ("%s: %s", path, last_error (c));
  return -1;
}

void
control_close (struct control *c)
{
  qmp_client_close (&c->client);
  free (c->export);
}

/* Find an object of a list by what one of its members says. */
static const json_t *
find (const json_t *list, const char *key, const char *value)
{
  const json_t *item;
  size_t i;

  json_array_foreach (list, i, item) {
    const char *text = json_string_value (json_object_get (item, key));

    if (text != NULL && strcmp (text, value) == 0)
      return item;
  }
  return NULL;
}

int
control_granularity (struct control *c, uint64_t *granularity,
                     uint64_t *disk_bytes)
{
  json_t *list = call (c, "query-block", json_object ());
  const json_t *inserted, *image, *bitmap;

  if (list == NULL)
    return -1;
  inserted = json_object_get (json_array_get (list, 0), "inserted");
  image = json_object_get (inserted, "image");
  bitmap = find (json_object_get (inserted, "dirty-bitmaps"), "name",
                 c->bitmap);
  *disk_bytes = json_integer_value (json_object_get (image, "virtual-size"));
  *granularity = json_is_true (json_object_get (bitmap, "recording"))
    ? json_integer_value (json_object_get (bitmap, "granularity")) : 0;
  json_decref (list);
  return 0;
}

static int
take_begun (struct control *c, const json_t *begun)
{
  const char *action = json_string_value (json_object_get (begun, "action"));
  const char *export = json_string_value (json_object_get (begun, "export"));
  const json_t *dirty = json_object_get (begun, "dirty");

  if (action == NULL || export == NULL || !json_is_integer (dirty)) {
    report_error ("backup-begin: the answer is not understood");
    return -1;
  }
  c->is_created = strcmp (action, "created") == 0;
  c->is_recreated = strcmp (action, "recreated") == 0;
  c->dirty_bytes = json_integer_value (dirty);
  c->export = strdup (export);
  if (c->export == NULL) {
    report_error ("strdup: %m");
    return -1;
  }
  return 0;
}

int
control_begin (struct control *c, bool dirty_only)
{
  json_t *begun = call (c, "backup-begin",
                        json_pack ("{s:s,s:i,s:s}", "bitmap", c->bitmap,
                                   "fail-after", FAIL_AFTER,
                                   "scope", dirty_only ? "dirty" : "disk"));
  int r;

  if (begun == NULL)
    return -1;
  c->has_begun = true;
  r = take_begun (c, begun);
  json_decref (begun);
  return r;
}

static int
end_backup (struct control *c, bool success)
{
  json_t *result = call (c, "backup-end",
                         json_pack ("{s:s,s:b}", "bitmap", c->bitmap,
                                    "success", success));

  c->has_begun = false;
  json_decref (result);
  return result == NULL ? -1 : 0;
}

int
control_end_earlier (struct control *c, bool *ended)
{
  json_t *list = call (c, "backup-list", json_object ());

  if (list == NULL)
    return -1;
  *ended = find (list, "bitmap", c->bitmap) != NULL;
  json_decref (list);
  return *ended ? end_backup (c, false) : 0;
}

int
control_end_as_success (struct control *c)
{
  struct report_hold hold;
  int r;

  report_hold_begin (&hold);
  r = end_backup (c, true);
  report_hold_end (&hold);
  if (r == -1)
    report_error ("the point is stored, but the bitmap has not lost what it "
                  "has, and the next point has that again: %s", hold.text);
  return r;
}

void
control_end_as_failure (struct control *c)
{
  struct report_hold hold;

  if (!c->has_begun)
    return;
  report_hold_begin (&hold);
  end_backup (c, false);
  report_hold_end (&hold);
}
