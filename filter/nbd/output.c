/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Bytes to the client.
 *
 * A worker makes each reply in its own output buffer, behind those that
 * it has gathered.  As long as it has the role and whole requests are
 * buffered it goes on gathering; one sendmsg then sends all.  A large
 * payload is sent from where it is, with the gathered replies before it.
 *
 * Invariants:
 * - The worker that writes to the socket holds send_lock from the first
 *   byte of a reply (or chunk) to its last.
 * - Gathered replies are sent when their worker gives up the role or
 *   waits for input; if the role is stolen from it while it executes,
 *   the next holder sends them, or the worker itself when its request is
 *   done, whichever comes first.  Both look at worker->gathered and at
 *   worker->ticket under send_lock, so they are sent once.
 * - A worker that sends with the role kept lets it be stolen meanwhile.
 *
 * A client that does not read blocks only workers of its connection, in
 * sendmsg or on send_lock, and connection_cut frees them.  The descriptor
 * has a send time-out, so that sendmsg tells of what it has sent, and of
 * an idle client.
 */

#include <config.h>

#include <assert.h>
#include <string.h>

#include "common/cleanup.h"
#include "common/lock.h"
#include "nbd/output.h"

/* Send everything.  A connection that cannot is cut, and those of its
 * workers that wait for memory wake.  Called with send_lock.
 */
static void
send_all (struct worker *w, struct iovec *iov, size_t nr)
{
  assert (lock_is_mine (&w->stream->send_lock));
  if (stream_send (w->stream, iov, nr) == 0)
    return;
  socket_cut (&w->stream->socket);
  budget_wake (w->account->budget);
}

/* Send the gathered replies and the reply at hand.  Without the role,
 * no other worker has gathered replies of ours to send from here on.
 */
static void
send_reply (struct worker *w)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&w->stream->send_lock);
  struct iovec iov[3] = {
    { .iov_base = w->output, .iov_len = w->gathered },
    { .iov_base = w->output + w->reply_at, .iov_len = w->reply_length },
    { .iov_base = (void *) w->reply_payload,
      .iov_len = w->reply_payload_length },
  };

  send_all (w, iov, 3);
  w->gathered = 0;
  if (!w->has_role)
    atomic_store (&w->ticket, 0);
}

static void
reset_reply (struct worker *w)
{
  w->reply_at = 0;
  w->reply_length = 0;
  w->reply_payload = NULL;
  w->reply_payload_length = 0;
}

/* Called with send_lock. */
static void
send_gathered (struct worker *w)
{
  struct iovec iov = { .iov_base = w->output, .iov_len = w->gathered };

  assert (lock_is_mine (&w->stream->send_lock));
  send_all (w, &iov, 1);
  w->gathered = 0;
}

void
output_flush (struct worker *w)
{
  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&w->stream->send_lock);
  send_gathered (w);
}

void
output_flush_gathered (struct worker *w)
{
  if (w->gathered > 0)
    output_flush (w);
}

void
output_release_role (struct worker *w)
{
  role_release (w);
  output_flush_gathered (w);
}

void
output_flush_keeping_role (struct worker *w)
{
  role_begin_sending (w);
  output_flush (w);
  role_end_executing (w);
}

/* The client may keep us here for long, and have the role stolen from
 * us too.  Meanwhile the robbed worker may have sent its replies, got
 * the role back and gathered others: these are none of our business, and
 * it has another ticket then, or none.
 */
void
output_flush_robbed (struct worker *w, const struct robbed *robbed)
{
  role_begin_sending (w);
  {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&w->stream->send_lock);

    if (atomic_load (&robbed->worker->ticket) == robbed->ticket)
      send_gathered (robbed->worker);
  }
  role_end_executing (w);
}

/* Is a whole request buffered, payload included? */
static bool
has_request (const struct worker *w)
{
  const uint8_t *data;
  const size_t n = stream_buffered (w->stream, &data);

  return wire_is_whole (w->session->extended, data, n);
}

/* The reply of a worker that has the role. */
static void
gather_reply (struct worker *w)
{
  w->gathered = w->reply_at + w->reply_length;
  reset_reply (w);
  if (w->gathered > 0 &&
      (w->gathered >= GATHER_LIMIT || !has_request (w)))
    output_flush_keeping_role (w);
}

void
output_reply (struct worker *w)
{
  if (w->has_role && w->reply_payload_length == 0) {
    gather_reply (w);
    return;
  }
  if (w->has_role) {
    role_begin_sending (w);
    send_reply (w);
    role_end_executing (w);
  }
  else
    send_reply (w);
  reset_reply (w);
}

void
output_partial_reply (struct worker *w)
{
  if (w->has_role)
    role_end_executing (w);
  if (w->has_role)
    output_release_role (w);
  send_reply (w);
  reset_reply (w);
}

int
output_append (struct worker *w, const void *data, size_t length)
{
  if (length > OUTPUT_SIZE - w->gathered)
    output_flush (w);
  memcpy (w->output + w->gathered, data, length);
  w->gathered += length;
  return atomic_load (&w->stream->socket.dead) ? -1 : 0;
}
