#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# --tls-verify-peer: clients need a certificate of the server's authority
# that has not expired and was not revoked.  Without it nobody asks.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
. "$tests/lib/tls-functions.sh"

make_ca ca
make_ca other
make_certificate ca server server localhost
make_certificate ca good client good.example
make_certificate ca revoked client revoked.example
make_certificate ca expired client expired.example \
  'activation_date = "2020-01-01 00:00:00"' \
  'expiration_date = "2020-02-01 00:00:00"'
make_certificate other stranger client stranger.example
cp ca/ca-cert.pem stranger/     # it trusts us; we do not trust it
mkdir nobody
cp ca/ca-cert.pem nobody/
qemu-img create -q -f qcow2 disk.qcow2 1M
qemu-img bitmap --add disk.qcow2 b

# may WHO: connect, and read.
may ()
{
  timeout 20 nbdinfo --map=qemu:dirty-bitmap:b \
    "nbds+unix://localhost/?socket=$sock&tls-certificates=$d/$1" \
    > map 2> client.log
}

# may_not WHO WHY: and the operator is told why.
may_not ()
{
  local before

  before=$(grep -c 'TLS handshake' "$log") || :
  ! may "$1" || fail "served: $1"
  [ ! -s map ] || fail "$1 was told something"
  grep 'TLS handshake: ' "$log" | tail -n "+$((before + 1))" > said
  grep -i "$2" said || { cat said; fail "the log does not say '$2'"; }
}

start_nbdkit --tls=require --tls-certificates=server \
             --filter="$FILTER" file disk.qcow2
for who in good revoked expired stranger nobody; do
  may $who || { cat client.log; fail "not served: $who"; }
done
stop_server

start_nbdkit --tls=require --tls-certificates=server --tls-verify-peer \
             --filter="$FILTER" file disk.qcow2
may good || { cat client.log; fail "not served"; }
may revoked || { cat client.log; fail "not served"; }
may_not expired expired
# libnbd does not even show a certificate of another authority.
may_not stranger 'no certificate\|certificate is required'
may_not nobody 'no certificate\|certificate is required'
may good || fail "not served after the others"
stop_server

revoke ca revoked/client-cert.pem server/ca-crl.pem
start_nbdkit --tls=require --tls-certificates=server --tls-verify-peer \
             --filter="$FILTER" file disk.qcow2
may good || { cat client.log; fail "not served"; }
may_not revoked revoked
stop_server

# A list that cannot be read is no empty list.
echo nonsense > server/ca-crl.pem
refused 'ca-crl.pem' --tls=require --tls-certificates=server \
        --tls-verify-peer --filter="$FILTER" file disk.qcow2
