/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The three forms of replies: simple, structured, and with extended
 * headers.
 *
 * What is to be expected is written down from the protocol document, not
 * from the server: a table of commands, and from that for each request
 * the set of errors that it deserves.  Where a request is wrong in more
 * than one way any of these may be told.  The matrix is every command
 * with no flag and with each one, in every form, of every kind of range,
 * on an export that may be written and on one that may not.
 *
 * In two places clients, and the other servers, go before the document:
 * - With extended headers it wants PAYLOAD_LEN with every WRITE.  QEMU's
 *   client, from 8.2 to 11 at least, never sets it, libnbd's with strict
 *   mode off need not, and qemu-nbd takes such a WRITE.  So it has the
 *   payload that its length says, flag or not.
 * - Offset and length of a FLUSH are to be 0.  qemu-nbd does not look, and
 *   a flush of the whole disk is never less than what was asked for.
 *
 * Then what belongs to extended headers alone: how they are negotiated,
 * payloads that are not what they should be, lengths above 4 GiB.
 */

#include <config.h>

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/bytes.h"
#include "nbd-fixture.h"

#define SIZE (UINT64_C (1) << 20)
#define MAX (32 * 1024 * 1024)
#define COOKIE UINT64_C (0xfedcba9876543210)

static const char *const contexts[] = {
  "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:first",
  "qemu:dirty-bitmap:second", NULL
};
enum { NR_CONTEXTS = 4 };

static void
init_size (uint64_t size)
{
  fixture_init (&f, size);
  fake_disk_add_bitmap (f.disk, "first", 4096);
  fake_disk_add_bitmap (f.disk, "second", 65536);
}

static int
setup (void **state)
{
  (void) state;
  init_size (SIZE);
  fixture_start (&f, false);
  return 0;
}

enum form { SIMPLE, STRUCTURED, EXTENDED, NR_FORMS };

static int
open_form (enum form form)
{
  int fd;

  if (form == SIMPLE) {
    fd = fixture_connect (&f);
    client_greet (fd, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    client_go (fd, "", NULL);
    return fd;
  }
  client_wants_extended = form == EXTENDED;
  fd = client_open (&f, contexts);
  client_wants_extended = false;
  return fd;
}

/* The matrix. */

/* Sets of errors: a bit for each value of the protocol, which are small. */
typedef struct { uint64_t low, high; } errors;

static void
permit (errors *e, uint32_t error)
{
  assert_in_range (error, 0, 127);
  if (error < 64)
    e->low |= UINT64_C (1) << error;
  else
    e->high |= UINT64_C (1) << (error - 64);
}

static bool
permits (const errors *e, uint32_t error)
{
  if (error >= 128)
    return false;
  return (error < 64 ? e->low >> error : e->high >> (error - 64)) & 1;
}

#define FLAG(n) (1u << (n))
#define FUA FLAG (0)
#define NO_HOLE FLAG (1)
#define DF FLAG (2)
#define REQ_ONE FLAG (3)
#define FAST_ZERO FLAG (4)
#define PAYLOAD_LEN FLAG (5)

/* "Request types" and "Command flags" of the document.  FUA is valid for
 * all commands.  A length of 0 is unspecified but for the connection to
 * live; what we do is the last column.
 */
static const struct command {
  uint16_t type;
  unsigned flags[NR_FORMS];     /* which are valid */
  bool changes;                 /* EPERM where the export is read-only */
  uint32_t past_end;            /* the error for a range past the end */
  uint32_t nothing;             /* the error for a length of 0, or none */
} commands[] = {
  { NBD_CMD_READ, { FUA, FUA | DF, FUA | DF }, false, NBD_EINVAL, 0 },
  { NBD_CMD_WRITE, { FUA, FUA, FUA | PAYLOAD_LEN }, true, NBD_ENOSPC, 0 },
  { NBD_CMD_FLUSH, { FUA, FUA, FUA }, false, NBD_EINVAL, 0 },
  { NBD_CMD_TRIM, { FUA, FUA, FUA }, true, NBD_EINVAL, 0 },
  { NBD_CMD_CACHE, { FUA, FUA, FUA }, false, NBD_EINVAL, 0 },
  { NBD_CMD_WRITE_ZEROES,
    { FUA | NO_HOLE | FAST_ZERO, FUA | NO_HOLE | FAST_ZERO,
      FUA | NO_HOLE | FAST_ZERO }, true, NBD_ENOSPC, 0 },
  { NBD_CMD_BLOCK_STATUS,
    { FUA | REQ_ONE, FUA | REQ_ONE, FUA | REQ_ONE | PAYLOAD_LEN },
    false, NBD_EINVAL, NBD_EINVAL },
};

/* Not one of them: RESIZE, and some that do not exist. */
static const uint16_t unknown[] = { 8, 9, 255, 256 + NBD_CMD_READ, 0xffff };

static const struct range {
  uint64_t offset, length;
} good = { 8192, 20000 }, ranges[] = {
  { 8192, 20000 },
  { 1, 1 },
  { SIZE - 512, 512 },
  { 4096, 0 },
  { SIZE, 0 },
  /* past the end */
  { SIZE - 511, 512 },
  { SIZE, 1 },
  { SIZE + 1, 0 },
  { UINT64_MAX, 1 },
  { UINT64_MAX - 4095, 4096 },
  { UINT64_C (1) << 63, 4096 },
};

struct asked {
  enum form form;
  const struct command *command; /* NULL: unknown */
  uint16_t type, flags;
  uint64_t offset, length;      /* that it is about */
  bool readonly;
};

static bool
is_past_end (const struct asked *a)
{
  return a->offset > SIZE || a->length > SIZE - a->offset;
}

/* The payload that is sent without being told otherwise: a BLOCK_STATUS
 * selects the contexts 3 and 0.
 */
static bool
is_selection (const struct asked *a)
{
  return a->form == EXTENDED && a->type == NBD_CMD_BLOCK_STATUS &&
    (a->flags & PAYLOAD_LEN) != 0;
}

static errors
deserved (const struct asked *a)
{
  const struct command *c = a->command;
  errors e = { 0, 0 };

  if (c == NULL) {
    permit (&e, NBD_EINVAL);
    return e;
  }
  if ((a->flags & ~c->flags[a->form]) != 0)
    permit (&e, NBD_EINVAL);
  if (c->changes && a->readonly)
    permit (&e, NBD_EPERM);
  if (c->type != NBD_CMD_FLUSH && is_past_end (a))
    permit (&e, c->past_end);
  if (c->type == NBD_CMD_BLOCK_STATUS && a->form == SIMPLE)
    permit (&e, NBD_EINVAL);    /* no contexts */
  if (a->length == 0 && c->nothing != 0)
    permit (&e, c->nothing);
  if (e.low == 0 && e.high == 0)
    permit (&e, 0);
  return e;
}

static uint8_t pattern[MAX + 4096];

static void
ask (int fd, const struct asked *a)
{
  uint8_t selection[16];

  if (is_selection (a)) {
    put_be64 (selection, a->length);
    put_be32 (selection + 8, 3);
    put_be32 (selection + 12, 0);
    send_request (fd, a->flags, a->type, COOKIE, a->offset,
                  sizeof selection);
    send_bytes (fd, selection, sizeof selection);
    return;
  }
  send_request (fd, a->flags, a->type, COOKIE, a->offset, a->length);
  if (a->type == NBD_CMD_WRITE ||
      (a->form == EXTENDED && (a->flags & PAYLOAD_LEN) != 0))
    send_bytes (fd, pattern, a->length);
}

/* One chunk of an answer: every byte that is read arrives once. */
static void
check_data (const struct asked *a, const struct reply *r, uint64_t *seen)
{
  const uint64_t offset = get_be64 (r->data);
  const uint64_t length = r->length - 8;

  assert_true (r->length > 8);
  assert_true (offset >= a->offset && length <= a->length &&
               offset - a->offset <= a->length - length);
  assert_memory_equal (r->data + 8, f.disk->data + offset, length);
  *seen += length;
}

static void
check_status (const struct asked *a, const struct reply *r, uint64_t *seen)
{
  const bool ext = a->form == EXTENDED;
  const size_t head = ext ? 8 : 4, each = ext ? 16 : 8;
  static const uint32_t selected[] = { 0, 3 };
  const size_t nr = (r->length - head) / each;
  const uint32_t id = get_be32 (r->data);
  uint64_t sum = 0;

  assert_true (r->length >= head + each);
  assert_int_equal ((r->length - head) % each, 0);
  assert_int_equal (id, is_selection (a) ? selected[*seen] : *seen);
  if (ext)
    assert_int_equal (get_be32 (r->data + 4), nr);
  if ((a->flags & REQ_ONE) != 0)
    assert_int_equal (nr, 1);
  for (size_t i = 0; i < nr; ++i) {
    const uint8_t *p = r->data + head + i * each;

    sum += ext ? get_be64 (p) : get_be32 (p);
    if (ext)
      assert_int_equal (get_be32 (p + 8), 0);
  }
  assert_true (sum == a->length || ((a->flags & REQ_ONE) != 0 &&
                                    sum > 0 && sum < a->length));
  (*seen)++;
}

/* The whole answer: its error, or 0.  How it must look is "Request
 * types" and "Structured reply types".
 */
static uint32_t
answer (int fd, const struct asked *a)
{
  uint32_t error = 0;
  uint64_t seen = 0;
  struct reply r;

  do {
    recv_reply (fd, &r, a->type == NBD_CMD_READ ? a->length : 0);
    assert_true (r.cookie == COOKIE);
    if (!r.structured) {
      assert_true (a->form != EXTENDED);
      assert_true (a->form == SIMPLE ||
                   (a->type != NBD_CMD_READ &&
                    (a->type != NBD_CMD_BLOCK_STATUS || r.error != 0)));
      if (a->type == NBD_CMD_READ && r.error == 0) {
        assert_memory_equal (r.data, f.disk->data + a->offset, a->length);
        seen = a->length;
      }
      free (r.data);
      error = r.error;
      break;
    }
    assert_true (a->form != SIMPLE);
    if (a->form == EXTENDED)
      assert_true (r.offset == a->offset);
    if ((r.type & 0x8000) != 0) {
      assert_int_equal (error, 0);
      error = r.error;
    }
    else if (r.type == NBD_REPLY_TYPE_OFFSET_DATA) {
      assert_int_equal (a->type, NBD_CMD_READ);
      check_data (a, &r, &seen);
      if ((a->flags & DF) != 0)
        assert_true (seen == a->length);
    }
    else if (r.type == (a->form == EXTENDED
                        ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT
                        : NBD_REPLY_TYPE_BLOCK_STATUS)) {
      assert_int_equal (a->type, NBD_CMD_BLOCK_STATUS);
      check_status (a, &r, &seen);
    }
    else {
      assert_int_equal (r.type, NBD_REPLY_TYPE_NONE);
      assert_int_equal (r.flags, NBD_REPLY_FLAG_DONE);
      assert_int_equal (r.length, 0);
    }
    free (r.data);
  } while ((r.flags & NBD_REPLY_FLAG_DONE) == 0);

  if (error == 0 && a->type == NBD_CMD_READ)
    assert_true (seen == a->length);
  if (error == 0 && a->type == NBD_CMD_BLOCK_STATUS)
    assert_true (seen == (is_selection (a) ? 2 : NR_CONTEXTS));
  return error;
}

static unsigned
count_changes (void)
{
  return f.disk->calls[FAKE_WRITE] + f.disk->calls[FAKE_ZERO] +
    f.disk->calls[FAKE_TRIM];
}

static void
check_one (int fd, const struct asked *a)
{
  const errors e = deserved (a);
  const unsigned changes = count_changes ();
  const unsigned expected =
    permits (&e, 0) && a->command->changes && a->length > 0 ? 1 : 0;
  uint32_t error;

  ask (fd, a);
  error = answer (fd, a);
  if (!permits (&e, error))
    fail_msg ("form %u, command %u, flags 0x%x, offset %llu, length %llu%s: "
              "error %u", a->form, a->type, a->flags,
              (unsigned long long) a->offset, (unsigned long long) a->length,
              a->readonly ? ", read-only" : "", error);
  assert_int_equal (count_changes () - changes, expected);
  if (error == 0 && a->type == NBD_CMD_WRITE)
    assert_memory_equal (f.disk->data + a->offset, pattern, a->length);
}

/* Of flag -1 there is none. */
static void
check_flags_and_ranges (int fd, struct asked *a, uint16_t always)
{
  for (int flag = -1; flag < 16; ++flag) {
    a->flags = always | (flag == -1 ? 0 : FLAG (flag));
    if (a->type == NBD_CMD_FLUSH) {
      a->offset = a->length = 0;
      check_one (fd, a);
    }
    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; ++i) {
      a->offset = ranges[i].offset;
      a->length = ranges[i].length;
      check_one (fd, a);
    }
  }
}

static void
check_form (enum form form, bool readonly)
{
  struct asked a = { .form = form, .readonly = readonly };
  int fd = open_form (form);

  for (size_t i = 0; i < sizeof commands / sizeof commands[0]; ++i) {
    a.command = &commands[i];
    a.type = commands[i].type;
    check_flags_and_ranges (fd, &a, 0);
    if (a.form == EXTENDED && a.type == NBD_CMD_WRITE)
      check_flags_and_ranges (fd, &a, PAYLOAD_LEN);
  }
  a.command = NULL;
  for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; ++i) {
    a.type = unknown[i];
    check_flags_and_ranges (fd, &a, 0);
  }
  close (fd);
}

static void
check_all_forms (bool readonly)
{
  for (size_t i = 0; i < SIZE; ++i)
    f.disk->data[i] = i * 7 + i / 251;
  for (size_t i = 0; i < sizeof pattern; ++i)
    pattern[i] = i * 13 + i / 241;
  for (enum form form = 0; form < NR_FORMS; ++form)
    check_form (form, readonly);
}

static void
test_matrix (void **state)
{
  (void) state;
  check_all_forms (false);
}

static int
setup_readonly (void **state)
{
  (void) state;
  init_size (SIZE);
  fixture_start (&f, true);
  return 0;
}

static void
test_matrix_readonly (void **state)
{
  (void) state;
  check_all_forms (true);
  assert_int_equal (count_changes (), 0);
}

/* Replies come as the requests are done, in each form. */
static void
test_out_of_order (void **state)
{
  (void) state;
  for (enum form form = 0; form < NR_FORMS; ++form) {
    const struct asked flush = {
      .form = form, .command = &commands[2], .type = NBD_CMD_FLUSH,
    }, write = {
      .form = form, .command = &commands[1], .type = NBD_CMD_WRITE,
      .flags = form == EXTENDED ? PAYLOAD_LEN : 0,
      .offset = good.offset, .length = good.length,
    }, read = {
      .form = form, .command = &commands[0], .type = NBD_CMD_READ,
      .offset = 512, .length = 100000,
    };
    int fd = open_form (form);

    gate_close (f.disk, FAKE_READ, 512);
    ask (fd, &read);
    gate_wait ();
    check_one (fd, &write);
    check_one (fd, &flush);
    gate_open ();
    assert_int_equal (answer (fd, &read), 0);
    close (fd);
  }
}

/* Negotiation. */

static int
greeted (void)
{
  int fd = fixture_connect (&f);

  client_greet (fd, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
  return fd;
}

static uint16_t
export_flags (const struct option_reply *export)
{
  return get_be16 (export->data + 10);
}

static void
test_negotiation (void **state)
{
  struct option_reply export;
  uint8_t data[4100];
  uint32_t n;
  int fd;

  (void) state;
  /* Data are refused, and then it is not negotiated. */
  fd = greeted ();
  memset (data, 0, sizeof data);
  send_option (fd, NBD_OPT_EXTENDED_HEADERS, data, sizeof data);
  expect_option_reply (fd, NBD_OPT_EXTENDED_HEADERS, NBD_REP_ERR_INVALID,
                       NULL);
  client_structured (fd);
  client_go (fd, "", &export);
  assert_int_equal (export_flags (&export) & NBD_FLAG_BLOCK_STATUS_PAYLOAD,
                    0);
  client_check_alive (&f, fd);
  close (fd);

  /* It takes precedence over structured replies, which may come before
   * it and not after it, and has what they have.
   */
  fd = greeted ();
  client_structured (fd);
  client_extended (fd);
  send_option (fd, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
  expect_option_reply (fd, NBD_OPT_STRUCTURED_REPLY,
                       NBD_REP_ERR_EXT_HEADER_REQD, NULL);
  send_option (fd, NBD_OPT_EXTENDED_HEADERS, NULL, 0);
  expect_option_reply (fd, NBD_OPT_EXTENDED_HEADERS, NBD_REP_ERR_INVALID,
                       NULL);
  client_set_contexts (fd, contexts, NR_CONTEXTS);
  client_go (fd, "", &export);
  assert_true (export_flags (&export) & NBD_FLAG_SEND_DF);
  assert_true (export_flags (&export) & NBD_FLAG_BLOCK_STATUS_PAYLOAD);
  client_check_alive (&f, fd);
  close (fd);

  /* No contexts, no payload to select them by. */
  fd = greeted ();
  client_extended (fd);
  client_go (fd, "", &export);
  assert_true (export_flags (&export) & NBD_FLAG_SEND_DF);
  assert_int_equal (export_flags (&export) & NBD_FLAG_BLOCK_STATUS_PAYLOAD,
                    0);
  client_check_alive (&f, fd);
  close (fd);

  /* Nor where they were selected for another export. */
  fd = greeted ();
  client_extended (fd);
  n = make_context_query (data, "other", contexts);
  send_option (fd, NBD_OPT_SET_META_CONTEXT, data, n);
  for (int i = 0; i < NR_CONTEXTS; ++i)
    expect_option_reply (fd, NBD_OPT_SET_META_CONTEXT, NBD_REP_META_CONTEXT,
                         NULL);
  expect_option_reply (fd, NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, NULL);
  client_go (fd, "", &export);
  assert_int_equal (export_flags (&export) & NBD_FLAG_BLOCK_STATUS_PAYLOAD,
                    0);
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, 1, 0, 512);
  expect_error (fd, 1, NBD_EINVAL);
  close (fd);

  /* Contexts that were set before stay. */
  fd = greeted ();
  client_structured (fd);
  client_set_contexts (fd, contexts, NR_CONTEXTS);
  client_extended (fd);
  client_go (fd, "", &export);
  assert_true (export_flags (&export) & NBD_FLAG_BLOCK_STATUS_PAYLOAD);
  const struct asked a = {
    .form = EXTENDED, .command = &commands[6], .type = NBD_CMD_BLOCK_STATUS,
    .offset = good.offset, .length = good.length,
  };

  check_one (fd, &a);
  close (fd);

  /* EXPORT_NAME must not follow. */
  fd = greeted ();
  client_extended (fd);
  send_option (fd, NBD_OPT_EXPORT_NAME, NULL, 0);
  expect_end (fd);
  close (fd);
}

/* The last of the INFO_EXPORTs of an INFO. */
static void
test_info (void **state)
{
  struct option_reply reply;
  uint16_t flags = 0;
  uint8_t data[6] = { 0 };

  (void) state;
  for (int extended = 0; extended < 2; ++extended) {
    int fd = greeted ();

    if (extended)
      client_extended (fd);
    send_option (fd, NBD_OPT_INFO, data, sizeof data);
    do {
      recv_option_reply (fd, &reply);
      if (reply.type == NBD_REP_INFO &&
          get_be16 (reply.data) == NBD_INFO_EXPORT)
        flags = export_flags (&reply);
    } while (reply.type == NBD_REP_INFO);
    assert_int_equal (reply.type, NBD_REP_ACK);
    assert_int_equal ((flags & NBD_FLAG_BLOCK_STATUS_PAYLOAD) != 0, extended);
    close (fd);
  }
}

/* What ends the connection, and has changed nothing.  If it is a request
 * whose error can be told, it is told.
 */
static void
check_cut (enum form form, const void *bytes, size_t length, bool is_told)
{
  int fd = open_form (form), other = open_form (EXTENDED);
  const struct asked a = {
    .form = EXTENDED, .command = &commands[0], .type = NBD_CMD_READ,
    .offset = good.offset, .length = good.length,
  };

  send_bytes (fd, bytes, length);
  if (is_told)
    expect_error (fd, COOKIE, NBD_EINVAL);
  expect_end (fd);
  close (fd);
  check_one (other, &a);
  close (other);
  assert_int_equal (count_changes (), 0);
}

static void
test_cut (void **state)
{
  static const uint64_t too_long[] = {
    MAX + 1, UINT64_C (1) << 32, (UINT64_C (1) << 32) + 512,
    UINT64_C (1) << 63, UINT64_MAX
  };
  static const uint16_t types[] = {
    NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_CACHE,
    NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS, 8, 0xffff
  };
  uint8_t buf[2 * sizeof (struct nbd_extended_request)];

  (void) state;
  /* The other form of requests than was negotiated. */
  memset (buf, 0, sizeof buf);
  put_request (buf, 0, NBD_CMD_TRIM, 1, 0, 512);
  check_cut (EXTENDED, buf, sizeof buf, false);
  put_extended_request (buf, 0, NBD_CMD_TRIM, 1, 0, 512);
  check_cut (SIMPLE, buf, sizeof (struct nbd_extended_request), false);
  check_cut (STRUCTURED, buf, sizeof (struct nbd_extended_request), false);

  /* What cannot be a payload.  Behind it is what would be a request, if it
   * were taken for one.
   */
  put_extended_request (buf + sizeof buf / 2, 0, NBD_CMD_TRIM, 2, 0, 512);
  for (size_t i = 0; i < sizeof too_long / sizeof too_long[0]; ++i)
    for (size_t j = 0; j < sizeof types / sizeof types[0]; ++j) {
      if (types[j] == NBD_CMD_WRITE && too_long[i] <= UINT32_MAX)
        continue;
      put_extended_request (buf, PAYLOAD_LEN, types[j], COOKIE, 0,
                            too_long[i]);
      check_cut (EXTENDED, buf, sizeof buf, true);
      if (types[j] == NBD_CMD_WRITE) {
        put_extended_request (buf, 0, types[j], COOKIE, 0, too_long[i]);
        check_cut (EXTENDED, buf, sizeof buf, true);
      }
    }
}

/* A WRITE of more than can be taken is thrown away and refused, and the
 * connection lives, in every form and with the flag or without it.
 */
static void
test_too_long_write (void **state)
{
  (void) state;
  for (enum form form = 0; form < NR_FORMS; ++form)
    for (unsigned flags = 0; flags <= (form == EXTENDED ? PAYLOAD_LEN : 0);
         flags += PAYLOAD_LEN) {
      const struct asked read = {
        .form = form, .command = &commands[0], .type = NBD_CMD_READ,
        .offset = good.offset, .length = good.length,
      };
      int fd = open_form (form);

      send_request (fd, flags, NBD_CMD_WRITE, COOKIE, 0, MAX + 4096);
      send_bytes (fd, pattern, MAX + 4096);
      expect_error (fd, COOKIE, NBD_EINVAL);
      check_one (fd, &read);
      close (fd);
    }
  assert_int_equal (count_changes (), 0);
}

/* QEMU's client as it is seen on the wire: WRITEs without the flag, many
 * of them at once, and another request behind each.
 */
static void
test_unflagged_writes (void **state)
{
  enum { N = 100, LENGTH = 5000 };
  const size_t header = sizeof (struct nbd_extended_request);
  uint8_t buf[2 * sizeof (struct nbd_extended_request) + LENGTH];
  int fd = open_form (EXTENDED);

  (void) state;
  for (int i = 0; i < N; ++i) {
    put_extended_request (buf, i % 2 ? FUA : 0, NBD_CMD_WRITE, 2 * i,
                          i * 8192, LENGTH);
    memset (buf + header, i + 1, LENGTH);
    put_extended_request (buf + header + LENGTH, 0, NBD_CMD_CACHE, 2 * i + 1,
                          i * 8192, LENGTH);
    send_bytes (fd, buf, sizeof buf);
  }
  for (int i = 0; i < 2 * N; ++i) {
    struct reply r;

    recv_reply (fd, &r, 0);
    assert_int_equal (r.type, NBD_REPLY_TYPE_NONE);
    free (r.data);
  }
  for (int i = 0; i < N; ++i) {
    assert_int_equal (f.disk->data[i * 8192], i + 1);
    assert_int_equal (f.disk->data[i * 8192 + LENGTH - 1], i + 1);
  }
  assert_int_equal (count_changes (), N);
  close (fd);
}

/* The longest payload is taken, whatever it is of. */
static void
test_longest_payload (void **state)
{
  static const uint16_t types[] = {
    NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_BLOCK_STATUS, 77
  };
  int fd = open_form (EXTENDED);

  (void) state;
  for (size_t i = 0; i < sizeof types / sizeof types[0]; ++i) {
    send_request (fd, PAYLOAD_LEN, types[i], i, 0, MAX);
    send_bytes (fd, pattern, MAX);
    expect_error (fd, i, types[i] == NBD_CMD_WRITE ? NBD_ENOSPC
                                                   : NBD_EINVAL);
  }
  assert_int_equal (count_changes (), 0);
  client_check_alive (&f, fd);
  close (fd);
}

/* Lengths that wrap when they are cut to 32 bits, or added to. */
static void
test_long_lengths (void **state)
{
  static const uint64_t lengths[] = {
    SIZE + 1, (UINT64_C (1) << 32) + 512, UINT64_C (1) << 32,
    UINT64_C (1) << 63, UINT64_MAX - 4095, UINT64_MAX
  };
  int fd = open_form (EXTENDED);

  (void) state;
  for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; ++i)
    for (size_t j = 0; j < sizeof commands / sizeof commands[0]; ++j) {
      struct asked a = {
        .form = EXTENDED, .command = &commands[j], .type = commands[j].type,
        .offset = 4096, .length = lengths[i],
      };

      if (a.type == NBD_CMD_WRITE)
        continue;               /* its length is a payload's */
      check_one (fd, &a);
      if (a.type == NBD_CMD_BLOCK_STATUS) {
        a.flags = PAYLOAD_LEN;
        check_one (fd, &a);
      }
      if (a.type == NBD_CMD_READ) {
        send_request (fd, DF, NBD_CMD_READ, 5, 0, lengths[i]);
        expect_error (fd, 5, lengths[i] > MAX ? NBD_EOVERFLOW : NBD_EINVAL);
      }
    }
  assert_int_equal (count_changes (), 0);
  client_check_alive (&f, fd);
  close (fd);
}

/* BLOCK_STATUS with a payload. */

#define MAX_IDS 8

static void
send_selection (int fd, uint16_t flags, uint64_t offset, uint64_t effect,
                const uint32_t *ids, size_t nr, size_t length)
{
  uint8_t payload[8 + 4 * MAX_IDS + 4] = { 0 };

  put_be64 (payload, effect);
  for (size_t i = 0; i < nr; ++i)
    put_be32 (payload + 8 + 4 * i, ids[i]);
  send_request (fd, flags | PAYLOAD_LEN, NBD_CMD_BLOCK_STATUS, COOKIE,
                offset, length);
  send_bytes (fd, payload, length);
}

static void
expect_statuses (int fd, uint64_t offset, uint64_t length,
                 const uint32_t *ids, size_t nr)
{
  for (size_t i = 0; i < nr; ++i) {
    struct reply r;

    recv_reply (fd, &r, 0);
    assert_true (r.cookie == COOKIE && r.offset == offset);
    assert_int_equal (r.type, NBD_REPLY_TYPE_BLOCK_STATUS_EXT);
    assert_int_equal (r.flags, i + 1 == nr ? NBD_REPLY_FLAG_DONE : 0);
    assert_int_equal (r.length, 24);
    assert_int_equal (get_be32 (r.data), ids[i]);
    assert_true (get_be64 (r.data + 8) == length);
    free (r.data);
  }
}

static void
test_selection (void **state)
{
  static const struct {
    uint32_t ids[MAX_IDS], sorted[MAX_IDS];
    size_t nr;
  } fine[] = {
    { { 0 }, { 0 }, 1 }, { { 1 }, { 1 }, 1 }, { { 3 }, { 3 }, 1 },
    { { 3, 0 }, { 0, 3 }, 2 }, { { 2, 1 }, { 1, 2 }, 2 },
    { { 3, 2, 1, 0 }, { 0, 1, 2, 3 }, 4 },
    { { 1, 0, 3 }, { 0, 1, 3 }, 3 },
  };
  int fd = open_form (EXTENDED);

  (void) state;
  for (size_t i = 0; i < sizeof fine / sizeof fine[0]; ++i) {
    send_selection (fd, i % 2 ? REQ_ONE : 0, 512, 4096,
                    fine[i].ids, fine[i].nr, 8 + 4 * fine[i].nr);
    expect_statuses (fd, 512, 4096, fine[i].sorted, fine[i].nr);
  }
  /* It was for those requests only. */
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, COOKIE, 512, 4096);
  expect_statuses (fd, 512, 4096, (const uint32_t[]) { 0, 1, 2, 3 }, 4);
  close (fd);
}

static void
test_bad_selection (void **state)
{
  static const struct {
    uint32_t ids[MAX_IDS];
    size_t nr;
  } bad[] = {
    { { 4 }, 1 }, { { 0xffffffff }, 1 }, { { 0, 4 }, 2 }, { { 4, 0 }, 2 },
    { { 0, 0 }, 2 }, { { 3, 0, 3 }, 3 }, { { 2, 2, 2, 2 }, 4 },
    { { 0, 1, 2, 3, 3 }, 5 }, { { 0, 1, 2, 3, 4 }, 5 },
    { { 0, 1, 2, 3, 0, 1, 2, 3 }, 8 }, { { 0 }, 0 },
    { { 0x01000000 }, 1 },
  };
  /* The ids are those of 0; these are not 8 + 4n, or have no id. */
  static const size_t lengths[] = { 0, 1, 4, 7, 8, 9, 11, 13, 14, 15, 39 };
  static const uint64_t effects[] = {
    0, SIZE + 1, UINT64_C (1) << 32, UINT64_C (1) << 63, UINT64_MAX
  };
  const uint32_t zero[MAX_IDS] = { 0 };
  int fd = open_form (EXTENDED);

  (void) state;
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; ++i) {
    send_selection (fd, 0, 0, 4096, bad[i].ids, bad[i].nr,
                    8 + 4 * bad[i].nr);
    expect_error (fd, COOKIE, NBD_EINVAL);
  }
  for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; ++i) {
    send_selection (fd, 0, 0, 4096, zero, MAX_IDS, lengths[i]);
    expect_error (fd, COOKIE, NBD_EINVAL);
  }
  for (size_t i = 0; i < sizeof effects / sizeof effects[0]; ++i) {
    send_selection (fd, 0, 0, effects[i], zero, 1, 12);
    expect_error (fd, COOKIE, NBD_EINVAL);
    send_selection (fd, 0, 4096, effects[i], zero, 1, 12);
    expect_error (fd, COOKIE, NBD_EINVAL);
  }
  client_check_alive (&f, fd);
  close (fd);

  /* Of contexts that exist but were not negotiated. */
  client_wants_extended = true;
  fd = client_open (&f, contexts + 2);
  client_wants_extended = false;
  send_selection (fd, 0, 0, 4096, zero, 1, 12);
  expect_error (fd, COOKIE, NBD_EINVAL);
  send_selection (fd, 0, 0, 4096, (const uint32_t[]) { 3 }, 1, 12);
  expect_statuses (fd, 0, 4096, (const uint32_t[]) { 3 }, 1);
  close (fd);
  client_wants_extended = true;
  fd = client_open (&f, NULL);
  client_wants_extended = false;
  send_selection (fd, 0, 0, 4096, zero, 1, 12);
  expect_error (fd, COOKIE, NBD_EINVAL);
  client_check_alive (&f, fd);
  close (fd);
}

/* Many requests in one stream of bytes, cut where it happens: payloads
 * that are taken and those that are thrown away.
 */
static void
test_pipelined (void **state)
{
  enum { N = 2000, LONGEST = 9000 };
  const size_t header = sizeof (struct nbd_extended_request);
  uint8_t *buf = malloc (N * (header + LONGEST)), *seen = calloc (N, 1);
  size_t n = 0, sent = 0;
  int fd = open_form (EXTENDED);

  (void) state;
  srandom (5);
  for (int i = 0; i < N; ++i) {
    const uint32_t length = 1 + random () % LONGEST;

    switch (i % 4) {
    case 0:
      put_extended_request (buf + n, PAYLOAD_LEN, NBD_CMD_WRITE, i, 0,
                            length);
      break;
    case 1:
      put_extended_request (buf + n, PAYLOAD_LEN, NBD_CMD_TRIM, i, 0,
                            length);
      break;
    case 2:
      put_extended_request (buf + n, PAYLOAD_LEN, NBD_CMD_BLOCK_STATUS, i,
                            0, length);
      break;
    default:
      put_extended_request (buf + n, 0, NBD_CMD_CACHE, i, 0, length);
    }
    n += header;
    if (i % 4 != 3) {
      /* What would be a request, if it were taken for one. */
      for (uint32_t j = 0; j < length; j += header) {
        uint8_t request[sizeof (struct nbd_extended_request)];

        put_extended_request (request, 0, NBD_CMD_WRITE_ZEROES, 12345, 0,
                              SIZE);
        memcpy (buf + n + j, request, min_u64 (header, length - j));
      }
      n += length;
    }
  }
  for (int received = 0; received < N;) {
    struct reply r;

    while (sent < n && sent < (size_t) (received + 20) * LONGEST) {
      const size_t some = min_u64 (1 + random () % 30000, n - sent);

      send_bytes (fd, buf + sent, some);
      sent += some;
    }
    recv_reply (fd, &r, 0);
    assert_true (r.cookie < N && !seen[r.cookie]);
    seen[r.cookie] = 1;
    assert_int_equal (r.error, r.cookie % 4 == 1 || r.cookie % 4 == 2
                      ? NBD_EINVAL : 0);
    free (r.data);
    received++;
  }
  assert_int_equal (f.disk->calls[FAKE_ZERO], 0);
  assert_int_equal (f.disk->calls[FAKE_TRIM], 0);
  assert_int_equal (f.disk->calls[FAKE_WRITE], N / 4);
  close (fd);
  free (buf);
  free (seen);
}

/* A request of which a part has come, however large, does not keep the
 * answers to those before it.
 */
static void
test_half_a_request (void **state)
{
  static const struct { uint16_t type, flags; } requests[] = {
    { NBD_CMD_WRITE, PAYLOAD_LEN }, { NBD_CMD_WRITE, 0 },
    { NBD_CMD_TRIM, PAYLOAD_LEN }, { NBD_CMD_BLOCK_STATUS, PAYLOAD_LEN },
    { 77, PAYLOAD_LEN },
  };
  enum { LENGTH = 5000 };
  const size_t header = sizeof (struct nbd_extended_request);
  static const size_t parts[] = {
    1, 31, 32, 33, 32 + LENGTH / 2, 32 + LENGTH - 1
  };
  uint8_t buf[2 * sizeof (struct nbd_extended_request) + LENGTH] = { 0 };
  const struct asked read = {
    .form = EXTENDED, .command = &commands[0], .type = NBD_CMD_READ,
    .offset = good.offset, .length = good.length,
  };
  int fd = open_form (EXTENDED);

  (void) state;
  for (size_t i = 0; i < sizeof requests / sizeof requests[0]; ++i)
    for (size_t j = 0; j < sizeof parts / sizeof parts[0]; ++j) {
      put_extended_request (buf, 0, NBD_CMD_READ, COOKIE, good.offset,
                            good.length);
      put_extended_request (buf + header, requests[i].flags,
                            requests[i].type, 9, 0, LENGTH);
      send_bytes (fd, buf, header + parts[j]);
      assert_int_equal (answer (fd, &read), 0);
      send_bytes (fd, buf + header + parts[j], header + LENGTH - parts[j]);
      expect_error (fd, 9, requests[i].type == NBD_CMD_WRITE ? 0
                                                             : NBD_EINVAL);
    }
  close (fd);
}

/* 16 TiB. */

#define HUGE (UINT64_C (16) << 40)

static int
setup_huge (void **state)
{
  (void) state;
  fixture_init (&f, HUGE);
  f.disk->block_size = 1 << 30;
  fake_disk_add_bitmap (f.disk, "first", 1 << 30);
  fake_disk_add_bitmap (f.disk, "second", 1 << 30);
  fixture_start (&f, false);
  return 0;
}

/* What came to the disk, in pieces that follow each other and are cut
 * where no cluster is cut.
 */
static uint64_t noted_offset, noted_count;
static bool noted_badly;

static int
note_range (struct disk *d, enum fake_op op, uint64_t offset, uint64_t count)
{
  (void) d;
  (void) op;
  if (noted_count == 0)
    noted_offset = offset;
  else if (offset != noted_offset + noted_count || offset % (1 << 30) != 0)
    noted_badly = true;
  noted_count += count;
  return 0;
}

static void
check_huge_change (int fd, uint16_t type, uint64_t offset, uint64_t length)
{
  noted_count = 0;
  noted_badly = false;
  send_request (fd, 0, type, COOKIE, offset, length);
  expect_error (fd, COOKIE, 0);
  assert_true (noted_offset == offset && noted_count == length);
  assert_false (noted_badly);
}

static void
test_huge (void **state)
{
  static const uint16_t types[] = {
    NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES
  };
  int fd = open_form (EXTENDED);

  (void) state;
  send_request (fd, 0, NBD_CMD_BLOCK_STATUS, COOKIE, 0, HUGE);
  expect_statuses (fd, 0, HUGE, (const uint32_t[]) { 0, 1, 2, 3 }, 4);
  send_selection (fd, 0, 4096, HUGE - 4096, (const uint32_t[]) { 2 }, 1, 12);
  expect_statuses (fd, 4096, HUGE - 4096, (const uint32_t[]) { 2 }, 1);
  send_request (fd, REQ_ONE, NBD_CMD_BLOCK_STATUS, COOKIE, 0, HUGE);
  expect_statuses (fd, 0, HUGE, (const uint32_t[]) { 0, 1, 2, 3 }, 4);

  f.disk->hook = note_range;
  for (size_t i = 0; i < sizeof types / sizeof types[0]; ++i) {
    check_huge_change (fd, types[i], 0, HUGE);
    check_huge_change (fd, types[i], 512, HUGE - 512);
    check_huge_change (fd, types[i], HUGE / 2, (UINT64_C (1) << 32) + 512);
    check_huge_change (fd, types[i], 0, UINT64_C (1) << 32);
  }
  f.disk->hook = NULL;
  close (fd);
}

/* Stopping does not wait for what may take for ever. */
static void
test_stop_in_huge_requests (void **state)
{
  static const struct { uint16_t flags, type; } requests[] = {
    { 0, NBD_CMD_TRIM }, { 0, NBD_CMD_CACHE }, { FUA, NBD_CMD_WRITE_ZEROES },
    { FAST_ZERO, NBD_CMD_WRITE_ZEROES }, { 0, NBD_CMD_BLOCK_STATUS },
  };
  enum { N = sizeof requests / sizeof requests[0] };
  unsigned each_ms = 20, start;
  int fd[N];

  (void) state;
  f.disk->opaque = &each_ms;
  f.disk->hook = hook_sleep;
  for (int i = 0; i < N; ++i) {
    fd[i] = open_form (EXTENDED);
    send_request (fd[i], requests[i].flags, requests[i].type, COOKIE, 0,
                  HUGE);
  }
  sleep_ms (100);
  start = milliseconds ();
  nbd_server_stop (f.server, 100);
  assert_in_range (milliseconds () - start, 90, 20000);
  for (int i = 0; i < N; ++i)
    close (fd[i]);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (test_matrix),
    cmocka_unit_test_setup_teardown (test_matrix_readonly, setup_readonly,
                                     teardown),
    TEST (test_out_of_order),
    TEST (test_negotiation),
    TEST (test_info),
    TEST (test_cut),
    TEST (test_too_long_write),
    TEST (test_unflagged_writes),
    TEST (test_longest_payload),
    TEST (test_long_lengths),
    TEST (test_selection),
    TEST (test_bad_selection),
    TEST (test_pipelined),
    TEST (test_half_a_request),
    cmocka_unit_test_setup_teardown (test_huge, setup_huge, teardown),
    cmocka_unit_test_setup_teardown (test_stop_in_huge_requests, setup_huge,
                                     teardown),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
