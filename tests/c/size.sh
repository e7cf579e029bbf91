#!/bin/sh
# What the C library takes of a program: code and constants of its stripped objects, in KiB, with all kernels of the processor, with
# those in plain C alone, and of these for float32 alone; and what of that a program links which calls fastattn_attention and no more.
#
#   tests/c/size.sh [--cc COMPILER] [--most ALL PORTABLE FLOAT32]
#
# The flags are those of src_c/CMakeLists.txt; the tools are those beside the compiler (aarch64-linux-gnu-gcc). The exit status is 1 when a
# size is above --most.
set -eu

cc=cc most_all='' most_portable='' most_float32=''
while [ $# -gt 0 ]; do
    case $1 in
        --cc) cc=$2; shift 2 ;;
        --most) most_all=$2 most_portable=$3 most_float32=$4; shift 4 ;;
        *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done

here=$(cd "$(dirname "$0")" && pwd)
tools=${cc%gcc}
case $cc in *-gcc) ;; *) tools='' ;; esac
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
status=0

# kib OBJECT...
kib() { "${tools}size" "$@" | awk 'NR > 1 { bytes += $1 + $2 } END { print int(bytes / 1024 + 0.999) }'; }

# library NAME MOST FLAGS...
library() {
    name=$1 most=$2
    shift 2
    mkdir "$build/$name"
    sh "$here/objects.sh" "$build/$name" "$cc" -fPIC -fvisibility=hidden "$@"
    "${tools}strip" --strip-unneeded "$build/$name"/*.o
    all=$(kib "$build/$name"/*.o)
    echo "$name $all KiB${most:+ (at most $most)}"
    [ -z "$most" ] || [ "$all" -le "$most" ] || status=1
}

library all "$most_all"
plain='-DFASTATTN_NO_AVX2 -DFASTATTN_NO_AVX512 -DFASTATTN_NO_NEON'
# shellcheck disable=SC2086 # the flags are words
library portable "$most_portable" $plain
# shellcheck disable=SC2086
library float32 "$most_float32" $plain -DFASTATTN_NO_16BIT -DFASTATTN_NO_QUANTISED -DFASTATTN_NO_ROPE
"${tools}ar" rc "$build/float32.a" "$build"/float32/*.o
"${tools}ld" -r -u fastattn_attention "$build/float32.a" -o "$build/attention.o"
echo "attention of these $(kib "$build/attention.o") KiB"
exit $status
