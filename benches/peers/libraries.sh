#!/usr/bin/env bash
# Runs a command where `effnetv2 bench libraries` finds cuBLASLt and cuDNN.
#
#     benches/peers/libraries.sh [--python PYTHON] COMMAND...
#     benches/peers/libraries.sh target/release/effnetv2 bench libraries --model s
#
# The program opens libcublasLt.so and libcudnn.so, and pip installs neither name: only libcublasLt.so.13 and the like. This
# makes the names in a folder of its own, from what PYTHON [python3] or the system has, and puts it first on LD_LIBRARY_PATH.
set -euo pipefail

python=python3
case ${1:-} in
--python) python=${2:?--python needs a program} && shift 2 ;;
-h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit ;;
esac
[ $# -gt 0 ] || { echo "no command; see --help" >&2 && exit 2; }

places=$("$python" -c '
import glob, site, sys
for root in dict.fromkeys([*sys.path, *site.getsitepackages()]):
    print(*glob.glob(f"{glob.escape(root)}/nvidia/*/lib"), sep="\n")
' 2>/dev/null || true)
places=$(printf '%s\n' "$places" /usr/local/cuda/lib64 /usr/local/cuda*/lib64 /usr/lib/x86_64-linux-gnu /usr/lib/aarch64-linux-gnu)
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
path=$links
while IFS= read -r place; do
    [ -n "$place" ] && [ -d "$place" ] || continue
    for name in libcublasLt libcudnn; do
        for file in "$place/$name".so "$place/$name".so.[0-9]*; do
            [ -e "$file" ] && [ ! -e "$links/$name.so" ] && ln -s "$file" "$links/$name.so" || true
        done
    done
    # cuDNN opens its parts, and cuBLAS, by their own names.
    case $place in */nvidia/* | */cuda*) path=$path:$place ;; esac
done <<<"$places"
for name in libcublasLt libcudnn; do
    [ -e "$links/$name.so" ] && echo "$name: $(readlink "$links/$name.so")" || echo "$name: not found" >&2
done
LD_LIBRARY_PATH=$path${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} "$@"
