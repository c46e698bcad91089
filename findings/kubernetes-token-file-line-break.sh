#!/usr/bin/env bash
# A kubeconfig's tokenFile that ends with a line break, as every editor leaves it, is of no use to the official Python
# client: the whole text of the file becomes the Authorization header, which the HTTP library refuses, so that no request
# leaves the process. kubectl (client-go) leaves white space at the ends out and works with the very same file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'kubernetes==37.0.2' 'aiohttp==3.14.5' 'aiohttp-retry==2.9.1' 'urllib3==2.8.0'
cd "$folder"
cat > ask.py <<'PYTHON'
import asyncio
import http.server
import json
import pathlib
import threading
from importlib.metadata import version

VERSION = {name: "1" for name in ("major", "minor", "gitVersion", "gitCommit", "gitTreeState", "buildDate",
                                  "goVersion", "compiler", "platform")}
seen = []


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        seen.append(self.headers.get("Authorization"))
        body = json.dumps(VERSION).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
pathlib.Path("config").write_text(json.dumps({
    "apiVersion": "v1",
    "kind": "Config",
    "current-context": "here",
    "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
    "users": [{"name": "u", "user": {"tokenFile": "token"}}],
    "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
}))


def ask_sync():
    from kubernetes import client, config

    configuration = client.Configuration()
    config.load_kube_config("config", client_configuration=configuration)
    client.VersionApi(client.ApiClient(configuration)).get_code()


async def ask_async():
    from kubernetes.aio import client, config

    configuration = client.Configuration()
    await config.load_kube_config("config", client_configuration=configuration)
    async with client.ApiClient(configuration) as api:
        await client.VersionApi(api).get_code()


def outcome(ask):
    seen.clear()
    try:
        ask()
        return f"answered; the server saw {seen}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:60]}; the server saw {seen}"


print("kubernetes", version("kubernetes"))
works = True
for name, ask in {"kubernetes": ask_sync, "kubernetes.aio": lambda: asyncio.run(ask_async())}.items():
    for text in ("a-token", "a-token\n"):
        pathlib.Path("token").write_text(text)
        said = outcome(ask)
        print(f"{name:15} tokenFile {text!r:12} {said}")
        works = works and said.startswith("answered" if text == "a-token" else "ValueError")
raise SystemExit(0 if works else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" ask.py
