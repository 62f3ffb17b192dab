/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* Negotiation of options: fixed newstyle.
 *
 * An option is taken piece by piece as it is parsed (struct option), so
 * that its length costs no memory.  Every option but EXPORT_NAME gets
 * exactly one final reply, and when it has been sent the option has
 * been taken to its last byte, however malformed it was: the stream
 * stays in step.
 *
 * Functions that handle an option return 0 to go on, 1 if transmission
 * begins, -1 if the connection ends.
 *
 * Which names there are is for exports.c to say; one that is unknown is
 * refused by every option that has one.
 *
 * STARTTLS.  Where TLS is required, every other option is refused until
 * it has come (negotiate).  An attacker between client and server can put
 * plaintext before the client's handshake, and it must not be taken for the
 * client's:
 *
 * - what was negotiated in plaintext is forgotten;
 * - a client that means it sends nothing behind STARTTLS before it has
 *   our answer; if there is anything, the connection ends;
 * - what comes later than that is for GnuTLS to judge, since from then on
 *   GnuTLS alone reads the socket.
 */

#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "common/cleanup.h"
#include "common/bytes.h"
#include "nbd/client-errors.h"
#include "nbd/contexts.h"
#include "nbd/debug.h"
#include "nbd/handshake.h"
#include "nbd/output.h"
#include "nbd/tls.h"
#include "nbd/trace.h"

/* QEMU's bound.  A client that wants to send more is cut off. */
#define MAX_OPTION_LENGTH (UINT32_C (32) * 1024 * 1024)

/* A client that has been told of exports may ask for each of them: qemu-nbd
 * --list and nbdinfo --list send two options an export or more, on one
 * connection.  nbdkit's bound for an export is the same.
 */
#define MAX_OPTIONS 4096
#define OPTIONS_PER_EXPORT 32

static uint16_t
transmission_flags (const struct worker *w, const struct export *export,
                    bool selects_contexts)
{
  const uint16_t changes = NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES |
    NBD_FLAG_SEND_FAST_ZERO;
  uint16_t flags = w->service->eflags;

  if (!export_is_disk (export))
    flags = (flags & ~changes) | NBD_FLAG_READ_ONLY;
  return flags | (w->session->structured ? NBD_FLAG_SEND_DF : 0) |
    (w->session->extended && selects_contexts
     ? NBD_FLAG_BLOCK_STATUS_PAYLOAD : 0);
}

static int
opt_export_name (struct option *o, struct selection *selection,
                 bool no_zeroes)
{
  struct worker *w = o->worker;
  CLEANUP_FREE char *name = NULL;
  uint32_t length = o->remaining;
  struct nbd_export_name_reply reply = {
    .exportsize = htobe64 (w->service->size),
  };

  /* The only way to refuse this option is to disconnect. */
  if (w->session->extended || length > NBD_MAX_STRING ||
      (name = malloc (length + 1)) == NULL ||
      option_read (o, name, length) != 0 ||
      !export_find (w->service->disk, &w->service->export, name, length,
                    &w->session->export))
    return -1;
  reply.eflags = htobe16 (transmission_flags (w, &w->session->export, false));
  trace_export (w->session, name, length);
  contexts_bind (w->session, selection, name, length);
  if (output_append (o->worker, &reply, no_zeroes
                     ? offsetof (struct nbd_export_name_reply, zeroes)
                     : sizeof reply) == -1)
    return -1;
  return 1;
}

static int
reply_export (void *option, const char *name, const char *description)
{
  struct option *o = option;
  const size_t length = strlen (name);
  CLEANUP_FREE uint8_t *data = malloc (sizeof (uint32_t) + length);

  if (data == NULL)
    return -1;
  o->nr_listed++;
  put_be32 (data, length);
  memcpy (data + sizeof (uint32_t), name, length);
  return option_reply2 (o, NBD_REP_SERVER, data, sizeof (uint32_t) + length,
                        description,
                        description != NULL ? strlen (description) : 0);
}

static int
opt_list (struct option *o)
{
  const struct service *service = o->worker->service;

  if (o->remaining > 0)
    return option_error (o, NBD_REP_ERR_INVALID, "list: unexpected data");
  if (exports_list (service->disk, &service->export, reply_export, o) == -1)
    return -1;
  return option_reply (o, NBD_REP_ACK, NULL, 0);
}

/* Everything that an option has changed, but for what the greeting said. */
static void
forget_negotiated (struct session *session, struct selection *selection)
{
  session->structured = false;
  session->extended = false;
  contexts_drop (session);
  contexts_forget (selection);
}

static int
opt_structured_reply (struct option *o)
{
  if (o->remaining > 0)
    return option_error (o, NBD_REP_ERR_INVALID,
                         "structured reply: unexpected data");
  if (o->worker->session->extended)
    return option_error (o, NBD_REP_ERR_EXT_HEADER_REQD,
                         "extended headers are negotiated already");
  o->worker->session->structured = true;
  return option_reply (o, NBD_REP_ACK, NULL, 0);
}

static int
opt_extended_headers (struct option *o)
{
  struct worker *w = o->worker;

  if (o->remaining > 0)
    return option_error (o, NBD_REP_ERR_INVALID,
                         "extended headers: unexpected data");
  if (w->session->extended)
    return option_error (o, NBD_REP_ERR_INVALID,
                         "extended headers are negotiated already");
  w->session->structured = true;
  w->session->extended = true;
  return option_reply (o, NBD_REP_ACK, NULL, 0);
}

/* The protocol wants this reply of a server that has no TLS by choice. */
static int
opt_starttls (struct option *o, struct selection *selection)
{
  struct worker *w = o->worker;

  if (o->remaining > 0)
    return option_error (o, NBD_REP_ERR_INVALID, "starttls: unexpected data");
  if (w->service->tls == NULL)
    return option_error (o, NBD_REP_ERR_POLICY, "TLS is not configured");
  if (w->stream->tls != NULL)
    return option_error (o, NBD_REP_ERR_INVALID, "TLS is in use already");
  if (stream_has (w->stream, 1)) {
    client_error (w->service->errors,
                  "nbd: a client sent plaintext behind STARTTLS: "
                  "its connection is closed");
    return -1;
  }
  if (option_reply (o, NBD_REP_ACK, NULL, 0) == -1)
    return -1;
  output_flush (o->worker);

  forget_negotiated (w->session, selection);
  return stream_start_tls (w->stream, w->service->tls, w->service->errors);
}

/* The information requests that end INFO and GO.  Which of those that
 * we know were asked for: bit n of *wanted for NBD_INFO_n.  Returns as
 * option_export_name does.
 */
static int
read_info_requests (struct option *o, unsigned *wanted)
{
  uint16_t n, info;
  int r = option_read (o, &n, sizeof n);

  if (r == -1)
    return -1;
  if (r == 1 || o->remaining != be16toh (n) * sizeof info) {
    if (option_error (o, NBD_REP_ERR_INVALID, "inconsistent lengths") == -1)
      return -1;
    return 1;
  }
  *wanted = 0;
  while (o->remaining > 0) {
    if (option_read (o, &info, sizeof info) != 0)
      return -1;
    if (be16toh (info) <= NBD_INFO_BLOCK_SIZE)
      *wanted |= 1u << be16toh (info);
  }
  return 0;
}

/* Nothing, if the export has no description. */
static int
reply_description (struct option *o, const struct export *export)
{
  const struct service *service = o->worker->service;
  const uint16_t info = htobe16 (NBD_INFO_DESCRIPTION);
  CLEANUP_FREE char *description = NULL;

  if (export_describe (&service->export, export, &description) == -1)
    return -1;
  if (description == NULL)
    return 0;
  return option_reply2 (o, NBD_REP_INFO, &info, sizeof info,
                        description, strlen (description));
}

static int
reply_infos (struct option *o, unsigned wanted, bool selects_contexts,
             const struct export *export, const char *name, uint32_t length)
{
  const struct worker *w = o->worker;
  const struct service *service = w->service;
  const uint16_t info_name = htobe16 (NBD_INFO_NAME);
  const struct nbd_info_export info_export = {
    .info = htobe16 (NBD_INFO_EXPORT),
    .exportsize = htobe64 (service->size),
    .eflags = htobe16 (transmission_flags (w, export, selects_contexts)),
  };
  const struct nbd_info_block_size block_size = {
    .info = htobe16 (NBD_INFO_BLOCK_SIZE),
    .minimum = htobe32 (1),
    .preferred = htobe32 (service->preferred_block_size),
    .maximum = htobe32 (NBD_MAX_PAYLOAD),
  };

  if ((wanted & 1u << NBD_INFO_NAME) != 0 &&
      option_reply2 (o, NBD_REP_INFO, &info_name, sizeof info_name,
                     name, length) == -1)
    return -1;
  if ((wanted & 1u << NBD_INFO_DESCRIPTION) != 0 &&
      reply_description (o, export) == -1)
    return -1;
  /* Not only if it was asked for: every client can make use of it. */
  if (option_reply (o, NBD_REP_INFO, &block_size, sizeof block_size) == -1)
    return -1;
  return option_reply (o, NBD_REP_INFO, &info_export, sizeof info_export);
}

static int
opt_info_or_go (struct option *o, struct selection *selection)
{
  struct worker *w = o->worker;
  CLEANUP_FREE char *name = malloc (NBD_MAX_STRING);
  CLEANUP_EXPORT_PUT struct export export = { .delta = NULL };
  uint32_t length;
  unsigned wanted;
  bool selects;
  int r;

  if (name == NULL)
    return -1;
  r = option_export_name (o, name, &length);
  if (r == 0)
    r = read_info_requests (o, &wanted);
  if (r == 0)
    r = option_find_export (o, name, length, &export);
  if (r != 0)
    return r == 1 ? 0 : -1;

  /* INFO tells what may yet be had. */
  selects = o->option == NBD_OPT_INFO ||
    contexts_selected (w->session, selection, &export, name, length);
  if (o->option == NBD_OPT_GO) {
    w->session->export = export_get (&export);
    trace_export (w->session, name, length);
    contexts_bind (w->session, selection, name, length);
  }
  if (reply_infos (o, wanted, selects, &export, name, length) == -1 ||
      option_reply (o, NBD_REP_ACK, NULL, 0) == -1)
    return -1;
  return o->option == NBD_OPT_GO ? 1 : 0;
}

/* Must the client turn to TLS before it may say this? */
static bool
needs_tls (const struct option *o)
{
  const struct worker *w = o->worker;

  return w->service->tls != NULL && nbd_tls_is_required (w->service->tls) &&
    w->stream->tls == NULL &&
    o->option != NBD_OPT_STARTTLS && o->option != NBD_OPT_ABORT;
}

static int
negotiate (struct option *o, struct selection *selection, bool no_zeroes)
{
  if (needs_tls (o))
    /* The only way to refuse EXPORT_NAME is to disconnect. */
    return o->option == NBD_OPT_EXPORT_NAME ? -1
      : option_error (o, NBD_REP_ERR_TLS_REQD, "TLS is required");

  switch (o->option) {
  case NBD_OPT_EXPORT_NAME:
    return opt_export_name (o, selection, no_zeroes);

  case NBD_OPT_ABORT:
    socket_ending (&o->worker->stream->socket, "the client gave up", 0);
    if (option_skip (o, o->remaining) == 0)
      option_reply (o, NBD_REP_ACK, NULL, 0);
    output_flush (o->worker);
    return -1;

  case NBD_OPT_LIST:
    return opt_list (o);

  case NBD_OPT_STARTTLS:
    return opt_starttls (o, selection);

  case NBD_OPT_INFO:
  case NBD_OPT_GO:
    return opt_info_or_go (o, selection);

  case NBD_OPT_STRUCTURED_REPLY:
    return opt_structured_reply (o);

  case NBD_OPT_EXTENDED_HEADERS:
    return opt_extended_headers (o);

  case NBD_OPT_LIST_META_CONTEXT:
    return contexts_list (o);

  case NBD_OPT_SET_META_CONTEXT:
    return contexts_set (o, selection);

  default:
    return option_error (o, NBD_REP_ERR_UNSUP, "unsupported option");
  }
}

/* The greeting, and the client's answer to it. */
static int
greet (struct worker *w, bool *no_zeroes)
{
  const struct nbd_new_handshake greeting = {
    .nbdmagic = htobe64 (NBD_MAGIC),
    .version = htobe64 (NBD_OPTION_MAGIC),
    .gflags = htobe16 (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES),
  };
  uint32_t cflags;

  output_append (w, &greeting, sizeof greeting);
  output_flush (w);
  if (stream_read (w->stream, &cflags, sizeof cflags) == -1)
    return -1;
  cflags = be32toh (cflags);
  *no_zeroes = (cflags & NBD_FLAG_NO_ZEROES) != 0;
  return cflags & ~(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES) ? -1 : 0;
}

int
handshake (struct worker *w)
{
  struct selection selection = { .export_name = NULL };
  unsigned max = MAX_OPTIONS;
  bool no_zeroes;
  int r = greet (w, &no_zeroes);

  for (unsigned i = 0; r == 0 && i < max; ++i) {
    struct nbd_new_option header;
    struct option o = { .worker = w };

    if (stream_read (w->stream, &header, sizeof header) == -1 ||
        be64toh (header.magic) != NBD_OPTION_MAGIC)
      r = -1;
    else {
      o.option = be32toh (header.option);
      o.remaining = be32toh (header.length);
      debug_request ("nbd: option %u, %u bytes", o.option, o.remaining);
      r = o.remaining <= MAX_OPTION_LENGTH
        ? negotiate (&o, &selection, no_zeroes) : -1;
    }
    if (r != -1)
      output_flush (w);
    max = max_u64 (max, MAX_OPTIONS + OPTIONS_PER_EXPORT * o.nr_listed);
  }
  if (r == 0)
    socket_ending (&w->stream->socket, "too many options", 0);
  contexts_forget (&selection);
  return r == 1 ? 0 : -1;
}
