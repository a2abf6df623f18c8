#!/bin/sh
# Writes requirements.lock and deploy/requirements-hub.lock anew: `make lock`, after a pin has changed. It needs an index
# of packages and `uv` (UV=path). Versions in an old lock are kept as far as the pins allow.
set -eu

cd "$(dirname -- "$0")/.."
UV=${UV:-uv}
HEAD=$(mktemp)
trap 'rm -f "$HEAD" "$HEAD.excluded"' EXIT

# What torch needs on Linux for its CUDA build only. torch pins each of them exactly.
"$UV" pip compile -q --universal --python-version 3.11 --no-header --no-annotate requirements.txt |
    sed -nE 's/^(triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==.*/\1/p' | grep -v '^nvidia-ml-py$' >"$HEAD.excluded"

lock() { # lock INPUT OUTPUT [OPTION...]: for Python 3.11 to 3.13, on Linux, macOS and Windows
    input=$1 output=$2
    shift 2
    "$UV" pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-package torch \
        --excludes "$HEAD.excluded" "$@" -o "$output" "$input"
    { cat "$HEAD"; grep -v '^# torch$\|^# The following packages were excluded from the output:$' "$output"; } >"$output.new"
    mv "$output.new" "$output"
}

cat >"$HEAD" <<'TEXT'
# Made by `make lock` from requirements.txt: all packages that the pins bring, with the hashes of their files. Install:
#
#   python -m pip install --no-deps --require-hashes -r requirements.lock
#   python -m pip install -r requirements.txt
#
# The second command finds torch missing and nothing else. torch and its CUDA libraries are not in this file, because one
# version has several builds: a lock with the CUDA libraries (3 GB) would force them on machines where the CPU build is
# installed, and that build has other hashes. requirements.txt pins torch, and torch pins its CUDA libraries.
#
TEXT
lock requirements.txt requirements.lock
cat >"$HEAD" <<'TEXT'
# Made by `make lock` from deploy/requirements-hub.txt: all packages that JupyterHub brings, with the hashes of their
# files, in the versions of requirements.lock where that has them. deploy/install.sh installs it.
#
TEXT
lock deploy/requirements-hub.txt deploy/requirements-hub.lock -c requirements.lock
