# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# Keys and certificates for the tests of TLS, in folders of the test's
# own, made as nbdkit-tls(1) describes.  After functions.sh.

requires certtool psktool

# quietly COMMAND...
quietly ()
{
  "$@" >tool.log 2>&1 || { cat tool.log; fail "$*"; }
}

# A small key is quick to make.
make_key ()
{
  quietly certtool --generate-privkey --key-type=ecdsa --outfile "$1"
}

# make_ca DIR: an authority, in DIR/ca-cert.pem and DIR/ca-key.pem.
make_ca ()
{
  mkdir -p "$1"
  make_key "$1/ca-key.pem"
  printf '%s\n' "cn = authority $1" ca cert_signing_key crl_signing_key \
         'expiration_days = 2' > ca.info
  quietly certtool --generate-self-signed --template ca.info \
          --load-privkey "$1/ca-key.pem" --outfile "$1/ca-cert.pem"
}

# make_certificate CA-DIR DIR server|client NAME [LINE...]: in
# DIR/KIND-cert.pem and DIR/KIND-key.pem, with the authority's beside it.
make_certificate ()
{
  local ca=$1 dir=$2 kind=$3 name=$4

  shift 4
  mkdir -p "$dir"
  [ "$ca" = "$dir" ] || cp "$ca/ca-cert.pem" "$dir/"
  make_key "$dir/$kind-key.pem"
  [ $# -gt 0 ] || set -- 'expiration_days = 2'
  printf '%s\n' "cn = $name" "dns_name = $name" 'ip_address = 127.0.0.1' \
         "tls_www_$kind" signing_key "$@" > cert.info
  quietly certtool --generate-certificate --template cert.info \
          --load-ca-certificate "$ca/ca-cert.pem" \
          --load-ca-privkey "$ca/ca-key.pem" \
          --load-privkey "$dir/$kind-key.pem" \
          --outfile "$dir/$kind-cert.pem"
}

# revoke CA-DIR CERTIFICATE LIST
revoke ()
{
  printf '%s\n' 'crl_next_update = 2' 'crl_number = 1' > crl.info
  quietly certtool --generate-crl --template crl.info \
          --load-ca-certificate "$1/ca-cert.pem" \
          --load-ca-privkey "$1/ca-key.pem" \
          --load-certificate "$2" --outfile "$3"
}

# make_psk FILE USER...
make_psk ()
{
  local file=$1 user

  shift
  for user in "$@"; do quietly psktool -u "$user" -p "$file"; done
}
