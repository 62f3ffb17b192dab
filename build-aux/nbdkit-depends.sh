#!/bin/sh
# Print what a package of the filter depends on: the upstream version of
# the nbdkit that it is built for, from that on and before the next one.
#
# usage: nbdkit-depends.sh FORMAT [VERSION]
#        nbdkit-depends.sh 'nbdkit (>= %s), nbdkit (<< %s~)'
#
# FORMAT is that of printf.  Without VERSION it is pkg-config that says
# which nbdkit is there.

set -eu

version=${2-$(pkg-config --modversion nbdkit)}
case $version in
    *[!0-9.]* | .* | *. | *..*) number= ;;
    *.*) number=${version##*.} ;;
    *) number= ;;
esac
if test -z "$number"; then
    echo "$0: '$version' is not a version of nbdkit" >&2
    exit 1
fi
# shellcheck disable=SC2059  # it is a format
printf "$1\n" "$version" "${version%.*}.$((number + 1))"
