#!/bin/sh
# Proves the installation where no container engine runs: a fresh Debian root, install.sh in it, then as the learner and
# without any network the server, its health check and the whole series. As root, with debootstrap installed:
#
#   deploy/proof/prove.sh NEW_FOLDER [FOLDER...]     takes 6 GB there; FOLDERs are wheels that pip's settings here name
#
# SUITE=bookworm (default) or trixie. The settings of apt and pip on this machine are used inside as well. On a busy machine
# COURSE_CELL_SECONDS lets a cell take longer, as README says.
set -eu

if [ -z "${PROVING:-}" ]; then # mounts of its own, which end with it
    PROVING=1 exec unshare --mount --propagation private "$0" "$@"
fi
[ $# -gt 0 ] && [ ! -e "$1" ] || { echo "Name a folder that is not there yet: deploy/proof/prove.sh NEW_FOLDER" >&2; exit 1; }
COURSE=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
ROOT=$1
shift

say() {
    echo "== $(date +%T) $*"
}

show() { # a folder of this machine inside, read-only
    mkdir -p "$ROOT$2"
    mount --bind "$1" "$ROOT$2"
    mount -o remount,ro,bind "$ROOT$2"
}

inside() { # a command in the root, with an environment that holds nothing else of this machine
    chroot "$ROOT" /usr/bin/env -i LANG=C.UTF-8 HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        PIP_CERT=/proof.crt ${COURSE_DEVICE:+COURSE_DEVICE="$COURSE_DEVICE"} "$@"
}

say "a fresh ${SUITE:-bookworm}"
debootstrap --variant=minbase "${SUITE:-bookworm}" "$ROOT" >"$ROOT.log" 2>&1 || { tail "$ROOT.log"; exit 1; }
say "$(du -sh "$ROOT" | cut -f1) before"
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
cp /etc/resolv.conf /etc/hosts "$ROOT/etc/"
cp /etc/apt/apt.conf.d/* "$ROOT/etc/apt/apt.conf.d/" 2>/dev/null || true
cp /etc/ssl/certs/ca-certificates.crt "$ROOT/proof.crt"
PIP_CONFIG_FILE=$(python3 -m pip config debug | sed -n 's/^ *\(.*\), exists: True$/\1/p' | tail -n 1)
[ -z "$PIP_CONFIG_FILE" ] || cp "$PIP_CONFIG_FILE" "$ROOT/etc/pip.conf"
for folder in "$@"; do show "$folder" "$folder"; done
show "$COURSE" /src
say "install.sh"
inside /src/deploy/install.sh
for folder in /src "$@"; do umount "$ROOT$folder"; done # nothing of this machine is left to lean on
say "$(du -sxh "$ROOT" | cut -f1) after; $(du -sh "$ROOT/opt/course/.venv" | cut -f1) of it are Python packages"

say "as learner, network cut off"
# shellcheck disable=SC2016  # the inner shell is the one to expand it
ROOT=$ROOT unshare --net sh -c 'ip link set lo up && exec chroot --userspec=learner:learner "$ROOT" /usr/bin/env -i \
    LANG=C.UTF-8 HOME=/home/learner PATH=/usr/bin:/bin ${COURSE_CELL_SECONDS:+COURSE_CELL_SECONDS="$COURSE_CELL_SECONDS"} \
    /opt/course/.venv/bin/python /opt/course/deploy/proof/proof.py'
say "proved"
