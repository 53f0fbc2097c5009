#!/usr/bin/env bash
# Builds the host device: the runtime beside this script and CUDA kernels, as one libcuda.so.1.
#
#   build.sh [--sanitize address|thread] [--out DIR] [--jobs N] [KERNEL.cu ...]
#
# Without kernels named, those of the folder above. Objects are kept in DIR/objects and rebuilt when a file they depend
# on, or the command, has changed. $CXX and $CXXFLAGS are respected; the last line printed is the library's path.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
sanitize= out= jobs=2 kernels=()
while (($#)); do
    case $1 in
        --sanitize) sanitize=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        --jobs) jobs=$2; shift 2 ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        -*) echo "build.sh: unknown option $1" >&2; exit 2 ;;
        *) kernels+=("$1"); shift ;;
    esac
done
if ((${#kernels[@]} == 0)); then
    shopt -s nullglob
    kernels=("$here"/../*.cu)
fi
out=${out:-$here/../../target/host-device${sanitize:+-$sanitize}}
mkdir -p "$out/objects"

flags=(-std=c++17 -g1 -fPIC -fvisibility=hidden -fno-strict-aliasing -fno-math-errno -ffp-contract=fast -pthread
    -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi)
# Fused multiply-add in hardware, as on the device; any x86-64 machine since 2013 has it.
if [[ $(uname -m) == x86_64 ]]; then flags+=(-march=x86-64-v3); fi
kernel_flags=() link_flags=()
case $sanitize in
    '') flags+=(-O2) ;;
    address)
        flags+=(-O1 -fno-omit-frame-pointer -DHOST_ADDRESS_SANITIZER -fsanitize=address,undefined
            -fno-sanitize-recover=undefined)
        link_flags+=(-fsanitize=address,undefined) ;;
    thread)
        # The runtime is not instrumented: it says itself what orders what (sanitizer.hpp).
        flags+=(-O1 -fno-omit-frame-pointer -DHOST_THREAD_SANITIZER)
        kernel_flags+=(-fsanitize=thread)
        link_flags+=(-fsanitize=thread) ;;
    *) echo "build.sh: --sanitize takes address or thread, not $sanitize" >&2; exit 2 ;;
esac
read -ra extra <<<"${CXXFLAGS:-}"
compile=("${CXX:-c++}" "${flags[@]}" "${extra[@]}")

# Compiles $1 to $2 with the remaining arguments, unless object, command and every dependency are unchanged.
compile_if_stale() {
    local source=$1 object=$2 command dependency
    shift 2
    command="$*"
    if [[ -f $object && -f $object.command && $(<"$object.command") == "$command" ]]; then
        local stale=
        while read -r dependency; do
            if [[ ! -e $dependency || $dependency -nt $object ]]; then stale=1; break; fi
        done < <(sed -e 's/^[^:]*: *//' -e 's/ *\\$//' "$object.d" | tr ' ' '\n' | grep .)
        if [[ -z $stale ]]; then return; fi
    fi
    "$@" -MMD -MF "$object.d" -c "$source" -o "$object"
    printf '%s' "$command" >"$object.command"
}

objects=() running=0 failed=
start() {
    local source=$1
    shift
    local object=$out/objects/$(basename "$source").o
    objects+=("$object")
    if ((running == jobs)); then
        wait -n || failed=1
        running=$((running - 1))
    fi
    compile_if_stale "$source" "$object" "${compile[@]}" "$@" &
    running=$((running + 1))
}

for source in "${kernels[@]}"; do start "$source" "${kernel_flags[@]}" -x c++; done
for source in "$here"/*.cpp "$here"/*.S; do start "$source"; done
while ((running > 0)); do
    wait -n || failed=1
    running=$((running - 1))
done
if [[ -n $failed ]]; then exit 1; fi

library=$out/libcuda.so.1
# The name that programs ask for first (README.md), so that a library loaded by its path is found under it.
"${CXX:-c++}" -shared "${link_flags[@]}" "${extra[@]}" -Wl,-soname,libcuda.so -Wl,-z,nodelete -pthread "${objects[@]}" \
    -ldl -o "$library"
ln -sf libcuda.so.1 "$out/libcuda.so"
echo "$library"
