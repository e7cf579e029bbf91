#!/bin/sh
# Builds the C library from src_c/sources.txt with a plain compiler, and tests it without Python.
#
#   tests/c/run.sh [--cc COMPILER] [--sanitize address,undefined | thread] [--no-openmp]
#                  [--emulate 'qemu-x86_64 -cpu Nehalem' | 'valgrind -q' | aarch64 | riscv64 | arm | musl | windows | wasm | amx]
#                  [--effort PERCENT] [--only PART-OF-A-TEST'S-NAME[,ANOTHER]]
#
# One line per test, and the line "N passed, N failed, N skipped" at the end; the exit status is 1 when a test failed.
# With sanitizers the engine's assertions hold; with that of threads only the tests of threads run; without, also checks of the objects. With "amx" the
# tests of that instruction set run, on any x86-64 with AVX-512: what the processor lacks of it tests/amx/emulator.c does.
# The other names are what the library is cross-compiled for; words after the first are the emulator's ('aarch64 -cpu cortex-a53').
# What an option needs and the system lacks is installed with apt-get where that is possible; else the exit status is 77.
set -eu

cc=cc openmp=-fopenmp sanitize='' emulate='' effort='' only=''
while [ $# -gt 0 ]; do
    case $1 in
        --cc) cc=$2; shift 2 ;;
        --sanitize) sanitize=$2; shift 2 ;;
        --no-openmp) openmp=''; shift ;;
        --emulate) emulate=$2; shift 2 ;;
        --effort) effort=$2; shift 2 ;;
        --only) only=$2; shift 2 ;;
        *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done

need() { # a command, and the package that has it
    command -v "$1" >/dev/null && return
    echo "installing $2" >&2
    $(command -v sudo) apt-get -o DPkg::Lock::Timeout=300 install -qq -y --no-install-recommends $2 >/dev/null || true
    command -v "$1" >/dev/null || { echo "SKIPPED: $1 cannot be installed (packages: $2)"; exit 77; }
}

here=$(cd "$(dirname "$0")" && pwd)
source=$here/../../src_c
build=$(mktemp -d)
trap 'rm -rf "$build" || { sleep 1; rm -rf "$build"; }' EXIT # Wine still writes there for a moment

tools='' static='' run=$emulate isa='' isa_tests='' threads=-lpthread suffix='' pic=-fPIC extra=''
wrap='-Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc'
cross() { # a prefix of tools, the packages of the compiler and of its C library, and the emulator
    need "$4" qemu-user
    need "$1gcc" "$2 $3"
    tools=$1 cc=$1gcc static=-static run=$4
}
target=${emulate%% *} words=${emulate#"${emulate%% *}"}
case $target in
    '') ;;
    aarch64) cross aarch64-linux-gnu- gcc-aarch64-linux-gnu libc6-dev-arm64-cross "qemu-aarch64" ;;
    riscv64) cross riscv64-linux-gnu- gcc-riscv64-linux-gnu libc6-dev-riscv64-cross "qemu-riscv64" ;;
    arm) cross arm-linux-gnueabihf- gcc-arm-linux-gnueabihf libc6-dev-armhf-cross "qemu-arm" ;;
    musl) need musl-gcc musl-tools; cc=musl-gcc static=-static run='' openmp='' ;; # its OpenMP would be glibc's
    windows)
        need x86_64-w64-mingw32-gcc gcc-mingw-w64-x86-64
        PATH=$PATH:/usr/lib/wine
        need wine64 wine64
        tools=x86_64-w64-mingw32- cc=x86_64-w64-mingw32-gcc static=-static run=wine64 suffix=.exe pic='' extra=-D__USE_MINGW_ANSI_STDIO=1
        export WINEPREFIX=$build/wine WINEDEBUG=-all ;;
    wasm)
        need emcc emscripten
        export NODE_PATH=/usr/share/nodejs # where Debian's emscripten has its modules, whosever node it is
        cc=emcc run=node openmp='' threads='-sALLOW_MEMORY_GROWTH=1 -sTOTAL_STACK=4194304 -sSINGLE_FILE=1' suffix=.js pic=''
        [ "$words" = ' portable' ] || extra='-msimd128 -fno-slp-vectorize' ;; # clang 14 turns the portable squares wrongly otherwise
    amx) isa=amx isa_tests=amx/test_emulator.c run="env LD_PRELOAD=$build/emulator.so" ;;
    valgrind) need valgrind valgrind; run="$emulate --error-exitcode=9" ;;
    *) need "$target" qemu-user ;;
esac
case $run in qemu-*) [ "$target" = "${run%% *}" ] || run=$run$words ;; esac
[ "$target" = windows ] || [ "$target" = wasm ] || wrap=$wrap,--wrap=aligned_alloc,--wrap=posix_memalign
if [ -n "$sanitize" ]; then
    if [ "$sanitize" = thread ]; then
        openmp='' # its run-time is not instrumented: barriers look like races
        only=${only:-threads}
    fi
    sanitize="-O1 -g1 -DFASTATTN_ASSERT -fsanitize=$sanitize -fno-sanitize-recover=all" # the tiles compile for minutes at -O2 -g
fi
echo 'int main(void) { return 0; }' >"$build/openmp.c"
if [ -n "$openmp" ] && ! $cc $openmp $static "$build/openmp.c" -o "$build/openmp" 2>/dev/null; then
    echo "note: $cc has no OpenMP here" >&2
    openmp=''
fi
: "${effort:=$([ -n "$run$sanitize" ] && echo 10 || echo 100)}"

# ---------------------------------------------------------------------------------------------------- build and run
flags="-std=c11 -O2 -DFASTATTN_LAYERS ${CPPFLAGS-} $extra -Wall -Wextra -Werror $openmp $sanitize ${isa:+-DFASTATTN_ASSUME_AMX}"
library=$(sed 's/#.*//' "$source/sources.txt")
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$here/../../fastattn/__init__.py")
tests="$isa_tests $(cd "$here/.." && ls c/*.c)"
[ "$target" != wasm ] || tests=$(echo "$tests" | grep -v -e test_threads -e test_pool) # threads, of which this build has none
object() { # of a source's path
    echo "$(echo "${1%.c}" | tr / -).o"
}
mkdir "$build/library" "$build/tests"
includes="-I'$source/include' -I'$source'"
{
    for file in $library; do
        echo "$cc $flags $pic -fvisibility=hidden -DFASTATTN_VERSION='\"$version\"' $includes" \
            "-c '$source/$file' -o $build/library/$(object "$file")"
    done
    for file in $tests; do
        echo "$cc $flags $includes -c '$here/../$file' -o $build/tests/$(object "$file")"
    done
    [ -z "$isa" ] || echo "$cc $flags -fPIC -shared '$here/../$isa/emulator.c' -ldl -o $build/emulator.so"
} | xargs -P "$(nproc)" -d '\n' -I{} sh -c '{}' || exit 1
$cc $flags $static $wrap "$build"/tests/*.o "$build"/library/*.o -lm $threads -o "$build/test$suffix"

# A huge request is an error to report, not a reason to end the program.
export ASAN_OPTIONS="allocator_may_return_null=1:${ASAN_OPTIONS-}"
case $run in qemu-*) export TEST_UNDER_QEMU=1 ;; esac
$run "$build/test$suffix" "$effort" "$only" "$isa" | tee "$build/log" | sed '$d'
# Where a newer processor has bfloat16 and an older one has not, other products are chosen.
[ "$run" != qemu-aarch64 ] || [ -n "$only" ] || qemu-aarch64 -cpu cortex-a72 "$build/test" 1 first,info,products | sed '$d' | tee -a "$build/log"
[ -z "$isa" ] || AMX_REFUSED=1 $run "$build/test" 1 amx_refused | sed '$d' | tee -a "$build/log"

# ---------------------------------------------------------------------------------------------- the objects themselves
outcome() { # pass, FAIL or skip, the name, and what was found
    echo "$1 $2${3:+: $3}" | tee -a "$build/log"
}
expect_nothing() { # a test's name, and what ought to be empty
    if [ -z "$2" ]; then outcome pass "$1"; else outcome FAIL "$1" "$(echo "$2" | tr '\n' ' ')"; fi
}

check_objects() {
    set -- "$build"/library/*.o
    expect_nothing symbols_begin_with_fastattn \
        "$("${tools}nm" -g --defined-only "$@" | awk 'NF == 3 && $3 !~ /^fastattn_/ { print $3 }')"
    unwanted='printf|puts|putc|fwrite|^write$|perror|abort|exit|assert|stderr|stdout|^signal$|sigaction'
    expect_nothing symbols_print_or_abort \
        "$("${tools}nm" -u "$@" | awk -v unwanted="$unwanted" '$2 ~ unwanted { print $2 }')"

    # Mutable data: the cached features of the processor and the pool of threads, and nothing else.
    data=$("${tools}objdump" -t "$@" | awk '
        /file format/ { object = $1; sub(".*/", "", object) }
        match($0, /\.(data|bss|tdata|tbss)[^ \t]*|\*COM\*/) {
            section = substr($0, RSTART, RLENGTH)
            if (section !~ /rel\.ro/ && $NF !~ /^\./) print object "/" $NF
        }')
    expect_nothing data_is_cached_features_and_the_pool "$(echo "$data" | grep -v -e '^cpu-cpu' -e '^core-pool' || true)"
    echo "     mutable data: ${data:-none}"

    if $cc $flags -shared "$@" -lm $threads -o "$build/libfastattn.so" 2>/dev/null; then
        grep -o 'fastattn_[a-z_]*(' "$source/include/fastattn.h" | tr -d '(' | sort -u >"$build/declared"
        expect_nothing shared_library_exports_the_header "$("${tools}nm" -D --defined-only "$build/libfastattn.so" |
            awk '$3 !~ /^(_init|_fini)$/ { print $3 }' | sort -u | comm -3 - "$build/declared" | tr -d '\t')"
    else
        outcome skip shared_library_exports_the_header "no shared libraries"
    fi

    if "${tools}objdump" -f "$1" | grep -q x86-64; then
        wide=$(for object in "$@"; do
            case $object in *avx*|*amx*) continue ;; esac
            objdump -d --no-show-raw-insn "$object" | awk -v object="${object##*/}" '
                /^[0-9a-f]+ <.*>:$/ { name = $2 }
                NF > 1 && ($2 ~ /^v/ && $2 !~ /^ver[rw]$/ || /%[yz]mm|%k[0-7]/) { print object name; exit }'
        done)
        expect_nothing instructions_outside_isa_files "$wide"
    else
        outcome skip instructions_outside_isa_files "not x86-64"
    fi
}

if [ -z "$sanitize$only" ]; then
    case $target in
        wasm | windows) outcome skip objects "of another format" ;;
        *) check_objects ;;
    esac
    cxx=$(echo "$cc" | sed 's/gcc/g++/; s/clang/clang++/; s/^cc$/c++/; s/^emcc$/em++/')
    if ! command -v "$cxx" >/dev/null; then
        outcome skip header_in_c++ "no $cxx"
    elif $cxx -Wall -Wextra -Werror -pedantic $openmp $static -I"$source/include" "$here/test_header.cpp" \
            "$build"/library/*.o -lm $threads -o "$build/header$suffix" && $run "$build/header$suffix"; then
        outcome pass header_in_c++
    else
        outcome FAIL header_in_c++
    fi
fi

awk '$1 == "pass" { p++ } $1 == "FAIL" { f++ } $1 == "skip" { s++ }
     END { printf "%d passed, %d failed, %d skipped\n", p, f, s; exit f > 0 || p == 0 }' "$build/log"
