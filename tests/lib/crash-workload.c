/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Random requests on a disk, by one thread or by several.
 *
 * Threads never change the same sector, but some windows they share in
 * small units, so that they meet in clusters, L2 slices, refcounts, and
 * granules.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/bytes.h"
#include "container/container.h"
#include "crash-universe.h"
#include "disk/disk.h"
#include "image.h"

#define MAX_THREADS 3

void
give_up (const struct universe *u, const char *fmt, ...)
{
  va_list args;

  fprintf (stderr, "CRASH_UNIVERSE=%" PRIu64 " (%s%s): ", u->number,
           u->kind->options, u->kind->beside ? ", beside" : "");
  va_start (args, fmt);
  vfprintf (stderr, fmt, args);
  va_end (args);
  fputc ('\n', stderr);
  exit (1);
}

/* One request that is being made. */
struct request {
  struct universe *u;
  uint64_t *seed;
  struct change change;
  uint8_t *data;
};

uint64_t
any (uint64_t *seed, uint64_t below)
{
  return random_next (seed) % below;
}

/* Every sector of every write is told apart. */
static void
make_data (struct request *r)
{
  for (uint64_t i = 0; i < r->change.count; ++i) {
    const uint64_t sector = (r->change.offset + i) / 512;
    const uint64_t tag = (r->change.start * UINT64_C (0x9e3779b97f4a7c15))
      ^ sector * UINT64_C (0xbf58476d1ce4e5b9);

    r->data[i] = tag >> (i % 8 * 8);
  }
}

static int
make_change (struct request *r)
{
  struct disk *d = r->u->disk;
  const struct change *c = &r->change;
  /* A large range stays a hole, or there would be no end of it. */
  const bool no_hole = c->count <= r->u->model->window_size
    && any (r->seed, 2) == 0;
  const bool fast = any (r->seed, 4) == 0;
  int ret;

  switch (c->kind) {
  case CHANGE_WRITE:
    return disk_write (d, r->data, c->count, c->offset, c->fua);
  case CHANGE_TRIM:
    return disk_trim (d, c->count, c->offset, c->fua);
  default:
    ret = disk_zero (d, c->count, c->offset, no_hole, fast, c->fua);
    if (ret == -1 && fast && errno == ENOTSUP)
      ret = disk_zero (d, c->count, c->offset, no_hole, false, c->fua);
    return ret;
  }
}

/* After a failure nobody knows what is there: read it. */
static void
read_back (struct request *r)
{
  const struct change *c = &r->change;
  uint64_t at = round_down (c->offset, 512);

  while (at < c->offset + c->count) {
    uint8_t *p = model_content (r->u->model, at);

    if (p == NULL)
      at = (at / r->u->model->windows_apart + 1) * r->u->model->windows_apart;
    else {
      if (disk_read (r->u->disk, p, 512, at) == -1)
        give_up (r->u, "cannot read: %s", strerror (errno));
      at += 512;
    }
  }
}

static void
run_change (struct request *r)
{
  struct universe *u = r->u;
  struct change *c = &r->change;

  c->fua = any (r->seed, 16) == 0;
  c->start = crash_log_note (u->log);
  c->end = SIZE_MAX;
  if (c->kind == CHANGE_WRITE) {
    r->data = malloc (c->count);
    assert_non_null (r->data);
    make_data (r);
  }
  model_begin (u->model, c, r->data);
  const int ret = make_change (r);

  if (ret == -1 && !u->may_fail)
    give_up (u, "a request failed: %s", strerror (errno));
  if (ret == -1)
    read_back (r);
  c->end = crash_log_note (u->log);
  (ret == 0 ? model_end : model_failed) (u->model, c);
  free (r->data);
  r->data = NULL;
}

static void
run_flush (struct universe *u)
{
  const size_t start = crash_log_note (u->log);

  if (disk_flush (u->disk, &u->client) == 0)
    model_flushed (u->model, start, crash_log_note (u->log));
  else if (!u->may_fail)
    give_up (u, "a flush failed: %s", strerror (errno));
}

static void
run_read (struct request *r)
{
  const struct change *c = &r->change;
  const uint64_t at = round_down (c->offset, 512);
  uint8_t buf[512];

  if (disk_read (r->u->disk, buf, 512, at) == -1)
    give_up (r->u, "a read failed: %s", strerror (errno));
  if (memcmp (buf, model_content (r->u->model, at), 512) != 0)
    give_up (r->u, "guest offset %#" PRIx64 " reads wrong", at);
}

/* A range inside of one window, and of what the thread has of it. */
static void
choose_range (struct request *r, unsigned thread)
{
  struct universe *u = r->u;
  const struct model *m = u->model;
  const uint64_t cluster_size = UINT64_C (1) << m->cluster_bits;
  unsigned w = any (r->seed, m->nr_windows);
  uint64_t low = 0, high = m->window_size, align = 1, max;

  if (u->nr_threads > 1 && w % 2 == 0) {
    const uint64_t units = m->window_size / u->unit / u->nr_threads;

    low = (any (r->seed, units) * u->nr_threads + thread) * u->unit;
    high = low + u->unit;
  }
  else if (u->nr_threads > 1)
    w = (thread * 2 + 1) % m->nr_windows;

  switch (any (r->seed, 3)) {
  case 0: max = 2000; break;
  case 1: align = 512; max = cluster_size; break;
  default: align = cluster_size; max = 3 * cluster_size;
  }
  r->change.offset = low + any (r->seed, high - low);
  r->change.offset = max_u64 (low, round_down (r->change.offset, align));
  r->change.count = min_u64 (round_up (1 + any (r->seed, max), align),
                             high - r->change.offset);
  r->change.offset += model_window (m, w);
}

/* A range that may hold several windows. */
static void
choose_large_range (struct request *r)
{
  const uint64_t size = r->u->model->active_size;
  const uint64_t max = r->change.kind == CHANGE_TRIM ? size / 2 : size / 8;

  r->change.offset = round_down (any (r->seed, size), 512);
  r->change.count = min_u64 (round_up (1 + any (r->seed, max), 512),
                             size - r->change.offset);
}

static void
run_request (struct universe *u, unsigned thread, uint64_t *seed)
{
  struct request r = { .u = u, .seed = seed };
  const unsigned what = any (seed, 32);

  if (u->keep && any (seed, 16) == 0)
    disk_tidy (u->disk, false);
  r.change.kind = what < 20 ? CHANGE_WRITE
    : what < 23 ? CHANGE_ZERO : CHANGE_TRIM;
  choose_range (&r, thread);
  if (what >= 26 && what < 30)
    run_flush (u);
  else if (what >= 30)
    run_read (&r);
  else {
    if (u->nr_threads == 1 && what >= 20 && any (seed, 4) == 0)
      choose_large_range (&r);
    run_change (&r);
  }
}

struct worker {
  struct universe *u;
  unsigned thread;
  uint64_t seed;
  pthread_t id;
};

static void *
work (void *opaque)
{
  struct worker *w = opaque;

  for (unsigned i = 0; i < w->u->nr_requests; ++i)
    run_request (w->u, w->thread, &w->seed);
  return NULL;
}

struct disk *
open_logged_disk (const struct universe *u, struct crash_log *log,
                  const struct disk_options *base, struct container **data)
{
  struct disk_options options = *base;
  struct container *c = crash_container_open (log);
  struct disk *d;

  *data = crash_data_open (log);
  options.below = u->kind->below;
  options.is_beside = u->kind->beside;
  if (u->kind->beside)
    options.beside = *data;
  else
    options.data_file = *data;
  d = disk_open (c, &options);
  if (d == NULL) {
    const int err = errno;

    container_close (c);
    if (*data != NULL)
      container_close (*data);
    errno = err;
  }
  return d;
}

void
close_logged_disk (struct disk *d, struct container *data)
{
  disk_close (d);
  if (data != NULL)
    container_close (data);
}

static void
open_disk (struct universe *u)
{
  const struct disk_options options = {
    .cache_size = 1, .granularity = 1024,
    .require = &u->create, .nr_require = u->create != NULL ? 1 : 0,
    .keep = u->keep,
  };

  u->model->never_marked = u->keep && !u->may_fail;

  u->disk = open_logged_disk (u, u->log, &options, &u->data);
  if (u->disk != NULL) {
    disk_client_begin (u->disk, &u->client);
    return;
  }
  if (!u->may_fail)
    give_up (u, "the disk cannot be opened: %s", strerror (errno));

  u->model->may_lose = u->create != NULL && u->kind->pad != 0;
  crash_log_set_faults (u->log, 0);
  crash_log_set_limit (u->log, UINT64_MAX);
  u->disk = open_logged_disk (u, u->log, &options, &u->data);
  if (u->disk == NULL)
    give_up (u, "the disk cannot be opened: %s", strerror (errno));
  disk_client_begin (u->disk, &u->client);
  /* What it found may be there, and not be durable. */
  if (disk_flush (u->disk, &u->client) == -1)
    give_up (u, "the disk cannot be flushed: %s", strerror (errno));
}

/* Returns whether it was a clean stop. */
static bool
stop_disk (struct universe *u)
{
  const size_t start = crash_log_note (u->log);
  const bool stopped = disk_stop (u->disk) == 0;

  if (stopped)
    model_flushed (u->model, start, crash_log_note (u->log));
  else if (!u->may_fail)
    give_up (u, "the disk cannot be stopped: %s", strerror (errno));
  close_logged_disk (u->disk, u->data);
  u->disk = NULL;
  return stopped;
}

static void
run_threads (struct universe *u)
{
  struct worker workers[MAX_THREADS];

  for (unsigned i = 0; i < u->nr_threads; ++i) {
    workers[i] = (struct worker) { u, i, random_next (&u->seed), 0 };
    assert_int_equal (pthread_create (&workers[i].id, NULL, work,
                                      &workers[i]), 0);
  }
  for (unsigned i = 0; i < u->nr_threads; ++i)
    pthread_join (workers[i].id, NULL);
}

static void
run_alone (struct universe *u)
{
  for (unsigned i = 0; i < u->nr_requests; ++i) {
    run_request (u, 0, &u->seed);
    /* After a failed stop a bitmap is marked for good. */
    if (any (&u->seed, 64) == 0 && !u->may_fail) {
      stop_disk (u);
      open_disk (u);
    }
  }
}

/* Compare all of the windows as the disk serves them. */
void
compare_served (const struct universe *u, struct disk *d,
                const struct checked *k)
{
  const struct model *m = u->model;
  const uint64_t unit_size = UINT64_C (1) << m->unit_bits;
  static const uint8_t zeroes[65536];
  static uint8_t buf[65536];

  if (disk_size (d) != m->disk_size)
    give_up (u, "the disk has %" PRIu64 " bytes", disk_size (d));
  for (unsigned w = 0; w < m->nr_windows; ++w)
    for (uint64_t i = 0; i < m->window_size; i += unit_size) {
      const uint64_t at = model_window (m, w) + i;
      const uint8_t *p = k == NULL ? model_content (m, at)
        : checked_unit (k, at >> m->unit_bits);

      if (disk_read (d, buf, unit_size, at) == -1 ||
          memcmp (buf, p == NULL ? zeroes : p, unit_size) != 0)
        give_up (u, "guest offset %#" PRIx64 " is served wrong", at);
    }
}

void
run_workload (struct universe *u)
{
  open_disk (u);
  u->model->opened = crash_log_note (u->log);
  if (u->nr_threads > 1)
    run_threads (u);
  else
    run_alone (u);
  compare_served (u, u->disk, NULL);
  if (any (&u->seed, 2) == 0)
    u->stopped = stop_disk (u);
  else
    close_logged_disk (u->disk, u->data);
}
