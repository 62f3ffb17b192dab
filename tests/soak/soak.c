/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* What test-soak.py runs.
 *
 * soak create MODEL SECTORS CONNECTIONS SEED
 *     begins a model, of a disk that is all zeroes.
 *
 * soak run MODEL UNIX-SOCKET TCP-PORT MILLISECONDS [PID]
 *     keeps that many connections alive for so long, each in a thread.
 *     The threads belong to processes, of which one is killed now and
 *     then, in the middle of whatever its threads do.  With PID, the
 *     server is sent a TERM at the end while all connections work;
 *     without, the connections end first.
 *
 * soak verify MODEL CONTENTS CHANGES
 *     compares the disk's contents with the model, when nobody writes.
 *     CHANGES is written: for each sector a 0 if nothing was sent to it,
 *     2 if it has been changed, and 1 if that is not known.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "lives.h"

#define THREADS_PER_PROCESS 8

/* Until all clients have ended in good order. */
#define END_MS (120 * 1000)

static struct model *model;
static struct address address;

static void __attribute__ ((noreturn))
fail (const char *what)
{
  fprintf (stderr, "soak: %s: %s\n", what, strerror (errno));
  exit (EXIT_FAILURE);
}

static int64_t
milliseconds_now (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return ts.tv_sec * INT64_C (1000) + ts.tv_nsec / 1000000;
}

static void *
slot_main (void *vp)
{
  struct peer c = { .model = model, .slot = vp, .fd = -1 };

  while (!atomic_load (&model->over) && live (&c, &address))
    ;
  free (c.in.data);
  free (c.out.data);
  return NULL;
}

/* A process has the slots from first on. */
struct family {
  pid_t pid;
  uint32_t first, count;
};

static void
spawn (struct family *f)
{
  pthread_t threads[THREADS_PER_PROCESS];
  pid_t parent = getpid ();

  f->pid = fork ();
  if (f->pid == -1)
    fail ("fork");
  if (f->pid > 0)
    return;

  prctl (PR_SET_PDEATHSIG, SIGKILL);
  if (getppid () != parent)
    _exit (EXIT_FAILURE);
  for (uint32_t i = 0; i < f->count; ++i) {
    const int err = pthread_create (&threads[i], NULL, slot_main,
                                    &model->slots[f->first + i]);

    if (err != 0) {
      errno = err;
      fail ("pthread_create");
    }
  }
  for (uint32_t i = 0; i < f->count; ++i)
    pthread_join (threads[i], NULL);
  _exit (EXIT_SUCCESS);
}

/* True if it has ended, whatever that was. */
static bool
reap (struct family *f, int flags)
{
  int status;

  if (f->pid == 0)
    return true;
  if (waitpid (f->pid, &status, flags) != f->pid)
    return false;
  if (!WIFEXITED (status) || WEXITSTATUS (status) != 0) {
    if (!WIFSIGNALED (status) || WTERMSIG (status) != SIGKILL) {
      fprintf (stderr, "soak: a process ends with status %x\n", status);
      atomic_store (&model->failed, true);
    }
  }
  f->pid = 0;
  for (uint32_t i = 0; i < f->count; ++i)
    model_vanished (model, &model->slots[f->first + i]);
  return true;
}

static void
kill_family (struct family *f)
{
  if (f->pid == 0)
    return;
  kill (f->pid, SIGKILL);
  reap (f, 0);
}

static void
run_until (struct family *families, unsigned nr, int64_t end)
{
  uint64_t n = 0;

  while (milliseconds_now () < end && !atomic_load (&model->failed)) {
    const struct timespec ts = { .tv_nsec = 20 * 1000 * 1000 };

    nanosleep (&ts, NULL);
    for (unsigned i = 0; i < nr; ++i)
      if (reap (&families[i], WNOHANG) && !atomic_load (&model->failed)) {
        fprintf (stderr, "soak: a process has ended early\n");
        atomic_store (&model->failed, true);
      }
    /* Each process is killed every ten seconds or so. */
    if (++n % (500 / nr + 1) == 0 && !atomic_load (&model->failed)) {
      struct family *f = &families[rand () % nr];

      kill_family (f);
      spawn (f);
    }
  }
}

static void
wait_for_all (struct family *families, unsigned nr)
{
  const int64_t end = milliseconds_now () + END_MS;
  const struct timespec ts = { .tv_nsec = 20 * 1000 * 1000 };
  bool ended;

  do {
    nanosleep (&ts, NULL);
    ended = true;
    for (unsigned i = 0; i < nr; ++i)
      ended = reap (&families[i], WNOHANG) && ended;
  } while (!ended && milliseconds_now () < end &&
           !atomic_load (&model->failed));
  for (unsigned i = 0; i < nr; ++i)
    kill_family (&families[i]);
  if (!ended && !atomic_load (&model->failed)) {
    fprintf (stderr, "soak: clients do not come to an end\n");
    atomic_store (&model->failed, true);
  }
}

static void
print_sums (void)
{
  uint64_t lives = 0, requests = 0, acked = 0, avoided = 0;

  for (uint32_t i = 0; i < model->nr_slots; ++i) {
    lives += model->slots[i].nr_lives;
    requests += model->slots[i].nr_requests;
    acked += model->slots[i].nr_acked;
    avoided += model->slots[i].nr_avoided;
  }
  printf ("%" PRIu64 " lives, %" PRIu64 " requests, %" PRIu64 " answered, "
          "%" PRIu64 " avoided\n", lives, requests, acked, avoided);
}

static int
run (int64_t milliseconds, pid_t server)
{
  const unsigned nr =
    (model->nr_slots + THREADS_PER_PROCESS - 1) / THREADS_PER_PROCESS;
  CLEANUP_FREE struct family *families = calloc (nr, sizeof *families);

  if (families == NULL)
    fail ("calloc");
  srand (model_random (&model->slots[0]));
  atomic_store (&model->over, false);
  for (unsigned i = 0; i < nr; ++i) {
    struct family *f = &families[i];

    f->first = i * THREADS_PER_PROCESS;
    f->count = model->nr_slots - f->first;
    if (f->count > THREADS_PER_PROCESS)
      f->count = THREADS_PER_PROCESS;
    spawn (f);
  }
  run_until (families, nr, milliseconds_now () + milliseconds);

  if (server > 0 && !atomic_load (&model->failed)) {
    atomic_store (&model->stopping, true);
    kill (server, SIGTERM);
  }
  else {
    /* Some go without a word. */
    for (unsigned i = 0; i < nr; i += 4)
      kill_family (&families[i]);
    atomic_store (&model->over, true);
  }
  wait_for_all (families, nr);
  print_sums ();
  return atomic_load (&model->failed) ? EXIT_FAILURE : EXIT_SUCCESS;
}

static int
verify (FILE *contents, FILE *changes)
{
  unsigned nr_wrong = 0;

  for (uint32_t i = 0; i < model->nr_sectors; ++i) {
    uint8_t bytes[SECTOR];

    if (fread (bytes, sizeof bytes, 1, contents) != 1)
      fail ("the contents are too short");
    if (!model_allows (model, i, bytes)) {
      if (nr_wrong++ < 20)
        model_explain (model, i, bytes);
    }
    else
      model_settle (model, i, bytes);
    putc (model->sectors[i].flags & SECTOR_CHANGED ? 2
          : model->sectors[i].flags & SECTOR_ISSUED ? 1 : 0, changes);
  }
  if (nr_wrong > 0)
    fprintf (stderr, "soak: %u sectors are wrong\n", nr_wrong);
  return nr_wrong > 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}

static int
verify_files (const char *contents, const char *changes)
{
  FILE *in = fopen (contents, "re"), *out = fopen (changes, "we");
  int r;

  if (in == NULL || out == NULL)
    fail ("fopen");
  r = verify (in, out);
  fclose (in);
  if (fclose (out) != 0)
    fail (changes);
  return r;
}

int
main (int argc, char *argv[])
{
  const char *what = argc > 2 ? argv[1] : "";

  if (strcmp (what, "create") == 0 && argc == 6) {
    model_create (argv[2], atoi (argv[3]), atoi (argv[4]),
                  strtoull (argv[5], NULL, 10));
    return EXIT_SUCCESS;
  }
  if (argc > 2)
    model = model_open (argv[2]);
  if (strcmp (what, "run") == 0 && (argc == 6 || argc == 7)) {
    address.unix_path = argv[3];
    address.tcp_port = atoi (argv[4]);
    return run (atoi (argv[5]), argc == 7 ? atoi (argv[6]) : 0);
  }
  if (strcmp (what, "verify") == 0 && argc == 5)
    return verify_files (argv[3], argv[4]);
  fprintf (stderr, "soak: usage: see soak.c\n");
  return EXIT_FAILURE;
}
