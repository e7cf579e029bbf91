#!/usr/bin/env bash
# Fuzzes the C library's entries with libFuzzer, under the address and the undefined-behaviour sanitizer.
#
#   tests/fuzz/run.sh [--seconds N] [--all-kernels] [--keep FOLDER] [TARGET...]
#
# Each target (attention, select, store, merge, rope, linear) starts from its inputs in corpus/, one a line in hexadecimal, runs for its share
# of the seconds (60 for all of them), and has to end without a report. The AVX-512 kernels, which take a compiler with sanitizers
# minutes, are left out but with --all-kernels. With --keep what is found stays in FOLDER: TARGET/ holds inputs, crash-* those that
# failed; `FOLDER/fuzz_TARGET FILE` runs one. To take inputs into corpus/:
#
#   FOLDER/fuzz_TARGET -merge=1 NEW FOLDER/TARGET && for f in NEW/*; do od -An -v -tx1 "$f" | tr -d ' \n'; echo; done
set -euo pipefail

seconds=60 kernels=-DFASTATTN_NO_AVX512 keep='' targets=()
while [ $# -gt 0 ]; do
    case $1 in
        --seconds) seconds=$2; shift 2 ;;
        --all-kernels) kernels=''; shift ;;
        --keep) keep=$2; shift 2 ;;
        --*) sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
        *) targets+=("$1"); shift ;;
    esac
done
[ ${#targets[@]} -gt 0 ] || targets=(attention select store merge rope linear)

here=$(cd "$(dirname "$0")" && pwd)
source=$here/../../src_c
if [ -n "$keep" ]; then
    mkdir -p "$keep"
    build=$(cd "$keep" && pwd)
else
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT
fi

# Coverage and checks of behaviour guide and judge what decides, core/ and cpu/; of the kernels, memory alone. At -O1 clang unrolls less
# than the kernels ask for.
compile() { # FILE, relative to src_c or an absolute path
    local name=${1#"$here/"} checks=fuzzer-no-link,address,undefined
    case $name in ukernel/select.c) ;; ukernel/*) checks=address ;; esac
    clang -std=c11 -O1 -g1 -Wall -Wextra -Werror -Wno-pass-failed -DFASTATTN_ASSERT $kernels -fsanitize=$checks -fno-sanitize=pointer-overflow -fno-sanitize-recover=all \
        -I"$source" -I"$source/include" -c "$(cd "$source" && realpath "$1")" -o "$build/$(tr / - <<<"${name%.c}").o"
}
export -f compile
export here source build kernels
{
    sed 's/#.*//' "$source/sources.txt" | grep . | sort -r # the kernels, which take longest, first
    printf "$here/%s.c\n" fuzz "${targets[@]}"
} | xargs -P "$(nproc)" -I{} bash -euc 'compile {}'

export ASAN_OPTIONS="allocator_may_return_null=1:${ASAN_OPTIONS-}" # a huge request is an error to report
passed=0 failed=0
for target in "${targets[@]}"; do
    clang -fsanitize=fuzzer,address,undefined "$build/$target.o" "$build/fuzz.o" "$build"/{core,cpu,ukernel}-*.o -lm -lpthread \
        -o "$build/fuzz_$target"
    mkdir -p "$build/$target"
    number=0
    while read -r line; do
        number=$((number + 1))
        printf "$(sed 's/../\\x&/g' <<<"$line")" >"$build/$target/corpus-$number"
    done <"$here/corpus/$target.hex"
    if "$build/fuzz_$target" -max_total_time=$((seconds / ${#targets[@]})) -max_len=500 -len_control=0 -rss_limit_mb=0 -timeout=60 -seed=1 \
            -artifact_prefix="$build/crash-$target-" "$build/$target" >"$build/$target.log" 2>&1; then
        passed=$((passed + 1))
        echo "pass fuzz_$target: $(tail -n 1 "$build/$target.log"), from $number inputs to $(find "$build/$target" -type f | wc -l)"
    else
        failed=$((failed + 1))
        grep -v -e '^#' -e '^INFO' -e NEW_FUNC "$build/$target.log" | head -n 60
        echo "FAIL fuzz_$target"
    fi
done
echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" = 0 ]
