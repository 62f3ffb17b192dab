#!/bin/sh
# Run a command in another Debian: in a tree of its own, on a copy of this
# source folder.  As root or with sudo.
#
# usage: in-debian.sh SUITE COMMAND [ARGUMENT...]
#        in-debian.sh sid env QUICK=1 ./runtests
#
# SUITE is bookworm, trixie, sid, or what else debootstrap knows.  The
# command finds itself in a copy of what git has here and of what is not
# committed yet, without build folders; those that it makes are kept, and
# so is the tree: a second run is quick.  The tree begins with the
# packages that Debian calls essential, and apt.  It is upgraded when a
# day has passed since the last time.
#
# From the environment:
#   IN_DEBIAN_CACHE   folder of the trees
#                     [${XDG_CACHE_HOME:-/var/cache}/nbdkit-dirty-bitmap-filter]
#   IN_DEBIAN_MIRROR  Debian mirror [that of this machine's apt, else
#                     http://deb.debian.org/debian]
# The command gets a clean environment, but for TERM and the proxies.
#
# Exit status: that of the command; 69 if the tree cannot be made because
# the mirror cannot be reached; 125 if this script fails in another way.
#
# The command runs in mount and process namespaces of its own.  All that
# is mounted and started there is gone when it ends, however it ends.  It
# has this machine's /dev, /sys and network.  To delete a tree, delete its
# folder.

set -eu

unreachable=69
broken=125
name=nbdkit-dirty-bitmap-filter

die ()
{
    echo "$0: $1" >&2
    exit "${2:-$broken}"
}

# ---------------------------------------------------------------------
# Inside of the namespaces: "--inside make" and "--inside run".

# Make the tree in $root.new, which becomes $root once it is whole.
make_tree ()
{
    rm -rf "$root.new"
    mkdir -p "$root.new"
    if ! debootstrap --variant=minbase "$suite" "$root.new" "$mirror" \
             >"$root.log" 2>&1; then
        tail -n 20 "$root.log" >&2
        cp "$root.new/debootstrap/debootstrap.log" "$root.log" 2>/dev/null || :
        die "debootstrap of $suite from $mirror failed: see $root.log"
    fi
    echo "deb $mirror $suite main" >"$root.new/etc/apt/sources.list"
    # The mirror may be one that stands still, as a snapshot.  What it has
    # is signed all the same.
    echo 'Acquire::Check-Valid-Until "false";' \
         >"$root.new/etc/apt/apt.conf.d/snapshot"
    # No service is to be started.
    printf '#!/bin/sh\nexit 101\n' >"$root.new/usr/sbin/policy-rc.d"
    chmod 755 "$root.new/usr/sbin/policy-rc.d"
    # A tree that is cut off by a power cut is made anew.
    echo force-unsafe-io >"$root.new/etc/dpkg/dpkg.cfg.d/unsafe-io"
    mkdir -p "$root.new$source"
    touch "$root.new/upgraded"
    mv "$root.new" "$root"
}

in_root ()
{
    env -i --default-signal=INT,QUIT \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        HOME=/root LANG=C.UTF-8 TERM="${TERM:-dumb}" \
        ${http_proxy:+"http_proxy=$http_proxy"} \
        ${https_proxy:+"https_proxy=$https_proxy"} \
        ${no_proxy:+"no_proxy=$no_proxy"} \
        chroot "$root" "$@"
}

upgrade ()
{
    # shellcheck disable=SC2016  # to be expanded in there
    in_root env DEBIAN_FRONTEND=noninteractive sh -ec '
        apt="apt-get -q -y -o Acquire::Retries=3"
        $apt -o APT::Update::Error-Mode=any update
        $apt -o Dpkg::Options::=--force-confold dist-upgrade
        apt-get clean' >"$root.log" 2>&1
}

mount_all ()
{
    # A folder is a mount point of its own, so that what looks for the
    # file system of / finds it.
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    mount -t tmpfs -o mode=755 tmpfs "$root/run"
    rm -rf "$root/tmp"
    mkdir -m 1777 "$root/tmp"
    for file in resolv.conf hosts; do
        test ! -f "/etc/$file" || cat "/etc/$file" >"$root/etc/$file"
    done
}

inside ()
{
    case $1 in
        make)
            make_tree
            ;;
        run)
            shift
            mount_all
            if test -z "$(find "$root/upgraded" -mtime -1)"; then
                if upgrade; then
                    touch "$root/upgraded"
                else
                    tail -n 5 "$root.log" >&2
                    echo "$0: the packages of $root were not upgraded" >&2
                fi
            fi
            # No exec: this shell is process 1 here, and collects the
            # processes that the command leaves.
            status=0
            # shellcheck disable=SC2016  # to be expanded in there
            in_root sh -c 'cd "$0" && exec "$@"' "$source" "$@" || status=$?
            exit "$status"
            ;;
    esac
}

# ---------------------------------------------------------------------
# Outside of them.

# isolated ACTION: what must not outlive this script, or leave mounts.
isolated ()
{
    suite=$suite mirror=$mirror root=$root source=$source \
    setpriv --pdeathsig KILL \
        unshare --mount --propagation private --pid --fork --kill-child \
        sh "$self" --inside "$@" <&3 3<&- 9>&- &
    child=$!
    status=0
    wait "$child" || status=$?
    child=
    return "$status"
}

# shellcheck disable=SC2317  # it is reached, by traps
stop ()
{
    trap - INT TERM HUP
    test -z "$child" || kill -KILL "$child" 2>/dev/null || :
    wait
    kill -"$1" $$
}

# Bring the copy to what the source folder has, and leave alone the files
# that are the same, so that make does too.  The copy has a git of its own,
# since that of a work tree may be elsewhere.
copy_source ()
{
    copy=$root$source
    test -d "$copy/.git" || git init -q "$copy"
    (
        unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE
        git="git --git-dir=$copy/.git"
        $git config user.name "$name"
        $git config user.email "$name@localhost"
        $git config core.excludesFile /dev/null
        GIT_INDEX_FILE=$copy/.git/taken $git --work-tree="$top" add -A
        tree=$(GIT_INDEX_FILE=$copy/.git/taken $git write-tree)
        commit=$($git commit-tree -m "copy of $top" "$tree")
        cd "$copy"
        git read-tree -u --reset "$commit"
        git update-ref HEAD "$commit"
    )
}

need_mirror ()
{
    wget -q -t 2 -T 30 -O /dev/null "$mirror/dists/$suite/InRelease" ||
        die "the mirror $mirror cannot be reached, or has no $suite" \
            "$unreachable"
}

# What apt here has for Debian itself; others have /debian deeper down.
find_mirror ()
{
    cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
        grep -v '^ *#' | grep -Eo 'https?://[^/ ]*/debian/?( |$)' |
        sed 's,/* *$,,' | head -n 1
}

install_missing ()
{
    missing=
    for program in debootstrap git wget; do
        command -v $program >/dev/null 2>&1 || missing="$missing $program"
    done
    keyring=debian-archive-keyring
    test -f "/usr/share/keyrings/$keyring.gpg" || missing="$missing $keyring"
    test -n "$missing" || return 0
    command -v apt-get >/dev/null 2>&1 || die "install$missing"
    apt="env DEBIAN_FRONTEND=noninteractive apt-get -q"
    apt="$apt -o Acquire::Retries=3"
    # shellcheck disable=SC2086  # words are meant
    {
        $apt update
        $apt install -y --no-install-recommends $missing
    } >&2 || die "cannot install$missing" "$unreachable"
}

# A function, since the shell reads a function whole: this file may be
# edited while it runs.
main ()
{
    # The suite is the name of a folder, too.
    case ${1:-} in
        '' | -* | */* | .*) set -- ;;
    esac
    if test $# -lt 2; then
        echo "usage: $0 SUITE COMMAND [ARGUMENT...]" >&2
        exit "$broken"
    fi

    if test "$(id -u)" -ne 0; then
        command -v sudo >/dev/null 2>&1 || die "run this as root"
        exec sudo ${IN_DEBIAN_CACHE:+"IN_DEBIAN_CACHE=$IN_DEBIAN_CACHE"} \
             ${IN_DEBIAN_MIRROR:+"IN_DEBIAN_MIRROR=$IN_DEBIAN_MIRROR"} \
             "$0" "$@"
    fi

    suite=$1
    shift
    top=$(cd "$(dirname "$0")/.." && pwd)
    self=$top/build-aux/in-debian.sh
    cache=${IN_DEBIAN_CACHE:-${XDG_CACHE_HOME:-/var/cache}/$name}
    root=$cache/$suite
    source=/srv/$name
    mirror=${IN_DEBIAN_MIRROR:-$(find_mirror)}
    mirror=${mirror:-http://deb.debian.org/debian}

    install_missing
    mkdir -p "$cache"
    child=
    # A command that is started with & would read from /dev/null.
    test -e /dev/fd/0 || exec </dev/null
    exec 3<&0 9>"$root.lock"
    if ! flock -n 9; then
        echo "$0: waiting for another command in $root" >&2
        flock 9
    fi
    for signal in INT TERM HUP; do
        # shellcheck disable=SC2064  # now is meant
        trap "stop $signal" $signal
    done

    if test ! -d "$root"; then
        need_mirror
        echo "$0: making $root from $mirror" >&2
        isolated make || { need_mirror; exit "$broken"; }
    fi
    copy_source >&2 || die "cannot copy $top to $root$source"
    isolated run "$@"
}

case ${1:-} in
    --inside) shift; inside "$@" ;;
    *) main "$@" ;;
esac
exit
