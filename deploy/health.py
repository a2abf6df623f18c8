"""Whether the JupyterLab server on this machine answers, as exit status: the image's health check.

It asks for the server's version, which needs no token, on 127.0.0.1 and port `COURSE_PORT` (8888).
"""

import http.client
import json
import os
import sys

connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("COURSE_PORT") or 8888), timeout=3)
try:
    connection.request("GET", "/api")
    version = json.loads(connection.getresponse().read())["version"]
except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
    sys.exit(f"no answer from JupyterLab: {type(error).__name__}")
print(f"Jupyter server {version} answers")
