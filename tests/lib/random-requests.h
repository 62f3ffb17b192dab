/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_TEST_RANDOM_REQUESTS_H
#define DIRTY_BITMAP_TEST_RANDOM_REQUESTS_H

/* Random requests to an image, and to a plain array of the same size. */

#include <stdbool.h>
#include <stdint.h>

struct container;
struct qcow2;

struct random_requests {
  struct qcow2 *q;
  uint8_t *model;
  uint64_t low, high;           /* where they lie */
  uint64_t max;                 /* bytes of one */
  uint64_t trim_from;           /* clusters from here on can be trimmed */
  uint64_t seed;
  bool all_told;                /* the tables say all of what is zero, and no
                                   other thread is at work */
};

/* One request.  Returns what it returned; its effect is in the model,
 * and what it reads is compared with that.
 */
extern int random_request (struct random_requests *);

/* The whole disk, and that no extent hides data. */
extern void compare_all (struct qcow2 *, const uint8_t *model);

/* What QEMU reads from check.qcow2, to be freed. */
extern uint8_t *read_by_qemu (uint64_t size);

/* The same through QEMU; check.qcow2 is the image's name then. */
extern void compare_with_qemu (struct container *, const uint8_t *model,
                               uint64_t size);

#endif /* DIRTY_BITMAP_TEST_RANDOM_REQUESTS_H */
