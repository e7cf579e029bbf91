#!/bin/sh
# Compiles the C library: an object for each file of src_c/sources.txt, with the flags of setup.py but for OpenMP; ENGINE has more
# for those of core/.
#
#   [ENGINE=FLAGS] tests/c/objects.sh FOLDER COMPILER [FLAG...]
set -eu

folder=$1 compiler=$2
shift 2
source=$(cd "$(dirname "$0")/../../src_c" && pwd)
sed "s/#.*//; /^ *$/d" "$source/sources.txt" | while read -r file; do
    own=''
    case $file in core/*) own=${ENGINE-} ;; esac
    echo "$compiler -std=c11 -O2 -ffp-contract=off -fno-math-errno $* $own -I'$source/include' -c '$source/$file'" \
        "-o '$folder/$(echo "${file%.c}" | tr / -).o'"
done | xargs -P "$(nproc)" -d '\n' -I{} sh -c '{}'
