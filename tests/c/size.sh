#!/bin/sh
# What the C library takes of a program: code and constants of its stripped objects, in KiB, with all kernels of the processor and with
# those in plain C alone.
#
#   tests/c/size.sh [--cc COMPILER] [--most ALL PORTABLE]
#
# The flags are those of src_c/CMakeLists.txt; the tools are those beside the compiler (aarch64-linux-gnu-gcc). The exit status is 1 when a
# size is above --most.
set -eu

cc=cc most_all='' most_portable=''
while [ $# -gt 0 ]; do
    case $1 in
        --cc) cc=$2; shift 2 ;;
        --most) most_all=$2 most_portable=$3; shift 3 ;;
        *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done

here=$(cd "$(dirname "$0")" && pwd)
tools=${cc%gcc}
case $cc in *-gcc) ;; *) tools='' ;; esac
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
status=0

# library NAME MOST FLAGS...
library() {
    name=$1 most=$2
    shift 2
    mkdir "$build/$name"
    sh "$here/objects.sh" "$build/$name" "$cc" -fPIC -fvisibility=hidden "$@"
    "${tools}strip" --strip-unneeded "$build/$name"/*.o
    kib=$("${tools}size" "$build/$name"/*.o | awk 'NR > 1 { bytes += $1 + $2 } END { print int(bytes / 1024 + 0.999) }')
    echo "$name $kib KiB${most:+ (at most $most)}"
    [ -z "$most" ] || [ "$kib" -le "$most" ] || status=1
}

library all "$most_all"
library portable "$most_portable" -DFASTATTN_NO_AVX2 -DFASTATTN_NO_AVX512 -DFASTATTN_NO_NEON
exit $status
