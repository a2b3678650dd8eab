"""A stand-in on loopback for the Hugging Face Hub: repositories, commits, large files and downloads.

It speaks the part of the Hub's HTTP interface that `huggingface_hub` uses for `create_repo`, `create_commit` (with
Git LFS's basic transfer) and `hf_hub_download`.
"""

import base64
import hashlib
import http.server
import json
import re
import threading

import yaml

COMMIT = "0" * 39 + "1"
LARGE = (".safetensors", ".onnx", ".pth", ".pt2")
TOKEN = "hf_standin"


class HubServer:
    """`files` has what was committed, by repository and name; `private` the repositories that were made, and how."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.messages: list[str] = []
        self.refuse = False  # answer commits with 403
        server = self

        class Handler(_Handler):
            hub = server

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        """Ends the server."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.hub.private.setdefault(name, asked.get("visibility") == "private" or bool(asked.get("private")))
            return self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        if self.path == "/api/validate-yaml":
            header = json.loads(body)["content"].split("---")[1]
            wrong = [] if isinstance(yaml.safe_load(header), dict) else [{"message": "no mapping"}]
            return self._json({"errors": wrong, "warnings": []}, 400 if wrong else 200)
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": modes})
        if re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            if self.hub.refuse:
                return self._json({"error": "You have read access but not the required permissions"}, 403)
            files = self.hub.files.setdefault(match[1], {})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.hub.messages.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
            return self._json(
                {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.url}/{match[1]}/commit/{COMMIT}"}
            )
        return self._json({"error": "not found"}, 404)

    def do_PUT(self) -> None:
        body = self._body()
        assert hashlib.sha256(body).hexdigest() == self.path.removeprefix("/lfs/")
        self.hub.large[self.path.removeprefix("/lfs/")] = body
        self._json({})

    def do_HEAD(self) -> None:
        self._download()

    def do_GET(self) -> None:
        self._download()

    def _download(self) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        content = self.hub.files.get(match[1], {}).get(match[2]) if match else None
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            content = b""
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
