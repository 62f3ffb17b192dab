/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_BACKUP_SVG_H
#define DIRTY_BITMAP_BACKUP_SVG_H

/* Text in an SVG file, and numbers as people read them (svg.c). */

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

/* Any bytes as the text of an element: what has a meaning in XML is escaped,
 * and what must not be there, or would change the direction of the text, is
 * U+FFFD.  Of a text of more than max_columns, the width of as many Latin
 * letters, the middle becomes an ellipsis; 0 is no limit.
 */
extern void svg_text (FILE *, const char *text, size_t max_columns);

#define SVG_NUMBER_CHARS 32

/* "1.25 GiB", of three digits. */
extern const char *svg_size (char text[SVG_NUMBER_CHARS], uint64_t bytes);

/* "1,234,567" */
extern const char *svg_grouped (char text[SVG_NUMBER_CHARS], uint64_t n);

/* "12.5 %".  Only nothing is "0 %", and only all is "100 %". */
extern const char *svg_percent (char text[SVG_NUMBER_CHARS], uint64_t part,
                                uint64_t whole);

#endif /* DIRTY_BITMAP_BACKUP_SVG_H */
