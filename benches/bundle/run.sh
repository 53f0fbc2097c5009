#!/usr/bin/env bash
# Tests and measures on this machine: device tests, compute-sanitizer, benchmarks, PyTorch beside ours.
#
#     ./run.sh [--out FOLDER] [--seconds TOTAL] [--only PART,PART...] [--python PYTHON]
#
# Each part has a time limit of its own; one that fails or cannot run loses none of the others. FOLDER [results] gets a log of
# each part, the figures as JSON, and summary.json; the summary is printed last. The exit code is 1 when something failed
# that could have run. Parts: devices tests sanitizer step blocks fusion ops criterion peers.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)

out=results
total=480
only=
python=${PYTHON:-python3}
while [ $# -gt 0 ]; do
    case $1 in
    --out) out=${2:?--out needs a folder} && shift 2 ;;
    --seconds) total=${2:?--seconds needs a number} && shift 2 ;;
    --only) only=${2:?--only needs names of parts} && shift 2 ;;
    --python) python=${2:?--python needs a program} && shift 2 ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit ;;
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

# part NAME LIMIT FUNCTION: runs it in a shell of its own, within its limit and what is left of the total.
part() {
    local name=$1 limit=$2 work=$3 left start code state
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
        [ "$limit" -le "$left" ] || limit=$left
        export note name here out programs program python gpu
        timeout --kill-after=10 "$limit" bash -c "$(declare -f skip say run_all bench "$work"); $work" >"$out/$name.log" 2>&1
        code=$?
    fi
    case $code in
    0) state=passed ;;
    77) state="not run" ;;
    124 | 137) state="out of time" && echo "stopped after $limit s; see $name.log" >"$note" ;;
    *) state=failed && [ -s "$note" ] || { [ $code -eq 0 ] || tail -n 1 "$out/$name.log" >"$note"; } ;;
    esac
    names+=("$name") states+=("$state") times+=($((SECONDS - start))) notes+=("$(head -n 1 "$note" | tr -d '\r')")
    echo "$state"
}

# run_all PREFIX... -- PROGRAM...: each program behind the prefix; says how many failed.
run_all() {
    local prefix=() failed=() count=0 one
    while [ "$1" != -- ]; do prefix+=("$1") && shift; done
    shift
    for one in "$@"; do
        [ -x "$one" ] || continue
        count=$((count + 1))
        echo "== $(basename "$one")"
        ${prefix[@]+"${prefix[@]}"} "$one" --test-threads=1 || failed+=("$(basename "$one")")
    done
    [ $count -gt 0 ] || skip "there are no test programs in this folder"
    if [ ${#failed[@]} -gt 0 ]; then
        say "${#failed[@]} of $count programs failed: ${failed[*]}"
        return 1
    fi
    say "$count programs"
}

devices() {
    "$program" devices || return
    say "$("$program" devices | grep -E '^(GPU [0-9]|driver:|GPUs:)' | tail -n 1)"
}

tests() {
    [ -n "$gpu" ] || skip "no GPU"
    EFFNETV2_TEST_DEVICE=cuda EFFNETV2_REQUIRE_GPU=1 run_all -- "$programs"/test/*
}

sanitizer() {
    [ -n "$gpu" ] || skip "no GPU"
    local tool
    tool=$(command -v compute-sanitizer || ls -d "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer \
        /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
    [ -n "$tool" ] || skip "compute-sanitizer is not installed"
    # It slows a kernel down a hundredfold: few random cases.
    PROPTEST_CASES=2 EFFNETV2_TEST_DEVICE=cuda EFFNETV2_REQUIRE_GPU=1 \
        run_all "$tool" --error-exitcode=1 --leak-check=no -- "$programs"/test/*_kernels
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

step() { bench step; }
blocks() { bench blocks --rounds 3; }
fusion() { bench fusion --rounds 3; }
ops() { bench ops --rounds 3; }

criterion() {
    [ -n "$gpu" ] || skip "no GPU"
    local one
    for one in "$programs"/bench/*; do
        # The CPU reference's own is long and no matter of the GPU.
        case $one in */training_step | *'*') continue ;; esac
        echo "== $(basename "$one")"
        (cd "$out" && "$one" --bench --warm-up-time 0.3 --measurement-time 0.7) || return
    done
    say "criterion.log"
}

peers() {
    command -v "$python" >/dev/null || skip "no $python"
    "$python" -c 'import torch, timm' 2>/dev/null || skip "$python has no torch and timm (--python names another)"
    if [ -n "$gpu" ]; then
        "$python" "$here/compare.py" --program "$program" --turns 1 --rounds 3 --out "$out/peers" \
            --modes eager,graph,compile-graph || return
    else
        "$python" "$here/compare.py" --program "$program" --device cpu --model b0 --size 64 --batch 2 --turns 1 \
            --rounds 2 --threads 2 --modes eager --out "$out/peers" || return
    fi
    say "peers/compare.md"
}

echo "effnetv2 at $EFFNETV2_COMMIT, for at most $total s"
gpu=$("$program" devices 2>/dev/null | grep -m 1 '^GPU 0:')
echo "${gpu:-no GPU: only what the CPU can do is run}"
part devices 30 devices
part tests 150 tests
part step 60 step
part blocks 60 blocks
part fusion 45 fusion
part ops 30 ops
part peers 200 peers
part sanitizer 90 sanitizer
part criterion 60 criterion
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
