#!/bin/sh
# What the C library takes by itself, beside other ways to the same result: one head, D = 64, one thread, workspace given.
#
#   bench/library.sh [entry] [portable] [wasm] [aarch64]      all, or some
#
#   entry     nanoseconds of a call that has little to do: 1 query, 16 keys; also by a plan that was made once. Wanted: 400
#   portable  the portable kernels and the plain online softmax, compiled alike by gcc -O3, 64 queries. Wanted: 3 times as fast
#   wasm      a build with SIMD128 and one without under node, 64 queries. Wanted: 2.5 times as fast
#   aarch64   instructions of a call under qemu-aarch64, 64 queries: those of a second call, so that nothing else of the program counts.
#             Wanted: NEON takes at most a third of portable, and at most 1.05 times OpenBLAS's two products and a softmax (with
#             vectors of powers), the former from PyPI's package scipy-openblas32 for AArch64. Also bfloat16, and a few queries of it over
#             keys and values of int8 and int4: on processors with SDOT, and without
#
# Sides take turns in one process (those of WebAssembly are two, which take turns), and the smallest of their times counts. What
# cannot run here is named, and the others run.
set -eu

[ $# -gt 0 ] || set -- entry portable wasm aarch64
here=$(cd "$(dirname "$0")" && pwd)
source=$here/../src_c
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

# compile NAME COMPILER FLAG...: the library; and link, the program with it.
compile() {
    name=$1
    shift
    mkdir "$build/$name"
    sh "$here/../tests/c/objects.sh" "$build/$name" "$@"
}
link() { # NAME COMPILER OUTPUT FLAG...
    name=$1 compiler=$2 output=$3
    shift 3
    $compiler -std=c11 -O3 -Wall -Wextra -I"$source/include" "$here/library.c" "$build/$name"/*.o "$@" -lm -o "$build/$output"
}
native() { [ -e "$build/native" ] || { compile native "${CC:-cc}" && link native "${CC:-cc}" library -lpthread; }; }

# ratio LINE FIRST SECOND: "SIDE NUMBER" lines on standard input, and how many times the second the first takes.
ratio() {
    awk -v line="$1" -v first="$2" -v second="$3" '{ is[$1] = $2; sides = sides sprintf("  %s %d", $1, $2) }
        END { printf "%s %s   %s is %.2f x %s\n", line, sides, first, is[first] / is[second], second }'
}

entry() {
    native
    "$build/library" 1 16 200 1000 portable best best+planned | sed 's/.*/entry: & ns (wanted 400)/'
}

portable() {
    native
    for keys in 128 512 2048; do "$build/library" 64 "$keys" 20 1 plain portable | ratio "portable: $keys keys, ns" plain portable; done
}

wasm() {
    command -v emcc >/dev/null && command -v node >/dev/null || { echo "wasm: SKIPPED, no emcc or no node"; return; }
    export NODE_PATH=/usr/share/nodejs # where Debian's emscripten has its modules, whosever node it is
    for name in scalar simd; do
        flags=$([ $name = scalar ] || echo -msimd128)
        compile $name emcc -O3 "$flags"
        link $name emcc $name.js $flags -sALLOW_MEMORY_GROWTH=1 -sTOTAL_STACK=4194304 -sSINGLE_FILE=1
    done
    for keys in 128 512 2048; do
        for _ in 1 2 3; do
            for name in scalar simd; do node "$build/$name.js" 64 "$keys" 20 1 best | sed "s/best/$name/"; done
        done | sort -k1,1 -k2,2n | awk '!seen[$1]++' | ratio "wasm: $keys keys, ns" scalar simd
    done
}

# count CPU SIDE KEYS [QUERIES]: "SIDE NUMBER", the instructions of a second call.
count() {
    for calls in 1 2; do
        qemu-aarch64 -L /usr/aarch64-linux-gnu -U OPENBLAS_CORETYPE -E OPENBLAS_NUM_THREADS=1 -E LD_LIBRARY_PATH="$blas:$build" -cpu "$1" \
            -plugin "$build/instructions.so" "$build/aarch64.bin" "${4-64}" "$3" 1 "$calls" "$2" 2>&1 >/dev/null
    done | awk -v side="$2" '$1 == "instructions" { if (first) print side, $2 - first; first = $2 }'
}

aarch64() {
    cross=aarch64-linux-gnu-gcc
    command -v $cross >/dev/null && command -v qemu-aarch64 >/dev/null || { echo "aarch64: SKIPPED, no $cross or no qemu-aarch64"; return; }
    "${CC:-cc}" -shared -fPIC -O2 "$here/instructions.c" -o "$build/instructions.so"
    blas=''
    if ${PYTHON:-python3} -m pip download -q --no-deps --only-binary=:all: --platform manylinux2014_aarch64 -d "$build" scipy-openblas32 \
            >"$build/download.log" 2>&1; then
        ${PYTHON:-python3} -m zipfile -e "$build"/scipy_openblas32-*.whl "$build/openblas"
        blas=$build/openblas/scipy_openblas32/lib
        $cross -shared -x c /dev/null -o "$build/libz.so.1" # named by its Fortran's library, and never called
    else
        echo "aarch64: OpenBLAS cannot be had"
    fi
    compile aarch64 $cross -DFASTATTN_PORTABLE # to have something to compare with
    link aarch64 $cross aarch64.bin -lpthread ${blas:+-DWITH_OPENBLAS "$blas/libscipy_openblas.so" -Wl,-rpath-link,"$build"}
    for keys in 512 1024 2048 4096 8192; do
        { for side in portable neon; do count cortex-a76 $side $keys; done
          [ -z "$blas" ] || count cortex-a76 gemms $keys; } >"$build/counts"
        ratio "aarch64: $keys keys, instructions" neon portable <"$build/counts"
        [ -z "$blas" ] || ratio "aarch64: $keys keys, instructions" neon gemms <"$build/counts"
        for side in portable+bfloat16 best+bfloat16; do count max $side $keys; done |
            ratio "aarch64: $keys keys of bfloat16, instructions" best+bfloat16 portable+bfloat16
    done
    for kept in int8 int4; do
        for queries in 1 4; do
            { count cortex-a72 best+$kept 1024 $queries | sed 's/^[^ ]*/without/'
              count cortex-a76 best+$kept 1024 $queries | sed 's/^[^ ]*/sdot/'; } |
                ratio "aarch64: $queries queries, 1024 keys of $kept, instructions" without sdot
        done
    done
}

for what in "$@"; do
    case $what in
        entry | portable | wasm | aarch64) $what ;;
        *) sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done
