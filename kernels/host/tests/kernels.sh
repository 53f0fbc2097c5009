#!/usr/bin/env bash
# Runs the Rust tests of the kernels against three builds of the host device: plain, AddressSanitizer with
# UndefinedBehaviorSanitizer, and ThreadSanitizer, each with another schedule than `cargo test` has. What a sanitizer
# reports ends the run.
#
#   kernels.sh [plain|address|thread ...]      all three without arguments
#
# $PROPTEST_CASES (4) are the random cases of each property, $PROFILE (release) is cargo's profile, $TESTS the names of
# the test files (those of the families of kernels), $FILTERS those of the tests (all; under ThreadSanitizer, which is slow,
# all but the many shapes on which integers are exact), $SKIP those left out, $EFFNETV2_HOST_SEED the schedule. The
# sanitizers see networks, too: every kind of block, for inference as well, and nano in each type; and the exact tests of
# batch norm and the optimizer in any case.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

flavours=("$@")
if ((${#flavours[@]} == 0)); then flavours=(plain address thread); fi
PROPTEST_CASES=${PROPTEST_CASES:-4}
networks=(each_kind_of_block a_rehearsal a_graph_computes an_overflow folded_inference nano_24)
names=()
families() { (cd tests && ls *_kernels.rs optimizer.rs device.rs | grep -vE '^(network|program|training)_'); }
for name in ${TESTS:-$(families)}; do names+=(--test "${name%.rs}"); done
# Cargo's name of a setting: CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER. Only the tests get the sanitizer's library in
# front, not cargo and the compiler.
triple=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')

# The shared run-time library of a sanitizer, as GCC or as Clang calls it.
runtime() {
    local name path
    for name in "lib$1.so" "libclang_rt.$1-$(uname -m).so"; do
        path=$("${CXX:-c++}" -print-file-name="$name")
        if [[ $path == /* ]]; then echo "$path"; return; fi
    done
    echo "kernels.sh: ${CXX:-c++} has no shared library of the sanitizer \`$1\`" >&2
    return 1
}

run_flavour() {
    local flavour=$1 seed=$2 build=(kernels/host/build.sh --jobs "$(nproc)") runner=(env) skip=(--skip on_a_gpu) asan ubsan tsan
    local filters=${FILTERS-} cases=$PROPTEST_CASES name
    for name in ${SKIP-}; do skip+=(--skip "$name"); done
    case $flavour in
        plain) ;;
        address)
            build+=(--sanitize address)
            asan=$(runtime asan) && ubsan=$(runtime ubsan 2>/dev/null || true)
            # Rust's test harness keeps what it has allocated.
            runner+=("LD_PRELOAD=$asan${ubsan:+:$ubsan}" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1) ;;
        thread)
            build+=(--sanitize thread)
            tsan=$(runtime tsan)
            # The Rust side is not instrumented: ThreadSanitizer does not see what orders its threads.
            runner+=("LD_PRELOAD=$tsan" TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1)
            # Libraries before GCC 14 and LLVM 18 do not know where things lie when addresses are as random as can be.
            if setarch -R true 2>/dev/null; then runner=(setarch -R "${runner[@]}"); fi
            cases=1 skip+=(--skip exact --skip a_graph_computes) ;;
        *) echo "kernels.sh: plain, address or thread, not $flavour" >&2; exit 2 ;;
    esac
    if [[ $flavour != plain ]]; then
        # One makes a kernel reach beyond its buffers; the other adds up so many values that it takes minutes.
        skip+=(--skip debugging_names_the_kernel_at_fault --skip ten_million)
        # To do the same again shows no other access.
        runner+=(EFFNETV2_TEST_SCHEDULES=1)
    fi
    echo "== $flavour, schedule $seed"
    local library
    library=$("${build[@]}" | tail -n 1)
    # One test at a time: a kernel has the threads to itself.
    tests() {
        env "CARGO_TARGET_${triple}_RUNNER=${runner[*]}" EFFNETV2_HOST_DEVICE="$(realpath "$library")" \
            EFFNETV2_HOST_SEED="$seed" PROPTEST_CASES="$cases" \
            cargo test --quiet --profile "${PROFILE:-release}" "$@" --test-threads=1 "${skip[@]}"
    }
    tests "${names[@]}" -- $filters
    if [[ $flavour == plain || -n ${TESTS-}${FILTERS-} ]]; then return; fi
    # These take little time, and run kernels that nothing else here does.
    (skip=(--skip on_a_gpu) && tests --test batch_norm_kernels --test optimizer -- exact)
    for name in "${networks[@]}"; do
        grep -q "$name" tests/network_kernels.rs || { echo "kernels.sh: there is no test $name" >&2; return 1; }
    done
    tests --test network_kernels -- "${networks[@]}"
}

for flavour in "${flavours[@]}"; do
    case $flavour in plain) seed=2 ;; address) seed=3 ;; *) seed=4 ;; esac
    run_flavour "$flavour" "${EFFNETV2_HOST_SEED:-$seed}"
done
echo "kernels on the host device: all passed (${flavours[*]})"
