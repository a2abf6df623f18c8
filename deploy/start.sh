#!/bin/sh
# Starts JupyterLab on the series for one learner: in the image, on a machine of his own, and for each user of the hub.
#
#   COURSE_WORK      the learner's folder (default ~/course), which outlives the image: notebooks, edits, results
#   COURSE_LANGUAGE  which notebooks (default en)
#   COURSE_IP        where it listens (default 127.0.0.1; the image says 0.0.0.0, for its own network), COURSE_PORT 8888
#   JUPYTER_TOKEN    the token that opens it; without it Jupyter makes a random one and prints the address
set -eu
umask 077 # a learner's files are his own

COURSE=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
WORK=${COURSE_WORK:-$HOME/course}
LANGUAGE=${COURSE_LANGUAGE:-en}

fail() {
    echo "start.sh: $*" >&2
    exit 1
}

copy() { # whole or not at all, also when it is killed
    cp "$1" "$2.part" && mv "$2.part" "$2"
}

[ $# = 0 ] || fail "takes no arguments, only the variables above"
case $LANGUAGE in *[!A-Za-z-]*) known= ;; *) known=$COURSE/notebooks/$LANGUAGE ;; esac
if [ ! -d "$known" ]; then
    echo "COURSE_LANGUAGE=$LANGUAGE: there are no such notebooks, so the English ones open."
    LANGUAGE=en
fi
mkdir -p "$WORK" 2>/dev/null || fail "$WORK cannot be made. Set COURSE_WORK to a folder that $(id -un) may write."
[ -w "$WORK" ] || fail "$WORK belongs to another user. Give it to user $(id -u):  chown -R $(id -u) FOLDER"

# A notebook looks for the rest of the course two folders above itself.
for path in "$COURSE/.venv" "$COURSE"/*; do
    name=$(basename "$path")
    case $name in notebooks | output | images | __pycache__) continue ;; esac
    if [ -L "$WORK/$name" ] || [ ! -e "$WORK/$name" ]; then
        ln -sfn "$path" "$WORK/$name"
    fi
done

mkdir -p "$WORK/images" # copied, for Jupyter shows no picture through a link that leads out of its folder
cp -R "$COURSE/images/." "$WORK/images/"

# Every notebook is the learner's. A newer one takes its place only as long as it was not touched.
given=$WORK/.course/$LANGUAGE # as they were given, to know what was touched
mkdir -p "$given" "$WORK/notebooks/$LANGUAGE"
for new in "$COURSE/notebooks/$LANGUAGE"/*.ipynb; do
    name=$(basename "$new" .ipynb)
    mine=$WORK/notebooks/$LANGUAGE/$name.ipynb
    if [ ! -e "$mine" ] || cmp -s "$mine" "$given/$name.ipynb"; then
        cmp -s "$new" "$mine" || copy "$new" "$mine"
    elif ! cmp -s "$new" "$given/$name.ipynb" && ! cmp -s "$new" "$mine"; then
        beside=${mine%.ipynb}.$(cat "$COURSE/deploy/VERSION").ipynb
        while [ -e "$beside" ]; do beside=${beside%.ipynb}+.ipynb; done
        copy "$new" "$beside"
        echo "$name has a new version. Yours stays as it is; the new one lies beside it: $(basename "$beside")"
    fi
    cmp -s "$new" "$given/$name.ipynb" || copy "$new" "$given/$name.ipynb"
done

export COURSE_OUTPUT="${COURSE_OUTPUT:-$WORK/output}"
export PYTHONSTARTUP="$COURSE/course/startup.py" MPLBACKEND=module://matplotlib_inline.backend_inline
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}" # threads of torch that wait sleep soon, for other kernels need the cores
export PATH="$COURSE/.venv/bin:$PATH"
cd "$WORK"

# No question about news, no look for updates or extensions; the interface in the language of the notebooks, until the
# learner chooses another in its menu. Kernels speak through sockets that only their user reaches.
export JUPYTER_CONFIG_PATH="$COURSE/deploy/jupyter/$LANGUAGE:$COURSE/deploy/jupyter"
first=/lab/tree/notebooks/$LANGUAGE/01_environment.ipynb
set -- --ServerApp.root_dir="$WORK" --LabApp.extension_manager=readonly --KernelManager.transport=ipc
if [ -n "${JUPYTERHUB_API_TOKEN:-}" ]; then
    chmod go= "$HOME"
    export JUPYTERHUB_DEFAULT_URL="$first"
    # A kernel without a browser gives its memory back after half an hour.
    exec jupyterhub-singleuser "$@" --MappingKernelManager.cull_idle_timeout=1800
fi
[ -n "${JUPYTER_TOKEN:-}" ] || unset JUPYTER_TOKEN # an empty one would open the door
exec jupyter lab --no-browser --ip="${COURSE_IP:-127.0.0.1}" --port="${COURSE_PORT:-8888}" --ServerApp.port_retries=0 \
    --LabApp.default_url="$first" "$@"
