#!/usr/bin/env bash
# Builds a folder that measures and tests on a machine with a GPU and without Rust: copy it there and start its run.sh.
#
#     benches/bundle.sh [--out FOLDER]      # needs nvcc, as every build with kernels does
#
# It holds the program, the device tests with their files, and the benchmarks, stripped, and the scripts. Each of these
# programs has all kernels in itself; packed together they take the room of one. EFFNETV2_CUDA_ARCHS works as in any build.
set -euo pipefail
cd "$(dirname "$0")/.."

out=target/bundle
limit_mib=60
while [ $# -gt 0 ]; do
    case $1 in
    --out) out=${2:?--out needs a folder} && shift 2 ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0" && exit ;;
    *) echo "$1: unknown; see --help" >&2 && exit 2 ;;
    esac
done
export EFFNETV2_REQUIRE_CUDA=1
# Where CI puts the compiler, unless there is another.
if ! command -v nvcc >/dev/null && [ -z "${NVCC:-}${VIRTUAL_ENV:-}" ] && [ -d target/nvcc ]; then
    export VIRTUAL_ENV=$PWD/target/nvcc
fi
command -v xz >/dev/null || { echo "xz packs the programs: install it (xz-utils)" >&2 && exit 1; }

commit=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain --untracked-files=no 2>/dev/null)" ] || commit="$commit and changes"

# Tests that have a device to run on, but for those of the build itself, which need its tools and folders.
tests=$(grep -l '^mod devices;' tests/*.rs | xargs -n 1 basename -s .rs | grep -vE '^(kernel_table|libraries|machine_code|plan|program_kernels)$')
benches=$(for bench in benches/*.rs; do basename "$bench" .rs; done)
targets=()
for name in $tests; do targets+=(--test "$name"); done
for name in $benches; do targets+=(--bench "$name"); done

# The programs that cargo made, of one kind, a path a line.
programs() {
    sed -n "/\"kind\":\[\"$1\"\]/s/.*\"executable\":\"\([^\"]*\)\".*/\1/p" "$2"
}

echo "building at $commit"
messages=$(mktemp)
packed=$(mktemp -d)
trap 'rm -rf "$messages" "$packed"' EXIT
# Tests bring the program along, which they run.
cargo test --release --no-run "${targets[@]}" --message-format=json-render-diagnostics >"$messages"
for kind in bin test bench; do
    mkdir "$packed/$kind"
    programs $kind "$messages" | sort -u | while IFS= read -r path; do
        name=$(basename "$path")
        # Cargo puts a hash behind the names of tests and benchmarks.
        [ $kind = bin ] || name=${name%-*}
        strip -o "$packed/$kind/$name" "$path"
    done
done

mkdir "$packed/goldens"
cp tests/goldens/*.json "$packed/goldens"

rm -rf "$out"
mkdir -p "$out/peers"
# Programs that lie beside each other have their kernels within the reach of one dictionary.
tar -C "$packed" -c bin test bench goldens | xz --threads=1 --lzma2=preset=6,dict=96MiB >"$out/programs.tar.xz"
cp benches/bundle/run.sh benches/compare.py "$out"
cp benches/peers/pytorch.py benches/peers/libraries.sh "$out/peers"
echo "$commit" >"$out/VERSION"

count() { find "$packed/$1" -type f | wc -l; }
size=$(du -sm "$out" | cut -f1)
echo "$out: the program, $(count test) test programs, $(count bench) benchmarks: $size MiB"
if [ "$size" -ge "$limit_mib" ]; then
    echo "$out is larger than $limit_mib MiB: build for fewer GPU generations by EFFNETV2_CUDA_ARCHS" >&2
    exit 1
fi
