#!/bin/sh
# What the C library takes of a program: code and constants of its stripped objects, in KiB,
#
#     all         with all kernels of the processor
#     all_small   with all of them for float32 and the 16-bit types, and attention alone
#     portable    with those in plain C
#     float32     of these without 16-bit types, integers and rope; and what of that a program links which calls fastattn_attention and no more
#     small       of these attention alone
#
#   tests/c/size.sh [--cc COMPILER] [--most ALL ALL_SMALL PORTABLE FLOAT32 SMALL]
#
# docs/c-library.md says what the small ones leave out. The flags are those of src_c/CMakeLists.txt; the tools are those beside the compiler
# (aarch64-linux-gnu-gcc). The exit status is 1 when a size is above --most.
set -eu

cc=cc most_all='' most_all_small='' most_portable='' most_float32='' most_small=''
while [ $# -gt 0 ]; do
    case $1 in
        --cc) cc=$2; shift 2 ;;
        --most) most_all=$2 most_all_small=$3 most_portable=$4 most_float32=$5 most_small=$6; shift 6 ;;
        *) sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
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

plain='-DFASTATTN_NO_AVX2 -DFASTATTN_NO_AVX512 -DFASTATTN_NO_NEON'
float32='-DFASTATTN_NO_16BIT -DFASTATTN_NO_QUANTISED -DFASTATTN_NO_ROPE'
fast='-DFASTATTN_NO_AVX512_BF16 -DFASTATTN_NO_AVX512_VNNI -DFASTATTN_NO_AMX'
small='-fno-asynchronous-unwind-tables -fno-unwind-tables'
for part in QUANTISED MASK SPARSE ADDITIVE ACTIVATION SEGMENTS LINEAR SELECT MERGE ROPE; do small="$small -DFASTATTN_NO_$part"; done

library all "$most_all"
# shellcheck disable=SC2086 # the flags are words, here and below
ENGINE=-Os library all_small "$most_all_small" $fast $small
# shellcheck disable=SC2086
library portable "$most_portable" $plain
# shellcheck disable=SC2086
library float32 "$most_float32" $plain $float32
"${tools}ar" rc "$build/float32.a" "$build"/float32/*.o
"${tools}ld" -r -u fastattn_attention "$build/float32.a" -o "$build/attention.o"
echo "attention of these $(kib "$build/attention.o") KiB"
# shellcheck disable=SC2086
ENGINE=-Os library small "$most_small" $plain $float32 $small
exit $status
