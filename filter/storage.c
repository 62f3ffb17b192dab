/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Opening what is served.
 *
 * With dirty-bitmap-image there are two storages: the plugin has the guest's
 * disk, and the file that the parameter names is an image that has nothing
 * but the disk's bitmaps.  Or the image's raw external data file is the very
 * file that the plugin serves; then the image's tables say what is in it.
 */

#include <config.h>

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "common/folder.h"
#include "container/container.h"
#include "container/next.h"
#include "disk/disk.h"
#include "image/chain.h"
#include "nbdkit/command-line.h"
#include "nbdkit/filter-stack.h"
#include "parameters.h"
#include "storage.h"

static bool
is_beside (const struct storage *s)
{
  return s->parameters->image != NULL;
}

static bool
is_readonly (const struct storage *s)
{
  return s->command_line->readonly || s->parameters->snapshot != NULL;
}

static void
get_disk_options (const struct storage *s, bool readonly,
                  struct disk_options *o)
{
  const struct parameters *p = s->parameters;

  *o = (struct disk_options) {
    .readonly = readonly || is_readonly (s),
    .snapshot = p->snapshot,
    .keep = p->keep,
    .detect_zeroes = p->detect_zeroes,
    .cache_size = p->cache_size,
    .granularity = p->granularity,
    .require = (const char *const *) p->require.name,
    .nr_require = p->require.nr,
    .expose = (const char *const *) p->expose.name,
    .nr_expose = p->expose.nr,
    .load_all = p->is_controlled,
    .scratch = p->scratch != NULL ? p->scratch : s->default_scratch,
    .scratch_max = p->scratch_size,
    .view_memory = p->view_memory,
    .is_beside = is_beside (s),
    .beside = s->beside,
  };
  chain_give (s->chain, o);
  o->beside_is_data_file = chain_has_disk (s->chain);
}

/* Where views keep what the disk does not have any more: beside the disk's
 * file, where such an amount is most likely to fit, or beside its bitmaps, or
 * else where the system has temporary files that need not fit into memory.
 */
static int
choose_scratch (struct storage *s)
{
  const char *dir = getenv ("TMPDIR");

  if (!s->parameters->is_controlled || s->parameters->scratch != NULL)
    return 0;
  if (s->file.true_path != NULL && !s->file.is_block_device)
    s->default_scratch = folder_of (s->file.true_path);
  else if (is_beside (s))
    s->default_scratch = folder_of (s->bitmaps.path);
  else {
    if (dir != NULL)
      s->default_scratch = realpath (dir, NULL);
    if (s->default_scratch == NULL)
      s->default_scratch = strdup ("/var/tmp");
  }
  if (s->default_scratch != NULL)
    return 0;
  nbdkit_error ("strdup: %m");
  return -1;
}

/* Does the plugin serve the bytes of the file that is open? */
static bool
has_same_bytes (const struct storage *s)
{
  return s->file.fd != -1 && s->file.differs == NULL;
}

/* Open the files that the image refers to. */
static int
open_chain (struct storage *s, struct container *image, bool readonly)
{
  const bool beside = is_beside (s);
  struct stat disk;
  const struct chain_options options = {
    .readonly = readonly,
    .holds_writes = filter_stack_holds_writes (s->command_line),
    .path = beside ? s->bitmaps.path : s->file.path,
    .fd = beside ? s->bitmaps.fd : s->file.fd,
    .allowed = (const char *const *) s->parameters->allow.name,
    .nr_allowed = s->parameters->allow.nr,
    .cache_size = s->parameters->cache_size,
    .is_beside = beside,
    .is_top_alone = s->parameters->is_top_alone,
    .disk = has_same_bytes (s) ? &disk : NULL,
  };

  if (options.disk != NULL && fstat (s->file.fd, &disk) == -1) {
    nbdkit_error ("%s: %m", s->file.path);
    return -1;
  }
  s->chain = chain_open (image, &options);
  return s->chain == NULL ? -1 : 0;
}

/* Check that the image can be served.  disk is the disk beside it, open
 * read-only, or NULL if there is none, or its size is not known yet.
 */
static int
check_image_with (struct storage *s, struct container *image,
                  struct container *disk, bool readonly)
{
  struct disk_options options;

  if (open_chain (s, image, readonly) == -1)
    return -1;
  get_disk_options (s, readonly, &options);
  options.beside = s->file.is_direct || options.beside_is_data_file ? disk
    : NULL;
  return disk_check (image, &options);
}

static struct container *
open_file_for_check (const struct storage *s)
{
  struct container *c = container_open_file (s->file.fd);

  if (c == NULL)
    nbdkit_error ("%s: %m", s->file.path);
  return c;
}

/* If the bytes that will be served are the file's. */
static int
check_image (struct storage *s)
{
  struct container *image;
  int r;

  if (s->file.differs != NULL)
    return 0;
  image = open_file_for_check (s);
  if (image == NULL)
    return -1;
  r = check_image_with (s, image, NULL, s->file.readonly);
  container_close (image);
  return r;
}

/* The same of an image beside the disk.  If there is none it is made, once the
 * size of the disk is known.
 */
static int
check_beside (struct storage *s)
{
  struct container *image, *disk = NULL;
  int r = -1;

  if (s->bitmaps.fd == -1 && !s->file.is_direct)
    return 0;
  if (has_same_bytes (s) && (disk = open_file_for_check (s)) == NULL)
    return -1;
  if (s->bitmaps.fd != -1 ||
      bitmaps_file_create (&s->bitmaps, container_size (disk)) == 0) {
    image = bitmaps_file_container (&s->bitmaps, true);
    if (image != NULL)
      r = check_image_with (s, image, disk, s->bitmaps.readonly);
    container_close (image);
  }
  container_close (disk);
  if (r == 0)
    bitmaps_file_compare_times (&s->bitmaps, &s->file);
  return r;
}

int
storage_prepare (struct storage *s)
{
  s->file.is_disk = is_beside (s);
  if (image_file_open (&s->file, s->command_line, is_readonly (s)) == -1)
    return -1;
  if (!is_beside (s))
    return choose_scratch (s) == -1 ? -1 : check_image (s);
  s->bitmaps.path = s->parameters->image;
  if (bitmaps_file_open (&s->bitmaps, s->file.readonly) == -1)
    return -1;
  return choose_scratch (s) == -1 ? -1 : check_beside (s);
}

static struct container *
open_plugin (struct storage *s, nbdkit_backend *backend, bool serialize)
{
  const struct container_next_options options = {
    .backend = backend,
    .readonly = is_readonly (s),
    .serialize = serialize,
    .fd = s->file.fd,
    .path = s->file.true_path,
    .same_bytes = s->file.differs == NULL,
    .is_disk = is_beside (s),
  };
  struct container *c = container_open_next (&options);

  if (c != NULL && image_file_attach (&s->file, c) == -1) {
    container_close (c);
    return NULL;
  }
  return c;
}

static struct container *
open_bottom (struct storage *s, nbdkit_backend *backend, bool serialize)
{
  return s->file.is_direct ? image_file_container (&s->file)
    : open_plugin (s, backend, serialize);
}

/* Open the image beside the disk, which is open. */
static struct container *
open_image_beside (struct storage *s)
{
  struct bitmaps_file *f = &s->bitmaps;

  if (f->fd == -1) {
    if (s->beside->readonly) {
      nbdkit_error ("dirty-bitmap-image: %s: it does not exist, and the disk "
                    "is read-only", f->path);
      return NULL;
    }
    if (bitmaps_file_create (f, container_size (s->beside)) == -1)
      return NULL;
    bitmaps_file_compare_times (f, &s->file);
  }
  return bitmaps_file_container (f, f->readonly || s->beside->readonly);
}

static struct disk *
open_disk (struct storage *s, struct container *image)
{
  struct disk_options options;

  if (s->chain == NULL && open_chain (s, image, image->readonly) == -1)
    return NULL;
  get_disk_options (s, image->readonly, &options);
  return disk_open (image, &options);
}

struct disk *
storage_open (struct storage *s, nbdkit_backend *backend, bool serialize)
{
  struct container *image = open_bottom (s, backend, serialize);
  struct disk *disk = NULL;

  if (image != NULL && is_beside (s)) {
    s->beside = image;
    image = open_image_beside (s);
  }
  if (image != NULL)
    disk = open_disk (s, image);
  if (disk == NULL) {
    container_close (image);
    container_close (s->beside);
    s->beside = NULL;
  }
  return disk;
}

const char *
storage_name (const struct storage *s)
{
  return s->file.path != NULL ? s->file.path
    : s->command_line->plugin != NULL ? s->command_line->plugin : "";
}

void
storage_close_disk (struct storage *s, bool stored)
{
  container_close (s->beside);
  s->beside = NULL;
  chain_close (s->chain);
  s->chain = NULL;
  if (stored)
    bitmaps_file_set_time (&s->bitmaps, &s->file);
}

void
storage_free (struct storage *s)
{
  storage_close_disk (s, false);
  image_file_close (&s->file);
  bitmaps_file_close (&s->bitmaps);
  free (s->default_scratch);
  s->default_scratch = NULL;
}
