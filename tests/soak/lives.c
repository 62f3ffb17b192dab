/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The lives that connections lead.
 *
 * Some never get as far as a request.  The others work for a while, wait
 * for the answers or not, and then meet one of the ends below.  A life
 * returns -1 if the server has ended the connection where it should not,
 * 0 otherwise.
 */

#include <config.h>

#include <gnutls/gnutls.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/bytes.h"
#include "nbd/protocol.h"
#include "lives.h"

static void
pause_ms (unsigned ms)
{
  const struct timespec ts = {
    .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L
  };

  nanosleep (&ts, NULL);
}

/* A vanished client is reset or not: on a Unix socket it is the same. */
static void
vanish (struct peer *c)
{
  peer_vanish (c, model_draw (c->slot, 2) == 0);
}

static int
wait_for_replies (struct peer *c, unsigned leave)
{
  if (peer_flush (c) == -1)
    return -1;
  while (peer_in_flight (c) > leave)
    if (peer_reply (c) == -1)
      return -1;
  return 0;
}

static uint32_t
draw_size (struct peer *c)
{
  static const uint32_t sizes[] = { 1, 8, 8, 8, 8, 16, 128, 130, MAX_COUNT };

  return sizes[model_draw (c->slot, sizeof sizes / sizeof sizes[0])];
}

static void
put_change (struct peer *c)
{
  const uint16_t fua = model_draw (c->slot, 40) == 0 ? NBD_CMD_FLAG_FUA : 0;

  switch (model_draw (c->slot, 8)) {
  case 0:
    peer_request (c, NBD_CMD_TRIM, fua, draw_size (c));
    break;
  case 1:
    peer_request (c, NBD_CMD_WRITE_ZEROES, fua |
                    (model_draw (c->slot, 2) == 0 ? NBD_CMD_FLAG_NO_HOLE : 0) |
                    (model_draw (c->slot, 4) == 0
                     ? NBD_CMD_FLAG_FAST_ZERO : 0), draw_size (c));
    break;
  default:
    peer_request (c, NBD_CMD_WRITE, fua, draw_size (c));
  }
}

static void
put_question (struct peer *c)
{
  switch (model_draw (c->slot, 12)) {
  case 0:
    peer_request (c, NBD_CMD_FLUSH, 0, 0);
    break;
  case 1:
    peer_request (c, NBD_CMD_CACHE, 0, draw_size (c));
    break;
  case 2:
  case 3:
  case 4:
    if (c->contexts[0] != UINT32_MAX) {
      peer_request (c, NBD_CMD_BLOCK_STATUS, model_draw (c->slot, 4) == 0
                      ? NBD_CMD_FLAG_REQ_ONE : 0, MAX_COUNT);
      break;
    }
    /* fallthrough */
  default:
    peer_request (c, NBD_CMD_READ, c->structured &&
                    model_draw (c->slot, 2) == 0 ? NBD_CMD_FLAG_DF : 0,
                    draw_size (c));
  }
}

static void
put_batch (struct peer *c)
{
  for (unsigned n = 1 + model_draw (c->slot, DEPTH); n > 0; --n) {
    if (model_draw (c->slot, 3) == 0)
      put_question (c);
    else
      put_change (c);
  }
}

/* Ask for new keys now and then; GnuTLS allows eight times a second.  With
 * nothing in flight there is room in the socket, so that this need not be
 * called again later.
 */
static void
change_keys (struct peer *c)
{
  struct timespec now;

  clock_gettime (CLOCK_MONOTONIC, &now);
  if (c->session != NULL && now.tv_sec != c->keys_changed &&
      peer_in_flight (c) == 0 &&
      gnutls_protocol_get_version (c->session) == GNUTLS_TLS1_3 &&
      model_draw (c->slot, 10) == 0) {
    c->keys_changed = now.tv_sec;
    if (gnutls_session_key_update (c->session, GNUTLS_KU_PEER) != 0 &&
        !atomic_load (&c->model->stopping))
      peer_failure (c, "cannot ask for new keys");
  }
}

static int
work (struct peer *c)
{
  static const unsigned batches[] = { 1, 3, 10, 50 }, pauses[] = { 1, 5, 100 };
  unsigned n = 1 + model_draw (c->slot, batches[model_draw (c->slot, 4)]);
  const unsigned pause = pauses[model_draw (c->slot, 3)];

  for (; n > 0 && !atomic_load (&c->model->over); --n) {
    change_keys (c);
    put_batch (c);
    if (wait_for_replies (c, model_draw (c->slot, 3) == 0 ? 0
                          : model_draw (c->slot, DEPTH / 2)) == -1)
      return -1;
    pause_ms (model_draw (c->slot, pause + 1));
  }
  return 0;
}

/* Ends.  Those that wait for the server's end of the connection know
 * that whatever was sent has been answered.
 */
static int
read_to_end (struct peer *c)
{
  while (peer_in_flight (c) > 0) {
    if (peer_reply (c) == 0)
      continue;
    if (atomic_load (&c->model->stopping))
      return -1;
    peer_failure (c, "%u requests are not answered", peer_in_flight (c));
  }
  if (peer_need (c, 1) == 0)
    peer_failure (c, "a reply too many");
  return 0;
}

static int
end_disconnect (struct peer *c)
{
  if (wait_for_replies (c, 0) == -1)
    return -1;
  peer_put_header (c, NBD_CMD_DISC, 0, 0, 0, 0);
  if (peer_flush (c) == -1)
    return -1;
  return read_to_end (c);
}

/* The same with requests before it. */
static int
end_disconnect_busy (struct peer *c)
{
  put_batch (c);
  peer_put_header (c, NBD_CMD_DISC, 0, 0, 0, 0);
  if (peer_flush (c) == -1)
    return -1;
  return read_to_end (c);
}

static int
end_half_close (struct peer *c)
{
  put_batch (c);
  if (peer_flush (c) == -1)
    return -1;
  peer_half_close (c);
  return read_to_end (c);
}

static int
end_answered (struct peer *c)
{
  return wait_for_replies (c, 0);
}

static int
end_busy (struct peer *c)
{
  put_batch (c);
  return peer_flush (c);
}

/* Not a byte, of what is under way, is waited for. */
static int
end_at_once (struct peer *c)
{
  put_batch (c);
  peer_flush_deaf (c, 10);
  return 0;
}

static int
end_in_header (struct peer *c)
{
  const size_t before = c->out.end - c->out.start;

  peer_put_header (c, NBD_CMD_READ, 0, 0, 0, SECTOR);
  c->out.end = c->out.start + before + 1 +
    model_draw (c->slot, sizeof (struct nbd_request) - 1);
  return peer_flush (c);
}

/* A write that lacks its last bytes.  What has come of it may be written,
 * but not a sector of which a byte is missing.
 */
static int
end_in_payload (struct peer *c)
{
  const struct operation *o = NULL;
  uint32_t first, count, sent;
  uint8_t bytes[SECTOR];

  if (wait_for_replies (c, 0) == -1)
    return -1;
  model_place (c->model, c->slot, draw_size (c), &first, &count);
  peer_put_header (c, NBD_CMD_WRITE, 0, 0, (uint64_t) first * SECTOR,
                     count * SECTOR);
  sent = model_draw (c->slot, count * SECTOR);
  if (sent >= SECTOR) {
    o = model_begin (c->model, c->slot, CHANGE_WRITE, first, sent / SECTOR);
    if (o == NULL)
      sent %= SECTOR;
  }
  for (uint32_t i = 0; sent > 0; ++i) {
    const uint32_t n = min_u64 (sent, SECTOR);

    model_fill (bytes, first + i, n == SECTOR ? o->stamp : STAMP_NEVER);
    peer_put (c, bytes, n);
    sent -= n;
  }
  return peer_flush (c);
}

/* More is asked for than sockets hold, and nothing read. */
static int
end_deaf (struct peer *c)
{
  for (unsigned i = 0; i < DEPTH; ++i)
    peer_request (c, NBD_CMD_READ, 0, MAX_COUNT);
  put_batch (c);
  peer_flush_deaf (c, model_draw (c->slot, 3000));
  return 0;
}

/* The same, and read in the end. */
static int
end_late (struct peer *c)
{
  if (end_deaf (c) == -1)
    return -1;
  return wait_for_replies (c, 0);
}

static int
end_idle (struct peer *c)
{
  if (wait_for_replies (c, 0) == -1)
    return -1;
  for (unsigned n = model_draw (c->slot, 40);
       n > 0 && !atomic_load (&c->model->over); --n)
    pause_ms (100);
  peer_request (c, NBD_CMD_READ, 0, 8);
  return wait_for_replies (c, 0);
}

/* The server hangs up on those that talk nonsense. */
static int
end_garbage (struct peer *c)
{
  uint8_t bytes[64];

  if (wait_for_replies (c, 0) == -1)
    return -1;
  memset (bytes, 'x', sizeof bytes);
  peer_put (c, bytes, sizeof bytes);
  while (peer_need (c, 1) == 0)
    peer_failure (c, "garbage is answered");
  return 0;
}

/* A request in bytes that come one by one. */
static int
end_slow (struct peer *c)
{
  struct buffer all;

  if (wait_for_replies (c, 0) == -1)
    return -1;
  peer_request (c, NBD_CMD_READ, 0, 8);
  all = c->out;
  while (c->out.start < all.end) {
    c->out.end = c->out.start + 1;
    if (peer_flush (c) == -1)
      return -1;
    pause_ms (20);
  }
  return wait_for_replies (c, 0);
}

static const struct end {
  const char *name;
  int (*end) (struct peer *);
  unsigned weight;
} ends[] = {
  { "disconnects", end_disconnect, 4 },
  { "disconnects with requests in flight", end_disconnect_busy, 4 },
  { "closes half, with requests in flight", end_half_close, 4 },
  { "is gone, all answered", end_answered, 3 },
  { "is gone, with requests in flight", end_busy, 4 },
  { "is gone at once", end_at_once, 4 },
  { "is gone in a header", end_in_header, 3 },
  { "is gone in a payload", end_in_payload, 4 },
  { "is gone without taking its replies", end_deaf, 2 },
  { "takes its replies late", end_late, 2 },
  { "is idle", end_idle, 3 },
  { "talks garbage", end_garbage, 2 },
  { "talks slowly", end_slow, 1 },
};

static const struct end *
draw_end (struct slot *slot)
{
  const struct end *end = ends;
  unsigned total = 0, n;

  for (size_t i = 0; i < sizeof ends / sizeof ends[0]; ++i)
    total += ends[i].weight;
  for (n = model_draw (slot, total); n >= end->weight; ++end)
    n -= end->weight;
  return end;
}

/* Those that are gone in the middle of the handshake. */
static int
stillborn (struct peer *c, bool tls)
{
  uint8_t bytes[16 + 300];
  const unsigned how = model_draw (c->slot, 5);

  c->life = "is gone in the handshake";
  if (how == 0)
    return 0;
  if (peer_greet (c) == -1)
    return -1;
  if (how == 1)
    return peer_flush (c);
  if (tls && peer_starttls (c) == -1)
    return -1;
  if (tls && how == 2) {
    /* The first bytes of a record. */
    memset (bytes, 22, 3);
    peer_put (c, bytes, 3);
    return peer_flush (c);
  }
  if (tls && peer_tls_handshake (c) == -1)
    return -1;
  if (how == 3) {
    peer_put_option (c, NBD_OPT_ABORT, NULL, 0);
    return peer_flush (c);
  }
  /* An option that goes on. */
  memset (bytes, 0, sizeof bytes);
  put_be64 (bytes, NBD_OPTION_MAGIC);
  put_be32 (bytes + 8, how == 2 ? NBD_OPT_SET_META_CONTEXT : NBD_OPT_GO);
  put_be32 (bytes + 12, sizeof bytes);
  peer_put (c, bytes, 1 + model_draw (c->slot, sizeof bytes));
  if (peer_flush (c) == -1)
    return -1;
  pause_ms (model_draw (c->slot, 200));
  return 0;
}

static int
live_through (struct peer *c, bool tls)
{
  const struct end *end = draw_end (c->slot);

  if (model_draw (c->slot, 8) == 0)
    return stillborn (c, tls);
  c->life = end->name;
  if (peer_greet (c) == -1)
    return -1;
  if (tls && (peer_starttls (c) == -1 || peer_tls_handshake (c) == -1))
    return -1;
  if (peer_negotiate (c) == -1 || work (c) == -1)
    return -1;
  return end->end (c);
}

bool
live (struct peer *c, const struct address *address)
{
  const bool tcp = model_draw (c->slot, 5) < 2;
  const bool tls = model_draw (c->slot, 4) == 0;
  int r;

  c->life = "is born";
  c->slot->nr_lives++;
  if (peer_connect (c, address, tcp) == -1) {
    peer_vanish (c, false);
    return false;
  }
  r = live_through (c, tls);
  if (r == -1 && !atomic_load (&c->model->stopping))
    peer_failure (c, "the server has ended the connection");
  vanish (c);
  return r == 0;
}
