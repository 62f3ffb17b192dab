/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The views of backups (disk/disk.h), and what clients are told of them.
 *
 * The disk has the views.  It calls nothing when one breaks, or when a client
 * opens or closes one.  So the thread looks at them every VIEWS_MS as long as
 * there are any, and before and after each change of the set of bitmaps.  It
 * remembers each view from its beginning until it finds it gone, and what it
 * has told of it.
 *
 * The time without a client is the sum of the times between two looks that
 * found none.  A long command may keep the thread from looking.  That time is
 * not counted, since a client may have had the view open in it: a backup may
 * end late, and never early.
 */

#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/report.h"
#include "control/internal.h"
#include "disk/change.h"
#include "disk/disk.h"

/* How often to look at the views. */
#define VIEWS_MS 200

/* The most that one look counts as. */
#define MAX_COUNTED_MS (2 * VIEWS_MS)

struct watch {
  struct watch *next;
  uint32_t fail_after;          /* seconds; 0: never */
  bool was_idle;                /* the last look has found no client, */
  int64_t idle_ms;              /* and for so long looks have found none */
  bool told_broken;             /* BACKUP_BROKEN was sent */
  bool exists;                  /* the last look has found it */
  char name[];
};

json_t *
views_export (const char *name)
{
  return qmp_string_of (EXPORT_VIEW_PREFIX, name);
}

int
views_note (struct watch **list, const char *name, uint32_t fail_after)
{
  struct watch *w = calloc (1, sizeof *w + strlen (name) + 1);

  if (w == NULL)
    return -1;
  w->fail_after = fail_after;
  strcpy (w->name, name);
  w->next = *list;
  *list = w;
  return 0;
}

void
views_forget (struct watch **list)
{
  while (*list != NULL) {
    struct watch *w = *list;

    *list = w->next;
    free (w);
  }
}

static struct watch *
find_watch (struct watch *list, const char *name)
{
  while (list != NULL && strcmp (list->name, name) != 0)
    list = list->next;
  return list;
}

static void
tell_broken (struct control *control, struct watch *w, const char *reason)
{
  if (w->told_broken)
    return;
  w->told_broken = true;
  control_send_event (control, "BACKUP_BROKEN",
                      json_pack ("{s:o,s:o}", "bitmap", qmp_string (w->name),
                                 "reason", qmp_string (reason)));
}

/* A look. */
struct look {
  struct control *control;
  int64_t passed_ms;            /* since the last one */
};

static void
look_at (const struct disk_view_state *v, void *opaque)
{
  const struct look *look = opaque;
  struct watch *w = find_watch (look->control->views, v->name);

  if (w == NULL)
    return;
  w->exists = true;
  w->idle_ms = v->clients == 0 && w->was_idle
    ? w->idle_ms + look->passed_ms : 0;
  w->was_idle = v->clients == 0;
  if (v->broken != NULL)
    tell_broken (look->control, w, v->broken);
}

/* Forget the views that are gone. */
static void
drop_ended (struct control *control)
{
  struct watch **p = &control->views;

  while (*p != NULL) {
    struct watch *w = *p;

    if (w->exists) {
      p = &w->next;
      continue;
    }
    control_send_event (control, "BLOCK_EXPORT_DELETED",
                        json_pack ("{s:o}", "id", views_export (w->name)));
    *p = w->next;
    free (w);
  }
}

void
views_look (struct control *control)
{
  const int64_t now = now_ms ();
  struct look look = {
    .control = control, .passed_ms = now - control->views_seen_ms,
  };

  control->views_seen_ms = now;
  if (control->views == NULL)
    return;
  if (look.passed_ms > MAX_COUNTED_MS)
    look.passed_ms = MAX_COUNTED_MS;
  for (struct watch *w = control->views; w != NULL; w = w->next)
    w->exists = false;
  disk_list_views (control->options.disk, look_at, &look);
  drop_ended (control);
}

void
views_watch (struct control *control, struct watch **list)
{
  while (*list != NULL) {
    struct watch *w = *list;

    *list = w->next;
    w->next = control->views;
    control->views = w;
  }
}

/* No client has had it open for too long: the backup has failed. */
static void
end_backup (struct control *control, struct watch *w)
{
  const struct control_options *o = &control->options;
  struct disk_action end = { .type = DISK_BACKUP_END, .name = w->name };
  struct report_hold hold;
  char reason[80];
  int r;

  snprintf (reason, sizeof reason,
            "no client had its export open for %u seconds",
            (unsigned) w->fail_after);
  report_hold_begin (&hold);
  r = disk_change_bitmaps (o->disk, o->node, &end, 1);
  report_hold_end (&hold);
  if (r == -1) {
    w->idle_ms = 0;             /* to be tried again */
    report_warning ("control: the backup of bitmap '%s' cannot be ended, "
                    "although %s: %s", w->name, reason, hold.text);
    return;
  }
  report_warning ("control: the backup of bitmap '%s' has failed: %s",
                  w->name, reason);
  tell_broken (control, w, reason);
}

/* One at most. */
static bool
end_overdue (struct control *control)
{
  for (struct watch *w = control->views; w != NULL; w = w->next)
    if (w->fail_after > 0 &&
        w->idle_ms >= (int64_t) w->fail_after * 1000) {
      end_backup (control, w);
      return true;
    }
  return false;
}

int
views_turn (struct control *control)
{
  const int64_t left = control->views_seen_ms + VIEWS_MS - now_ms ();

  if (control->views == NULL)
    return -1;
  if (left > 0)
    return left;
  views_look (control);
  if (end_overdue (control))
    views_look (control);
  return control->views == NULL ? -1 : VIEWS_MS;
}

/* The result of backup-list, which gets the views. */
struct reply {
  const struct control *control;
  json_t *list;
  bool failed;
};

/* The entry of backup-list. */
static json_t *
find_entry (const json_t *list, const char *name)
{
  json_t *entry;
  size_t i;

  json_array_foreach (list, i, entry)
    if (strcmp (json_string_value (json_object_get (entry, "bitmap")),
                name) == 0)
      return entry;
  return NULL;
}

static void
add_to_entry (const struct disk_view_state *v, void *opaque)
{
  struct reply *r = opaque;
  const struct watch *w = find_watch (r->control->views, v->name);
  json_t *entry = find_entry (r->list, v->name);
  json_t *view;

  if (entry == NULL)
    return;
  view = json_pack ("{s:o,s:I,s:I}", "export", views_export (v->name),
                    "clients", (json_int_t) v->clients,
                    "kept", (json_int_t) v->kept_bytes);
  if ((v->broken != NULL &&
       json_object_set_new (view, "broken", qmp_string (v->broken)) == -1) ||
      json_object_set (entry, "view", view) == -1 ||
      (w != NULL && w->fail_after > 0 &&
       json_object_set_new (entry, "fail-after",
                            json_integer (w->fail_after)) == -1))
    r->failed = true;
  json_decref (view);
}

int
views_add_to_backups (struct control *control, json_t *list)
{
  struct reply r = { .control = control, .list = list };

  disk_list_views (control->options.disk, add_to_entry, &r);
  return r.failed ? -1 : 0;
}
