#!/bin/sh
# Builds the image where no registry of images is reached: debootstrap makes the base out of Debian's packages, buildah
# does what the Dockerfile says. As root, with debootstrap, buildah and podman installed:
#
#   deploy/proof/build_image.sh IMAGE [FOLDER...]     FOLDERs are wheels that pip's settings here name
#
# SUITE=bookworm (default) or trixie, COURSE_DEVICE=cpu (default) or cuda. The certificates and the settings of pip on
# this machine are used in the build and are not part of the image.
set -eu

[ $# -gt 0 ] || { echo "Name the image: deploy/proof/build_image.sh IMAGE" >&2; exit 1; }
COURSE=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
IMAGE=$1
SUITE=${SUITE:-bookworm}
BASE=localhost/debian-debootstrap:$SUITE
CERTIFICATES=/run/ca-certificates.crt # where the build sees those of this machine
shift

say() {
    echo "== $(date +%T) $*"
}

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
if ! buildah inspect --type image "$BASE" >/dev/null 2>&1; then
    say "the base, a fresh $SUITE"
    debootstrap --variant=minbase "$SUITE" "$WORK/root" >"$WORK/log" 2>&1 || { tail "$WORK/log"; exit 1; }
    tar -C "$WORK/root" -c . | podman import -q - "$BASE"
    rm -rf "$WORK/root"
fi

PIP_CONFIG_FILE=$(python3 -m pip config debug | sed -n 's/^ *\(.*\), exists: True$/\1/p' | tail -n 1)
{
    [ -z "$PIP_CONFIG_FILE" ] || grep -v '^cert *=' "$PIP_CONFIG_FILE"
    printf '\n[install]\ncert = %s\n' "$CERTIFICATES"
} >"$WORK/pip.conf"
folders=$# # each FOLDER becomes --volume FOLDER:FOLDER:ro
while [ "$folders" -gt 0 ]; do
    set -- "$@" --volume "$1:$1:ro"
    shift
    folders=$((folders - 1))
done

say "the image"
# Docker's format, for that of OCI has no health check. No cached layers: Buildah 1.28 takes an old one although a file
# that the step mounts has changed.
buildah bud --format docker --layers=false --network host --file "$COURSE/deploy/Dockerfile" --tag "$IMAGE" \
    --build-arg BASE="$BASE" --build-arg DEVICE="${COURSE_DEVICE:-cpu}" --secret id=pip,src="$WORK/pip.conf" \
    --volume "/etc/ssl/certs/ca-certificates.crt:$CERTIFICATES:ro" "$@" "$COURSE"
say "$(podman image inspect --format '{{.Size}}' "$IMAGE" | numfmt --to=si --suffix=B) in all: $IMAGE"
