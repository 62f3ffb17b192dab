/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_CHAIN_H
#define DIRTY_BITMAP_CHAIN_H

/* The files that an image refers to: its backing file, the backing file
 * of that and so on, and the external data files of all of them.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

struct chain;
struct container;
struct disk_options;

struct chain_options {
  bool readonly;                /* the image is served read-only */
  bool holds_writes;            /* a filter keeps what is written to the
                                   image elsewhere */
  const char *path;             /* of the image, absolute; NULL if it is not
                                   a local file */
  int fd;                       /* of the image, or -1 */

  /* Folders that the files may be in, besides the image's own: true paths,
   * as from realpath.
   */
  const char *const *allowed;
  size_t nr_allowed;

  /* The image is served without its backing file, which is not looked for.
   * For writing that is refused if it has one: a cluster that is written for
   * the first time would be filled up with zeroes, in place of what the
   * backing file has there.
   */
  bool is_top_alone;

  uint64_t cache_size;          /* of the image, bytes */

  /* The image is that of dirty-bitmap-image.  Its data file, if it has one,
   * is not opened: it has to be the disk's file, whose status this is, or
   * NULL if it is not known.
   */
  bool is_beside;
  const struct stat *disk;
};

/* Open and lock what the image in the container refers to.  Backing
 * files are opened read-only, and so is the external data file unless
 * the image is served for writing.  NULL, with the reason reported, if
 * the image must not be served: chain.c says what is refused.
 */
extern struct chain *chain_open (struct container *image,
                                 const struct chain_options *);

/* Close all of it, after what used it. */
extern void chain_close (struct chain *);

/* Fill in what the disk has to know about the chain.  The chain keeps it. */
extern void chain_give (const struct chain *, struct disk_options *);

/* is_beside: is the disk's file the image's data file? */
extern bool chain_has_disk (const struct chain *);

#endif /* DIRTY_BITMAP_CHAIN_H */
