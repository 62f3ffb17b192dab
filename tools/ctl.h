/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_CTL_H
#define DIRTY_BITMAP_CTL_H

#include <stdbool.h>
#include <stdio.h>

#include <jansson.h>

/* Print the result of a command for people.  False, and nothing is printed, if
 * it is better printed as JSON.
 */
extern bool print_table (const char *command, const json_t *result);

/* Print a string that may come from an image, and so from a stranger: nothing
 * in it is a terminal's command.
 */
extern void print_text (FILE *, const char *text);

#endif /* DIRTY_BITMAP_CTL_H */
