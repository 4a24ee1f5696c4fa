"""The part of the Hugging Face hub that an upload needs, over HTTP."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    repos = None

    def answer(self, status, value=None):
        body = json.dumps(value).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def repo(self):
        return self.repos.get("/".join(self.path.split("?")[0].split("/")[3:5]))

    def do_GET(self):
        if self.repo() is None:
            return self.answer(404, {"error": "Repository not found"})
        if "/tree/" in self.path:
            files = self.repo()["files"]
            return self.answer(200, [{"type": "file", "path": p, "oid": "0", "size": len(x)}
                                     for p, x in files.items()])
        self.answer(200, {"id": "x/y", "private": self.repo()["private"], "tags": [],
                          "siblings": [{"rfilename": p} for p in self.repo()["files"]]})

    def do_POST(self):
        body = self.body()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            url = f"http://{self.headers['Host']}/{name}"
            if name in self.repos:
                return self.answer(409, {"url": url})
            private = asked.get("private", asked.get("visibility") == "private")
            self.repos[name] = {"private": private, "files": {}}
            return self.answer(200, {"url": url})
        if "/preupload/" in self.path:
            return self.answer(200, {"files": [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]]})
        if "/commit/" in self.path:
            self.repo().setdefault("uploads", []).append(self.repo()["private"])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    content = base64.b64decode(value["content"])
                    self.repo()["files"][value["path"]] = content
                elif line["key"] == "deletedFile":
                    del self.repo()["files"][value["path"]]
            return self.answer(200, {"commitUrl": f"http://{self.headers['Host']}/x/y/commit/0",
                                     "commitOid": "0" * 40})
        self.answer(200, {})

    def do_PUT(self):
        assert self.path.endswith("/settings"), self.path
        asked = json.loads(self.body())
        self.repo()["private"] = asked.get("private", asked.get("visibility") == "private")
        self.answer(200, {})

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def hub(repos):
    """repos: {name: {"private": bool, "files": {path: bytes}}}, which uploads change. Yields the
    URL for HF_ENDPOINT."""
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Hub", (Handler,), {"repos": repos}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
