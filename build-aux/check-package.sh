#!/bin/sh
# Build the packages of this source folder and see that they work.  As root
# on a Debian that may be changed: what is missing is installed, and so is
# the filter, at last without it again.  in-debian.sh makes such a Debian:
#
#     build-aux/in-debian.sh trixie build-aux/check-package.sh
#
# Each line "ok: ..." or "FAILED: ..." is a test, and the last line is
# "N passed, N failed, N skipped".  The exit status is 0 if none failed.

# shellcheck disable=SC2317  # step runs the functions
set -u
cd "$(dirname "$0")/.." || exit 1

name=nbdkit-dirty-bitmap-filter
package=nbdkit-filter-dirty-bitmap
top=$PWD
passed=0
failed=0

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# step WHAT COMMAND...: a test; print what the command said if it fails.
step ()
{
    what=$1
    shift
    if "$@" >"$dir/out" 2>&1; then
        passed=$((passed + 1))
        echo "ok: $what"
    else
        failed=$((failed + 1))
        tail -n 200 "$dir/out"
        echo "FAILED: $what"
        false
    fi
}

finish ()
{
    echo
    echo "$passed passed, $failed failed, 0 skipped"
    test "$failed" -eq 0
    exit
}

# Without the network, and with a loopback device of its own.
offline ()
{
    # shellcheck disable=SC2016  # to be expanded in there
    unshare --net sh -c 'ip link set lo up && exec "$@"' sh "$@"
}

make_tarball ()
{
    build-aux/prepare.sh build &&
    make -C build dist &&
    cp "build/$name-$version.tar.xz" "$dir/${name}_$version.orig.tar.xz" &&
    tar -C "$dir" -xf "build/$name-$version.tar.xz" &&
    test ! -e "$dir/$name-$version/debian" &&
    cp -R debian "$dir/$name-$version/"
}

build_deb ()
{
    (cd "$dir/$name-$version" && offline dpkg-buildpackage \
        -us -uc "-J$(nproc)")
}

# The dependency is on the upstream version that is installed here.
depends ()
{
    upstream=$(nbdkit --version | sed 's/^nbdkit \([0-9.]*\).*/\1/')
    next=${upstream%.*}.$((${upstream##*.} + 1))
    echo "installed: nbdkit $upstream"
    dpkg-deb -f "$deb" Depends | tee "$dir/depends"
    grep -qF "nbdkit (>= $upstream), nbdkit (<< $next~)" "$dir/depends" &&
    dpkg --compare-versions "$(dpkg-query -W -f '${Version}' nbdkit)" \
         lt "$next~" &&
    dpkg --compare-versions "$next-0" ge "$next~"
}

lint_deb ()
{
    # Nothing of a package here is signed, or sent to anybody.
    lintian --allow-root --fail-on error --info "$dir"/*.changes
}

install_deb ()
{
    DEBIAN_FRONTEND=noninteractive \
    apt-get -q -y -o Acquire::Retries=3 --no-install-recommends \
            --reinstall install "$deb"
}

remove_deb ()
{
    dpkg -r "$package" &&
    ! nbdkit --filter=dirty-bitmap null --help
}

manual_page ()
{
    page=$(man -w "$name") &&
    case $page in /usr/share/man/man1/*) ;; *) false ;; esac &&
    man "$name" | grep -F dirty-bitmap-stats-interval
}

# The README's commands listen at the usual port of NBD.
readme_example ()
{
    offline debian/tests/readme-example "$top/README.md"
}

build_rpm ()
{
    # The packages that the build needs are there by Debian's names; what
    # takes debug symbols out is not.
    offline rpmbuild --nodeps -D "_topdir $dir/rpm" -D 'debug_package %{nil}' \
            -ta "build/$name-$version.tar.xz" &&
    rpm=$(find "$dir/rpm/RPMS" -name "$name-$version-*.rpm") &&
    rpm -qlp "$rpm" | tee "$dir/files" &&
    rpm -qp --requires "$rpm" | tee "$dir/requires" &&
    grep -q "/nbdkit/filters/$name.so\$" "$dir/files" &&
    grep -q "/man1/$name.1" "$dir/files" &&
    grep -q "^nbdkit-server.* >= $upstream\$" "$dir/requires" &&
    grep -q "^nbdkit-server.* < $next~\$" "$dir/requires"
}

lint_spec ()
{
    rpmlint "packaging/$name.spec"
}

version=$(sed -n 's/^AC_INIT(\[.*\],\[\(.*\)\])$/\1/p' configure.ac)
step "packages are installed" \
     build-aux/install-packages.sh build demo test package || finish
step "make dist makes version $version" make_tarball || finish
step "the Debian package builds without the network" build_deb || finish
deb=$(find "$dir" -name "${package}_*.deb")
step "it depends on the version of nbdkit" depends
step "lintian finds no error" lint_deb
step "it can be installed" install_deb || finish
step "the manual page is there" manual_page
step "the README's first example works" readme_example
step "it can be removed" remove_deb
step "rpmlint finds no error in the spec file" lint_spec
step "the RPM package builds, for the same version of nbdkit" build_rpm
finish
