/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Opening a file that an image names, if the image may lead there.
 *
 * How this works
 *
 * The names are untrusted.  Their author must not be able to read, write, or
 * even open files that do not belong to the image:
 *
 * - A file is first opened without using it in any way (O_PATH).  Its true
 *   path, with all symbolic links resolved, and its type are checked.  Only
 *   if both are allowed, the very same file is opened for use, through
 *   /proc/self/fd.  So a change of the path in between makes no difference.
 * - The true path has to be in the image's own folder or below, or in a
 *   folder that the user allowed.  A block device must be in an allowed
 *   folder.
 * - json: and names with a protocol are not followed at all.
 *
 * Relative names are resolved as in QEMU, with one exception.  Names of
 * backing files are relative to the folder of the file that names them.  In
 * QEMU, names of data files, and names after "file:", are relative to the
 * current folder of the process that opens the image.  That can be a
 * different file every time, and for a server it is hardly ever the intended
 * one.  So these are taken from the image's folder, too.  But if the current
 * folder has another file of that name, the image is refused: we would write
 * to one data file and QEMU to the other.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "common/report.h"
#include "image/reference.h"

static int
invalid (int err)
{
  errno = err;
  return -1;
}

const char *
reference_name (const char *of)
{
  return of != NULL ? of : "the image";
}

/* Does a name begin with a protocol, by QEMU's rules?  Returns the length of
 * the protocol, or 0.
 */
static size_t
protocol_length (const char *name)
{
  const size_t n = strcspn (name, ":/");

  return name[n] == ':' ? n : 0;
}

/* The path of a name in the folder of a file. */
static char *
join (const char *of, const char *name)
{
  char *path = NULL;

  if (asprintf (&path, "%.*s/%s", (int) (strrchr (of, '/') - of), of,
                name) == -1) {
    report_error ("asprintf: %m");
    return NULL;
  }
  return path;
}

/* Does the current folder have a file of this name that is not the one at
 * path?
 */
static bool
is_ambiguous (const char *name, const char *path)
{
  struct stat here, there;

  return stat (name, &here) == 0 &&
    (stat (path, &there) == -1 ||
     here.st_dev != there.st_dev || here.st_ino != there.st_ino);
}

/* Can a name be that of a file at all?  From here on messages contain it. */
static int
check_name (const char *of, const char *name, const char *role)
{
  if (strlen (name) >= PATH_MAX) {
    report_error ("%s: the name of the %s is too long",
                  reference_name (of), role);
    return invalid (ENAMETOOLONG);
  }
  for (const unsigned char *p = (const unsigned char *) name; *p; ++p)
    if (*p < ' ' || *p == 0x7f) {
      report_error ("%s: the name of the %s contains the control character "
                    "0x%02x", reference_name (of), role, *p);
      return invalid (EINVAL);
    }
  return 0;
}

char *
reference_resolve (const char *of, const char *name, const char *role,
                   bool from_current_folder)
{
  const size_t protocol = protocol_length (name);
  char *path;

  if (check_name (of, name, role) == -1)
    return NULL;
  if (protocol != 0) {
    if (strncmp (name, "file:", 5) != 0) {
      report_error ("%s: the %s is named by '%s': names that begin with "
                    "'%.*s:' are not supported", reference_name (of), role,
                    name, (int) protocol, name);
      errno = ENOTSUP;
      return NULL;
    }
    name += 5;
    from_current_folder = true;
  }
  if (*name == '\0') {
    report_error ("%s: the name of the %s is empty",
                  reference_name (of), role);
    errno = EINVAL;
    return NULL;
  }
  if (*name == '/') {
    path = strdup (name);
    if (path == NULL)
      report_error ("strdup: %m");
    return path;
  }

  if (of == NULL) {
    report_error ("the %s of the image, '%s', is named relative to the "
                  "image's folder, which is not known, because the plugin "
                  "does not serve a local file", role, name);
    errno = EINVAL;
    return NULL;
  }
  path = join (of, name);
  if (path != NULL && from_current_folder && is_ambiguous (name, path)) {
    report_error ("%s: the %s is named '%s', which QEMU looks for in the "
                  "current folder, where it is a different file from '%s': "
                  "use an absolute name",
                  reference_name (of), role, name, path);
    free (path);
    errno = EINVAL;
    return NULL;
  }
  return path;
}

/* Is a true path in a folder or below it? */
static bool
is_below (const char *path, const char *folder)
{
  const size_t n = strlen (folder);

  if (strcmp (folder, "/") == 0)
    return *path == '/';
  return strncmp (path, folder, n) == 0 && path[n] == '/';
}

static bool
is_allowed (const struct reference_rules *rules, const char *true_path,
            bool is_block_device)
{
  if (!is_block_device && rules->own_folder != NULL &&
      is_below (true_path, rules->own_folder))
    return true;
  for (size_t i = 0; i < rules->nr_allowed; ++i)
    if (is_below (true_path, rules->allowed[i]))
      return true;
  return false;
}

/* The true path of the open file fd. */
static int
true_path (int fd, const char *path, char result[PATH_MAX])
{
  char link[64];
  ssize_t n;

  snprintf (link, sizeof link, "/proc/self/fd/%d", fd);
  n = readlink (link, result, PATH_MAX - 1);
  if (n == -1) {
    report_error ("%s: cannot find out where it is: readlink: %s: %m",
                  path, link);
    return -1;
  }
  if (n == PATH_MAX - 1) {
    report_error ("%s: its true path is too long", path);
    return invalid (ENAMETOOLONG);
  }
  result[n] = '\0';
  return 0;
}

/* Judge the open file fd, which has not been used yet. */
static int
check_place (const struct reference_rules *rules, int fd, const char *path,
             const char *role, const struct stat *statbuf)
{
  const bool is_block_device = S_ISBLK (statbuf->st_mode);
  char place[PATH_MAX];

  if (true_path (fd, path, place) == -1)
    return -1;
  if (!is_allowed (rules, place, is_block_device)) {
    report_error ("the %s '%s' is not opened, because it is %s: "
                  "dirty-bitmap-allow-path=DIR allows what is in the "
                  "folder DIR", role, path,
                  is_block_device ? "a block device"
                  : rules->own_folder != NULL
                  ? "not in the image's folder or below"
                  : "in no folder that is allowed");
    if (strcmp (place, path) != 0)
      report_error ("'%s' resolves to '%s'", path, place);
    return invalid (EACCES);
  }
  if (!is_block_device && !S_ISREG (statbuf->st_mode)) {
    report_error ("the %s '%s' is neither a file nor a block device",
                  role, path);
    return invalid (EINVAL);
  }
  return 0;
}

int
reference_find (const struct reference_rules *rules, const char *of,
                const char *path, const char *role, struct stat *statbuf)
{
  CLEANUP_CLOSE int place = open (path, O_PATH | O_CLOEXEC);
  int found;

  if (place == -1 || fstat (place, statbuf) == -1) {
    report_error ("%s: cannot open the %s '%s': %m",
                  reference_name (of), role, path);
    return -1;
  }
  if (check_place (rules, place, path, role, statbuf) == -1)
    return -1;
  found = place;
  place = -1;
  return found;
}

int
reference_open (int place, const char *path, const char *role, bool writable)
{
  const int flags = O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
  char link[64];
  int fd;

  snprintf (link, sizeof link, "/proc/self/fd/%d", place);
  fd = open (link, (writable ? O_RDWR : O_RDONLY) | flags);
  if (fd == -1)
    report_error ("cannot open the %s '%s'%s: %m", role, path,
                  writable ? " for writing" : "");
  return fd;
}
