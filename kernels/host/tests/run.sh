#!/usr/bin/env bash
# Builds the host device and its tests three times (plain, AddressSanitizer with UndefinedBehaviorSanitizer,
# ThreadSanitizer), runs them, and prints a summary. In the sanitizer builds each bug of kernels/broken.cu that is
# theirs to find must be reported at the line marked `bug: <name>`, and its right twin must run in silence.
#
#   run.sh [plain|address|thread ...]      all three without arguments; output goes to $OUT or target/host-device-tests
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${OUT:-$here/../../../target/host-device-tests}
broken=$here/kernels/broken.cu
flavours=("$@")
if ((${#flavours[@]} == 0)); then flavours=(plain address thread); fi
failures=0
export UBSAN_OPTIONS=print_stacktrace=1

fail() {
    echo "FAILED $*"
    failures=$((failures + 1))
}

# "broken.cu:12:" alternatives for the lines marked with bug $1, as an extended regular expression.
marked_lines() {
    grep -n "// bug: $1\$" "$broken" | cut -d: -f1 | sed 's/.*/broken\\.cu:&/' | paste -sd'|'
}

# The sanitizer must stop broken_$3 with a report that matches $4 and the marked line, and let right_$3 pass.
expect_report() {
    local flavour=$1 tests=$2 bug=$3 report=$4 text lines
    lines=$(marked_lines "$bug")
    if text=$("$tests" --launch "broken_$bug" 2>&1); then
        fail "$flavour: broken_$bug was not caught"
    elif ! grep -qE "$report" <<<"$text" || ! grep -qE "$lines" <<<"$text" || ! grep -q "broken_$bug" <<<"$text"; then
        fail "$flavour: the report on broken_$bug lacks \"$report\", ${lines//\\/} or the kernel's name:"
        sed 's/^/    /' <<<"$text" | head -20
    fi
    if ! text=$("$tests" --launch "right_$bug" 2>&1) || [[ -n $text ]]; then
        fail "$flavour: right_$bug was reported:"
        sed 's/^/    /' <<<"$text" | head -20
    fi
}

run_flavour() {
    local flavour=$1 sanitize=() flags=() tests
    case $flavour in
        plain) ;;
        address)
            sanitize=(--sanitize address)
            flags=(-DHOST_ADDRESS_SANITIZER -fsanitize=address,undefined) ;;
        thread)
            sanitize=(--sanitize thread)
            flags=(-DHOST_THREAD_SANITIZER -fsanitize=thread) ;;
        *) echo "run.sh: plain, address or thread, not $flavour" >&2; exit 2 ;;
    esac
    local folder=$out/$flavour
    "$here/../build.sh" "${sanitize[@]}" --out "$folder" "$here"/kernels/*.cu >"$folder.log" 2>&1 ||
        { cat "$folder.log"; fail "$flavour: build"; return; }
    if grep -q warning "$folder.log"; then cat "$folder.log"; fail "$flavour: warnings"; fi
    tests=$folder/host_tests
    "${CXX:-c++}" -std=c++17 -g1 -Wall -Wextra -Werror -Wno-psabi "${flags[@]}" -DBROKEN_CU="\"$broken\"" "$here"/*.cpp \
        -L"$folder" -Wl,-rpath,"$folder" -l:libcuda.so -pthread -o "$tests" || { fail "$flavour: build of the tests"; return; }

    echo "== $flavour"
    "$tests" || fail "$flavour: host_tests"
    if [[ $flavour == address ]]; then
        local bug
        for bug in far_write near_write near_read shared_overflow; do
            expect_report address "$tests" $bug 'AddressSanitizer: heap-buffer-overflow'
        done
        expect_report address "$tests" early_plain_read 'shared memory that a cp.async is still to fill'
        expect_report address "$tests" static_overflow 'index 128 out of bounds'
    elif [[ $flavour == thread ]]; then
        for bug in missing_barrier missing_syncwarp missing_second_barrier race_of_blocks missing_fence \
            wgmma_overwritten tensor_copy_overwrites tensor_copy_early_barrier; do
            expect_report thread "$tests" $bug 'ThreadSanitizer: data race'
        done
    fi
}

mkdir -p "$out"
for flavour in "${flavours[@]}"; do run_flavour "$flavour"; done
if ((failures > 0)); then
    echo "host device: $failures failures"
    exit 1
fi
echo "host device: all passed (${flavours[*]})"
