#!/bin/sh
# Compile for other machines, and run the unit tests as they would run
# there, in a Debian of its own (in-debian.sh).  As root or with sudo.
#
#   i386    32 bits.  Its programs run here as they are, or under QEMU's
#           emulation if the kernel cannot run them
#   s390x   most significant byte first.  Its programs run under QEMU's
#           emulation of a processor, without a kernel of their own
#   musl    another C library, for which Debian has no packages of what the
#           filter is linked to: it is compiled, and linked without them
#
# usage: check-machines.sh [MACHINE...]     (all, if none is named)
#
# From the environment: those of in-debian.sh.  Of the tree here it uses a
# folder of its own, machines, of the same cache.
#
# The tests of nbdkit itself and QEMU's servers are not run.  Exit status:
# 0 if all is well; 69 if the mirror cannot be reached; else another.

set -eu

top=$(cd "$(dirname "$0")/.." && pwd)
suite=bookworm
name=nbdkit-dirty-bitmap-filter

# What can be installed for several machines at once; libnbd cannot, but
# only bench/ needs it.
libraries="libcmocka-dev libgnutls28-dev libjansson-dev libzstd-dev
           nbdkit-plugin-dev zlib1g-dev"
programs="autoconf automake gcc-i686-linux-gnu gcc-s390x-linux-gnu libc6-dev
          libtool make musl-tools perl pkg-config qemu-user-static qemu-utils"

# Left out under emulation:
#   test-nbd-calls      watches system calls by ptrace, of the emulator
#   test-crash-order, test-faults, test-qcow2-races
#                       minutes each, and of the others' code
emulated_out="test-nbd-calls test-crash-order test-faults test-qcow2-races"

# Waiting is not what is tested: each test has this many seconds.
test_timeout=1800

say ()
{
    echo "$0: $*"
}

# ---------------------------------------------------------------------
# Inside of the tree.

# All is there, and of this day (in-debian.sh upgrades)?
install_all ()
{
    packages=$programs
    for machine in amd64 i386 s390x; do
        for library in $libraries; do
            packages="$packages $library:$machine"
        done
    done
    packages=$(echo "$packages" | tr -s ' \n' ' ')
    if test "$(cat /installed 2>/dev/null)" = "$packages"; then
        return
    fi
    dpkg --add-architecture i386
    dpkg --add-architecture s390x
    apt="env DEBIAN_FRONTEND=noninteractive apt-get -q -y"
    apt="$apt -o Acquire::Retries=3 -o Dpkg::Use-Pty=0"
    # shellcheck disable=SC2086  # words are meant
    {
        $apt update &&
            $apt install --no-install-recommends $packages &&
            $apt clean
    } >/installing.log 2>&1 || {
        tail -n 20 /installing.log >&2
        exit 69
    }
    echo "$packages" >/installed
}

# The unit tests but those named.
tests_but ()
{
    sed -n '/^unit_tests =/,/NULL/s,.*\(unit/[^ ]*\) .*,\1,p' \
        tests/Makefile.am |
        while read -r test; do
            case " $* " in
                *" ${test##*/} "*) ;;
                *) echo "$test" ;;
            esac
        done
}

# configure_in FOLDER OPTION...: quietly, and only if it was not done so.
configure_in ()
{
    folder=$1
    shift
    mkdir -p "$folder"
    if test "$(cat "$folder/configured-for" 2>/dev/null)" = "$*"; then
        return
    fi
    (
        cd "$folder"
        LIBNBD_CFLAGS=-DNONE LIBNBD_LIBS=-lnone \
        LIBXXHASH_CFLAGS=-DNONE LIBXXHASH_LIBS=-lnone \
            ../configure -q --with-filterdir=/nowhere --enable-werror "$@" \
            >configure.log 2>&1
    ) || {
        tail -n 20 "$folder/configure.log" >&2
        exit 1
    }
    echo "$*" >"$folder/configured-for"
}

# run_tests MACHINE TRIPLET MULTIARCH RUNNER LEFT-OUT...
run_tests ()
{
    machine=$1 triplet=$2 multiarch=$3 runner=$4
    shift 4
    say "$machine: compiling"
    PKG_CONFIG_LIBDIR=/usr/lib/$multiarch/pkgconfig:/usr/share/pkgconfig
    export PKG_CONFIG_LIBDIR
    # gcc has much to say of what once changed on i386.
    configure_in "build-$machine" --host="$triplet" \
                 CFLAGS="-g -O2 -Wno-psabi"
    make -s -j"$(nproc)" -C "build-$machine/filter"
    tests=$(tests_but "$@" | tr '\n' ' ')
    say "$machine: running $(echo "$tests" | wc -w) unit tests"
    test $# -eq 0 || say "$machine: left out: $*"
    UNDER_SANITIZERS=1 CRASH_STATES=400 \
        make -j"$(nproc)" -C "build-$machine/tests" check TESTS="$tests" \
             LOG_COMPILER="timeout -k 10 $test_timeout $runner"
}

# Of the headers of glibc nothing but what is the kernel's.
compile_musl ()
{
    say "musl: compiling"
    headers=$PWD/build-musl/headers
    rm -rf "$headers"
    mkdir -p "$headers"
    for header in linux asm-generic gnutls zlib.h zconf.h zstd.h \
                  jansson.h jansson_config.h \
                  nbdkit-common.h nbdkit-filter.h nbdkit-plugin.h \
                  nbdkit-version.h nbd-protocol.h nbdkit-compat.h; do
        test ! -e "/usr/include/$header" ||
            ln -s "/usr/include/$header" "$headers/$header"
    done
    ln -s /usr/include/x86_64-linux-gnu/asm "$headers/asm"
    configure_in build-musl CC="musl-gcc -idirafter $headers"
    # A shared object may have symbols that are found only when it is loaded.
    make -s -k -j"$(nproc)" -C build-musl/filter LIBS= GNUTLS_LIBS= \
         ZLIB_LIBS= LIBZSTD_LIBS= JANSSON_LIBS=
}

one_machine ()
{
    case $1 in
        i386)
            # Some kernels cannot run its programs.
            runner=qemu-i386-static left_out=$emulated_out
            if /lib/ld-linux.so.2 --help >/dev/null 2>&1; then
                runner='' left_out=''
            fi
            # shellcheck disable=SC2086  # words are meant
            run_tests i386 i686-linux-gnu i386-linux-gnu "$runner" $left_out
            ;;
        s390x)
            # shellcheck disable=SC2086  # words are meant
            run_tests s390x s390x-linux-gnu s390x-linux-gnu \
                      qemu-s390x-static $emulated_out
            ;;
        musl) compile_musl ;;
    esac
}

inside ()
{
    install_all
    if test ! -x configure || test configure.ac -nt configure; then
        autoreconf -i
    fi
    failed=
    for machine in "$@"; do
        # A shell of its own: where a function is part of a condition, set -e
        # has no effect in it.
        sh "$0" --one "$machine" || failed="$failed $machine"
    done
    test -z "$failed" || {
        say "failed:$failed" >&2
        exit 1
    }
    say "all is well: $*"
}

# ---------------------------------------------------------------------
# Outside of it.

main ()
{
    test $# -gt 0 || set -- i386 s390x musl
    for machine in "$@"; do
        case $machine in
            i386 | s390x | musl) ;;
            *)
                echo "usage: $0 [i386] [s390x] [musl]" >&2
                exit 125
                ;;
        esac
    done
    cache=${IN_DEBIAN_CACHE:-${XDG_CACHE_HOME:-/var/cache}/$name}
    IN_DEBIAN_CACHE=$cache/machines exec "$top/build-aux/in-debian.sh" \
        "$suite" build-aux/check-machines.sh --inside "$@"
}

case ${1:-} in
    --inside)
        shift
        inside "$@"
        ;;
    --one) one_machine "$2" ;;
    *) main "$@" ;;
esac
