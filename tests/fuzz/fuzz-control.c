/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The input is all that a client of the control socket says.  There is one
 * control for all inputs, over a disk in memory; each input is a connection of
 * its own.  The replies are read as they come: the first line is the greeting,
 * and every line is a JSON object.  When the client has said all, the
 * connection ends.  The command quit has no effect.  Bitmaps that were added
 * are removed before the next input; those that were removed are not made
 * anew, except the one that seeds use.
 */

#include <config.h>

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <jansson.h>

#include "bitmap-image.h"
#include "common/cleanup.h"
#include "common/vector.h"
#include "container/container.h"
#include "control/internal.h"
#include "disk/change.h"
#include "disk/disk.h"
#include "fuzz.h"
#include "stats/stats.h"

const char fuzz_target[] = "control";

static struct disk *disk;
static struct stats *stats;
static struct control *control;
static struct sockaddr_un address;
static socklen_t address_length;

/* Called by the control's thread. */
static void
ignore_quit (void)
{
  control->quit_asked = control->quit_told = false;
}

static struct disk *
make_disk (void)
{
  static const struct bitmap_spec specs[] = {
    { .name = "monday", .granularity_bits = 16, .flags = 2,
      .table = "d", .fill = 0x55 },
    { .name = "broken", .granularity_bits = 12, .flags = 3, .table = "d" },
    { .name = "not UTF-8: \xff\x1b", .granularity_bits = 9, .table = "1" },
  };
  const struct disk_options options = {
    .cache_size = 1 << 20, .keep = true, .load_all = true,
    .scratch = P_tmpdir, .scratch_max = 1 << 20, .view_memory = 1 << 20,
  };
  struct crafted crafted = { .cluster_size = 0 };
  struct container *c;

  craft (&crafted, 16, 1 << 20, specs, sizeof specs / sizeof specs[0]);
  c = container_open_memory (crafted.bytes.n + (16 << 20));
  if (c == NULL || container_reserve (c, crafted.bytes.n) == -1 ||
      container_pwrite (c, crafted.bytes.p, crafted.bytes.n, 0) == -1)
    fuzz_fail ("cannot make a container");
  free (crafted.bytes.p);
  return disk_open (c, &options);
}

static int
listen_somewhere (void)
{
  const int fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

  /* An abstract address, of the kernel's choice. */
  address.sun_family = AF_UNIX;
  address_length = sizeof address;
  if (fd == -1 ||
      bind (fd, (struct sockaddr *) &address, sizeof (sa_family_t)) == -1 ||
      getsockname (fd, (struct sockaddr *) &address, &address_length) == -1 ||
      listen (fd, 1) == -1)
    fuzz_fail ("cannot listen: %s", strerror (errno));
  return fd;
}

int
LLVMFuzzerInitialize (int *argc, char ***argv)
{
  (void) argc;
  (void) argv;
  fuzz_quiet ();
  disk = make_disk ();
  stats = stats_new ();
  if (disk == NULL || stats == NULL)
    fuzz_fail ("cannot open the disk");

  const struct control_options options = {
    .disk = disk, .stats = stats, .node = CONTROL_DEFAULT_NODE,
    .exports = { .name = "\xff the disk", .list_deltas = true },
    .image = "memory", .quit = ignore_quit,
  };
  control = control_new (&options, listen_somewhere ());
  if (control == NULL || control_start (control) == -1)
    fuzz_fail ("cannot start the control");
  return 0;
}

void
fuzz_finish (void)
{
  control_stop (control, 1000);
  control_free (control);
  disk_close (disk);
  stats_free (stats);
}

/* What has come. */
struct output {
  char *text;
  size_t nr, max;
};

/* Say it all, and take what comes, until the connection ends. */
static void
talk (int fd, const uint8_t *data, size_t size, struct output *out)
{
  struct pollfd p = { .fd = fd, .events = POLLIN | POLLOUT };

  for (;;) {
    /* A signal of libFuzzer's clock. */
    if (poll (&p, 1, -1) == -1)
      continue;
    if (p.revents & POLLIN) {
      ssize_t n;

      if (vector_reserve (out->text, out->nr, out->max, 65536) == -1)
        abort ();
      n = recv (fd, out->text + out->nr, 65536, MSG_DONTWAIT);
      if (n == 0)
        return;
      FUZZ_CHECK (n > 0 || errno == EAGAIN, "recv: %s", strerror (errno));
      out->nr += n > 0 ? n : 0;
    }
    if (p.revents & p.events & POLLOUT) {
      const ssize_t n = size == 0 ? 0
        : send (fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);

      FUZZ_CHECK (n >= 0 || errno == EAGAIN, "send: %s", strerror (errno));
      if (n > 0) {
        data += n;
        size -= n;
      }
      if (size == 0) {
        shutdown (fd, SHUT_WR);
        p.events = POLLIN;
      }
    }
  }
}

static void
check_output (const struct output *out)
{
  const char *p = out->text, *end = p + out->nr;

  for (unsigned i = 0; p < end; ++i) {
    const char *newline = memchr (p, '\n', end - p);
    json_t *message;

    FUZZ_CHECK (newline != NULL && newline > p && newline[-1] == '\r',
                "a reply has no end");
    message = json_loadb (p, newline - p, JSON_ALLOW_NUL, NULL);
    FUZZ_CHECK (json_is_object (message), "a reply is no JSON object: %.*s",
                (int) (newline - p), p);
    FUZZ_CHECK ((json_object_get (message, "QMP") != NULL) == (i == 0),
                "the greeting is not the first line");
    FUZZ_CHECK ((json_object_get (message, "return") != NULL) +
                (json_object_get (message, "error") != NULL) +
                (json_object_get (message, "event") != NULL) == (i > 0),
                "neither result nor error nor event, or several");
    json_decref (message);
    p = newline + 1;
  }
}

/* What is there that was not at the beginning. */
struct leftover {
  char *names[4096];
  size_t nr;
  bool has_monday;
};

static void
note_leftover (const struct disk_bitmap_state *b, void *opaque)
{
  struct leftover *l = opaque;

  if (strcmp (b->name, "monday") == 0)
    l->has_monday = true;
  else if (strcmp (b->name, "broken") != 0 && strchr (b->name, '\xff') == NULL
           && l->nr < sizeof l->names / sizeof l->names[0])
    l->names[l->nr++] = strdup (b->name);
}

/* If there is one. */
static void
end_backup (const char *name)
{
  struct disk_action end = { .type = DISK_BACKUP_END, .name = name };

  disk_change_bitmaps (disk, CONTROL_DEFAULT_NODE, &end, 1);
}

static void
tidy_up (void)
{
  struct disk_action action = { .type = DISK_BITMAP_REMOVE, .force = true };
  struct leftover l = { .nr = 0 };

  end_backup ("monday");
  disk_list_bitmaps (disk, note_leftover, &l);
  for (size_t i = 0; i < l.nr; ++i) {
    end_backup (l.names[i]);
    action.name = l.names[i];
    disk_change_bitmaps (disk, CONTROL_DEFAULT_NODE, &action, 1);
    free (l.names[i]);
  }
  action = (struct disk_action) {
    .type = DISK_BITMAP_ADD, .name = "monday", .persistent = true,
  };
  if (!l.has_monday)
    disk_change_bitmaps (disk, CONTROL_DEFAULT_NODE, &action, 1);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  CLEANUP_CLOSE int fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  struct output out = { .text = NULL };

  while (connect (fd, (struct sockaddr *) &address, address_length) == -1)
    FUZZ_CHECK (errno == EINTR, "connect: %s", strerror (errno));
  talk (fd, data, size, &out);
  FUZZ_CHECK (out.nr > 0, "no greeting");
  check_output (&out);
  free (out.text);
  tidy_up ();
  return 0;
}

/* ---------------------------------------------------------------------
 * A mutator that puts whole words of the protocol in.
 */

static const char *const words[] = {
  "{\"execute\":\"qmp_capabilities\"}", "{\"execute\":\"", "\"arguments\":{",
  "\"id\":", "query-block", "query-named-block-nodes", "query-stats",
  "query-block-exports", "\"flat\":", "\"enable\":[", "\"exec-oob\":", "true",
  "block-dirty-bitmap-add", "block-dirty-bitmap-remove",
  "block-dirty-bitmap-clear", "block-dirty-bitmap-enable",
  "block-dirty-bitmap-disable", "block-dirty-bitmap-merge", "transaction",
  "\"node\":\"disk\",", "\"name\":\"a\",", "\"target\":\"monday\",",
  "\"bitmaps\":[\"monday\"]", "\"granularity\":512,", "\"persistent\":true,",
  "\"disabled\":true,", "\"force\":true,", "\"actions\":[",
  "{\"type\":\"abort\",\"data\":{}},", "\"type\":\"", "\"data\":{",
  "\"properties\":{\"completion-mode\":\"individual\"},",
  "backup-begin", "backup-end", "backup-list", "gate-close", "gate-open",
  "\"bitmap\":\"monday\",", "\"view\":false,", "\"fail-after\":9,", "\"success\":true,",
  "\"clear\":false,", "\"create\":true,", "\"timeout\":1,",
  "null", "-1e9", "\"", "'", "\\'", "\\u0000", "\\ud83d\\ude00", "{", "}", "[",
  "]", ",", ":", " ", "\x1b", "\xff", "\xc3\xa9", "[[[[[[[[", "]]]]]]]]",
};

size_t
LLVMFuzzerCustomMutator (uint8_t *data, size_t size, size_t max,
                         unsigned seed)
{
  const char *word = words[seed / 16 % (sizeof words / sizeof words[0])];
  const size_t length = strlen (word), at = seed / 1024 % (size + 1);

  if (seed % 4 > 0 || size + length > max)
    return LLVMFuzzerMutate (data, size, max);
  memmove (data + at + length, data + at, size - at);
  memcpy (data + at, word, length);
  return size + length;
}
