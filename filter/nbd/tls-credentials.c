/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* TLS: what is loaded once for all connections.
 *
 * It is not changed afterwards, so all connections use it at once
 * (GnuTLS allows that), with one exception that is GnuTLS's: it opens
 * the file of keys again for each client, so that keys can be added and
 * taken away while we serve.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "common/report.h"
#include "nbd/nbd.h"
#include "nbd/tls.h"

struct nbd_tls {
  bool required, verify_peer;
  gnutls_certificate_credentials_t x509; /* or NULL, and */
  gnutls_psk_server_credentials_t psk;
  gnutls_priority_t priority;
};

bool
nbd_tls_is_required (const struct nbd_tls *tls)
{
  return tls->required;
}

/* A GnuTLS error, about what. */
static int
failed (const char *what, int err)
{
  report_error ("TLS: %s: %s", what, gnutls_strerror (err));
  return -1;
}

static int
load_trust (struct nbd_tls *tls, const char *dir)
{
  CLEANUP_FREE char *ca = NULL;
  CLEANUP_FREE char *crl = NULL;
  int r;

  if (asprintf (&ca, "%s/ca-cert.pem", dir) == -1 ||
      asprintf (&crl, "%s/ca-crl.pem", dir) == -1) {
    report_error ("malloc: %m");
    return -1;
  }
  r = gnutls_certificate_set_x509_trust_file (tls->x509, ca,
                                              GNUTLS_X509_FMT_PEM);
  if (r < 0)
    return failed (ca, r);
  /* It returns how many it found: none is as good as no file. */
  if (r == 0)
    return failed (ca, GNUTLS_E_NO_CERTIFICATE_FOUND);

  /* Where a list of revoked certificates cannot be read, clients must
   * not be served without it.
   */
  if (access (crl, F_OK) == -1 && errno == ENOENT)
    return 0;
  r = gnutls_certificate_set_x509_crl_file (tls->x509, crl,
                                            GNUTLS_X509_FMT_PEM);
  return r < 0 ? failed (crl, r) : 0;
}

static int
load_certificates (struct nbd_tls *tls, const char *dir)
{
  CLEANUP_FREE char *cert = NULL;
  CLEANUP_FREE char *key = NULL;
  CLEANUP_FREE char *both = NULL;
  int r = gnutls_certificate_allocate_credentials (&tls->x509);

  if (r < 0)
    return failed ("credentials", r);
  if (load_trust (tls, dir) == -1)
    return -1;
  if (asprintf (&cert, "%s/server-cert.pem", dir) == -1 ||
      asprintf (&key, "%s/server-key.pem", dir) == -1 ||
      asprintf (&both, "%s with %s", cert, key) == -1) {
    report_error ("malloc: %m");
    return -1;
  }
  r = gnutls_certificate_set_x509_key_file (tls->x509, cert, key,
                                            GNUTLS_X509_FMT_PEM);
  if (r < 0)
    return failed (both, r);
  r = gnutls_certificate_set_known_dh_params (tls->x509,
                                              GNUTLS_SEC_PARAM_MEDIUM);
  return r < 0 ? failed ("parameters", r) : 0;
}

/* The path is made absolute: a daemon has another current directory. */
static int
load_psk (struct nbd_tls *tls, const char *file)
{
  CLEANUP_FREE char *path = realpath (file, NULL);
  CLEANUP_CLOSE int fd = -1;
  int r;

  if (path == NULL ||
      (fd = open (path, O_RDONLY | O_CLOEXEC)) == -1) {
    report_error ("TLS: %s: %m", file);
    return -1;
  }
  r = gnutls_psk_allocate_server_credentials (&tls->psk);
  if (r < 0)
    return failed ("credentials", r);
  r = gnutls_psk_set_server_credentials_file (tls->psk, path);
  if (r < 0)
    return failed (path, r);
  r = gnutls_psk_set_server_known_dh_params (tls->psk,
                                             GNUTLS_SEC_PARAM_MEDIUM);
  return r < 0 ? failed ("parameters", r) : 0;
}

static int
load_priority (struct nbd_tls *tls, const char *priority)
{
  CLEANUP_FREE char *all = NULL;
  const char *bad;
  int r;

  if (asprintf (&all, "%s%s", priority, tls->psk != NULL
                ? ":+ECDHE-PSK:+DHE-PSK:+PSK" : "") == -1) {
    all = NULL;
    report_error ("malloc: %m");
    return -1;
  }
  r = gnutls_priority_init (&tls->priority, all, &bad);
  if (r == GNUTLS_E_INVALID_REQUEST) {
    report_error ("TLS: priority '%s': not understood at '%s'",
                  priority, bad);
    return -1;
  }
  if (r < 0) {
    report_error ("TLS: priority '%s': %s", priority, gnutls_strerror (r));
    return -1;
  }
  return 0;
}

struct nbd_tls *
nbd_tls_load (const struct nbd_tls_options *options)
{
  struct nbd_tls *tls = calloc (1, sizeof *tls);

  if (tls == NULL) {
    report_error ("malloc: %m");
    return NULL;
  }
  tls->required = options->required;
  tls->verify_peer = options->verify_peer;
  if ((options->psk_file != NULL
       ? load_psk (tls, options->psk_file)
       : load_certificates (tls, options->certificates)) == -1 ||
      load_priority (tls, options->priority) == -1) {
    nbd_tls_free (tls);
    return NULL;
  }
  report_debug ("TLS: loaded %s; priority %s",
                options->psk_file != NULL ? options->psk_file
                : options->certificates, options->priority);
  return tls;
}

void
nbd_tls_free (struct nbd_tls *tls)
{
  if (tls == NULL)
    return;
  if (tls->priority != NULL)
    gnutls_priority_deinit (tls->priority);
  if (tls->x509 != NULL)
    gnutls_certificate_free_credentials (tls->x509);
  if (tls->psk != NULL)
    gnutls_psk_free_server_credentials (tls->psk);
  free (tls);
}

/* Where certificates of clients are verified, a client that shows none
 * is refused as well.
 */
static int
configure (const struct nbd_tls *tls, gnutls_session_t session)
{
  int r = gnutls_priority_set (session, tls->priority);

  if (r < 0)
    return r;
  if (tls->psk != NULL)
    return gnutls_credentials_set (session, GNUTLS_CRD_PSK, tls->psk);

  if (tls->verify_peer) {
    gnutls_certificate_server_set_request (session, GNUTLS_CERT_REQUIRE);
    gnutls_session_set_verify_cert (session, NULL, 0);
  }
  return gnutls_credentials_set (session, GNUTLS_CRD_CERTIFICATE, tls->x509);
}

int
nbd_tls_new_session (const struct nbd_tls *tls, gnutls_session_t *session)
{
  int r = gnutls_init (session, GNUTLS_SERVER | GNUTLS_NONBLOCK |
                       GNUTLS_NO_SIGNAL);

  if (r < 0)
    return r;
  r = configure (tls, *session);
  if (r < 0)
    gnutls_deinit (*session);
  return r;
}
