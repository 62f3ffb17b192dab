/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The file of statistics: when it is written, and how.
 *
 * How this works
 *
 * A thread sleeps until an eventfd is written to or the interval is over,
 * and writes the file.  A reader never sees half of it, since it is written
 * under another name and renamed.  That name does not end in ".prom", so
 * node_exporter's textfile collector ignores it.
 *
 * SIGUSR1 is caught by a handler that writes to the eventfd, in whichever
 * thread it interrupts.  No thread's signal mask is changed, since children
 * of plugins would inherit it.  System calls are restarted.  The handler is
 * installed before nbdkit forks, so that no signal comes too early.  With
 * --run there are then two processes that share the eventfd, so either of
 * them may be signalled.
 *
 * An existing file that does not hold our statistics is not replaced, at the
 * start or later: it may be the image, or nbdkit's socket.  An empty file
 * that is not in use has nothing to lose.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "common/clock.h"
#include "common/report.h"
#include "common/threads.h"
#include "disk/disk.h"
#include "stats/stats-file.h"
#include "stats/stats.h"

/* How each of our files begins. */
#define BEGINNING "# HELP nbdkit_dirty_bitmap_"

static const char *path;
static int wake_fd = -1;
static struct sigaction saved_action;
static bool handles_signal;

/* The thread's. */
static pthread_t thread;
static bool is_running;
static atomic_bool stop;
static struct stats *stats;
static struct disk *disk;
static unsigned interval_s;
static bool complained;

static void
handle_signal (int sig)
{
  const int saved_errno = errno;
  const uint64_t one = 1;
  ssize_t r;

  (void) sig;
  r = write (wake_fd, &one, sizeof one);
  (void) r;                     /* If it is full, the thread wakes anyway. */
  errno = saved_errno;
}

/* Open the file under its other name, empty, with the mode that nbdkit's
 * umask gives, 0644.
 */
static int
open_temporary (char **name)
{
  int fd;

  if (asprintf (name, "%s.%ld.tmp", path, (long) getpid ()) == -1) {
    *name = NULL;
    return -1;
  }
  /* A killed process with our process ID may have left one. */
  unlink (*name);
  fd = open (*name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
             0666);
  if (fd == -1) {
    const int err = errno;

    free (*name);
    *name = NULL;
    errno = err;
  }
  return fd;
}

static int
write_to (int fd)
{
  FILE *f = fdopen (fd, "w");
  int r, err;

  if (f == NULL) {
    err = errno;
    close (fd);
    errno = err;
    return -1;
  }
  r = stats_write (stats, disk, f);
  if (r == 0 && ferror (f)) {
    errno = EIO;
    r = -1;
  }
  err = errno;
  if (fclose (f) == EOF)
    return -1;
  errno = err;
  return r;
}

/* An empty file may be an image of QEMU's, or belong to one. */
static bool
is_locked (int fd)
{
  struct flock fl = { .l_type = F_WRLCK, .l_whence = SEEK_SET };

  return fcntl (fd, F_OFD_GETLK, &fl) == 0 && fl.l_type != F_UNLCK;
}

/* May the existing file be replaced?  If not, *why is the reason, or NULL if
 * errno is.
 */
static int
check_file (const char **why)
{
  char beginning[sizeof BEGINNING - 1];
  struct stat statbuf;

  *why = NULL;
  if (lstat (path, &statbuf) == -1)
    return errno == ENOENT ? 0 : -1;
  if (!S_ISREG (statbuf.st_mode)) {
    *why = "is not a regular file";
    return -1;
  }

  CLEANUP_CLOSE int fd = open (path, O_RDONLY | O_CLOEXEC | O_NOCTTY |
                               O_NOFOLLOW | O_NONBLOCK);
  if (fd == -1)
    return -1;
  if (statbuf.st_size == 0) {
    if (!is_locked (fd))
      return 0;
    *why = "is locked by another process, and is not replaced";
    return -1;
  }
  if (pread (fd, beginning, sizeof beginning, 0) != sizeof beginning ||
      memcmp (beginning, BEGINNING, sizeof beginning) != 0) {
    *why = "exists, does not hold these statistics, and is not replaced";
    return -1;
  }
  return 0;
}

/* -1 with the reason as from check_file. */
static int
replace_file (const char **why)
{
  CLEANUP_FREE char *name = NULL;
  const int fd = open_temporary (&name);
  int err;

  *why = NULL;
  if (fd == -1)
    return -1;
  if (write_to (fd) == 0 && check_file (why) == 0 && rename (name, path) == 0)
    return 0;
  err = errno;
  unlink (name);
  errno = err;
  return -1;
}

static void
write_file (void)
{
  const char *why;

  if (replace_file (&why) == 0) {
    complained = false;
    return;
  }
  if (!complained && why != NULL)
    report_warning ("dirty-bitmap-stats: %s: %s", path, why);
  else if (!complained)
    report_warning ("dirty-bitmap-stats: %s: cannot be written: %m", path);
  complained = true;
}

/* Can a file be created beside it? */
static int
check_folder (void)
{
  CLEANUP_FREE char *name = NULL;
  const int fd = open_temporary (&name);

  if (fd == -1) {
    report_error ("dirty-bitmap-stats: %s: cannot be created: %m", path);
    return -1;
  }
  close (fd);
  unlink (name);
  return 0;
}

int
stats_file_prepare (const char *file)
{
  struct sigaction sa = { .sa_handler = handle_signal,
                          .sa_flags = SA_RESTART };

  const char *why;

  path = file;
  if (check_file (&why) == -1) {
    if (why != NULL)
      report_error ("dirty-bitmap-stats: %s: %s", path, why);
    else
      report_error ("dirty-bitmap-stats: %s: %m", path);
    return -1;
  }
  if (check_folder () == -1)
    return -1;
  wake_fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake_fd == -1) {
    report_error ("eventfd: %m");
    return -1;
  }
  sigemptyset (&sa.sa_mask);
  if (sigaction (SIGUSR1, &sa, &saved_action) == -1) {
    report_error ("sigaction: %m");
    return -1;
  }
  handles_signal = true;
  return 0;
}

/* Sleep until the thread is woken, or it is time.  A time that was slept
 * through is not made up for.
 */
static void
sleep_until (int64_t *due_ms)
{
  struct pollfd fd = { .fd = wake_fd, .events = POLLIN };
  int64_t now = now_ms ();
  eventfd_t ignored;

  if (interval_s == 0)
    poll (&fd, 1, -1);
  else {
    poll (&fd, 1, *due_ms > now ? *due_ms - now : 0);
    now = now_ms ();
    while (*due_ms <= now)
      *due_ms += (int64_t) interval_s * 1000;
  }
  eventfd_read (wake_fd, &ignored);
}

static void *
write_repeatedly (void *unused)
{
  int64_t due_ms = now_ms () + (int64_t) interval_s * 1000;

  (void) unused;
  while (!atomic_load (&stop)) {
    write_file ();
    sleep_until (&due_ms);
  }
  return NULL;
}

int
stats_file_start (struct stats *s, struct disk *d, unsigned seconds)
{
  int r;

  stats = s;
  disk = d;
  interval_s = seconds;
  atomic_store (&stop, false);

  r = thread_create (&thread, write_repeatedly, NULL);
  if (r != 0) {
    errno = r;
    report_error ("pthread_create: %m");
    return -1;
  }
  is_running = true;
  return 0;
}

void
stats_file_stop (void)
{
  if (!is_running)
    return;
  signal (SIGUSR1, SIG_IGN);
  atomic_store (&stop, true);
  eventfd_write (wake_fd, 1);
  pthread_join (thread, NULL);
  is_running = false;
  write_file ();
}

void
stats_file_free (void)
{
  if (handles_signal && !is_running) {
    struct sigaction now;

    /* If nothing was served.  After serving, the signal is ignored. */
    if (sigaction (SIGUSR1, NULL, &now) == 0 &&
        now.sa_handler == handle_signal)
      sigaction (SIGUSR1, &saved_action, NULL);
  }
  handles_signal = false;
  if (wake_fd != -1)
    close (wake_fd);
  wake_fd = -1;
}
