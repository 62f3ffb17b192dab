/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Keys and certificates, by nbdkit's options of TLS.
 *
 * How this works
 *
 * The rules are those of nbdkit-tls(1), so that both servers behave alike:
 *
 * - --tls=off disables TLS.
 * - A file of keys (--tls-psk) counts before certificates.
 * - Certificates are in the directory of --tls-certificates, or else in one
 *   of the default ones.  A directory counts if it has the three files that
 *   a server needs.  If none has, there is no TLS; if TLS is required, that
 *   is an error.
 *
 * This is called while nbdkit still has its original user ID and current
 * directory, and the user still sees errors.
 */

#include <config.h>

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "common/report.h"
#include "nbd/nbd.h"
#include "nbdkit/command-line.h"
#include "nbdkit/tls-options.h"

static bool
has_certificates (const char *dir)
{
  static const char *const names[] = {
    "ca-cert.pem", "server-cert.pem", "server-key.pem"
  };
  size_t i;

  for (i = 0; i < sizeof names / sizeof names[0]; ++i) {
    CLEANUP_FREE char *path = NULL;

    if (asprintf (&path, "%s/%s", dir, names[i]) == -1) {
      path = NULL;
      return false;
    }
    if (access (path, R_OK) == -1)
      return false;
  }
  return true;
}

/* nbdkit looks in one place for root, and in two places in the home
 * directory of other users.  The result is for the caller to free; NULL if
 * there are none.
 */
static char *
default_certificates (void)
{
  static const char *const places[] = { ".pki/nbdkit", ".config/pki/nbdkit" };
  const char *home = getenv ("HOME");
  size_t i;

  if (geteuid () == 0)
    return has_certificates (NBDKIT_TLS_CERTIFICATES_DIR)
      ? strdup (NBDKIT_TLS_CERTIFICATES_DIR) : NULL;
  for (i = 0; home != NULL && i < sizeof places / sizeof places[0]; ++i) {
    char *path;

    if (asprintf (&path, "%s/%s", home, places[i]) == -1)
      return NULL;
    if (has_certificates (path))
      return path;
    free (path);
  }
  return NULL;
}

/* The directory to use, for the caller to free; NULL if there is none. */
static char *
find_certificates (const struct command_line_tls *tls)
{
  if (tls->certificates == NULL)
    return default_certificates ();
  if (has_certificates (tls->certificates))
    return strdup (tls->certificates);
  if (tls->mode != TLS_REQUIRE)
    report_warning ("--tls-certificates=%s: ca-cert.pem, server-cert.pem or "
                    "server-key.pem is missing or cannot be read: "
                    "clients are served without TLS", tls->certificates);
  return NULL;
}

int
tls_options_load (const struct command_line_tls *cl, struct nbd_tls **tls)
{
  struct nbd_tls_options options = {
    .required = cl->mode == TLS_REQUIRE,
    .psk_file = cl->psk,
    .verify_peer = cl->verify_peer,
    .priority = cl->priority != NULL ? cl->priority : TLS_PRIORITY,
  };
  CLEANUP_FREE char *certificates = NULL;

  *tls = NULL;
  if (cl->mode == TLS_OFF)
    return 0;
  if (cl->psk == NULL) {
    options.certificates = certificates = find_certificates (cl);
    if (certificates == NULL && options.required) {
      report_error ("--tls=require: there are no certificates in %s",
                    cl->certificates != NULL ? cl->certificates
                    : "the default places");
      return -1;
    }
    if (certificates == NULL)
      return 0;
  }
  *tls = nbd_tls_load (&options);
  return *tls != NULL ? 0 : -1;
}
