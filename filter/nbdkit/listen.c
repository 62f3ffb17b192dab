/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Listening sockets of our own, for NBD and for control.
 *
 * How this works
 *
 * The sockets are bound in get_ready: the user still sees the error if an
 * address is in use, and the process still has the user ID and the directory
 * that nbdkit was started with.
 *
 * A Unix socket outlives its process if that was killed.  Such a socket
 * refuses connections; it is replaced.  If a process still listens on it, or
 * if it is not a socket, it is left alone, which is an error.
 *
 * nbdkit can exit between get_ready and its accept loop without calling us:
 * its own address is in use, another filter fails.  So the destructor of
 * this object, which exit calls, removes a socket that is still there.  It
 * does so only in the one process that continues with the socket: if nbdkit
 * goes into the background, its parent exits, too.
 *
 * A new socket has the mode and the label that nbdkit's own would have: the
 * mode left by the umask, and the label of --selinux-label.  The control
 * socket is for its owner alone: mode 0600, from the moment that it is there.
 */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "common/report.h"
#include "nbdkit/listen.h"

/* Our parameters that name a socket. */
#define MAX_AT_EXIT 2

int
listen_parse_path (const char *parameter, const char *address,
                   struct listen_address *a)
{
  CLEANUP_FREE char *cwd = NULL;
  struct sockaddr_un sun;

  memset (a, 0, sizeof *a);
  a->parameter = parameter;
  if (address[0] == '/')
    a->path = strdup (address);
  else {
    cwd = getcwd (NULL, 0);
    if (cwd == NULL) {
      report_error ("%s: getcwd: %m", parameter);
      return -1;
    }
    if (asprintf (&a->path, "%s/%s", cwd, address) == -1)
      a->path = NULL;
  }
  if (a->path == NULL) {
    report_error ("malloc: %m");
    return -1;
  }
  if (strlen (a->path) >= sizeof sun.sun_path) {
    report_error ("%s: path too long: length %zu > max %zu bytes",
                  parameter, strlen (a->path), sizeof sun.sun_path - 1);
    listen_address_free (a);
    return -1;
  }
  return 0;
}

/* getaddrinfo takes a port number modulo 65536. */
static bool
is_port (const char *port)
{
  const size_t digits = strspn (port, "0123456789");

  if (*port == '\0')
    return false;
  if (port[digits] != '\0')
    return true;                /* Maybe the name of a service. */
  return digits <= 5 && atoi (port) >= 1 && atoi (port) <= 65535;
}

int
listen_parse (const char *parameter, const char *address,
              struct listen_address *a)
{
  const char *host = address, *port;
  size_t host_len;

  port = strrchr (address, ':');
  if (port == NULL || strchr (address, '/') != NULL)
    return listen_parse_path (parameter, address, a);

  memset (a, 0, sizeof *a);
  a->parameter = parameter;
  host_len = port - address;
  port++;
  if (host[0] == '[') {
    if (host_len < 2 || host[host_len - 1] != ']') {
      report_error ("%s: expecting [ADDRESS]:PORT: %s", parameter, address);
      return -1;
    }
    host++;
    host_len -= 2;
  }
  else if (memchr (host, ':', host_len) != NULL) {
    report_error ("%s: put an IPv6 address in brackets, "
                  "[ADDRESS]:PORT: %s", parameter, address);
    return -1;
  }
  if (!is_port (port)) {
    report_error ("%s: not a port number: %s", parameter, address);
    return -1;
  }

  a->port = strdup (port);
  if (host_len > 0)
    a->host = strndup (host, host_len);
  if (a->port == NULL || (host_len > 0 && a->host == NULL)) {
    report_error ("malloc: %m");
    listen_address_free (a);
    return -1;
  }
  return 0;
}

void
listen_address_free (struct listen_address *a)
{
  free (a->path);
  free (a->host);
  free (a->port);
  memset (a, 0, sizeof *a);
}

/* Remove a socket that no process listens on.  True if it was one. */
static bool
remove_stale (const struct listen_address *a, const struct sockaddr_un *sun)
{
  struct stat statbuf;
  CLEANUP_CLOSE int fd = -1;

  if (lstat (sun->sun_path, &statbuf) == -1 || !S_ISSOCK (statbuf.st_mode))
    return false;
  fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd == -1)
    return false;
  if (connect (fd, (const struct sockaddr *) sun, sizeof *sun) == 0 ||
      errno != ECONNREFUSED)
    return false;
  report_debug ("%s: %s: no process listens, replacing it", a->parameter,
                sun->sun_path);
  return unlink (sun->sun_path) == 0;
}

static int
open_unix (const struct listen_address *a, struct listen_sockets *s)
{
  struct sockaddr_un sun = { .sun_family = AF_UNIX };
  const struct sockaddr *addr = (const struct sockaddr *) &sun;
  struct stat statbuf;
  int fd, r;

  strcpy (sun.sun_path, a->path); /* The length was checked. */
  fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd == -1) {
    report_error ("%s: socket: %m", a->parameter);
    return -1;
  }
  s->fd[s->nr++] = fd;

  /* In Linux this is the mode that bind gives it, less the umask. */
  if (a->is_private && fchmod (fd, 0600) == -1) {
    report_error ("%s: fchmod: %m", a->parameter);
    return -1;
  }
  r = bind (fd, addr, sizeof sun);
  if (r == -1 && errno == EADDRINUSE) {
    if (remove_stale (a, &sun))
      r = bind (fd, addr, sizeof sun);
    else
      errno = EADDRINUSE;
  }
  if (r == -1) {
    report_error ("%s: bind: %s: %m", a->parameter, a->path);
    return -1;
  }
  s->path = strdup (a->path);
  if (s->path == NULL || lstat (a->path, &statbuf) == -1) {
    report_error ("%s: %s: %m", a->parameter, a->path);
    unlink (a->path);
    return -1;
  }
  s->dev = statbuf.st_dev;
  s->ino = statbuf.st_ino;
  if (a->is_private && (statbuf.st_mode & 077) != 0) {
    report_error ("%s: %s: the socket has the mode %03o, and other users "
                  "could connect to it", a->parameter, a->path,
                  statbuf.st_mode & 0777);
    return -1;
  }
  if (listen (fd, SOMAXCONN) == -1) {
    report_error ("%s: listen: %s: %m", a->parameter, a->path);
    return -1;
  }
  return 0;
}

/* Open one address.  Returns 1 if the machine does not have this family. */
static int
open_one (const struct listen_address *a, const struct addrinfo *ai,
          const char *what, struct listen_sockets *s)
{
  const int one = 1;
  int fd;

  fd = socket (ai->ai_family, ai->ai_socktype | SOCK_CLOEXEC,
               ai->ai_protocol);
  if (fd == -1) {
    if (errno == EAFNOSUPPORT)
      return 1;
    report_error ("%s: socket: %m", a->parameter);
    return -1;
  }
  s->fd[s->nr++] = fd;

  if (setsockopt (fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == -1)
    report_debug ("%s: SO_REUSEADDR: %m", a->parameter);
  /* An IPv4 address, if there is one, has its own socket. */
  if (ai->ai_family == AF_INET6 &&
      setsockopt (fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one) == -1)
    report_debug ("%s: IPV6_V6ONLY: %m", a->parameter);

  if (bind (fd, ai->ai_addr, ai->ai_addrlen) == -1) {
    if (errno == EADDRNOTAVAIL && ai->ai_family == AF_INET6) {
      close (fd);
      s->nr--;
      return 1;
    }
    report_error ("%s: bind: %s: %m", a->parameter, what);
    return -1;
  }
  if (listen (fd, SOMAXCONN) == -1) {
    report_error ("%s: listen: %s: %m", a->parameter, what);
    return -1;
  }
  return 0;
}

static void
cleanup_freeaddrinfo (struct addrinfo **ai)
{
  if (*ai != NULL)
    freeaddrinfo (*ai);
}

static int
open_tcp (const struct listen_address *a, struct listen_sockets *s)
{
  const struct addrinfo hints = {
    .ai_family = AF_UNSPEC,
    .ai_socktype = SOCK_STREAM,
    .ai_flags = AI_PASSIVE,
  };
  __attribute__ ((cleanup (cleanup_freeaddrinfo)))
  struct addrinfo *list = NULL;
  struct addrinfo *ai;
  CLEANUP_FREE char *what = NULL;
  int r;

  if (asprintf (&what, "%s:%s", a->host ? a->host : "", a->port) == -1) {
    what = NULL;
    report_error ("malloc: %m");
    return -1;
  }
  r = getaddrinfo (a->host, a->port, &hints, &list);
  if (r != 0) {
    list = NULL;
    report_error ("%s: %s: %s", a->parameter, what,
                  r == EAI_SYSTEM ? strerror (errno) : gai_strerror (r));
    return -1;
  }
  for (ai = list; ai != NULL && s->nr < LISTEN_MAX_SOCKETS; ai = ai->ai_next)
    if (open_one (a, ai, what, s) == -1)
      return -1;
  if (s->nr == 0) {
    report_error ("%s: %s: no address could be bound", a->parameter, what);
    return -1;
  }
  return 0;
}

/* Choose the SELinux label of the sockets that this thread makes from now
 * on; NULL for the default one.  libselinux does no more than this.
 */
static int
set_socket_label (const struct listen_address *a, const char *label)
{
  CLEANUP_CLOSE int fd = open ("/proc/thread-self/attr/sockcreate",
                               O_WRONLY | O_CLOEXEC);
  const size_t n = label != NULL ? strlen (label) + 1 : 0;

  if (fd == -1 || write (fd, label, n) != (ssize_t) n) {
    report_error ("%s: --selinux-label: %m", a->parameter);
    return -1;
  }
  return 0;
}

int
listen_open (const struct listen_address *a, const char *selinux_label,
             struct listen_sockets *s)
{
  int r = 0;

  memset (s, 0, sizeof *s);
  if (selinux_label != NULL)
    r = set_socket_label (a, selinux_label);
  if (r == 0)
    r = a->path != NULL ? open_unix (a, s) : open_tcp (a, s);
  if (r == 0 && selinux_label != NULL)
    r = set_socket_label (a, NULL);
  if (r == -1) {
    listen_unlink (s);
    listen_close (s);
  }
  return r;
}

static struct {
  struct listen_sockets *sockets[MAX_AT_EXIT]; /* to be removed at exit */
  size_t nr;
  bool forks;                           /* the next fork is nbdkit's */
  pid_t owner;
} at_exit;

static void
forked_in_parent (void)
{
  if (at_exit.forks)
    at_exit.owner = 0;
  at_exit.forks = false;
}

static void
forked_in_child (void)
{
  if (at_exit.forks)
    at_exit.owner = getpid ();
  at_exit.forks = false;
}

void
listen_unlink_at_exit (struct listen_sockets *s, bool forks)
{
  assert (at_exit.nr < MAX_AT_EXIT);
  if (at_exit.nr == 0 &&
      pthread_atfork (NULL, forked_in_parent, forked_in_child) != 0)
    return;                     /* At worst the socket is left behind. */
  at_exit.sockets[at_exit.nr++] = s;
  at_exit.forks = forks;
  at_exit.owner = getpid ();
}

void
listen_serves (void)
{
  at_exit.forks = false;
  at_exit.owner = getpid ();
}

__attribute__ ((destructor))
static void
unlink_at_exit (void)
{
  if (at_exit.nr == 0 || at_exit.owner != getpid ())
    return;
  for (size_t i = 0; i < at_exit.nr; ++i)
    listen_unlink (at_exit.sockets[i]);
}

void
listen_unlink (struct listen_sockets *s)
{
  struct stat statbuf;

  if (s->path == NULL)
    return;
  if (lstat (s->path, &statbuf) == 0 &&
      statbuf.st_dev == s->dev && statbuf.st_ino == s->ino)
    unlink (s->path);
  free (s->path);
  s->path = NULL;
}

void
listen_close (struct listen_sockets *s)
{
  size_t i;

  for (i = 0; i < s->nr; ++i)
    if (s->fd[i] >= 0)
      close (s->fd[i]);
  s->nr = 0;
  free (s->path);
  s->path = NULL;
}
