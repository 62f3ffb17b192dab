/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_TEST_CRASH_CONTAINER_H
#define DIRTY_BITMAP_TEST_CRASH_CONTAINER_H

/* A container in memory that remembers all that is done to it, and what
 * an image looks like after a crash at any point of that.  If the image
 * has an external data file, or the disk is beside it, this is a second
 * container: a barrier of one says nothing of the other, but the log has what
 * was done to both.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct container;
struct crash_log;

/* What a guest reads from a backing file, from size to room zeroes, and
 * its name as it stands in the image.
 */
struct crash_backing {
  char name[1024];
  uint8_t *bytes;
  uint64_t size, room;
};

/* An image, flat in memory.  Bytes from size to room are zero. */
struct crash_image {
  uint8_t *bytes;
  uint64_t size, room;
  struct crash_image *data;     /* its external data file, or the disk
                                   beside it, or NULL */
  bool beside;                  /* the latter: the image has only bitmaps */
  bool damaged;                 /* its bitmaps are */
  const struct crash_backing *backing; /* or NULL.  It never changes, and
                                          is somebody else's */
};
extern struct crash_image crash_image_new (uint64_t room);
extern void crash_image_free (struct crash_image *);
/* Both have the same room.  The data file comes with it. */
extern void crash_image_copy (struct crash_image *to,
                              const struct crash_image *from);

/* Record what is done from now on.  The base is copied, and an image
 * can grow to its room.
 */
extern struct crash_log *crash_log_new (const struct crash_image *base,
                                        uint64_t seed);
extern void crash_log_free (struct crash_log *);

/* Entries so far.  Points of the log count entries. */
extern size_t crash_log_length (struct crash_log *);

/* Add an entry that means nothing to the image: a moment, for whoever
 * wants to know later what came first.  Returns its index.
 */
extern size_t crash_log_note (struct crash_log *);

/* The first barrier at or after a point: just before it the most is at
 * stake.  The length of the log if there is none.
 */
extern size_t crash_log_next_barrier (struct crash_log *, size_t point);

/* Let one in so many operations fail with EIO; none if 0.  What fails
 * may have been done all the same, or in part.  And the bytes that the
 * image may grow to, without its data file.
 */
extern void crash_log_set_faults (struct crash_log *, unsigned one_in);
extern void crash_log_set_limit (struct crash_log *, uint64_t limit);

/* The image as it is, to be served.  Closing it leaves the log, and it
 * can be opened again after that.
 */
extern struct container *crash_container_open (struct crash_log *);

/* The same of its data file or the disk beside it; NULL if it has none. */
extern struct container *crash_data_open (struct crash_log *);
extern const struct crash_image *crash_log_live (const struct crash_log *);

/* Go through the log.  Points may not go back. */
struct crash_replay;
extern struct crash_replay *crash_replay_new (struct crash_log *);
extern void crash_replay_free (struct crash_replay *);
extern void crash_replay_advance (struct crash_replay *, size_t point);

/* Make an image as it may be after a crash at the point: what the last
 * barrier covers, of each file, and of the rest whatever chance has it.
 */
extern void crash_replay_state (const struct crash_replay *,
                                struct crash_image *, uint64_t *seed);

/* The same with all of the rest: a kill of the process. */
extern void crash_replay_kill (const struct crash_replay *,
                               struct crash_image *);

#endif /* DIRTY_BITMAP_TEST_CRASH_CONTAINER_H */
