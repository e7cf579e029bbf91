#!/bin/sh
# Where the time of a block goes: what each slot of the micro-kernels takes, for every instruction set of this machine.
#
#   bench/slots.sh [--cc COMPILER] [--rounds N] [HEAD_DIM ...]
set -eu

cc=cc rounds=101
while [ $# -gt 0 ]; do
    case $1 in
        --cc) cc=$2; shift 2 ;;
        --rounds) rounds=$2; shift 2 ;;
        -*) sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || set -- 64 128

here=$(cd "$(dirname "$0")" && pwd)
source=$here/../src_c
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

sh "$here/../tests/c/objects.sh" "$build" "$cc"
fixture=$(printf "$here/../tests/c/%s.c " chain slots guard system oracle)
# shellcheck disable=SC2086 # the files are words
$cc -std=c11 -O2 -Wall -Wextra -Werror -I"$source/include" -I"$source" "$here/slots.c" $fixture "$build"/*.o -lm -o "$build/slots"
"$build/slots" "$rounds" "$@"
