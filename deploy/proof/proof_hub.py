"""Proves the hub: two learners log in, run notebook 01 at the same time, and cannot reach each other.

As root, after `install.sh hub`, on a machine to throw away, for it makes users: anna and ben, learners, and eve, none.
`/opt/course/.venv/bin/python /opt/course/deploy/proof/proof_hub.py`.
"""

import json
import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import requests
import websocket
from proof import expect

DEPLOY = Path(__file__).resolve().parents[1]
HUB = "http://127.0.0.1:8000"
PASSWORD = uuid.uuid4().hex
ROOM = ("anna", "ben")


def account(name: str, *groups: str) -> None:
    """Make a user of this machine with the one password."""
    subprocess.run(
        ["useradd", "--create-home", "-K", "HOME_MODE=0700", "--shell", "/bin/bash", *groups, name], check=True
    )
    subprocess.run(["chpasswd"], input=f"{name}:{PASSWORD}", text=True, check=True)


def login(name: str, password: str) -> requests.Session | None:
    """A browser's session after the login form, or None when it was refused.

    Raises:
        requests.HTTPError: the hub neither let in nor refused.
    """
    session = requests.Session()
    session.get(f"{HUB}/hub/login", timeout=60).raise_for_status()
    form = {"username": name, "password": password, "_xsrf": session.cookies.get("_xsrf")}
    answer = session.post(f"{HUB}/hub/login", data=form, timeout=60, allow_redirects=False)
    if answer.status_code == 403:
        return None
    answer.raise_for_status()
    return session


def open_lab(name: str, session: requests.Session) -> str:
    """Start the learner's server as a browser does; the address that it ends at."""
    session.get(f"{HUB}/hub/spawn", timeout=60)
    for _ in range(180):
        answer = session.get(f"{HUB}/user/{name}/", timeout=60)
        if answer.ok and answer.url.startswith(f"{HUB}/user/{name}/lab"):
            return answer.url
        time.sleep(1)
    return ""


def token(name: str, session: requests.Session) -> dict[str, str]:
    """The header of a token of the learner's own."""
    header = {"X-XSRFToken": session.cookies.get("_xsrf", path="/hub/")}
    answer = session.post(f"{HUB}/hub/api/users/{name}/tokens", headers=header, timeout=60)
    return {"Authorization": f"token {answer.json()['token']}"}


def run(name: str, header: dict[str, str], cells: list[str]) -> str:
    """Run cells in a new kernel of the learner's, in the notebooks' folder; what they printed."""
    kernels = f"{HUB}/user/{name}/api/kernels"
    kernel = requests.post(kernels, headers=header, json={"path": "notebooks/en/x.ipynb"}, timeout=120).json()["id"]
    address = f"{kernels}/{kernel}/channels".replace("http", "ws", 1)
    socket = websocket.create_connection(address, header=header, timeout=300)
    said = ""
    for cell in cells:
        asked = {
            "msg_id": uuid.uuid4().hex,
            "msg_type": "execute_request",
            "username": "",
            "session": "",
            "version": "5.4",
        }
        content = {"code": cell, "silent": False, "store_history": True, "allow_stdin": False}
        socket.send(
            json.dumps({"header": asked, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"})
        )
        while True:
            message = json.loads(socket.recv())
            if message["parent_header"].get("msg_id") != asked["msg_id"]:
                continue
            said += message["content"].get("text", "") + "".join(message["content"].get("traceback", []))
            if message["content"].get("execution_state") == "idle":
                break
    return said


def main() -> int:
    """0 when all holds."""
    for name in ROOM:
        account(name, "--groups", "learners")
    account("eve")
    environment = os.environ | {"COURSE_LEARNERS": "2", "PATH": f"/opt/course/.venv/bin:{os.environ['PATH']}"}
    command = ["/opt/course/.venv/bin/jupyterhub", "-f", str(DEPLOY / "jupyterhub_config.py")]
    with Path("/root/hub.log").open("w") as log:
        hub = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd="/")
    try:
        for _ in range(120):
            time.sleep(1)
            with suppress(requests.ConnectionError):
                if requests.get(f"{HUB}/hub/health", timeout=5).ok:
                    break
        expect("a wrong password is refused", login("anna", "wrong") is None)
        expect("a user of the machine who is no learner is refused", login("eve", PASSWORD) is None)
        sessions = {name: login(name, PASSWORD) for name in ROOM}
        expect("two learners are let in", None not in sessions.values())
        with ThreadPoolExecutor() as together:
            begun = time.time()
            opened = list(together.map(open_lab, ROOM, sessions.values()))
            expect(f"both servers run after {time.time() - begun:.0f} s: {opened[0]}", all(opened))
            headers = [token(name, sessions[name]) for name in ROOM]
            notebook = json.loads(Path("/opt/course/notebooks/en/01_environment.ipynb").read_text(encoding="utf-8"))
            cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"][:4]
            cells.append('import os; print(os.getuid(), os.environ["OMP_NUM_THREADS"], course.output)')
            said = list(together.map(run, ROOM, headers, [cells] * 2))
        print(*(f"    {name}: {lines.splitlines()[-1]}" for name, lines in zip(ROOM, said, strict=True)), sep="\n")
        expect("notebook 01's first cells ran for both", all("pinned packages are installed" in one for one in said))
        reports = [Path(f"/home/{name}/course/output/report.json") for name in ROOM]
        expect("each has an output of its own", all(path.owner() == path.parts[2] for path in reports))
        peeked = run("anna", headers[0], ['print(open("/home/ben/course/output/report.json").read())'])
        expect("anna cannot read ben's output", "PermissionError" in peeked)
        peeked = run("anna", headers[0], ['import os; print(os.listdir("/home/ben"))'])
        expect("anna cannot list ben's home", "PermissionError" in peeked)
        answer = requests.get(f"{HUB}/user/ben/api/contents", headers=headers[0], timeout=60)
        expect("anna's token does not open ben's server", answer.status_code in (403, 404))
        answer = requests.get(f"{HUB}/user/ben/api/contents", timeout=60, allow_redirects=False)
        expect("nor does none", answer.status_code in (302, 403))
        notes = Path("/home/ben/.local/share/jupyter/runtime").glob("kernel-*.json")
        ways = {json.loads(path.read_text())["transport"] for path in notes}
        expect("kernels are reached through files of their user only", ways == {"ipc"})
    finally:
        hub.terminate()
        hub.wait(60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
