/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_CONTROL_JSON_STREAM_H
#define DIRTY_BITMAP_CONTROL_JSON_STREAM_H

/* Find the JSON values in a stream of bytes that has no framing: values may
 * share lines, and come byte by byte.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

/* The bounds of a value: its text, how deeply arrays and objects may be nested
 * in each other, and how many values it may have inside.
 */
#define JSON_STREAM_MAX_BYTES (1 << 20)
#define JSON_STREAM_MAX_DEPTH 32
#define JSON_STREAM_MAX_VALUES 65536

enum json_event {
  JSON_MORE,                    /* all bytes were taken, and more are needed */
  JSON_VALUE,                   /* a value is complete: json_stream_value */
  JSON_BAD,                     /* what came is no JSON: json_stream_error */
};

struct json_stream {
  char *text;                   /* of the value so far, as jansson takes it */
  size_t nr, max;

  unsigned depth;               /* of open arrays and objects */
  char closing[JSON_STREAM_MAX_DEPTH]; /* how each of them has to be closed */
  unsigned nr_values;
  char quote;                   /* inside a string: how it began; else 0 */
  bool escaped;                 /* a backslash came just before */
  bool in_word;                 /* inside a number or a name, outside of all
                                   arrays and objects */
  bool discards;                /* it exceeded a bound: it is not kept */
  char error[96];
};

extern void json_stream_init (struct json_stream *);
extern void json_stream_free (struct json_stream *);

/* Take bytes, up to the end of a value or to an error.  Returns how many were
 * taken.  Behind an error the stream begins anew; but a value that exceeds a
 * bound is skipped to its end.
 */
extern size_t json_stream_take (struct json_stream *, const char *bytes,
                                size_t nr, enum json_event *);

/* The stream has ended: is there a last value? */
extern enum json_event json_stream_end (struct json_stream *);

/* After JSON_VALUE: the value, or NULL if it is not valid after all
 * (json_stream_error).  The stream is ready for the next.
 */
extern json_t *json_stream_value (struct json_stream *);

/* Why, as QEMU says it. */
extern const char *json_stream_error (const struct json_stream *);

#endif /* DIRTY_BITMAP_CONTROL_JSON_STREAM_H */
