"""A Hub on this machine: what `huggingface_hub` asks over HTTP, for tests with its real code.

Large files are announced as git-lfs files with their sha256, as the Hub does; every commit of a
repository keeps its files.
"""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_FROM = 4096
"""Bytes from which a file is a git-lfs file."""


class Hub:
    """Repositories by owner/name: path -> content. What is asked for is kept in `asked`.

    breaks: path -> after how many bytes the next answers stop, one number an answer. lies: path ->
    content that is sent in the place of what is announced.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.breaks: dict[str, list[int]] = {}
        self.lies: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str]] = []

    def commit(self, repository: str) -> str:
        """The commit of a repository as it is now."""
        content = sorted(self.repositories[repository].items())
        return hashlib.sha1(repr(content).encode()).hexdigest()

    def got(self, method: str, ending: str) -> list[str]:
        """The ranges of the requests for paths with this ending."""
        return [where for how, path, where in self.asked if how == method and path.endswith(ending)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        """Tests read `asked` instead."""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(("POST", path, ""))
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.repositories.setdefault(name, {})
            self._json({"url": f"https://huggingface.co/{name}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(content)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in files
            ]
            self._json({"files": modes})
        elif "/commit/" in path:
            name = "/".join(path.split("/")[3:5])
            for line in content.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    data = base64.b64decode(value["content"])
                    self.hub.repositories[name][value["path"]] = data
            commit = self.hub.commit(name)
            url = f"https://huggingface.co/{name}/commit/{commit}"
            self._json({"success": True, "commitUrl": url, "commitOid": commit})
        else:
            self._json({"error": "not here"}, 404)

    def _answer(self, body: bool):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        steps = path.strip("/").split("/")
        if steps[:2] == ["api", "models"]:
            name = "/".join(steps[2:4])
            if name in self.hub.repositories:
                return self._listing(name, steps[4] if len(steps) > 4 else "")
        elif len(steps) > 4 and steps[2] == "resolve":
            name, file = "/".join(steps[:2]), "/".join(steps[4:])
            content = self.hub.repositories.get(name, {}).get(file)
            if content is not None:
                return self._file(name, file, content, body)
        code = "EntryNotFound" if len(steps) > 4 else "RepoNotFound"
        return self._json({"error": "not here"}, 404, {"X-Error-Code": code})

    def _listing(self, name: str, what: str):
        files = self.hub.repositories[name]
        if what == "tree":
            return self._json([_entry(path, content) for path, content in files.items()])
        siblings = [{"rfilename": path} for path in files]
        return self._json({"id": name, "sha": self.hub.commit(name), "siblings": siblings})

    def _file(self, name: str, file: str, content: bytes, body: bool):
        digest = hashlib.sha256(content).hexdigest()
        sent = self.hub.lies.get(file, content) if body else content
        start = (
            int(self.headers["Range"].split("=")[1].split("-")[0])
            if self.headers.get("Range")
            else 0
        )
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", self.hub.commit(name))
        self.send_header("ETag", f'"{digest}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(sent) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(sent) - 1}/{len(sent)}")
        self.end_headers()
        if body:
            stops = self.hub.breaks.get(file) or [len(sent)]
            stop = stops.pop(0) if self.hub.breaks.get(file) else stops[0]
            with contextlib.suppress(OSError):
                self.wfile.write(sent[start : max(start, stop)])
                self.wfile.flush()
            if stop < len(sent):
                self.close_connection = True
        return None

    def _json(self, value, status: int = 200, headers: dict | None = None):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(data)


def _entry(path: str, content: bytes) -> dict:
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"size": len(content), "oid": digest, "pointerSize": 130}
    entry = {"type": "file", "path": path, "size": len(content), "oid": digest[:40]}
    return {**entry, "lfs": lfs} if len(content) >= LFS_FROM else entry


@contextlib.contextmanager
def serving():
    """A hub and the address that it answers at."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub, f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def point_at(monkeypatch, address: str, cache) -> None:
    """Make the loaded library ask this address and keep its files in a cache of the test's own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
