#!/usr/bin/env bash
# Tests and measures on this machine: device tests, compute-sanitizer, benchmarks, PyTorch beside ours.
#
#     ./run.sh [--out FOLDER] [--seconds TOTAL] [--only PART,PART...] [--python PYTHON] [--dtypes T,T] [--modes M,M]
#
# Each part has a time limit of its own, which all together stay within TOTAL [480]; one that fails or cannot run loses none of
# the others. FOLDER [results] gets a log of each part, the figures as JSON, and summary.json; the summary is printed last. The
# exit code is 1 when something failed that could have run.
# Parts: devices tests step blocks fusion ops libraries peers tune sanitizer criterion. A part that is named by --only may take all
# of TOTAL. Types [bf16] and PyTorch's modes [graph,compile-graph] are those of `peers`; for all of them, at leisure:
#     ./run.sh --only peers --seconds 3600 --dtypes bf16,f16 --modes eager,graph,compile,compile-graph,max-autotune
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)

out=results
total=480
only=
dtypes=bf16
modes=graph,compile-graph
python=${PYTHON:-python3}
while [ $# -gt 0 ]; do
    case $1 in
    --out) out=${2:?--out needs a folder} && shift 2 ;;
    --seconds) total=${2:?--seconds needs a number} && shift 2 ;;
    --only) only=${2:?--only needs names of parts} && shift 2 ;;
    --dtypes) dtypes=${2:?--dtypes needs names of types} && shift 2 ;;
    --modes) modes=${2:?--modes needs names of modes} && shift 2 ;;
    --python) python=${2:?--python needs a program} && shift 2 ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0" && exit ;;
    *) echo "$1: unknown; see --help" >&2 && exit 2 ;;
    esac
done
case $total in '' | *[!0-9]*) echo "--seconds = $total: must be a whole number" >&2 && exit 2 ;; esac
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
EFFNETV2_COMMIT=$(cat "$here/VERSION")
export EFFNETV2_COMMIT
programs=$(mktemp -d)
trap 'rm -rf "$programs"' EXIT
unpack() {
    tar -C "$programs" -xJf "$here/programs.tar.xz" 2>/dev/null ||
        "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' \
            "$here/programs.tar.xz" "$programs"
}
unpack || { echo "programs.tar.xz cannot be unpacked here: install xz" >&2 && exit 2; }
program=$programs/bin/effnetv2
names=() states=() times=() notes=()

# Ends a part, which has a shell of its own, because it cannot run here: `skip REASON`.
skip() { echo "$*" >"$note" && exit 77; }
# A word for the summary from a part that did run.
say() { echo "$*" >"$note"; }

# part NAME LIMIT: runs the function of that name in a shell of its own, within its limit and what is left of the total.
part() {
    local name=$1 limit=$2 left start code state said
    case ,${only:-$name}, in *",$name,"*) ;; *) return ;; esac
    left=$((total - SECONDS))
    note=$out/.note
    : >"$note"
    start=$SECONDS
    printf '%s ... ' "$name"
    if [ "$left" -lt 5 ]; then
        echo "the $total seconds were over" >"$note"
        code=77
    else
        [ -z "$only" ] && [ "$limit" -le "$left" ] || limit=$left
        export note name limit here out programs program python gpu dtypes modes
        timeout --kill-after=10 "$limit" bash -c "$(declare -f skip say run_all tally bench "$name"); $name" \
            >"$out/$name.log" 2>&1
        code=$?
    fi
    said=$(head -n 1 "$note" | tr -d '\r')
    case $code in
    0) state=passed ;;
    77) state="not run" ;;
    124 | 137) state="out of time" && said=${said:-stopped after $limit s; see $name.log} ;;
    *) state=failed && said=${said:-$(tail -n 1 "$out/$name.log")} ;;
    esac
    names+=("$name") states+=("$state") times+=($((SECONDS - start))) notes+=("$said")
    echo "$state"
}

# run_all SECONDS COMMAND...: test programs, four at a time, each for so many seconds at most. A command is `NAME|PREFIX|PROGRAM`.
# Their output comes into the log of the part one after the other, and the note says how many tests passed, failed, and were
# not run.
run_all() {
    local seconds=$1 workers=4 k
    shift
    [ $# -gt 0 ] || skip "there are no test programs in this folder"
    commands=("$@")
    logs=$(mktemp -d)
    # What is stopped says what it has got.
    trap 'kill $(jobs -p) 2>/dev/null; wait; tally; rm -rf "$logs"; exit 124' TERM
    for ((k = 0; k < workers; k++)); do
        (
            trap 'kill "$child" 2>/dev/null; wait; exit 143' TERM
            for ((i = k; i < ${#commands[@]}; i += workers)); do
                IFS='|' read -r one prefix path <<<"${commands[i]}"
                # shellcheck disable=SC2086 # A prefix is several words.
                timeout --kill-after=5 "$seconds" $prefix "$path" --test-threads=1 >"$logs/$one" 2>&1 &
                child=$!
                wait "$child"
                echo $? >"$logs/$one.code"
            done
        ) &
    done
    wait
    tally
    code=$?
    rm -rf "$logs"
    return $code
}

tally() {
    local failed=() stopped=() ok=0 command one code passed=0 missing=0 count
    for command in "${commands[@]}"; do
        one=${command%%|*}
        [ -f "$logs/$one" ] && echo "== $one" && cat "$logs/$one"
        code=$(cat "$logs/$one.code" 2>/dev/null || echo none)
        case $code in
        0) ok=$((ok + 1)) ;;
        124 | 137 | none) stopped+=("$one") ;;
        *) failed+=("$one") ;;
        esac
        count=$(sed -n 's/^test result: .* \([0-9]*\) passed.*/\1/p' "$logs/$one" 2>/dev/null | tail -n 1)
        passed=$((passed + ${count:-0}))
        missing=$((missing + $(grep -c '^not run: ' "$logs/$one" 2>/dev/null || true)))
    done
    local text="$ok of ${#commands[@]} programs well, $passed tests passed"
    [ "$missing" -eq 0 ] || text="$text, $missing not run"
    [ ${#failed[@]} -eq 0 ] || text="$text; failed: ${failed[*]}"
    [ ${#stopped[@]} -eq 0 ] || text="$text; not finished: ${stopped[*]}"
    say "$text"
    [ ${#failed[@]} -eq 0 ] || return 1
    [ ${#stopped[@]} -eq 0 ] || return 124
}

devices() {
    "$program" devices || return
    say "$("$program" devices | grep -E '^(GPU [0-9]|driver:|GPUs:)' | tail -n 1)"
}

tests() {
    [ -n "$gpu" ] || skip "no GPU"
    export EFFNETV2_TEST_DEVICE=cuda EFFNETV2_REQUIRE_GPU=1
    export EFFNETV2_TEST_GOLDENS=$programs/goldens EFFNETV2_TEST_PROGRAM=$program
    local one all=()
    for one in "$programs"/test/*; do all+=("$(basename "$one")||$one"); done
    run_all $((limit * 2 / 3)) "${all[@]}"
}

sanitizer() {
    [ -n "$gpu" ] || skip "no GPU"
    local tool one what all=()
    tool=$(command -v compute-sanitizer || ls -d "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer \
        /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
    [ -n "$tool" ] || skip "compute-sanitizer is not installed"
    # It slows a kernel down a hundredfold: one random case of each property, and no whole networks.
    for what in memcheck racecheck initcheck; do
        for one in "$programs"/test/*_kernels; do
            case $one in */network_kernels | */training_kernels) continue ;; esac
            all+=("$what-$(basename "$one" _kernels)|$tool --tool $what --error-exitcode 1 --report-api-errors no|$one")
        done
    done
    PROPTEST_CASES=1 EFFNETV2_TEST_DEVICE=cuda EFFNETV2_REQUIRE_GPU=1 run_all $((limit / 2)) "${all[@]}"
}

# bench WHAT FLAGS: on the GPU, or small on the CPU, and says on which.
bench() {
    local what=$1 where && shift
    if [ -n "$gpu" ]; then
        where="on the GPU"
        set -- --device cuda "$@"
    else
        where="on the CPU, small: no GPU"
        set -- --rounds 2 --round-seconds 0 --warm-up 0
        case $what in
        blocks) set -- --models s --size 64 "$@" ;;
        fusion) set -- --model b0 --size 64 --batch 2 "$@" ;;
        *) set -- --model b0 --size 64 --batch 2 "$@" ;;
        esac
    fi
    "$program" bench "$what" "$@" --out "$out" || return
    say "$where: $what.json, $what.svg"
}

# The training step once more with kernels that overlap, where the GPU can do that.
step() {
    bench step || return
    [ -n "$gpu" ] || return 0
    local code said
    "$program" bench step --device cuda --pass training --overlap on --out "$out/overlap"
    code=$?
    # 2 is a GPU that is too old.
    [ "$code" -eq 2 ] || [ "$code" -eq 0 ] || return "$code"
    said=$(sed -n 's/^training *[0-9]* *\([0-9.]*\) .*/\1 ms/p' "$out/step.log" | paste -sd ' ')
    case $code in
    0) say "on the GPU: a training step takes ${said% * ms}, with --overlap on ${said#* ms }: step.json, overlap/step.json" ;;
    *) say "on the GPU: a training step takes $said, --overlap on cannot be: step.json" ;;
    esac
}
blocks() { bench blocks --rounds 3; }
fusion() { bench fusion --rounds 3; }
ops() { bench ops --rounds 3; }

# NVIDIA's own libraries beside ours, single convolutions.
libraries() {
    [ -n "$gpu" ] || skip "no GPU"
    local dtype code=0 types
    IFS=, read -ra types <<<"$dtypes"
    for dtype in "${types[@]}"; do
        bash "$here/peers/libraries.sh" --python "$python" "$program" bench libraries --device cuda --dtype "$dtype" \
            --rounds 3 --round-seconds 0.01 --warm-up 0.02 --limit $((limit / ${#types[@]} - 8)) --out "$out/libraries-$dtype" || code=1
    done
    say "$(grep -E '^(all calls|only|nothing can|cu[A-Za-z]* cannot)' "$out/libraries.log" | head -n 3 | paste -sd ';')"
    return $code
}

# Every way to launch a step's convolutions, all of which must agree; and a step with those that were the fastest.
tune() {
    [ -n "$gpu" ] || skip "no GPU"
    "$program" bench tune s --device cuda --rounds 3 --round-seconds 0.01 --warm-up 0.01 --limit $((limit - 20)) --out "$out/tuning.json" \
        --record "$out/tune.json" || return
    local less
    less=$(grep '^all of a step' "$out/tune.log")
    say "$less"
    if grep -q 'differs from that by the rule' "$out/tune.log"; then
        say "some ways disagree with the rule, see tune.log; $less"
        return 1
    fi
    "$program" bench step --device cuda --pass training --rounds 3 --tuning "$out/tuning.json" --out "$out/tuned" || return
    say "$less; $(sed -n 's/^training *[0-9]* *\([0-9.]*\) .*/a step takes \1 ms/p' "$out/tune.log" | tail -n 1)"
}

criterion() {
    [ -n "$gpu" ] || skip "no GPU"
    local one count=0
    for one in "$programs"/bench/*; do
        # That of the CPU is long and no matter of the GPU.
        case $one in */training_step | *'*') continue ;; esac
        echo "== $(basename "$one")"
        (cd "$out" && "$one" --bench --noplot --sample-size 10 --warm-up-time 0.1 --measurement-time 0.3) || return
        # Each says in a line why it did not run.
        grep -q "^not run: the benchmarks of $(basename "$one"):" "$out/criterion.log" || count=$((count + 1))
        say "$count families: criterion.log"
    done
    [ $count -gt 0 ] || skip "$(grep -m 1 '^not run: ' "$out/criterion.log")"
}

peers() {
    command -v "$python" >/dev/null || skip "no $python"
    "$python" -c 'import torch, timm' 2>/dev/null || skip "$python has no torch and timm (--python names another)"
    if [ -n "$gpu" ]; then
        "$python" "$here/compare.py" --program "$program" --turns 1 --rounds 3 --out "$out/peers" \
            --dtypes "$dtypes" --modes "$modes" --total $((limit - 5))
    else
        "$python" "$here/compare.py" --program "$program" --device cpu --model b0 --size 64 --batch 2 --turns 1 \
            --rounds 2 --threads 2 --modes eager --out "$out/peers" --total $((limit - 5))
    fi
    local code=$?
    say "$(sed -n 's/^| \([^|]*training\) *|.*| *\([0-9.]*\) | *[0-9.]* |$/\1: \2 times as fast/p' "$out/peers/compare.md" \
        2>/dev/null | paste -sd ';' | grep . || echo "no training step was measured on both sides"); peers/compare.md"
    return $code
}

echo "effnetv2 at $EFFNETV2_COMMIT, for at most $total s"
gpu=$("$program" devices 2>/dev/null | grep -m 1 '^GPU 0:')
echo "${gpu:-no GPU: only what the CPU can do is run}"
part devices 10
part tests 80
part step 30
part blocks 40
part fusion 20
part ops 20
part libraries 50
part peers 100
part tune 50
part sanitizer 60
part criterion 20
rm -f "$out/.note"

quote() { printf '"%s"' "$(printf '%s' "$1" | sed 's/[\\"]/\\&/g' | tr -d '\000-\037')"; }
{
    printf '{\n "commit": %s,\n "gpu": %s,\n "parts": [' "$(quote "$EFFNETV2_COMMIT")" "$([ -n "$gpu" ] && quote "$gpu" || echo null)"
    for i in "${!names[@]}"; do
        [ "$i" -eq 0 ] || printf ','
        printf '\n  {"part": %s, "state": %s, "seconds": %s, "note": %s}' \
            "$(quote "${names[i]}")" "$(quote "${states[i]}")" "${times[i]}" "$(quote "${notes[i]}")"
    done
    printf '\n ]\n}\n'
} >"$out/summary.json"

echo
printf '%-10s  %-11s  %7s  %s\n' part result seconds note
code=0
for i in "${!names[@]}"; do
    printf '%-10s  %-11s  %7s  %s\n' "${names[i]}" "${states[i]}" "${times[i]}" "${notes[i]}"
    case ${states[i]} in failed | "out of time") code=1 ;; esac
done
echo "in $out: summary.json"
exit $code
