/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* nbdkit's listening sockets, found and taken over.
 *
 * How this works
 *
 * nbdkit binds its sockets between get_ready and after_fork and begins to
 * accept after after_fork.  In after_fork its listening sockets are
 * recognised as follows:
 *
 * - Under socket activation they are descriptors 3 and up, as many as
 *   LISTEN_FDS says.
 * - Otherwise they did not exist in get_ready, listen, are closed on exec,
 *   and have the family and the port or path of the command line.  Listening
 *   sockets that plugins and filters have opened, or that the process was
 *   started with, are not taken.  (If the system chooses the port, -p 0, or
 *   the command line is not understood, a socket that the plugin opens in
 *   its after_fork cannot be told from nbdkit's.)
 *
 * Taking over: the listening socket moves to a descriptor of ours, so that
 * clients already queued are kept, and nbdkit gets an eventfd in its place
 * that is never written to.  nbdkit polls its sockets and accepts from those
 * that are readable; the eventfd never is.  No client can reach it, there is
 * nothing to remove afterwards, and each descriptor of nbdkit has its own.
 *
 * The clients of nbdkit's own server, when they have to be shut down, are
 * recognised by their local address: a connected socket has the path of the
 * listening socket that it was accepted from, or its port.
 *
 * All this happens in nbdkit's main thread, except shutting down these
 * clients, which only reads what the main thread has stored.
 */

#include <config.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <linux/sockios.h>
#include <linux/vm_sockets.h>

#include "common/report.h"
#include "nbd/nbd.h"
#include "nbdkit/command-line.h"
#include "nbdkit/sockets.h"

#define FIRST_ACTIVATED_FD 3

/* A local address, reduced to what an accepted socket shares with its
 * listening socket.
 */
struct local {
  sa_family_t family;
  unsigned port;                        /* TCP, vsock */
  char path[sizeof ((struct sockaddr_un *) 0)->sun_path + 1];
};

struct listener {
  int fd;
  struct local local;
};

static struct {
  struct listener *listeners;
  size_t nr_listeners;

  ino_t *others;                /* listening sockets that are not nbdkit's */
  size_t nr_others;

  unsigned nr_activated;
  bool has_stdin;               /* with -s, if it is a socket: */
  ino_t stdin_ino;
} s;

/* Call fn for each descriptor of this process that is a socket. */
static int
for_each_socket (int (*fn) (int fd, const struct stat *, void *opaque),
                 void *opaque)
{
  DIR *dir = opendir ("/proc/self/fd");
  struct dirent *d;
  struct stat statbuf;
  int r = 0;

  if (dir == NULL) {
    report_error ("/proc/self/fd: %m");
    return -1;
  }
  while (r == 0 && (d = readdir (dir)) != NULL) {
    const int fd = atoi (d->d_name);

    if (d->d_name[0] < '0' || d->d_name[0] > '9' || fd == dirfd (dir) ||
        fstat (fd, &statbuf) == -1 || !S_ISSOCK (statbuf.st_mode))
      continue;
    r = fn (fd, &statbuf, opaque);
  }
  closedir (dir);
  return r;
}

static bool
is_listening (int fd)
{
  int value = 0;
  socklen_t len = sizeof value;

  return getsockopt (fd, SOL_SOCKET, SO_ACCEPTCONN, &value, &len) == 0 &&
    value != 0;
}

static bool
get_local (int fd, struct local *l)
{
  union {
    struct sockaddr any;
    struct sockaddr_un un;
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
    struct sockaddr_vm vm;
  } a;
  socklen_t len = sizeof a;
  const size_t path_at = offsetof (struct sockaddr_un, sun_path);

  memset (&a, 0, sizeof a);
  memset (l, 0, sizeof *l);
  if (getsockname (fd, &a.any, &len) == -1)
    return false;
  l->family = a.any.sa_family;
  switch (a.any.sa_family) {
  case AF_UNIX:
    if (len > path_at && len <= sizeof a.un)
      memcpy (l->path, a.un.sun_path, len - path_at);
    return true;
  case AF_INET:
    l->port = ntohs (a.in.sin_port);
    return true;
  case AF_INET6:
    /* A dual-stack socket accepts AF_INET6 only: the families of a
     * listening socket and of what it accepts are the same.
     */
    l->port = ntohs (a.in6.sin6_port);
    return true;
  case AF_VSOCK:
    l->port = a.vm.svm_port;
    return true;
  default:
    return false;
  }
}

static bool
same_local (const struct local *a, const struct local *b)
{
  return a->family == b->family && a->port == b->port &&
    memcmp (a->path, b->path, sizeof a->path) == 0;
}

static int
note_other (int fd, const struct stat *statbuf, void *opaque)
{
  ino_t *others;

  (void) opaque;
  if (!is_listening (fd))
    return 0;
  others = realloc (s.others, (s.nr_others + 1) * sizeof *others);
  if (others == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  s.others = others;
  s.others[s.nr_others++] = statbuf->st_ino;
  return 0;
}

int
sockets_note_others (const struct command_line *cl)
{
  struct stat statbuf;

  s.nr_activated = command_line_nr_activated ();
  if (cl->listens_on_stdin && fstat (STDIN_FILENO, &statbuf) == 0 &&
      S_ISSOCK (statbuf.st_mode)) {
    s.has_stdin = true;
    s.stdin_ino = statbuf.st_ino;
  }
  return for_each_socket (note_other, NULL);
}

static bool
is_other (const struct stat *statbuf)
{
  size_t i;

  for (i = 0; i < s.nr_others; ++i)
    if (s.others[i] == statbuf->st_ino)
      return true;
  return false;
}

/* Is it the path given to -U, which nbdkit has made absolute? */
static bool
is_unix_path (const char *path, const char *given)
{
  const size_t len = strlen (path), given_len = strlen (given);

  if (given[0] == '/')
    return strcmp (path, given) == 0;
  return len > given_len && path[len - given_len - 1] == '/' &&
    strcmp (path + len - given_len, given) == 0;
}

/* Is it the port that was given?  Names of services are not looked up.  0,
 * or the largest number for vsock, lets the system choose.  getaddrinfo
 * takes a TCP port number modulo 65536.
 */
static bool
is_port (unsigned port, const char *given, sa_family_t family)
{
  char *end;
  unsigned long number;

  if (given == NULL)
    return true;
  number = strtoul (given, &end, family == AF_VSOCK ? 0 : 10);
  if (end == given || *end != '\0')
    return true;
  if (family == AF_VSOCK)
    return number == VMADDR_PORT_ANY || number == port;
  number &= UINT16_MAX;
  return number == 0 || number == port;
}

/* Does the command line ask for this address? */
static bool
is_asked_for (const struct command_line *cl, const struct local *l)
{
  if (cl->is_ambiguous)
    return true;
  switch (l->family) {
  case AF_UNIX:
    return cl->on_unix &&
      (cl->unix_path == NULL || is_unix_path (l->path, cl->unix_path));
  case AF_VSOCK:
    return cl->on_vsock && is_port (l->port, cl->port, AF_VSOCK);
  default:
    return cl->on_tcp && is_port (l->port, cl->port, AF_INET);
  }
}

static int
find_listener (int fd, const struct stat *statbuf, void *opaque)
{
  const struct command_line *cl = opaque;
  struct listener *listeners;
  struct local local;
  int flags;

  if (!is_listening (fd) || !get_local (fd, &local))
    return 0;
  flags = fcntl (fd, F_GETFD);
  if (flags == -1 || !(flags & FD_CLOEXEC))
    return 0;
  if (s.nr_activated > 0) {
    if (fd < FIRST_ACTIVATED_FD ||
        (unsigned) (fd - FIRST_ACTIVATED_FD) >= s.nr_activated)
      return 0;
  }
  else if (is_other (statbuf) || !is_asked_for (cl, &local))
    return 0;

  listeners = realloc (s.listeners,
                       (s.nr_listeners + 1) * sizeof *listeners);
  if (listeners == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  s.listeners = listeners;
  s.listeners[s.nr_listeners].fd = fd;
  s.listeners[s.nr_listeners++].local = local;
  return 0;
}

int
sockets_find (const struct command_line *cl)
{
  if (for_each_socket (find_listener, (void *) cl) == -1)
    return -1;
  return s.nr_listeners;
}

int
sockets_take_over (struct nbd_server *server)
{
  size_t i;

  for (i = 0; i < s.nr_listeners; ++i) {
    const int fd = s.listeners[i].fd;
    int ours, silent, r;

    ours = fcntl (fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
    if (ours == -1) {
      report_error ("dup: %m");
      return -1;
    }
    silent = eventfd (0, EFD_CLOEXEC);
    if (silent == -1) {
      report_error ("eventfd: %m");
      close (ours);
      return -1;
    }
    r = dup3 (silent, fd, O_CLOEXEC);
    if (r == -1)
      report_error ("dup3: %m");
    close (silent);
    if (r == -1) {
      close (ours);
      return -1;
    }
    if (nbd_server_add_socket (server, ours) == -1) {
      report_error ("cannot serve on nbdkit's socket: %m");
      return -1;
    }
  }
  return 0;
}

static bool
is_client (int fd, const struct stat *statbuf)
{
  struct local local;
  size_t i;

  if (s.has_stdin && statbuf->st_ino == s.stdin_ino)
    return true;
  if (is_listening (fd) || !get_local (fd, &local))
    return false;
  for (i = 0; i < s.nr_listeners; ++i)
    if (same_local (&local, &s.listeners[i].local))
      return true;
  return false;
}

static int
shut_client (int fd, const struct stat *statbuf, void *how)
{
  /* If it is gone or not connected, that is fine. */
  if (is_client (fd, statbuf))
    shutdown (fd, *(const int *) how);
  return 0;
}

/* Find bytes that were sent and not received. */
static int
look_for_stuck (int fd, const struct stat *statbuf, void *found)
{
  int bytes;

  if (is_client (fd, statbuf) && ioctl (fd, SIOCOUTQ, &bytes) == 0 &&
      bytes > 0)
    *(bool *) found = true;
  return 0;
}

void
sockets_shut_clients (int how)
{
  for_each_socket (shut_client, &how);
}

bool
sockets_client_is_stuck (void)
{
  bool found = false;

  for_each_socket (look_for_stuck, &found);
  return found;
}

void
sockets_free (void)
{
  free (s.listeners);
  free (s.others);
  memset (&s, 0, sizeof s);
}
