"""JupyterHub for many learners on one machine, after `deploy/install.sh hub`; start it as root, it drops to each user.

A learner has an account of the machine and its password, and is a member of the group `learners`:

    useradd --create-home -K HOME_MODE=0700 --shell /bin/bash --groups learners NAME && passwd NAME

`/opt/course/.venv/bin/jupyterhub -f /opt/course/deploy/jupyterhub_config.py` starts it, and reads these variables:

    COURSE_LEARNERS   how many at the same time (8): shares out the processor's threads, and bounds the servers
    COURSE_MEMORY     the most memory of one learner (4G), all kernels together; held to only where systemd runs.
                      One notebook at a time took 2.6 GiB at most (workshop/README.md)
    COURSE_HUB_URL    where it listens (http://127.0.0.1:8000). Elsewhere than on this machine only with https:
    COURSE_CERT, COURSE_KEY   the files of its certificate and key (PEM), which https must have
    COURSE_LANGUAGE, COURSE_UPDATES   handed to the learners' servers
"""

import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

c = get_config()  # noqa: F821  (JupyterHub gives it)
deploy = Path(__file__).resolve().parent
state = Path("/var/lib/course-hub")
state.mkdir(mode=0o700, exist_ok=True)
learners = int(os.environ.get("COURSE_LEARNERS") or 8)

address = urlsplit(os.environ.get("COURSE_HUB_URL") or "http://127.0.0.1:8000")
if address.scheme != "https" and address.hostname != "127.0.0.1":
    sys.exit(f"{address.geturl()} would send passwords in the clear. COURSE_HUB_URL needs https there.")
c.JupyterHub.bind_url = address.geturl()
if address.scheme == "https":
    # Without both files JupyterHub would start all the same, and speak http.
    for name in ("COURSE_CERT", "COURSE_KEY"):
        file = os.environ.get(name, "")
        if not Path(file).is_file() or not os.access(file, os.R_OK):
            what = f"{name}={file} is no file that can be read" if file else f"{name} is not set"
            needed = "https needs COURSE_CERT and COURSE_KEY, the files of its certificate and its key"
            sys.exit(f"{address.geturl()}: {what}. {needed}. The hub was not started.")
    c.JupyterHub.ssl_cert = os.environ["COURSE_CERT"]
    c.JupyterHub.ssl_key = os.environ["COURSE_KEY"]
c.JupyterHub.db_url = f"sqlite:///{state}/jupyterhub.sqlite"
c.JupyterHub.cookie_secret_file = str(state / "cookie_secret")
c.ConfigurableHTTPProxy.pid_file = str(state / "proxy.pid")

# Whoever has no password of this machine, or is no member of the group (root is not), stays outside. Nobody is an
# administrator of the hub: that would open every learner's server to one password.
c.JupyterHub.authenticator_class = "pam"
c.PAMAuthenticator.allowed_groups = {"learners"}

# Each server runs as its learner, who cannot read another's folder. systemd holds it to its memory and gives it a /tmp
# of its own; without systemd the hub has no means to do so.
if Path("/run/systemd/system").is_dir():
    c.JupyterHub.spawner_class = "systemd"
    c.SystemdSpawner.isolate_tmp = True
    c.SystemdSpawner.mem_limit = os.environ.get("COURSE_MEMORY") or "4G"
else:
    print("systemd does not run here: memory is not limited, one learner can take that of all.", file=sys.stderr)
    c.JupyterHub.spawner_class = "jupyterhub.spawner.LocalProcessSpawner"
c.Spawner.cmd = [str(deploy / "start.sh")]
c.Spawner.environment = {
    "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // learners)),
    "TOKENIZERS_PARALLELISM": "false",
    **{name: os.environ[name] for name in ("COURSE_LANGUAGE", "COURSE_UPDATES") if os.environ.get(name)},
}
c.Spawner.start_timeout = c.Spawner.http_timeout = 180  # a whole room starts at the same moment
c.JupyterHub.active_server_limit = learners

# An hour without a browser ends a server; start.sh ends a kernel earlier. What was saved stays.
c.JupyterHub.services = [
    {"name": "culler", "command": [sys.executable, "-m", "jupyterhub_idle_culler", "--timeout=3600"]}
]
c.JupyterHub.load_roles = [
    {
        "name": "culler",
        "scopes": ["list:users", "read:users:activity", "read:servers", "delete:servers"],
        "services": ["culler"],
    }
]
