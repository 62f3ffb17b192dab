/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The main function of a fuzz target that is built without libFuzzer:
 * run files, or all files of folders; without arguments all of the
 * target's corpus.  Each must be done with in time.
 */

#include <config.h>

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fuzz.h"

/* For one input; under valgrind, too. */
#define MAX_SECONDS 60

#define MAX_INPUT_BYTES (1 << 20)

static unsigned nr_run;

/* Not every target has one. */
#pragma weak LLVMFuzzerInitialize
#pragma weak fuzz_finish

/* There is none to mutate with. */
size_t
LLVMFuzzerMutate (uint8_t *data, size_t size, size_t max)
{
  (void) data;
  (void) max;
  return size;
}

static int
run_file (const char *path)
{
  static uint8_t bytes[MAX_INPUT_BYTES];
  FILE *fp = fopen (path, "re");
  uint8_t *input;
  size_t n;

  if (fp == NULL) {
    fprintf (stderr, "%s: %s\n", path, strerror (errno));
    return -1;
  }
  n = fread (bytes, 1, sizeof bytes, fp);
  fclose (fp);
  printf ("%s\n", path);
  fflush (stdout);

  /* Exactly as large as it is, so that reading beyond it is seen. */
  input = malloc (n + (n == 0));
  if (input == NULL)
    abort ();
  memcpy (input, bytes, n);
  alarm (MAX_SECONDS);
  LLVMFuzzerTestOneInput (input, n);
  alarm (0);
  free (input);
  nr_run++;
  return 0;
}

static int
is_input (const struct dirent *entry)
{
  return entry->d_name[0] != '.';
}

static int
run_path (const char *path)
{
  struct dirent **entries;
  struct stat st;
  int r = 0, n;

  if (stat (path, &st) == -1 || !S_ISDIR (st.st_mode))
    return run_file (path);
  n = scandir (path, &entries, is_input, alphasort);
  if (n == -1) {
    fprintf (stderr, "%s: %s\n", path, strerror (errno));
    return -1;
  }
  for (int i = 0; i < n; ++i) {
    char file[4096];

    snprintf (file, sizeof file, "%s/%s", path, entries[i]->d_name);
    if (run_file (file) == -1)
      r = -1;
    free (entries[i]);
  }
  free (entries);
  return r;
}

int
main (int argc, char *argv[])
{
  const char *srcdir = getenv ("srcdir");
  char corpus[4096];
  int r = 0;

  if (LLVMFuzzerInitialize != NULL)
    LLVMFuzzerInitialize (&argc, &argv);
  if (argc < 2) {
    snprintf (corpus, sizeof corpus, "%s/fuzz/corpus/%s",
              srcdir != NULL ? srcdir : ".", fuzz_target);
    r = run_path (corpus);
  }
  for (int i = 1; i < argc; ++i)
    if (run_path (argv[i]) == -1)
      r = -1;
  if (fuzz_finish != NULL)
    fuzz_finish ();
  printf ("%u inputs of %s\n", nr_run, fuzz_target);
  return r == 0 && nr_run > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
