/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Copying with several connections.
 *
 * Each connection has a thread of its own, which takes parts from the plan,
 * keeps up to DEPTH of them in flight, and gives what comes to the sink.  A
 * part is of whole units of the sink.  It is read by several requests if the
 * server takes only smaller ones.  The thread that called waits, and tells how
 * far it is.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backup/backup.h"
#include "backup/copy.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"

#define DEPTH 16

/* Measured: what is in flight then fits into the CPU's caches. */
#define PART_BYTES ((uint64_t) 128 << 10)
#define POLL_MS 200

struct copy {
  struct source *source;
  const struct plan *plan;
  const struct copy_sink *sink;
  struct progress *progress;
  uint64_t part_bytes;

  pthread_mutex_t lock;         /* protects what follows */
  pthread_cond_t ended;
  size_t piece;                 /* the next to be taken, from this */
  uint64_t taken;               /* byte of it on */
  unsigned nr_threads;          /* that have not ended */
  char reason[512];             /* of the first failure */

  atomic_bool failed;           /* set with the lock held */
};

struct slot {
  uint8_t *buf;
  uint64_t offset;
  uint32_t count;
  uint32_t nr_missing;          /* bytes that were not sent yet */
  bool is_used;
  unsigned nr_requests;         /* in flight */
  int err;                      /* of one that failed, or 0 */
};

struct thread {
  struct copy *copy;
  struct nbd_handle *nbd;
  pthread_t id;
  struct slot slots[DEPTH];
};

int
copy_to_sink (const struct copy_sink *sink, const void *buf, uint64_t count,
              uint64_t offset)
{
  const uint8_t *p = buf;
  uint64_t begin = 0, at = 0;
  bool was_zero = false;
  int r = 0;

  while (at < count && r == 0) {
    const uint64_t n = min_u64 (sink->unit, count - at);
    const bool is_zero =
      p[at] == 0 && memcmp (p + at, p + at + 1, n - 1) == 0;

    if (at > begin && is_zero != was_zero) {
      r = was_zero ? sink->zero (sink->opaque, at - begin, offset + begin)
        : sink->data (sink->opaque, p + begin, at - begin, offset + begin);
      begin = at;
    }
    was_zero = is_zero;
    at += n;
  }
  if (r == -1 || count == 0)
    return r;
  return was_zero ? sink->zero (sink->opaque, count - begin, offset + begin)
    : sink->data (sink->opaque, p + begin, count - begin, offset + begin);
}

/* The next part.  False if there is none, or none should begin. */
static bool
take_part (struct copy *c, struct piece *part)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);
  const struct piece *p = &c->plan->piece[c->piece];

  if (c->failed || is_interrupted || c->piece == c->plan->nr)
    return false;
  *part = (struct piece) {
    .offset = p->offset + c->taken,
    .length = p->is_zero ? p->length
      : min_u64 (p->length - c->taken, c->part_bytes),
    .is_zero = p->is_zero,
  };
  c->taken += part->length;
  if (c->taken == p->length) {
    c->piece++;
    c->taken = 0;
  }
  return true;
}

/* libnbd does not see whether a reply has all that was asked for. */
static int
count_chunk (void *opaque, const void *buf, size_t count, uint64_t offset,
             unsigned status, int *error)
{
  struct slot *s = opaque;

  (void) buf;
  (void) offset;
  (void) error;
  if (status != LIBNBD_READ_ERROR)
    s->nr_missing -= count;
  return 0;
}

static int
keep_result (void *opaque, int *error)
{
  struct slot *s = opaque;

  if (*error != 0)
    s->err = *error;
  s->nr_requests--;
  return 1;
}

static struct slot *
free_slot (struct thread *t)
{
  for (unsigned i = 0; i < DEPTH; ++i)
    if (!t->slots[i].is_used)
      return &t->slots[i];
  return NULL;
}

static int
begin_read (struct thread *t, struct slot *s, const struct piece *part)
{
  const nbd_chunk_callback chunk = {
    .callback = count_chunk, .user_data = s
  };
  const nbd_completion_callback callback = {
    .callback = keep_result, .user_data = s
  };
  const uint64_t max = t->copy->source->max_request;
  uint64_t count;

  if (s->buf == NULL)
    s->buf = malloc (t->copy->part_bytes);
  if (s->buf == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  s->offset = part->offset;
  s->count = s->nr_missing = part->length;
  s->is_used = true;
  s->err = 0;
  for (uint64_t at = 0; at < s->count; at += count) {
    count = min_u64 (max, s->count - at);
    s->nr_requests++;
    if (nbd_aio_pread_structured (t->nbd, s->buf + at, count, s->offset + at,
                                  chunk, callback, 0) == -1) {
      report_error ("%s", nbd_get_error ());
      return -1;
    }
  }
  return 0;
}

/* Have as many reads in flight as there may be. */
static int
begin_reads (struct thread *t)
{
  const struct copy_sink *sink = t->copy->sink;
  struct piece part;
  struct slot *s;

  while ((s = free_slot (t)) != NULL && take_part (t->copy, &part))
    if (part.is_zero
        ? sink->zero (sink->opaque, part.length, part.offset) == -1
        : begin_read (t, s, &part) == -1)
      return -1;
  return 0;
}

static int
end_read (struct thread *t, struct slot *s)
{
  s->is_used = false;
  if (s->err != 0) {
    report_error ("cannot read %" PRIu32 " bytes of the disk at offset %"
                  PRIu64 ": %s", s->count, s->offset, strerror (s->err));
    return -1;
  }
  if (s->nr_missing != 0) {
    report_error ("cannot read %" PRIu32 " bytes of the disk at offset %"
                  PRIu64 ": the server's reply does not have them all",
                  s->count, s->offset);
    return -1;
  }
  t->copy->progress->done += s->count;
  return copy_to_sink (t->copy->sink, s->buf, s->count, s->offset);
}

static int
end_reads (struct thread *t)
{
  for (unsigned i = 0; i < DEPTH; ++i)
    if (t->slots[i].is_used && t->slots[i].nr_requests == 0 &&
        end_read (t, &t->slots[i]) == -1)
      return -1;
  return 0;
}

static bool
has_reads (const struct thread *t)
{
  for (unsigned i = 0; i < DEPTH; ++i)
    if (t->slots[i].is_used)
      return true;
  return false;
}

static int
copy_by (struct thread *t)
{
  for (;;) {
    if (begin_reads (t) == -1)
      return -1;
    if (t->copy->failed || is_interrupted || !has_reads (t))
      return is_interrupted ? -1 : 0;
    if (nbd_poll (t->nbd, POLL_MS) == -1) {
      report_error ("%s", nbd_get_error ());
      return -1;
    }
    if (end_reads (t) == -1)
      return -1;
  }
}

static void *
run_thread (void *opaque)
{
  struct thread *t = opaque;
  struct copy *c = t->copy;
  struct report_hold hold;
  int r;

  report_hold_begin (&hold);
  r = copy_by (t);
  report_hold_end (&hold);
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&c->lock);
  if (r == -1 && !c->failed) {
    c->failed = true;
    snprintf (c->reason, sizeof c->reason, "%s", hold.any ? hold.text : "");
  }
  c->nr_threads--;
  pthread_cond_signal (&c->ended);
  return NULL;
}

static void
wait_for_threads (struct copy *c)
{
  pthread_mutex_lock (&c->lock);
  while (c->nr_threads > 0) {
    struct timespec until;

    clock_gettime (CLOCK_REALTIME, &until);
    until.tv_nsec += POLL_MS / 2 * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_cond_timedwait (&c->ended, &c->lock, &until);
    pthread_mutex_unlock (&c->lock);
    progress_tell (c->progress);
    pthread_mutex_lock (&c->lock);
  }
  pthread_mutex_unlock (&c->lock);
}

static void
start_threads (struct copy *c, struct thread *threads)
{
  for (unsigned i = 0; i < c->source->nr_connections; ++i) {
    threads[i].copy = c;
    threads[i].nbd = c->source->nbd[i];
    pthread_mutex_lock (&c->lock);
    const int err = pthread_create (&threads[i].id, NULL, run_thread,
                                    &threads[i]);

    if (err == 0)
      c->nr_threads++;
    else {
      c->failed = true;
      snprintf (c->reason, sizeof c->reason, "pthread_create: %s",
                strerror (err));
      threads[i].copy = NULL;
    }
    pthread_mutex_unlock (&c->lock);
  }
}

int
copy_plan (struct source *source, const struct plan *plan,
           const struct copy_sink *sink, struct progress *progress)
{
  struct copy c = {
    .source = source, .plan = plan, .sink = sink, .progress = progress,
    .part_bytes = max_u64 (PART_BYTES, sink->unit),
    .lock = PTHREAD_MUTEX_INITIALIZER, .ended = PTHREAD_COND_INITIALIZER,
  };
  const unsigned nr_threads = source->nr_connections;
  CLEANUP_FREE struct thread *threads = calloc (nr_threads, sizeof *threads);

  if (threads == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  start_threads (&c, threads);
  wait_for_threads (&c);
  for (unsigned i = 0; i < nr_threads; ++i)
    if (threads[i].copy != NULL)
      pthread_join (threads[i].id, NULL);
  /* libnbd may write into buffers as long as a read is in flight. */
  if (c.failed)
    source_close (source);
  for (unsigned i = 0; i < nr_threads; ++i)
    for (unsigned n = 0; n < DEPTH; ++n)
      free (threads[i].slots[n].buf);
  if (c.failed && c.reason[0] != '\0')
    report_error ("%s", c.reason);
  return c.failed ? -1 : 0;
}
