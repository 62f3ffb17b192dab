/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The client of side-by-side: loads one NBD server with one workload
 * and prints what came of it as a line of JSON.
 *
 * How this works: one thread, one poll loop, one or more connections.
 * Each connection has "depth" slots; a slot is one request in flight
 * with a buffer of its own.  libnbd calls finished () from inside the
 * loop when a request is answered, and libnbd's handle is locked then,
 * so finished () only puts the slot on the ready list; the loop issues
 * the slot's next request.  Nothing is allocated while it runs.
 *
 * Counted is the window that begins after the warm-up and ends when
 * time is up (or, with a fixed count, the whole run).  The server's CPU
 * time is read at both ends of the same window.  Any error from the
 * server ends the program: a figure of a server that fails is no figure.
 *
 * Walks of the block status (map) are synchronous, as nbdinfo's and
 * most backup tools' are, and are repeated whole until time is up.  A
 * hash of all places where the flags change is printed, so that the
 * caller can compare the maps that two servers tell.
 */

#include <config.h>

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <libnbd.h>

#include "common/cleanup.h"

#define MAX_CONNECTIONS 64
#define MAX_DEPTH 1024

enum pattern { READS, WRITES, MIXED, WRITE_FLUSH, MAP };

static const struct workload {
  const char *name;
  enum pattern pattern;
  bool sequential;
} workloads[] = {
  { "randread", READS, false },
  { "randwrite", WRITES, false },
  { "randmixed", MIXED, false },        /* 70 reads to 30 writes */
  { "seqread", READS, true },
  { "seqwrite", WRITES, true },
  { "writeflush", WRITE_FLUSH, false },
  { "map", MAP, true },
};
#define NR_WORKLOADS (sizeof workloads / sizeof workloads[0])

static const struct workload *workload;
static const char *uri;
static const char *context;
static unsigned nr_connections = 1;
static unsigned depth = 1;
static uint64_t block_bytes = 4096;
static uint64_t request_bytes = 1 << 30;        /* of block status */
static uint64_t span_bytes;                     /* 0: the whole disk */
static uint64_t once_bytes;                     /* 0: offsets may repeat */
static bool pass;                               /* of the span, once */
static bool fua;
static uint64_t count;                          /* 0: as long as time is */
static double seconds = 2.0;
static double warm_seconds = 0.3;
static int server_pid;

struct slot {
  struct slot *next;            /* on the ready list */
  struct nbd_handle *nbd;
  char *buf;
  bool flushing;                /* the second half of a pair is under way */
};

static struct nbd_handle *handles[MAX_CONNECTIONS];
static struct slot *ready;
static uint64_t in_flight;
static uint64_t finished_ops;
static uint64_t next_sequential;
static uint64_t random_state = UINT64_C (0x9e3779b97f4a7c15);

static void __attribute__ ((noreturn))
fail_nbd (void)
{
  fprintf (stderr, "load: %s\n", nbd_get_error ());
  exit (EXIT_FAILURE);
}

static void __attribute__ ((noreturn))
fail_errno (const char *what)
{
  fprintf (stderr, "load: %s: %s\n", what, strerror (errno));
  exit (EXIT_FAILURE);
}

static double
now (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return ts.tv_sec + ts.tv_nsec / 1e9;
}

/* xorshift64*: good enough to spread requests, and the same in each
 * run.
 */
static uint64_t
next_random (void)
{
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * UINT64_C (0x2545f4914f6cdd1d);
}

/* User and system time of the server so far, in seconds: the clock of
 * its process, which counts threads that have ended too, and finer than
 * the ticks in /proc/PID/stat.
 */
static double
server_cpu (void)
{
  clockid_t clock;
  struct timespec ts;

  if (server_pid == 0)
    return 0;
  errno = clock_getcpuclockid (server_pid, &clock);
  if (errno != 0 || clock_gettime (clock, &ts) == -1)
    fail_errno ("the server's CPU time");
  return ts.tv_sec + ts.tv_nsec / 1e9;
}

static double
client_cpu (void)
{
  struct rusage ru;

  getrusage (RUSAGE_SELF, &ru);
  return ru.ru_utime.tv_sec + ru.ru_utime.tv_usec / 1e6 +
    ru.ru_stime.tv_sec + ru.ru_stime.tv_usec / 1e6;
}

/* What was counted, since the window began. */
struct window {
  double began, server, client;
  uint64_t ops;
};

static void
window_begin (struct window *w)
{
  w->server = server_cpu ();
  w->client = client_cpu ();
  w->ops = finished_ops;
  w->began = now ();
}

static void
window_print (const struct window *w, const char *more)
{
  double elapsed = now () - w->began;

  printf ("{\"ops\": %" PRIu64 ", \"seconds\": %.6f, "
          "\"server_cpu\": %.6f, \"client_cpu\": %.6f%s}\n",
          finished_ops - w->ops, elapsed, server_cpu () - w->server,
          client_cpu () - w->client, more);
}

static void
connect_server (unsigned i)
{
  struct nbd_handle *nbd = handles[i] = nbd_create ();

  if (nbd == NULL)
    fail_nbd ();
  /* The URI is the user's own: it may name a file of keys. */
  nbd_set_uri_allow_local_file (nbd, true);
  if (context && nbd_add_meta_context (nbd, context) == -1)
    fail_nbd ();
  if (nbd_connect_uri (nbd, uri) == -1)
    fail_nbd ();
  if (context && nbd_can_meta_context (nbd, context) != 1) {
    fprintf (stderr, "load: the server does not offer %s\n", context);
    exit (EXIT_FAILURE);
  }
}

/* The nth number below nr, scattered: each comes once before any comes
 * again, since the factor is a prime that does not divide nr.
 */
static uint64_t
scattered (uint64_t n, uint64_t nr)
{
  return n % nr * (UINT64_C (2654435761) % nr) % nr;
}

static uint64_t
next_offset (void)
{
  uint64_t nr_blocks = span_bytes / block_bytes;

  if (once_bytes != 0)
    return scattered (next_sequential++, span_bytes / once_bytes) *
      once_bytes;
  if (workload->sequential)
    return next_sequential++ % nr_blocks * block_bytes;
  return next_random () % nr_blocks * block_bytes;
}

/* An answer came.  We are inside libnbd and may not call it. */
static int
finished (void *opaque, int *error)
{
  struct slot *slot = opaque;

  if (*error) {
    errno = *error;
    fail_errno ("the server failed a request");
  }
  in_flight--;
  if (workload->pattern == WRITE_FLUSH)
    slot->flushing = !slot->flushing;
  if (!slot->flushing)
    finished_ops++;
  slot->next = ready;
  ready = slot;
  return 1;                     /* libnbd: the command is done with */
}

static void
issue (struct slot *slot)
{
  nbd_completion_callback cb = { .callback = finished, .user_data = slot };
  int64_t cookie;

  if (slot->flushing)
    cookie = nbd_aio_flush (slot->nbd, cb, 0);
  else if (workload->pattern == READS ||
           (workload->pattern == MIXED && next_random () % 10 < 7))
    cookie = nbd_aio_pread (slot->nbd, slot->buf, block_bytes,
                            next_offset (), cb, 0);
  else
    cookie = nbd_aio_pwrite (slot->nbd, slot->buf, block_bytes,
                             next_offset (), cb,
                             fua ? LIBNBD_CMD_FLAG_FUA : 0);
  if (cookie == -1)
    fail_nbd ();
  in_flight++;
}

/* Wait for any of the sockets and let libnbd do what it can. */
static void
poll_once (void)
{
  struct pollfd fds[MAX_CONNECTIONS];
  unsigned i, dir;

  for (i = 0; i < nr_connections; ++i) {
    dir = nbd_aio_get_direction (handles[i]);
    fds[i].fd = nbd_aio_get_fd (handles[i]);
    fds[i].events = ((dir & LIBNBD_AIO_DIRECTION_READ) ? POLLIN : 0) |
      ((dir & LIBNBD_AIO_DIRECTION_WRITE) ? POLLOUT : 0);
  }
  if (poll (fds, nr_connections, 30000) <= 0) {
    fprintf (stderr, "load: no answer from the server for 30 seconds\n");
    exit (EXIT_FAILURE);
  }
  for (i = 0; i < nr_connections; ++i) {
    dir = nbd_aio_get_direction (handles[i]);
    if ((fds[i].revents & (POLLIN | POLLHUP | POLLERR)) &&
        (dir & LIBNBD_AIO_DIRECTION_READ)) {
      if (nbd_aio_notify_read (handles[i]) == -1)
        fail_nbd ();
    }
    else if ((fds[i].revents & POLLOUT) &&
             (dir & LIBNBD_AIO_DIRECTION_WRITE)) {
      if (nbd_aio_notify_write (handles[i]) == -1)
        fail_nbd ();
    }
  }
}

static void
issue_ready (void)
{
  struct slot *slot, *list = ready;

  /* Issuing one may finish others, which go on a list of their own. */
  ready = NULL;
  while ((slot = list) != NULL) {
    list = slot->next;
    issue (slot);
  }
}

static void
drain (void)
{
  struct slot *slot;

  while (in_flight > 0) {
    poll_once ();
    /* A write that was counted on is followed by its flush still. */
    while ((slot = ready) != NULL) {
      ready = slot->next;
      if (slot->flushing)
        issue (slot);
    }
  }
}

static void
make_slots (struct slot *slots)
{
  unsigned i, nr_slots = nr_connections * depth;
  uint64_t b, v;

  for (i = 0; i < nr_slots; ++i) {
    slots[i].nbd = handles[i % nr_connections];
    if (posix_memalign ((void **) &slots[i].buf, 4096, block_bytes) != 0)
      fail_errno ("posix_memalign");
    for (b = 0; b + sizeof v <= block_bytes; b += sizeof v) {
      v = next_random ();
      memcpy (&slots[i].buf[b], &v, sizeof v);
    }
    slots[i].next = ready;
    ready = &slots[i];
  }
}

static void
run_requests (void)
{
  unsigned i;
  double begin;
  bool counting = count > 0;
  struct window w;
  CLEANUP_FREE struct slot *slots = calloc (nr_connections * depth,
                                            sizeof *slots);

  if (slots == NULL)
    fail_errno ("calloc");
  make_slots (slots);

  begin = now ();
  if (counting)
    window_begin (&w);
  for (;;) {
    issue_ready ();
    poll_once ();
    if (!counting) {
      if (now () - begin < warm_seconds)
        continue;
      counting = true;
      window_begin (&w);
    }
    if (count ? finished_ops >= count : now () - w.began >= seconds)
      break;
  }
  window_print (&w, "");
  drain ();
  for (i = 0; i < nr_connections * depth; ++i)
    free (slots[i].buf);
}

/* What one walk of the map found. */
struct walk {
  uint64_t covered;             /* bytes told so far, from the start */
  uint64_t extents;             /* as merged over replies */
  uint64_t set_bytes;           /* with flags other than 0 */
  uint64_t hash;
  uint32_t flags;
};

static int
extents_told (void *opaque, const char *metacontext, uint64_t offset,
              uint32_t *entries, size_t nr_entries, int *error)
{
  struct walk *walk = opaque;
  size_t i;

  if (strcmp (metacontext, context) != 0)
    return 0;
  if (offset != walk->covered) {
    *error = EPROTO;
    return -1;
  }
  for (i = 0; i < nr_entries; i += 2) {
    if (walk->extents == 0 || entries[i+1] != walk->flags) {
      walk->flags = entries[i+1];
      walk->extents++;
      walk->hash = (walk->hash ^ walk->covered ^ walk->flags) *
        UINT64_C (0x100000001b3);
    }
    if (walk->flags != 0)
      walk->set_bytes += entries[i];
    walk->covered += entries[i];
  }
  return 0;
}

static struct walk
walk_map (struct nbd_handle *nbd)
{
  struct walk walk = { .hash = UINT64_C (0xcbf29ce484222325) };
  uint64_t n, before;

  while (walk.covered < span_bytes) {
    before = walk.covered;
    n = span_bytes - before;
    if (n > request_bytes)
      n = request_bytes;
    if (nbd_block_status (nbd, n, before,
                          (nbd_extent_callback) { .callback = extents_told,
                                                  .user_data = &walk },
                          0) == -1)
      fail_nbd ();
    if (walk.covered == before) {
      fprintf (stderr, "load: a block status answer without extents\n");
      exit (EXIT_FAILURE);
    }
  }
  return walk;
}

/* One op is one walk of the whole disk. */
static void
run_map (void)
{
  struct walk walk;
  struct window w;
  char more[160];

  walk_map (handles[0]);
  window_begin (&w);
  do {
    walk = walk_map (handles[0]);
    finished_ops++;
  } while (count ? finished_ops < count : now () - w.began < seconds);

  snprintf (more, sizeof more,
            ", \"extents\": %" PRIu64 ", \"set_bytes\": %" PRIu64
            ", \"hash\": \"%016" PRIx64 "\"",
            walk.extents, walk.set_bytes, walk.hash);
  window_print (&w, more);
}

static void __attribute__ ((noreturn))
usage (int status)
{
  size_t i;

  fprintf (status ? stderr : stdout,
           "usage: load --uri=URI --workload=WORKLOAD [--depth=N]\n"
           "            [--connections=N] [--block=BYTES] [--span=BYTES]\n"
           "            [--once=BYTES] [--pass] [--fua]\n"
           "            [--seconds=S] [--warm=S] [--count=N] [--seed=N]\n"
           "            [--context=NAME] [--request=BYTES]\n"
           "            [--server-pid=PID]\n"
           "workloads:");
  for (i = 0; i < NR_WORKLOADS; ++i)
    fprintf (status ? stderr : stdout, " %s", workloads[i].name);
  fprintf (status ? stderr : stdout, "\n");
  exit (status);
}

static uint64_t
parse_number (const char *option, const char *arg, uint64_t min, uint64_t max)
{
  char *end;
  uint64_t v;

  errno = 0;
  v = strtoull (arg, &end, 10);
  if (errno || end == arg || *end || *arg == '-' || v < min || v > max) {
    fprintf (stderr, "load: --%s: cannot use %s\n", option, arg);
    exit (EXIT_FAILURE);
  }
  return v;
}

static double
parse_seconds (const char *option, const char *arg)
{
  char *end;
  double v = strtod (arg, &end);

  if (end == arg || *end || !(v >= 0 && v <= 86400)) {
    fprintf (stderr, "load: --%s: cannot use %s\n", option, arg);
    exit (EXIT_FAILURE);
  }
  return v;
}

static void
parse_workload (const char *arg)
{
  size_t i;

  for (i = 0; i < NR_WORKLOADS; ++i)
    if (strcmp (arg, workloads[i].name) == 0)
      workload = &workloads[i];
  if (workload == NULL)
    usage (EXIT_FAILURE);
}

static void
parse_options (int argc, char *argv[])
{
  static const struct option options[] = {
    { "uri", required_argument, NULL, 'u' },
    { "workload", required_argument, NULL, 'w' },
    { "depth", required_argument, NULL, 'd' },
    { "connections", required_argument, NULL, 'c' },
    { "block", required_argument, NULL, 'b' },
    { "span", required_argument, NULL, 'S' },
    { "once", required_argument, NULL, 'o' },
    { "pass", no_argument, NULL, 'P' },
    { "fua", no_argument, NULL, 'f' },
    { "seconds", required_argument, NULL, 's' },
    { "warm", required_argument, NULL, 'W' },
    { "count", required_argument, NULL, 'n' },
    { "seed", required_argument, NULL, 'R' },
    { "context", required_argument, NULL, 'x' },
    { "request", required_argument, NULL, 'r' },
    { "server-pid", required_argument, NULL, 'p' },
    { "help", no_argument, NULL, 'h' },
    { NULL, 0, NULL, 0 }
  };
  int c, i;

  while ((c = getopt_long (argc, argv, "", options, &i)) != -1) {
#define NUMBER(min, max) parse_number (options[i].name, optarg, (min), (max))
    switch (c) {
    case 'u': uri = optarg; break;
    case 'w': parse_workload (optarg); break;
    case 'd': depth = NUMBER (1, MAX_DEPTH); break;
    case 'c': nr_connections = NUMBER (1, MAX_CONNECTIONS); break;
    case 'b': block_bytes = NUMBER (1, 32 << 20); break;
    case 'S': span_bytes = NUMBER (1, INT64_MAX); break;
    case 'o': once_bytes = NUMBER (1, UINT32_MAX); break;
    case 'P': pass = true; break;
    case 'f': fua = true; break;
    case 's': seconds = parse_seconds (options[i].name, optarg); break;
    case 'W': warm_seconds = parse_seconds (options[i].name, optarg); break;
    case 'n': count = NUMBER (1, INT64_MAX); break;
    case 'R': random_state ^= NUMBER (0, UINT32_MAX); break;
    case 'x': context = optarg; break;
    case 'r': request_bytes = NUMBER (1, UINT32_MAX); break;
    case 'p': server_pid = NUMBER (1, INT32_MAX); break;
    case 'h': usage (EXIT_SUCCESS);
    default: usage (EXIT_FAILURE);
    }
#undef NUMBER
  }
  if (optind != argc || uri == NULL || workload == NULL)
    usage (EXIT_FAILURE);
  if (workload->pattern == MAP && context == NULL) {
    fprintf (stderr, "load: map needs --context\n");
    exit (EXIT_FAILURE);
  }
}

int
main (int argc, char *argv[])
{
  unsigned i;
  int64_t size;

  parse_options (argc, argv);
  for (i = 0; i < nr_connections; ++i)
    connect_server (i);

  size = nbd_get_size (handles[0]);
  if (size == -1)
    fail_nbd ();
  if (span_bytes == 0 || span_bytes > (uint64_t) size)
    span_bytes = size;
  if (span_bytes < block_bytes && workload->pattern != MAP) {
    fprintf (stderr, "load: the disk is smaller than a block\n");
    exit (EXIT_FAILURE);
  }

  if (once_bytes != 0 && (once_bytes < block_bytes ||
                          span_bytes / once_bytes == 0 ||
                          span_bytes / once_bytes > UINT32_MAX)) {
    fprintf (stderr, "load: --once: blocks do not fit\n");
    exit (EXIT_FAILURE);
  }
  if (pass)
    count = span_bytes / (once_bytes ? once_bytes : block_bytes);

  if (workload->pattern == MAP)
    run_map ();
  else
    run_requests ();

  for (i = 0; i < nr_connections; ++i) {
    if (nbd_shutdown (handles[i], 0) == -1)
      fail_nbd ();
    nbd_close (handles[i]);
  }
  exit (EXIT_SUCCESS);
}
