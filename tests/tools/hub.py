"""A stand-in for huggingface.co: what `datasets` asks of it, answered over HTTP from a dict.

`with serve({repository: {revision: {path: bytes}}}) as server:` and HF_ENDPOINT=server.address in
another process. Paths in `server.gone` are listed, but no longer there when they are asked for.
"""
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


def sha(*parts):
    """Return 40 hex digits, the form of a commit and of an ETag."""
    return hashlib.sha1(b"\0".join(parts)).hexdigest()


def tree(files, folder, deep):
    """Return the entries below a folder ("" or "x/"), folders too, only its own unless `deep`."""
    found = {}
    for path, content in files.items():
        names = path[len(folder):].split("/")
        if not path.startswith(folder):
            continue
        for depth in range(1, len(names) if deep else min(2, len(names))):
            name = folder + "/".join(names[:depth])
            found[name] = {"type": "directory", "path": name, "oid": sha(name.encode())}
        if deep or len(names) == 1:
            found[path] = {"type": "file", "path": path, "size": len(content), "oid": sha(content)}
    return list(found.values())


class Handler(BaseHTTPRequestHandler):
    """Answers /api/datasets/A/B[/revision/R | /tree/R/..] and /datasets/A/B/resolve/R/path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        address, _, query = self.path.partition("?")
        parts = [unquote(part) for part in address.strip("/").split("/")]
        api = parts[0] == "api"
        repository, rest = "/".join(parts[1 + api:3 + api]), [*parts[3 + api:], "", ""]
        path, revision = "/".join(rest[2:-2]), rest[1] or "main"
        for name, files in self.server.repositories.get(repository, {}).items():
            commit = sha(repository.encode(), name.encode())
            if revision not in (name, commit):
                continue
            if api and rest[0] == "tree":
                listed = tree(files, path and path + "/", "recursive=true" in query.lower())
                return self.answer(200 if listed else 404, json.dumps(listed).encode())
            if api:
                return self.answer(200, json.dumps({"id": repository, "sha": commit}).encode())
            if path in files and path not in self.server.gone:
                return self.answer(200, files[path], commit)
        return self.answer(404)

    do_HEAD = do_GET

    def answer(self, status, content=b"", commit=""):
        """Send the content, or the part of it that the request's Range names."""
        start, end = 0, len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and status == 200:
            start, end = int(asked[1]), min(end, int(asked[2] or end) + 1)
            status = 206 if start < end else 416
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{sha(content)}"')
        self.send_header("Content-Length", str(max(0, end - start)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[start:end])

    def log_message(self, *args):
        """Say nothing on the test's stderr."""


@contextmanager
def serve(repositories):
    """Yield a running server with .address, .repositories and .gone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories, server.gone = repositories, set()
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
