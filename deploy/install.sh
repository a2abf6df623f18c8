#!/bin/sh
# Installs the course on a bare Debian 12 or 13, as root. The Dockerfile calls it; a cloud machine does without Docker:
#
#   deploy/install.sh             everything for one learner
#   deploy/install.sh hub         and JupyterHub for many
#   deploy/install.sh packages    only what changes seldom (a layer of the image); then: deploy/install.sh course
#
# COURSE_DEVICE=cpu (default) or cuda says which build of torch must come out. Both have the same pin: an index that
# holds builds named +cpu gives the small one, any other the CUDA build. Which index is asked is pip's own matter:
# PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or a pip.conf.
set -eu

COURSE=/opt/course
SOURCE=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
PARTS=${1:-learner}

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

debian() { # Debian's packages, without what they only recommend
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null
    rm -rf /var/lib/apt/lists/*
}

python() { # Python's packages
    "$COURSE/.venv/bin/python" -m pip install -q --disable-pip-version-check --no-cache-dir "$@"
}

locked() { # exactly those of a lock file, each file compared with its hash
    python --no-deps --require-hashes -r "$1"
}

packages() {
    debian ca-certificates libgomp1 make python3 python3-venv tini # libgomp1: for llama.cpp in notebook 09
    python3 -m venv "$COURSE/.venv"
    locked "$SOURCE/requirements.lock"
    python -r "$SOURCE/requirements.txt" # torch, whose build pip chooses: requirements.lock says why
    "$COURSE/.venv/bin/python" -m pip check
    asked=${COURSE_DEVICE:-cpu}
    found=$("$COURSE/.venv/bin/python" -c 'import torch; print("cuda" if torch.version.cuda else "cpu")')
    [ "$found" = "$asked" ] || fail "torch came as its $found build, COURSE_DEVICE asks for $asked." \
        "For cpu, name an index that holds the +cpu builds in PIP_EXTRA_INDEX_URL; for cuda, name none."
}

course() { # root owns the sources: a learner reads them, and writes in a folder of his own
    [ -x "$COURSE/.venv/bin/python" ] || fail "run 'install.sh packages' first"
    [ "$SOURCE" != "$COURSE" ] || fail "these sources lie in $COURSE, where they would be replaced. Put them elsewhere."
    find "$COURSE" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
    tar -C "$SOURCE" --exclude=./.git --exclude=./.ci --exclude=./.venv --exclude=./output --exclude=./.hypothesis --exclude=./.carry \
        --exclude='./.*_cache' --exclude=__pycache__ --exclude=.ipynb_checkpoints \
        --mode=u=rwX,go=rX --owner=0 --group=0 -cf - . |
        tar -C "$COURSE" -xpf -
    "$COURSE/.venv/bin/python" -m compileall -q "$COURSE"/*.py "$COURSE"/*/
    touch "$COURSE/.venv/ready" # make has nothing to set up here
    id learner >/dev/null 2>&1 || useradd --create-home -K HOME_MODE=0700 --uid 1000 --shell /bin/bash learner
    install -d -o learner -g learner -m 700 /home/learner/course
    unit course.service
}

hub() {
    debian node-configurable-http-proxy
    locked "$SOURCE/deploy/requirements-hub.lock"
    "$COURSE/.venv/bin/python" -m pip check
    getent group learners >/dev/null || groupadd learners
    unit course-hub.service
}

unit() { # where systemd runs: known to it, not started
    [ -d /run/systemd/system ] || return 0
    install -m 644 "$SOURCE/deploy/$1" /etc/systemd/system/
    systemctl daemon-reload
    echo "To start it now and at each boot:  systemctl enable --now $1"
}

[ "$(id -u)" = 0 ] || fail "run it as root"
command -v apt-get >/dev/null || fail "it is made for Debian 12 and 13, and apt-get is not here"
case $PARTS in
packages) packages ;;
course) course ;;
learner) packages && course ;;
hub) packages && course && hub ;;
*) fail "unknown: $PARTS. Use packages, course, hub or nothing." ;;
esac
