"""What `prove.sh` looks at once the course is installed: run as the learner, with no network but this machine's own."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

DEPLOY = Path(__file__).resolve().parents[1]
WORK = Path(os.environ.get("COURSE_WORK") or Path.home() / "course")
LANGUAGE = os.environ.get("COURSE_LANGUAGE") or "en"
FIRST = WORK / "notebooks" / LANGUAGE / "01_environment.ipynb"


def status(address: str) -> int:
    """The HTTP status that a request gets."""
    try:
        return urllib.request.urlopen(address, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


def expect(what: str, right: bool) -> None:
    """Say what holds, or end.

    Raises:
        SystemExit: it does not hold.
    """
    print(f"{'ok' if right else 'NO'}  {what}", flush=True)
    if not right:
        sys.exit(1)


def server(log: Path) -> tuple[subprocess.Popen, str]:
    """Start the server; the process and the address with the token, once it answers the health check."""
    with log.open("w") as file:
        process = subprocess.Popen([DEPLOY / "start.sh"], stdout=file, stderr=subprocess.STDOUT)
    for _ in range(600):  # five minutes, on a machine that is busy
        time.sleep(0.5)
        found = re.search(r"http://127\.0\.0\.1:8888/\S+\?token=\w+", log.read_text())
        if found and not subprocess.run([sys.executable, DEPLOY / "health.py"], capture_output=True).returncode:
            return process, found[0]
    sys.exit(log.read_text())


def main() -> int:
    """0 when all holds."""
    expect(f"user {os.getuid()}, not root", os.getuid() != 0)
    try:
        urllib.request.urlopen("http://192.0.2.1", timeout=5)
        expect("no network", False)
    except OSError as error:
        expect(f"no network: {error}", True)
    expect("the course is read-only", not os.access(DEPLOY.parent / "utils.py", os.W_OK))

    begun = time.time()
    process, address = server(Path.home() / "server.log")
    expect(f"the server answers its health check after {time.time() - begun:.1f} s", True)
    base, token = address.split("lab/")[0], address.partition("?")[2]
    expect("the address opens 01_environment: " + address.replace(token, "token=..."), FIRST.stem in address)
    expect("with the token the page opens", status(address) == 200)
    contents = f"{base}api/contents/notebooks/{LANGUAGE}/{FIRST.name}"
    expect("without the token the notebook is refused", status(contents) == 403)
    expect("with the token it comes", status(f"{contents}?{token}") == 200)
    expect("a picture of the notebooks comes", status(f"{base}files/images/sample_to_answer.svg?{token}") == 200)
    process.terminate()
    process.wait(30)

    notebook = json.loads(FIRST.read_text(encoding="utf-8"))
    notebook["cells"][0]["source"] = ["# mine"]
    FIRST.write_text(json.dumps(notebook), encoding="utf-8")
    process, _ = server(Path.home() / "server.log")
    process.terminate()
    process.wait(30)
    expect("an edited notebook outlives a restart", "# mine" in FIRST.read_text(encoding="utf-8"))

    print("the whole series, by make run in the learner's folder", flush=True)
    run = subprocess.run(["make", "-C", str(WORK), "run"], env=os.environ | {"COURSE_OUTPUT": str(WORK / "output")})
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
