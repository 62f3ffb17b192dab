/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_UTF8_H
#define DIRTY_BITMAP_UTF8_H

/* Checking UTF-8. */

/* The length of the first character of s, which is not empty, or 0 if that
 * is not valid UTF-8 (RFC 3629): no overlong encoding, no surrogate, nothing
 * above U+10FFFF.  The NUL at the end is no continuation byte.
 */
extern unsigned utf8_length (const unsigned char *s);

#endif /* DIRTY_BITMAP_UTF8_H */
