/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* How this works
 *
 * One thread polls the listening socket and all clients.  No socket makes it
 * wait: it reads and writes what there is and what fits.
 *
 * In each turn a client gets one part of its input read, and one command
 * executed, so that none keeps the others from theirs.  A client that has not
 * received its replies is neither read nor served until it has received most
 * of them: what it can make this process hold is one command, one part of the
 * input, and one reply more than OUTPUT_BYTES.  Events come all the same, so a
 * client is disconnected when it has EVENT_BYTES of them to receive.
 *
 * A client that has shut down its sending side gets the replies to all that it
 * sent before; then it is disconnected.  If it vanishes, the first reply that
 * cannot be sent ends it: that command was executed, and what it sent after
 * that is not.
 *
 * A client that comes when there are MAX_CLIENTS is told so, and disconnected:
 * for people and scripts that is better than to wait for an unknown time.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "common/clock.h"
#include "common/report.h"
#include "common/threads.h"
#include "common/vector.h"
#include "control/internal.h"

/* A client that has so much to receive is served no further. */
#define OUTPUT_BYTES 65536

/* A client that has so much of events to receive is disconnected. */
#define EVENT_BYTES 65536

/* How long to wait when there are no descriptors for another client. */
#define ACCEPT_PAUSE_MS 100

static size_t
pending (const struct client *c)
{
  return c->nr_output - c->sent;
}

static void
disconnect (struct client *c)
{
  if (c->fd == -1)
    return;
  close (c->fd);
  json_stream_free (&c->stream);
  free (c->output);
  memset (c, 0, sizeof *c);
  c->fd = -1;
}

/* Send as much as fits. */
static void
flush_output (struct client *c)
{
  while (pending (c) > 0 && !c->is_broken) {
    const ssize_t n = send (c->fd, c->output + c->sent, pending (c),
                            MSG_DONTWAIT | MSG_NOSIGNAL);

    if (n > 0)
      c->sent += n;
    else if (errno == EAGAIN)
      return;
    else if (errno != EINTR)
      c->is_broken = true;
  }
  /* The memory of a long reply is given back. */
  c->sent = c->nr_output = c->event_bytes = 0;
  if (c->max_output > OUTPUT_BYTES) {
    free (c->output);
    c->output = NULL;
    c->max_output = 0;
  }
}

static int
put_output (const char *bytes, size_t nr, void *opaque)
{
  struct client *c = opaque;

  if (vector_reserve (c->output, c->nr_output, c->max_output, nr) == -1)
    return -1;
  memcpy (c->output + c->nr_output, bytes, nr);
  c->nr_output += nr;
  return 0;
}

/* Queue a message, which is freed.  A client that cannot get it whole is not
 * left with a part of it.
 */
static void
put_message (struct client *c, json_t *message)
{
  if (c->sent > 0) {
    memmove (c->output, c->output + c->sent, pending (c));
    c->nr_output -= c->sent;
    c->sent = 0;
  }
  if (message == NULL ||
      json_dump_callback (message, put_output, c, JSON_ENSURE_ASCII) == -1 ||
      put_output ("\r\n", 2, c) == -1)
    c->is_broken = true;
  json_decref (message);
}

static void
put_event (struct client *c, const char *name, json_t *data)
{
  const size_t before = pending (c);

  put_message (c, data == NULL ? NULL : qmp_event (name, json_incref (data)));
  c->event_bytes += pending (c) - before;
  if (c->event_bytes > EVENT_BYTES)
    c->is_broken = true;
}

void
control_send_event (struct control *control, const char *name, json_t *data)
{
  for (unsigned i = 0; i < MAX_CLIENTS; ++i)
    if (control->clients[i].fd != -1 && control->clients[i].is_negotiated)
      put_event (&control->clients[i], name, data);
  json_decref (data);
}

/* Answer what the stream has found. */
static void
answer (struct control *control, struct client *c, enum json_event event)
{
  json_t *request = event == JSON_VALUE ? json_stream_value (&c->stream)
                                        : NULL;

  put_message (c, request != NULL ? qmp_answer (control, c, request)
               : qmp_error (GENERIC_ERROR, json_stream_error (&c->stream)));
  json_decref (request);
}

/* May the client have another reply? */
static bool
may_be_served (const struct control *control, const struct client *c)
{
  return !c->is_broken && pending (c) < OUTPUT_BYTES && !control->quit_asked;
}

static bool
has_input (const struct client *c)
{
  return c->taken < c->received;
}

/* Take input up to the next value. */
static void
serve_input (struct control *control, struct client *c)
{
  enum json_event event;

  c->taken += json_stream_take (&c->stream, c->input + c->taken,
                                c->received - c->taken, &event);
  if (event != JSON_MORE)
    answer (control, c, event);
}

static void
receive (struct client *c)
{
  const ssize_t n = recv (c->fd, c->input, sizeof c->input, MSG_DONTWAIT);

  if (n > 0) {
    c->taken = 0;
    c->received = n;
  }
  else if (n == 0)
    c->has_ended = true;
  else if (errno != EAGAIN && errno != EINTR)
    c->is_broken = true;
}

/* A client's turn. */
static void
serve (struct control *control, struct client *c, short revents)
{
  if (revents & (POLLOUT | POLLERR | POLLHUP))
    flush_output (c);
  if (may_be_served (control, c) && !has_input (c) && !c->has_ended &&
      revents & (POLLIN | POLLERR | POLLHUP))
    receive (c);
  if (may_be_served (control, c)) {
    if (has_input (c))
      serve_input (control, c);
    else if (c->has_ended && json_stream_end (&c->stream) == JSON_VALUE)
      answer (control, c, JSON_VALUE);
  }
  flush_output (c);
  if (c->is_broken ||
      (c->has_ended && !has_input (c) && pending (c) == 0))
    disconnect (c);
}

static struct client *
free_place (struct control *control)
{
  for (unsigned i = 0; i < MAX_CLIENTS; ++i)
    if (control->clients[i].fd == -1)
      return &control->clients[i];
  return NULL;
}

/* There is no place for this client.  What it is told fits into its socket,
 * where there is nothing yet.
 */
static void
turn_away (int fd)
{
  struct client c = { .fd = fd };
  char text[64];

  snprintf (text, sizeof text, "Too many clients: %d are connected already",
            MAX_CLIENTS);
  put_message (&c, qmp_error (GENERIC_ERROR, text));
  flush_output (&c);
  disconnect (&c);
}

/* Take a client, if there is one.  False if that had better be tried again
 * later.
 */
static bool
accept_one (struct control *control)
{
  const int fd = accept4 (control->listen_fd, NULL, NULL, SOCK_CLOEXEC);
  struct client *c = free_place (control);

  if (fd == -1)
    return errno == EAGAIN || errno == ECONNABORTED || errno == EINTR;
  if (c == NULL) {
    report_debug ("control: a client was turned away, %d are connected",
                  MAX_CLIENTS);
    turn_away (fd);
    return true;
  }
  c->fd = fd;
  json_stream_init (&c->stream);
  put_message (c, qmp_greeting ());
  flush_output (c);
  return true;
}

/* What to wait for from a client. */
static short
events_of (const struct control *control, const struct client *c)
{
  short events = pending (c) > 0 ? POLLOUT : 0;

  if (may_be_served (control, c) && !has_input (c) && !c->has_ended)
    events |= POLLIN;
  return events;
}

/* Is there something to do for a client without an event? */
static bool
is_ready (const struct control *control, const struct client *c)
{
  return c->fd != -1 && may_be_served (control, c) &&
    (has_input (c) || c->has_ended);
}

/* The descriptors of a poll: wake_fd, the clients, the listening socket. */
#define NR_POLLED (MAX_CLIENTS + 2)

static void
fill_pollfds (const struct control *control, struct pollfd *fds)
{
  fds[0] = (struct pollfd) { .fd = control->wake_fd, .events = POLLIN };
  for (unsigned i = 0; i < MAX_CLIENTS; ++i)
    fds[1 + i] = (struct pollfd) {
      .fd = control->clients[i].fd,     /* -1 is ignored */
      .events = events_of (control, &control->clients[i]),
    };
  fds[1 + MAX_CLIENTS] =
    (struct pollfd) { .fd = control->listen_fd, .events = POLLIN };
}

/* The shorter of two times, of which -1 is any. */
static int
sooner (int a, int b)
{
  return a == -1 || (b != -1 && b < a) ? b : a;
}

/* One turn of all clients. */
static void
take_turn (struct control *control, bool *can_accept)
{
  struct pollfd fds[NR_POLLED];
  int timeout = *can_accept ? -1 : ACCEPT_PAUSE_MS;

  timeout = sooner (timeout, backup_gate_turn (control));
  timeout = sooner (timeout, views_turn (control));
  for (unsigned i = 0; i < MAX_CLIENTS; ++i)
    if (is_ready (control, &control->clients[i]))
      timeout = 0;
  fill_pollfds (control, fds);
  if (poll (fds, *can_accept ? NR_POLLED : NR_POLLED - 1, timeout) == -1)
    return;
  for (unsigned i = 0; i < MAX_CLIENTS; ++i)
    if (control->clients[i].fd != -1 && !atomic_load (&control->stopping))
      serve (control, &control->clients[i], fds[1 + i].revents);
  backup_gate_turn (control);
  *can_accept = !*can_accept || fds[1 + MAX_CLIENTS].revents == 0 ||
    accept_one (control);
}

/* Have the clients receive what there is for them, but not beyond the time. */
static void
flush_all (struct control *control)
{
  for (;;) {
    const int64_t left = control->cut_at_ms - now_ms ();
    struct pollfd fds[MAX_CLIENTS];
    nfds_t nr = 0;

    for (unsigned i = 0; i < MAX_CLIENTS; ++i) {
      struct client *c = &control->clients[i];

      if (c->fd == -1)
        continue;
      flush_output (c);
      if (!c->is_broken && pending (c) > 0)
        fds[nr++] = (struct pollfd) { .fd = c->fd, .events = POLLOUT };
    }
    if (nr == 0 || left <= 0)
      return;
    poll (fds, nr, left);
  }
}

static void
finish (struct control *control)
{
  backup_gate_expire (control);
  {
    ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&control->lock);
    control->has_ended = true;
    pthread_cond_broadcast (&control->ended);
  }
  control_send_event (control, "SHUTDOWN",
                      json_pack ("{s:b,s:s}", "guest", 0, "reason",
                                 control->quit_asked ? "host-qmp-quit"
                                                     : "host-signal"));
  flush_all (control);
  for (unsigned i = 0; i < MAX_CLIENTS; ++i)
    disconnect (&control->clients[i]);
}

static void *
control_main (void *vp)
{
  struct control *control = vp;
  bool can_accept = true;

  report_limit_thread ();
  while (!atomic_load (&control->stopping)) {
    take_turn (control, &can_accept);
    if (control->quit_asked && !control->quit_told) {
      control->quit_told = true;
      control->options.quit ();
    }
  }
  finish (control);
  return NULL;
}

struct control *
control_new (const struct control_options *options, int fd)
{
  CLEANUP_CLOSE int owned = fd;
  struct control *control = calloc (1, sizeof *control);
  const int flags = fcntl (fd, F_GETFL);

  if (control == NULL)
    return NULL;
  control->options = *options;
  control->wake_fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  /* A client that is gone again before accept must not hold us up. */
  if (control->wake_fd == -1 || flags == -1 ||
      fcntl (fd, F_SETFL, flags | O_NONBLOCK) == -1 ||
      monotonic_cond_init (&control->ended) == -1) {
    const int err = errno;

    if (control->wake_fd != -1)
      close (control->wake_fd);
    free (control);
    errno = err;
    return NULL;
  }
  pthread_mutex_init (&control->lock, NULL);
  for (unsigned i = 0; i < MAX_CLIENTS; ++i)
    control->clients[i].fd = -1;
  control->listen_fd = fd;
  owned = -1;
  return control;
}

int
control_start (struct control *control)
{
  const int err = thread_create (&control->thread, control_main, control);

  if (err != 0) {
    errno = err;
    report_error ("dirty-bitmap-control: cannot create a thread: %m");
    return -1;
  }
  control->started = true;
  return 0;
}

void
control_begin_stop (struct control *control, unsigned grace_ms)
{
  if (!control->started || atomic_load (&control->stopping))
    return;
  control->cut_at_ms = now_ms () + grace_ms;
  atomic_store (&control->stopping, true);
  eventfd_write (control->wake_fd, 1);
}

bool
control_wait (struct control *control, unsigned patience_ms)
{
  const int64_t until_ms = now_ms () + patience_ms;
  const struct timespec ts = {
    .tv_sec = until_ms / 1000,
    .tv_nsec = until_ms % 1000 * 1000000,
  };
  int r = 0;

  if (!control->started)
    return true;

  ACQUIRE_LOCK_FOR_CURRENT_SCOPE (&control->lock);
  while (!control->has_ended && r == 0)
    r = pthread_cond_timedwait (&control->ended, &control->lock, &ts);
  return control->has_ended;
}

void
control_stop (struct control *control, unsigned grace_ms)
{
  if (!control->started)
    return;
  control_begin_stop (control, grace_ms);
  pthread_join (control->thread, NULL);
  control->started = false;
}

void
control_free (struct control *control)
{
  if (control == NULL)
    return;
  close (control->listen_fd);
  close (control->wake_fd);
  views_forget (&control->views);
  pthread_mutex_destroy (&control->lock);
  pthread_cond_destroy (&control->ended);
  free (control);
}
