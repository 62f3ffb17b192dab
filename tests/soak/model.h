/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_SOAK_MODEL_H
#define DIRTY_BITMAP_SOAK_MODEL_H

/* What each sector of a disk may hold while many clients write to it,
 * and vanish.
 *
 * Every sector has at most one owner, a slot: of all connections there
 * ever are, one at a time lives in a slot, and only that one writes to
 * the slot's sectors.  The model is a file that processes share, so that
 * it is there when they are killed.
 */

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SECTOR 512
#define DEPTH 16                /* requests of a slot in flight */
#define MAX_STALE 6

/* What a request writes: a number, which with the sector's own says what
 * the bytes are.  No two requests of a slot write the same.
 */
typedef uint32_t stamp;
#define STAMP_ZERO 0

/* A stamp of what must not be written. */
#define STAMP_NEVER UINT32_C (0xffffffff)

struct sector {
  stamp settled;                /* written by what was acknowledged last */
  stamp stale[MAX_STALE];       /* of requests that were never answered,
                                   whose connection is gone: each may be
                                   executed still */
  uint8_t nr_stale;
  uint8_t flags;
};

#define SECTOR_MAYBE_ZERO 1     /* it was trimmed since */
#define SECTOR_CHANGED 2        /* a write or zero was acknowledged */
#define SECTOR_ISSUED 4         /* a change was sent, answered or not */

enum change { CHANGE_WRITE, CHANGE_ZERO, CHANGE_TRIM };

enum operation_state { OPERATION_NONE, OPERATION_SENT, OPERATION_ACKED };

struct operation {
  _Atomic (enum operation_state) state;
  enum change change;
  stamp stamp;
  uint32_t first, count;        /* sectors */
};

struct slot {
  stamp last_stamp;
  uint64_t random;
  uint64_t nr_lives, nr_requests, nr_acked, nr_avoided;
  uint32_t last_first, last_count;      /* where a change was acknowledged
                                           last */
  struct operation operations[DEPTH];
};

struct model {
  atomic_bool failed;           /* a process has said why */
  atomic_bool over;             /* clients end, in good order */
  atomic_bool stopping;         /* the server may be gone any time */
  uint64_t size;                /* of the file */
  uint32_t nr_sectors, nr_shared, nr_slots;
  struct slot *slots;           /* these two as seen by this process */
  struct sector *sectors;
};

/* Make a file for a disk of zeroes, or open one.  Errors end the
 * process.
 */
extern struct model *model_create (const char *path, uint32_t nr_sectors,
                                   uint32_t nr_slots, uint64_t seed);
extern struct model *model_open (const char *path);

extern uint64_t model_random (struct slot *);

/* Below n. */
extern uint32_t model_draw (struct slot *, uint32_t n);

/* Draw a place of up to max sectors, all owned by the slot. */
extern void model_place (const struct model *, struct slot *, uint32_t max,
                         uint32_t *first, uint32_t *count);

/* A change is about to be sent.  NULL if one of its sectors has been left
 * in the dark by too many requests without an answer, or if there are
 * too many in flight.  It must overlap with none in flight.
 */
extern struct operation *model_begin (struct model *, struct slot *,
                                      enum change, uint32_t first,
                                      uint32_t count);

/* It was acknowledged; or refused, and has not happened. */
extern void model_acked (struct model *, struct operation *);
extern void model_refused (struct operation *);

/* The connection in a slot is gone.  What had no answer may happen at
 * any time from now on, or never.
 */
extern void model_vanished (struct model *, struct slot *);

/* The bytes of a sector. */
extern void model_fill (void *, uint32_t number, stamp);

/* Are these bytes what the sector may hold?  Not if there is one of the
 * slot's own changes to it in flight.  sure is false if another process's
 * change may be under way, so that nothing can be said.
 */
extern bool model_allows (const struct model *, uint32_t number,
                          const void *bytes);
extern bool model_is_sure (const struct model *, uint32_t number);
extern void model_explain (const struct model *, uint32_t number,
                           const void *bytes);

/* There is nobody left who changes anything, and these are the bytes. */
extern void model_settle (struct model *, uint32_t number,
                          const void *bytes);

#endif /* DIRTY_BITMAP_SOAK_MODEL_H */
