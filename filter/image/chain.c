/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The files that the image refers to: its backing files and data files.
 *
 * How this works
 *
 * From the image downward, this follows the names in the headers, opens and
 * locks each file, and determines its format.  Then it opens the images,
 * from the last one upward, since each needs the one below.
 *
 * Names are followed only to where they may lead (reference.c): to the
 * image's own folder (that of the path the user gave), or to folders that
 * the user allowed.  An image on a block device has no folder of its own:
 * every disk of the machine would be in it.  No file is used twice, which
 * also ends every cycle.
 *
 * Where the header does not say which format a backing file has, QEMU looks
 * at its first bytes.  A guest may have written these, into a raw file that
 * was once its disk: it then looks like an image with names of the guest's
 * choice.  QEMU no longer creates headers that do not name the format.  So
 * probing is good enough for reading an image (-r), as QEMU would, but not
 * for writing.  A file that looks like any format that QEMU recognises, but
 * that is not supported here, is never taken for raw.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/report.h"
#include "container/container.h"
#include "disk/disk.h"
#include "image/chain.h"
#include "image/image-lock.h"
#include "image/probe.h"
#include "image/reference.h"
#include "qcow2/bitmap-directory.h"
#include "qcow2/qcow2.h"

/* Limits on what an untrusted image can make us open and keep in memory. */
#define MAX_BACKING_FILES 200
#define MAX_TABLES_BYTES (UINT64_C (512) << 20)

/* An open file. */
struct chain_file {
  char *path;                   /* absolute, as it was named */
  int fd;
  dev_t dev;
  ino_t ino;
  struct container *container;
};

/* A backing file, or what is kept of the image itself. */
struct chain_image {
  struct chain_file file;       /* of the image itself: the path alone */
  bool is_raw;
  struct qcow2_references references;
  struct chain_file data;       /* if the references have one */
  struct qcow2 *qcow2;          /* NULL for the image itself, and if raw */
};

struct chain {
  const struct chain_options *options; /* while it is being opened */
  struct stat top;              /* of the image's file, if it is known */
  char *own_folder;             /* the true path of its folder, or NULL */
  struct chain_image *image;    /* the image itself, then its backing file
                                   and so on */
  size_t nr_images;
  struct disk_backing *backing; /* those images that are qcow2 */
  size_t nr_backing;
  bool has_disk;                /* see chain_has_disk */
  bool is_top_alone;            /* as in the options */
};

/* The image's name in messages. */
static const char *
name_of (const struct chain_image *i)
{
  return reference_name (i->file.path);
}

static int
invalid (int err)
{
  errno = err;
  return -1;
}

static bool
same_file (const struct stat *s, dev_t dev, ino_t ino)
{
  return s->st_dev == dev && s->st_ino == ino;
}

/* Which image already uses the file?  NULL if none. */
static const struct chain_image *
find_user (const struct chain *chain, const struct stat *s)
{
  for (size_t i = 0; i < chain->nr_images; ++i) {
    const struct chain_image *image = &chain->image[i];

    if (i == 0 ? chain->options->fd != -1 &&
        same_file (s, chain->top.st_dev, chain->top.st_ino)
        : same_file (s, image->file.dev, image->file.ino))
      return image;
    if (image->data.fd != -1 &&
        same_file (s, image->data.dev, image->data.ino))
      return image;
  }
  return NULL;
}

static void
close_file (struct chain_file *f)
{
  container_close (f->container);
  if (f->fd != -1)
    close (f->fd);
  free (f->path);
}

static struct reference_rules
rules_of (const struct chain *chain)
{
  return (struct reference_rules) {
    .own_folder = chain->own_folder,
    .allowed = chain->options->allowed,
    .nr_allowed = chain->options->nr_allowed,
  };
}

/* Open the file at path.  f owns it, whatever this returns. */
static int
open_file (const struct chain *chain, const struct chain_image *of,
           char *path, const char *role, bool writable,
           struct chain_file *f)
{
  const struct reference_rules rules = rules_of (chain);
  struct stat statbuf;
  CLEANUP_CLOSE int place = reference_find (&rules, of->file.path, path, role,
                                            &statbuf);
  const struct chain_image *user;

  *f = (struct chain_file) { .path = path, .fd = -1 };
  if (place == -1)
    return -1;
  user = find_user (chain, &statbuf);
  if (user != NULL) {
    report_error ("%s: the %s '%s' is in use already in the same chain, by or "
                  "as '%s'", name_of (of), role, path, name_of (user));
    return invalid (ELOOP);
  }
  f->dev = statbuf.st_dev;
  f->ino = statbuf.st_ino;

  f->fd = reference_open (place, path, role, writable);
  if (f->fd == -1)
    return -1;
  if (image_lock (f->fd, path, !writable) == -1)
    return -1;
  f->container = writable ? container_open_file_writable (f->fd)
                          : container_open_file (f->fd);
  if (f->container == NULL) {
    report_error ("%s: %m", path);
    return -1;
  }
  return 0;
}

/* Called only if there is a file to open. */
static int
find_own_folder (struct chain *chain)
{
  const struct chain_options *o = chain->options;
  const char *path = o->path;
  CLEANUP_FREE char *folder = NULL;

  if (path == NULL || chain->own_folder != NULL ||
      (o->fd != -1 && S_ISBLK (chain->top.st_mode)))
    return 0;
  if (asprintf (&folder, "%.*s/.", (int) (strrchr (path, '/') - path),
                path) == -1) {
    folder = NULL;
    report_error ("asprintf: %m");
    return -1;
  }
  chain->own_folder = realpath (folder, NULL);
  if (chain->own_folder == NULL) {
    report_error ("realpath: %s: %m", folder);
    return -1;
  }
  return 0;
}

/* The data file of an image beside a disk: its file. */
static int
compare_disk (struct chain *chain, const struct chain_image *image)
{
  const struct stat *disk = chain->options->disk;
  CLEANUP_FREE char *path = NULL;
  struct reference_rules rules;
  struct stat statbuf;
  CLEANUP_CLOSE int place = -1;

  if (!image->references.data_file_raw) {
    report_error ("%s: the image has an external data file that is not raw, "
                  "so its disk cannot be served from there: serve the image "
                  "itself", name_of (image));
    return invalid (EINVAL);
  }
  path = reference_resolve (image->file.path, image->references.data_file_name,
                            "data file", true);
  if (path == NULL || find_own_folder (chain) == -1)
    return -1;
  if (disk == NULL) {
    report_error ("%s: the image has the external data file '%s', and it "
                  "cannot be known whether the disk is that file",
                  name_of (image), path);
    return invalid (EINVAL);
  }
  rules = rules_of (chain);
  place = reference_find (&rules, image->file.path, path, "data file",
                          &statbuf);
  if (place == -1)
    return -1;
  if (!same_file (&statbuf, disk->st_dev, disk->st_ino)) {
    report_error ("%s: the image has the external data file '%s', which is "
                  "not the disk that is served", name_of (image), path);
    return invalid (EINVAL);
  }
  chain->has_disk = true;
  return 0;
}

/* Open the external data file of the image that was added last. */
static int
open_data_file (struct chain *chain)
{
  struct chain_image *image = &chain->image[chain->nr_images - 1];
  const struct qcow2_references *r = &image->references;
  const bool is_top = chain->nr_images == 1;
  const bool writable = is_top && !chain->options->readonly;
  char *path;

  if (!r->has_data_file)
    return 0;
  if (r->data_file_name == NULL) {
    report_error ("%s: the image has an external data file, but its header "
                  "does not name it", name_of (image));
    return invalid (EINVAL);
  }
  if (is_top && chain->options->is_beside)
    return compare_disk (chain, image);
  /* Otherwise there would be guest data that the image does not refer to, in
   * place of those that it does.
   */
  if (writable && chain->options->holds_writes) {
    report_error ("%s: the image has an external data file, which would be "
                  "written, while a filter keeps what is written to the "
                  "image elsewhere: serve it read-only (-r)",
                  name_of (image));
    return invalid (EINVAL);
  }
  path = reference_resolve (image->file.path, r->data_file_name, "data file",
                            true);
  if (path == NULL || find_own_folder (chain) == -1) {
    free (path);
    return -1;
  }
  return open_file (chain, image, path, "data file", writable, &image->data);
}

/* The format of a backing file according to its first bytes. */
static const char *
probe (const struct chain_file *f, const char *role)
{
  uint8_t first[PROBE_BYTES];

  if (container_pread (f->container, first, sizeof first, 0) == -1) {
    report_error ("%s '%s': %m", role, f->path);
    return NULL;
  }
  return probe_format (first, container_size (f->container), f->path);
}

/* The header does not name the format.  -1, with the reason reported, if
 * that is not allowed.
 */
static int
guess_format (const struct chain *chain, const struct chain_image *of,
              const struct chain_file *f, const char **format)
{
  const char *name = of->references.backing_name;

  *format = probe (f, "backing file");
  if (*format == NULL)
    return -1;
  if (strcmp (*format, "raw") != 0 && strcmp (*format, "qcow2") != 0) {
    report_error ("%s: the header does not say which format the backing file "
                  "'%s' has, and it looks like %s, which is not supported",
                  name_of (of), f->path, *format);
    return invalid (ENOTSUP);
  }
  if (!chain->options->readonly) {
    report_error ("%s: the header does not say which format the backing file "
                  "'%s' has (it looks like %s), so the image can only be "
                  "served read-only (-r); if that is its format, "
                  "record it with qemu-img rebase -u -b '%s' -F %s '%s'",
                  name_of (of), f->path, *format, name, *format,
                  of->file.path != NULL ? of->file.path : "IMAGE");
    return invalid (EPERM);
  }
  report_warning ("%s: the header does not say which format the backing file "
                  "'%s' has, and it is taken for %s", name_of (of), f->path,
                  *format);
  return 0;
}

static int
find_format (const struct chain *chain, const struct chain_image *of,
             const struct chain_file *f, bool *is_raw)
{
  const char *format = of->references.backing_format;

  if (format == NULL && guess_format (chain, of, f, &format) == -1)
    return -1;
  *is_raw = strcmp (format, "raw") == 0;
  if (!*is_raw && strcmp (format, "qcow2") != 0) {
    report_error ("%s: the backing file '%s' has the format '%s', which is "
                  "not supported", name_of (of), f->path,
                  bitmap_show_name (format, strlen (format)).text);
    return invalid (ENOTSUP);
  }
  return 0;
}

/* Add another image, with all fields empty. */
static struct chain_image *
add_image (struct chain *chain)
{
  struct chain_image *images =
    reallocarray (chain->image, chain->nr_images + 1, sizeof *images);

  if (images == NULL) {
    report_error ("realloc: %m");
    return NULL;
  }
  chain->image = images;
  images += chain->nr_images;
  memset (images, 0, sizeof *images);
  images->file.fd = images->data.fd = -1;
  return images;
}

/* Add the backing file of the image that was added last. */
static int
open_backing_file (struct chain *chain)
{
  struct chain_image *image = add_image (chain), *of;
  struct chain_file f;
  bool is_raw = false;
  char *path;
  int r;

  if (image == NULL)
    return -1;
  of = image - 1;
  if (chain->nr_images > MAX_BACKING_FILES) {
    report_error ("%s: the chain has more than %d backing files",
                  name_of (&chain->image[0]), MAX_BACKING_FILES);
    return invalid (EMLINK);
  }
  path = reference_resolve (of->file.path, of->references.backing_name,
                            "backing file", false);
  if (path == NULL || find_own_folder (chain) == -1) {
    free (path);
    return -1;
  }
  r = open_file (chain, of, path, "backing file", false, &f);
  if (r == 0)
    r = find_format (chain, of, &f, &is_raw);
  if (r == -1) {
    close_file (&f);
    return -1;
  }
  image->file = f;
  image->is_raw = is_raw;
  chain->nr_images++;
  return 0;
}

static int
leave_out_backing (const struct chain *chain, const struct chain_image *image)
{
  if (chain->options->readonly)
    return 0;
  report_error ("%s: dirty-bitmap-backing=off: the image has a backing file, "
                "and what is written beside its data would be lost: serve it "
                "read-only (-r)", name_of (image));
  return invalid (EPERM);
}

/* Follow the references of the image that was added last, until there
 * are no more.
 */
static int
follow (struct chain *chain, struct container *c)
{
  for (;;) {
    struct chain_image *image = &chain->image[chain->nr_images - 1];

    if (image->is_raw)
      return 0;
    if (qcow2_read_references (c, &image->references) == -1) {
      if (chain->nr_images > 1)
        report_error ("the backing file '%s' cannot be opened",
                      image->file.path);
      return -1;
    }
    if (open_data_file (chain) == -1)
      return -1;
    if (image->references.backing_name == NULL)
      return 0;
    if (chain->options->is_beside) {
      report_error ("%s: the image has a backing file, which an image beside "
                    "a disk cannot have", name_of (image));
      return invalid (EINVAL);
    }
    if (chain->options->is_top_alone)
      return leave_out_backing (chain, image);
    if (open_backing_file (chain) == -1)
      return -1;
    c = chain->image[chain->nr_images - 1].file.container;
  }
}

/* The layer that provides what image i does not have. */
static struct qcow2_layer
layer_below (const struct chain *chain, size_t i)
{
  struct qcow2_layer layer = { 0 };

  if (i + 1 < chain->nr_images) {
    const struct chain_image *below = &chain->image[i + 1];

    if (below->is_raw)
      layer.raw = below->file.container;
    else
      layer.image = below->qcow2;
  }
  return layer;
}

/* Open the images, the last one first.  All backing files together have half
 * as much memory for their tables as the image itself: they map no more than
 * the image does, and their tables are never dirty.
 */
static int
open_images (struct chain *chain)
{
  const uint64_t cache_size = chain->options->cache_size / 2;
  uint64_t tables_bytes = 0;

  chain->backing = calloc (chain->nr_images, sizeof *chain->backing);
  if (chain->backing == NULL) {
    report_error ("calloc: %m");
    return -1;
  }
  for (size_t i = chain->nr_images - 1; i > 0; --i) {
    struct chain_image *image = &chain->image[i];
    const struct qcow2_options options = {
      .readonly = true,
      .cache_size = cache_size / (chain->nr_images - 1),
      .backing = layer_below (chain, i),
      .data_file = image->data.container,
    };

    if (image->is_raw)
      continue;
    image->qcow2 = qcow2_open (image->file.container, &options);
    if (image->qcow2 == NULL) {
      report_error ("the backing file '%s' cannot be opened",
                    image->file.path);
      return -1;
    }
    tables_bytes += qcow2_tables_bytes (image->qcow2);
    if (tables_bytes > MAX_TABLES_BYTES) {
      report_error ("the L1 tables of the backing files are too large");
      return invalid (EFBIG);
    }
  }
  for (size_t i = 1; i < chain->nr_images; ++i)
    if (!chain->image[i].is_raw)
      chain->backing[chain->nr_backing++] = (struct disk_backing) {
        chain->image[i].qcow2, chain->image[i].file.path
      };
  return 0;
}

static int
init (struct chain *chain, const struct chain_options *options)
{
  struct chain_image *top = add_image (chain);

  if (top == NULL)
    return -1;
  chain->options = options;
  chain->is_top_alone = options->is_top_alone;
  chain->nr_images = 1;
  if (options->fd != -1 && fstat (options->fd, &chain->top) == -1) {
    report_error ("fstat: %m");
    return -1;
  }
  if (options->path == NULL)
    return 0;

  top->file.path = strdup (options->path);
  if (top->file.path == NULL) {
    report_error ("strdup: %m");
    return -1;
  }
  return 0;
}

struct chain *
chain_open (struct container *image, const struct chain_options *options)
{
  struct chain *chain = calloc (1, sizeof *chain);

  if (chain == NULL) {
    report_error ("calloc: %m");
    return NULL;
  }
  if (init (chain, options) == -1 || follow (chain, image) == -1 ||
      open_images (chain) == -1) {
    const int err = errno;

    chain_close (chain);
    errno = err;
    return NULL;
  }
  chain->options = NULL;
  return chain;
}

void
chain_close (struct chain *chain)
{
  if (chain == NULL)
    return;
  /* From the top: no image outlives the one below it. */
  for (size_t i = 0; i < chain->nr_images; ++i) {
    struct chain_image *image = &chain->image[i];

    qcow2_close (image->qcow2);
    qcow2_free_references (&image->references);
    close_file (&image->data);
    close_file (&image->file);
  }
  free (chain->image);
  free (chain->backing);
  free (chain->own_folder);
  free (chain);
}

bool
chain_has_disk (const struct chain *chain)
{
  return chain->has_disk;
}

void
chain_give (const struct chain *chain, struct disk_options *o)
{
  o->below = layer_below (chain, 0);
  o->data_file = chain->image[0].data.container;
  o->backing = chain->backing;
  o->nr_backing = chain->nr_backing;
  o->is_top_alone = chain->is_top_alone;
}
