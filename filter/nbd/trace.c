/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* What is told, and counted, of connections and requests.
 *
 * Connections have serial numbers and so have the requests of each.
 * nbdkit's debug messages (-v) tell of every connection when it is
 * opened, which is when the handshake has come to an end, and when it is
 * closed.  With the debug flag "request" they tell of every option and
 * request too.  A thread serves one connection as long as it lives, so
 * what it says is said of that one.
 *
 * An error of the disk comes again with each request that meets it, so
 * these threads' messages are limited (report.h).
 *
 * What a client can choose freely, the name of an export, is shown with
 * nothing in it that a terminal or a reader of logs might act upon.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "common/report.h"
#include "nbd/trace.h"

void
trace_thread (struct worker *w)
{
  w->id.connection = w->connection->serial;
  debug_thread (&w->id);
  report_limit_thread ();
}

/* Describe the other end of a socket. */
static void
describe_peer (int fd, char *text, size_t size)
{
  struct sockaddr_storage address;
  socklen_t length = sizeof address;
  char host[NI_MAXHOST], port[NI_MAXSERV];
  struct ucred peer;
  const struct sockaddr *sa = (const struct sockaddr *) &address;

  memset (&address, 0, sizeof address);
  if (getpeername (fd, (struct sockaddr *) &address, &length) == -1)
    snprintf (text, size, "a client that is gone");
  else if (sa->sa_family == AF_UNIX) {
    length = sizeof peer;
    if (getsockopt (fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0)
      snprintf (text, size, "pid %ld, uid %lu",
                (long) peer.pid, (unsigned long) peer.uid);
    else
      snprintf (text, size, "a Unix socket");
  }
  else if (getnameinfo (sa, length, host, sizeof host, port, sizeof port,
                        NI_NUMERICHOST | NI_NUMERICSERV) == 0)
    snprintf (text, size, sa->sa_family == AF_INET6 ? "[%s]:%s" : "%s:%s",
              host, port);
  else
    snprintf (text, size, "an address of family %d", sa->sa_family);
}

void
trace_export (struct session *session, const char *name, uint32_t length)
{
  static const char hex[] = "0123456789abcdef";
  const size_t max = sizeof session->export_name - 8;
  size_t n = 0;
  uint32_t i;

  for (i = 0; i < length && n < max; ++i) {
    const unsigned char byte = name[i];

    if (byte < 0x7f && byte >= ' ' && byte != '\\' && byte != '"')
      session->export_name[n++] = byte;
    else {
      session->export_name[n++] = '\\';
      session->export_name[n++] = 'x';
      session->export_name[n++] = hex[byte >> 4];
      session->export_name[n++] = hex[byte & 15];
    }
  }
  strcpy (session->export_name + n, i < length ? "..." : "");
}

void
trace_opened (struct connection *c)
{
  char peer[NI_MAXHOST + NI_MAXSERV + 4];

  describe_peer (c->stream.socket.fd, peer, sizeof peer);
  report_debug ("nbd: connection %" PRIu64 " opened: %s, export \"%s\", "
                "%s replies, %s, %zu metadata contexts",
                c->serial, peer, c->session.export_name,
                c->session.extended ? "extended"
                : c->session.structured ? "structured" : "simple",
                c->stream.tls != NULL ? "TLS" : "no TLS",
                c->session.nr_contexts);
}

void
trace_closed (struct connection *c)
{
  const char *why = atomic_load (&c->stream.socket.ending);
  char peer[NI_MAXHOST + NI_MAXSERV + 4];

  if (why == NULL)
    why = "the protocol was violated";
  if (atomic_load (&c->handshaking)) {
    describe_peer (c->stream.socket.fd, peer, sizeof peer);
    report_debug ("nbd: connection %" PRIu64 " closed in the handshake: %s, "
                  "%s", c->serial, peer, why);
    return;
  }
  errno = atomic_load (&c->stream.socket.ending_errno);
  report_debug (errno != 0
                ? "nbd: connection %" PRIu64 " closed: %s (%m): %" PRIu64
                " requests, %" PRIu64 " bytes read, %" PRIu64 " written"
                : "nbd: connection %" PRIu64 " closed: %s: %" PRIu64
                " requests, %" PRIu64 " bytes read, %" PRIu64 " written",
                c->serial, why, c->nr_requests, c->bytes[NBD_CMD_READ],
                c->bytes[NBD_CMD_WRITE]);
}

static enum stats_command
stats_command (uint16_t type)
{
  switch (type) {
  case NBD_CMD_READ: return STATS_READ;
  case NBD_CMD_WRITE: return STATS_WRITE;
  case NBD_CMD_FLUSH: return STATS_FLUSH;
  case NBD_CMD_TRIM: return STATS_TRIM;
  case NBD_CMD_CACHE: return STATS_CACHE;
  case NBD_CMD_WRITE_ZEROES: return STATS_WRITE_ZEROES;
  case NBD_CMD_BLOCK_STATUS: return STATS_BLOCK_STATUS;
  default: return STATS_UNKNOWN;
  }
}

static const char *
command_name (uint16_t type)
{
  switch (type) {
  case NBD_CMD_READ: return "read";
  case NBD_CMD_WRITE: return "write";
  case NBD_CMD_DISC: return "disconnect";
  case NBD_CMD_FLUSH: return "flush";
  case NBD_CMD_TRIM: return "trim";
  case NBD_CMD_CACHE: return "cache";
  case NBD_CMD_WRITE_ZEROES: return "write zeroes";
  case NBD_CMD_BLOCK_STATUS: return "block status";
  default: return "unknown";
  }
}

void
trace_show_header (struct worker *w)
{
  const struct request *r = &w->request;

  debug_request ("command %u (%s), flags %#x, offset %" PRIu64
                 ", length %" PRIu64, r->type, command_name (r->type),
                 r->flags, r->offset, (uint64_t) r->length);
}

void
trace_disconnect (struct worker *w)
{
  w->id.request = 0;
  w->connection->nr_requests--;
  socket_ending (&w->connection->stream.socket, "the client disconnected", 0);
}

void
trace_count (struct worker *w)
{
  const struct request *r = &w->request;

  stats_end (w->service->stats, w->began, stats_command (r->type),
             r->length, w->error);
}
