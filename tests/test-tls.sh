#!/usr/bin/env bash
# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

# TLS as nbdkit's own options ask for it, with the bitmaps: certificates
# and keys, required and at the client's choice, with the clients that
# users have: libnbd's tools and QEMU's.

. "${srcdir:-$(dirname "$0")}/lib/functions.sh"
. "$tests/lib/tls-functions.sh"
requires nbdcopy qemu-io

make_ca ca
make_certificate ca server server localhost
make_certificate ca client client client.example
make_psk keys.psk alice bob
qemu-img create -q -f qcow2 disk.qcow2 64M
qemu-img bitmap --add disk.qcow2 b
x509="tls-creds-x509,id=t,endpoint=client,verify-peer=yes,dir=$d/client"
psk="tls-creds-psk,id=t,endpoint=client,username=bob,dir=$d/qemu"
mkdir qemu
cp keys.psk qemu/
unix="file.driver=nbd,file.server.type=unix,file.server.path=$sock"
unix+=,file.tls-creds=t,file.tls-hostname=localhost
certs_uri="nbds+unix://localhost/?socket=$sock&tls-certificates=$d/client"
psk_uri="nbds+unix://alice@/?socket=$sock&tls-psk-file=$d/keys.psk"

# stands_in: our server answers, without a word on stderr.
stands_in ()
{
  if grep warning "$log"; then fail "a warning"; fi
}

echo "certificates, required"
start_nbdkit --tls=require --tls-certificates="$d/server" \
             --filter="$FILTER" file disk.qcow2
stands_in
nbdinfo "$certs_uri" > info
grep 'with TLS' info
grep 'qemu:dirty-bitmap:b' info
nbdsh -c 'h.set_uri_allow_local_file(True)' \
      -c "h.connect_uri('$certs_uri')" -c 'assert h.get_tls_negotiated()' \
      -c 'h.pwrite(b"x" * 3000000, 1 << 20)' \
      -c 'assert h.pread(3000000, 1 << 20) == b"x" * 3000000'
expected="1048576 3014656"
same "dirty" "$expected" "$(dirty b "$certs_uri")"
qemu-io --object "$x509" --image-opts driver=raw,"$unix" \
        -c 'read -P 0x78 1M 1M' -c 'write -P 7 32M 64k' > out
! grep -i failed out || { cat out; fail "qemu-io"; }
qemu-img map --object "$x509" --output=json --image-opts \
    "driver=raw,$unix,file.x-dirty-bitmap=qemu:dirty-bitmap:b" > map.json
/usr/bin/python3 - <<'END'
import json
found = [(e["start"], e["length"]) for e in json.load (open ("map.json"))
         if not e["data"]]
assert found == [(1048576, 3014656), (33554432, 65536)], found
END
# Without TLS a client gets nothing, and hears nothing.
/usr/bin/python3 - "$sock" <<'END'
import nbd, sys
h = nbd.NBD ()
h.set_opt_mode (True)
h.connect_unix (sys.argv[1])
assert not h.get_structured_replies_negotiated ()
for call in (lambda: h.opt_list (lambda *a: None), h.opt_info, h.opt_go):
    try:
        call ()
    except nbd.Error as ex:
        print (ex)
    else:
        raise SystemExit ("served without TLS")
END
# Nor one that does not trust this server's authority.
make_ca other
! qemu-img info --object "${x509%client}other" \
  --image-opts driver=raw,"$unix" > out 2>&1 || fail "the client trusts anyone"
grep -i 'certificate' out
stop_server

echo "the client's choice, and the words of the options apart"
start_nbdkit --tls on --tls-certificates "$d/server" \
             --filter="$FILTER" file disk.qcow2
stands_in
same "with TLS" "$(dirty b "$certs_uri")" "$(dirty b)"
shell 'assert not h.get_tls_negotiated()'
nbdinfo "$uri" | grep 'without TLS'
stop_server

echo "without --tls, certificates are used where the client likes"
start_nbdkit --tls-certificates "$d/server" --filter="$FILTER" file disk.qcow2
nbdinfo "$certs_uri" | grep 'with TLS'
nbdinfo "$uri" | grep 'without TLS'
stop_server

echo "off"
start_nbdkit --tls-certificates "$d/server" --tls=off \
             --filter="$FILTER" file disk.qcow2
! nbdinfo "$certs_uri" 2>/dev/null || fail "TLS, though it is off"
nbdinfo "$uri" | grep 'without TLS'
stop_server

echo "keys, as a daemon, on TCP"
port=$(free_port)
rm -f pid
nbdkit -P pid -p "$port" -i 127.0.0.1 --tls=require --tls-psk=keys.psk \
       --filter="$FILTER" file disk.qcow2 2>daemon.log
wait_until test -s pid          # which the daemon writes
server_pid=$(cat pid)
tcp_uri="nbds://alice@127.0.0.1:$port/?tls-psk-file=$d/keys.psk"
nbdinfo --map=qemu:dirty-bitmap:b "$tcp_uri" > tcp.map
grep dirty tcp.map
qemu-io --object "$psk" --image-opts driver=raw,file.driver=nbd,file.server.type=inet,file.server.host=127.0.0.1,file.server.port="$port",file.tls-creds=t \
        -c 'read -P 7 32M 64k' > out
! grep -i failed out || { cat out; fail "qemu-io"; }
# Keys are looked up when a client comes.
make_psk keys.psk carol
nbdinfo "nbds://carol@127.0.0.1:$port/?tls-psk-file=$d/keys.psk" >/dev/null
echo "alice:$(printf %064d 9)" > wrong.psk
for who in "alice@127.0.0.1:$port/?tls-psk-file=$d/wrong.psk" \
           "dave@127.0.0.1:$port/?tls-psk-file=$d/dave.psk"; do
  echo "dave:$(printf %064d 9)" > dave.psk
  ! nbdinfo "nbds://$who" 2>/dev/null || fail "served: $who"
done
! nbdinfo "nbd://127.0.0.1:$port" 2>/dev/null || fail "served without TLS"
kill "$server_pid"
wait_until process_ended "$server_pid"
server_pid=
check_image disk.qcow2

echo "nbdcopy, four connections"
head -c 30000000 /dev/urandom > data
truncate -s 64M data
start_nbdkit --tls=require --tls-psk=keys.psk --filter="$FILTER" \
             file disk.qcow2
nbdcopy --connections=4 data "$psk_uri"
nbdcopy --connections=4 "$psk_uri" back
cmp data back
stop_server
check_image disk.qcow2
same flags auto "$(bitmap_flags disk.qcow2 b)"

echo "the other socket has the same doors"
start_nbdkit --tls=require --tls-psk=keys.psk --filter=log \
             --filter="$FILTER" file disk.qcow2 logfile=/dev/null \
             dirty-bitmap-listen="$d/own"
! nbdinfo "nbd+unix:///?socket=$d/own" 2>/dev/null ||
  fail "the listening socket has no TLS"
nbdinfo "nbds+unix://alice@/?socket=$d/own&tls-psk-file=$d/keys.psk" > info
grep 'qemu:dirty-bitmap:b' info
stop_server

echo "errors"
cp -r server bad
echo nonsense > bad/server-cert.pem
refused 'server-cert.pem' --tls=require --tls-certificates=bad \
        --filter="$FILTER" file disk.qcow2
refused 'no-such-file' --tls=require --tls-psk=no-such-file \
        --filter="$FILTER" file disk.qcow2
refused 'certificates' --tls=require --tls-certificates=/nowhere \
        --filter="$FILTER" file disk.qcow2
# nbdkit goes on without TLS then, and so do we, but not silently.
start_nbdkit --tls-certificates=/nowhere --filter="$FILTER" file disk.qcow2
nbdinfo "$uri" | grep 'without TLS'
grep 'warning: --tls-certificates=/nowhere: .*without TLS' "$log"
stop_server
# The filter that judges by TLS has to be asked: nbdkit's server answers.
start_nbdkit --tls=on --tls-psk=keys.psk --filter=tls-fallback \
             --filter="$FILTER" file disk.qcow2
grep 'not replaced: .*tls-fallback' "$log"
nbdinfo --size "$uri" > size
[ "$(cat size)" -lt 65536 ] || fail "tls-fallback does not work"
same "the size with TLS" 67108864 "$(nbdinfo --size "$psk_uri")"
stop_server
