#!/usr/bin/env bash
# Builds a folder that measures and tests on a machine with a GPU and without Rust: copy it there and start its run.sh.
#
#     benches/bundle.sh [--out FOLDER] [--archs LIST]
#
# It holds the program, the device tests and the benchmarks, stripped, and the scripts. --archs is EFFNETV2_CUDA_ARCHS: as
# every one of these programs has all kernels in itself, only a few GPU generations keep the folder small.
set -euo pipefail
cd "$(dirname "$0")/.."

out=target/bundle
archs=90a,80+ptx
limit_mib=60
while [ $# -gt 0 ]; do
    case $1 in
    --out) out=${2:?--out needs a folder} && shift 2 ;;
    --archs) archs=${2:?--archs needs a list} && shift 2 ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit ;;
    *) echo "$1: unknown; see --help" >&2 && exit 2 ;;
    esac
done

export EFFNETV2_CUDA_ARCHS=$archs
EFFNETV2_COMMIT=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
if [ -n "$(git status --porcelain --untracked-files=no 2>/dev/null)" ]; then
    EFFNETV2_COMMIT="$EFFNETV2_COMMIT and changes"
fi
export EFFNETV2_COMMIT

# Device tests are those that have a device to run on.
tests=$(grep -l '^mod devices;' tests/*.rs | xargs -n 1 basename -s .rs)
benches=$(sed -n '/^\[\[bench\]\]/{n;s/^name = "\(.*\)"/\1/p}' Cargo.toml)

# The programs that cargo made for the given targets, one path a line.
programs() {
    local kind=$1 && shift
    cargo "$@" --message-format=json-render-diagnostics |
        sed -n "/\"kind\":\[\"$kind\"\]/s/.*\"executable\":\"\([^\"]*\)\".*/\1/p"
}
flags() {
    local flag=$1 name && shift
    for name in "$@"; do printf '%s %s ' "$flag" "$name"; done
}

echo "building for $archs at $EFFNETV2_COMMIT"
rm -rf "$out"
mkdir -p "$out/bin" "$out/tests" "$out/benches" "$out/peers"
# shellcheck disable=SC2046
{
    program=$(programs bin build --release --bin effnetv2)
    test_programs=$(programs test test --release --no-run $(flags --test $tests))
    bench_programs=$(programs bench bench --no-run $(flags --bench $benches))
}
# Cargo puts a hash behind the name.
copy() {
    local folder=$1 path name && shift
    for path in "$@"; do
        name=$(basename "$path")
        strip -o "$out/$folder/${name%-[0-9a-f]*}" "$path"
    done
}
# shellcheck disable=SC2086
{
    copy bin $program
    copy tests $test_programs
    copy benches $bench_programs
}
cp benches/bundle/run.sh benches/compare.py "$out"
cp benches/peers/pytorch.py "$out/peers"
printf 'commit %s\nkernels for %s\n' "$EFFNETV2_COMMIT" "$archs" >"$out/VERSION"

size=$(du -sm "$out" | cut -f1)
echo "$out: $(find "$out/tests" -type f | wc -l) test programs, $(find "$out/benches" -type f | wc -l) benchmarks, $size MiB"
if [ "$size" -ge "$limit_mib" ]; then
    echo "$out is larger than $limit_mib MiB: name fewer GPU generations by --archs" >&2
    exit 1
fi
