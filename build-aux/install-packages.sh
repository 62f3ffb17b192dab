#!/bin/sh
# Install what is missing on Debian (12 or later) or Ubuntu, and nothing
# else: what is found already, from whatever source, is left alone, and
# then neither root nor the network is needed.
#
# usage: install-packages.sh GROUP...
#        (groups: build demo test bench package)

set -eu

# The table: group, how to see that it is there, Debian's package.
#   c:PROGRAM  in PATH    p:MODULE  known to pkg-config
#   y:MODULE   importable by /usr/bin/python3
#   h:HEADER   in /usr/include
#   d:PACKAGE  installed, of which nothing else can be seen
#   f:COMPILER links fuzz targets with the sanitizers
table='
build  c:gcc                gcc
build  h:stdio.h            libc6-dev
build  c:make               make
build  c:autoconf           autoconf
build  c:automake           automake
build  c:libtoolize         libtool
build  c:pkg-config         pkg-config
build  c:pod2man            perl
build  p:nbdkit             nbdkit-plugin-dev
build  p:libnbd             libnbd-dev
build  p:zlib               zlib1g-dev
build  p:libzstd            libzstd-dev
build  p:libxxhash          libxxhash-dev
build  p:gnutls             libgnutls28-dev
build  p:jansson            libjansson-dev
demo   c:nbdkit             nbdkit
demo   c:nbdinfo            libnbd-bin
demo   c:nbdsh              python3-libnbd
demo   c:qemu-img           qemu-utils
demo   c:qemu-nbd           qemu-utils
test   c:nbdkit             nbdkit
test   d:nbdkit-plugin-python nbdkit-plugin-python
test   c:nbdinfo            libnbd-bin
test   c:nbdcopy            libnbd-bin
test   c:nbdsh              python3-libnbd
test   c:qemu-img           qemu-utils
test   c:qemu-io            qemu-utils
test   c:qemu-nbd           qemu-utils
test   c:qemu-storage-daemon qemu-system-common
test   c:python3            python3
test   y:nbd                python3-libnbd
test   c:xxh128sum          xxhash
test   c:certtool           gnutls-bin
test   c:psktool            gnutls-bin
test   p:cmocka             libcmocka-dev
test   c:valgrind           valgrind
test   c:podchecker         perl
test   c:nm                 binutils
test   c:systemd-socket-activate systemd
test   c:git                git
test   c:xz                 xz-utils
test   c:clang              clang
test   f:clang              libclang-rt-dev
bench  c:nbdkit             nbdkit
bench  c:qemu-nbd           qemu-utils
bench  c:fio                fio
bench  y:nbd                python3-libnbd
package d:build-essential   build-essential
package c:dh                debhelper
package c:dpkg-buildpackage dpkg-dev
package c:ip                iproute2
package c:lintian           lintian
package c:man               man-db
package c:rpmbuild          rpm
package c:rpmlint           rpmlint
'

is_there ()
{
    case $1 in
        c:*) command -v "${1#c:}" >/dev/null 2>&1 ;;
        p:*) pkg-config --exists "${1#p:}" 2>/dev/null ;;
        y:*) /usr/bin/python3 -c "import ${1#y:}" >/dev/null 2>&1 ;;
        h:*) test -f "/usr/include/${1#h:}" ;;
        d:*) dpkg-query -W -f '${Status}' "${1#d:}" 2>/dev/null |
                 grep -q ' installed$' ;;
        f:*) echo 'int LLVMFuzzerTestOneInput (void) { return 0; }' |
                 "${1#f:}" -fsanitize=fuzzer,address,undefined -x c - \
                     -o /dev/null 2>/dev/null ;;
    esac
}

# Print the packages of the groups named that are missing, each once.
missing ()
{
    echo "$table" | while read -r group check package; do
        case " $* " in
            *" $group "*) is_there "$check" || echo "$package" ;;
        esac
    done | sort -u
}

packages=$(missing "$@")
test -n "$packages" || exit 0

# One word a package from here on.
packages=$(echo "$packages" | tr '\n' ' ')

if ! command -v apt-get >/dev/null 2>&1; then
    echo "$0: missing, by their Debian names: $packages" >&2
    echo "$0: there is no apt-get here; install them and run this again" >&2
    exit 1
fi

as_root=
if test "$(id -u)" -ne 0; then
    if ! command -v sudo >/dev/null 2>&1; then
        echo "$0: run this as root, or install: $packages" >&2
        exit 1
    fi
    as_root=sudo
fi

echo "installing: $packages"
apt="$as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -o Acquire::Retries=3"
# shellcheck disable=SC2086  # words are meant
{
    $apt update
    $apt install -y --no-install-recommends $packages
}

still=$(missing "$@" | tr '\n' ' ')
if test -n "$still"; then
    echo "$0: installed, yet not found: $still" >&2
    exit 1
fi
