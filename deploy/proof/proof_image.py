"""Proves an image: started as the README says, opened with its token, stopped and started again, then cut off.

`python3 deploy/proof/proof_image.py IMAGE`, where docker runs; `ENGINE=podman` uses Podman instead. Last it runs
`proof.py` inside, with the whole series, without a network and with a read-only root; `SERIES=no` leaves that out.
"""

import json
import os
import re
import subprocess
import sys
import time

from proof import expect, status

ENGINE = os.environ.get("ENGINE") or "docker"
NAME = f"course-proof-{os.getpid()}"  # of the container and of the volume
PORT = os.environ.get("COURSE_PORT") or "8888"
FOLDER = "/home/learner/course"
PYTHON = "/opt/course/.venv/bin/python"
#: As the Dockerfile says it.
READ_ONLY = ["--read-only", "--tmpfs", "/tmp", "-e", "HOME=/tmp"]
#: The series takes these from here, where they are set.
SETTINGS = [word for name in ("COURSE_CELL_SECONDS", "COURSE_MAX_STEPS") for word in ("-e", name)]


def engine(*words: str) -> str:
    """What the container engine answers.

    Raises:
        SystemExit: it refused.
    """
    done = subprocess.run([ENGINE, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{ENGINE} {' '.join(words)}\n{done.stderr}")
    return done.stdout.strip()


def inside(command: str) -> str:
    """What a shell command says in the running container."""
    return engine("exec", NAME, "sh", "-c", command)


def healthy() -> bool:
    """Whether the image's own health check holds."""
    if ENGINE.endswith("podman"):  # its checks need systemd's timers, so one is asked for
        return not subprocess.run([ENGINE, "healthcheck", "run", NAME], capture_output=True).returncode
    return engine("inspect", "--format", "{{.State.Health.Status}}", NAME) == "healthy"


def start(image: str) -> tuple[str, str]:
    """Start the image on the volume and wait until it is healthy; the server's address and its token."""
    begun = time.time()
    engine("run", "-d", "--name", NAME, "-p", f"127.0.0.1:{PORT}:8888", "-v", f"{NAME}:{FOLDER}", image)
    while not healthy():
        if time.time() - begun > 300:
            sys.exit(engine("logs", NAME))
        time.sleep(0.5)
    expect(f"healthy {time.time() - begun:.1f} s after the start", True)
    both = subprocess.run([ENGINE, "logs", NAME], capture_output=True, text=True)
    path, token = re.findall(r"http://127\.0\.0\.1:8888(/\S+)\?token=(\w+)", both.stdout + both.stderr)[-1]
    return f"http://127.0.0.1:{PORT}{path}", token


def stop() -> None:
    """Stop the container as `docker stop` does, and take it away."""
    begun = time.time()
    engine("stop", NAME)
    code = engine("inspect", "--format", "{{.State.ExitCode}}", NAME)
    expect(f"it stops on SIGTERM after {time.time() - begun:.1f} s, exit status {code}", code in ("0", "143"))
    engine("rm", NAME)


def main() -> int:
    """0 when all holds."""
    image = sys.argv[1]
    size = json.loads(engine("image", "inspect", image))[0]["Size"]
    expect(f"{image}: {size / 1e9:.2f} GB", True)
    try:
        address, token = start(image)
        expect("the address opens 01_environment: " + address, address.endswith("01_environment.ipynb"))
        expect("with the token the page opens", status(f"{address}?token={token}") == 200)
        contents = address.replace("/lab/tree/", "/api/contents/")
        expect("without the token the notebook is refused", status(contents) == 403)
        expect("with the token it comes", status(f"{contents}?token={token}") == 200)
        expect(f"user {inside('id -u')}, not root", inside("id -u") == "1000")
        inside(f"echo mine >{FOLDER}/notebooks/en/mine.txt")
        stop()
        start(image)
        expect("a learner's file outlives the container", inside(f"cat {FOLDER}/notebooks/en/mine.txt") == "mine")
        stop()
    finally:
        for words in (["rm", "-f", NAME], ["volume", "rm", NAME]):
            subprocess.run([ENGINE, *words], capture_output=True)
    asked = ["--entrypoint", PYTHON, image, "-c", "import utils; print(round(utils.machine()['memory_gib'], 2))"]
    seen = engine("run", "--rm", "--network", "none", "--memory", "3g", "--workdir", "/opt/course", *asked)
    expect(f"of 3 GiB that a container may hold, notebook 01 sees {seen}", seen == "3.0")
    if os.environ.get("SERIES") == "no":
        return 0
    print("proof.py in it, without a network and with a read-only root", flush=True)
    proof = [PYTHON, "/opt/course/deploy/proof/proof.py"]
    alone = ["run", "--rm", "--network", "none", *READ_ONLY, *SETTINGS, "--entrypoint", proof[0], image, *proof[1:]]
    return subprocess.run([ENGINE, *alone]).returncode


if __name__ == "__main__":
    sys.exit(main())
