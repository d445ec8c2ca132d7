"""A hub on loopback with a folder behind it: the requests that huggingface_hub makes to read a model and to write one.

`ROOT/USER/MODEL/commits/COMMIT/` holds the files of a commit, `refs/BRANCH` its name, and `ROOT/large/` large files
by their SHA-256.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_ana"  # may read and write everything
LICENSES = ("apache-2.0", "mit")  # those that the real Hub knows are many
MODEL = r"([\w.-]+/[\w.-]+)"


def git_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Hub:
    "The repositories in a folder, and what happens to their bytes on the way."

    def __init__(self, root: Path) -> None:
        self.root, self.private, self.requests = root, set[str](), list[str]()
        self.changed: dict[str, bytes] = {}     # file → bytes that are sent in its place
        self.stated: dict[str, int] = {}        # file → size that is stated of it

    def commit(self, repo: str, files: Mapping[str, bytes]) -> str:
        "Add files to the branch main; returns the commit."
        before = self.files(repo, "main") or {}
        after = {**before, **files}
        name = hashlib.sha1(repr([repo, sorted((path, git_id(content)) for path, content in after.items())]).encode()).hexdigest()
        folder = self.root / repo
        for path, content in after.items():
            (file := folder / "commits" / name / path).parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(name)
        return name

    def commit_of(self, repo: str, revision: str) -> str | None:
        ref, commit = self.root / repo / "refs" / revision, self.root / repo / "commits" / revision
        return ref.read_text() if ref.is_file() else revision if commit.is_dir() else None

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        commit = self.commit_of(repo, revision)
        if commit is None:
            return None
        folder = self.root / repo / "commits" / commit
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        "A file in a listing; a large one is stored by its SHA-256."
        size = self.stated.get(path, len(content))
        large = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
        return {"rfilename": path, "path": path, "type": "file", "size": size, "blobId": git_id(content), "oid": git_id(content),
                **({"lfs": large | {"sha256": large["oid"]}} if is_large(path) else {})}


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        self.hub.requests.append(f"{self.command} {unquote(urlsplit(self.path).path)}")

    def send(self, status: int, content: bytes | dict[str, Any] | list[Any] = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while n := int(self.rfile.readline(), 16):
            content += self.rfile.read(n + 2)[:-2]
        self.rfile.readline()
        return content

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def readable(self, repo: str, revision: str) -> str | None:
        "The commit; or None, after an answer with an error as the Hub gives it."
        if not (self.hub.root / repo).is_dir() or (repo in self.hub.private and not self.known):
            if self.known:
                self.send(404, b"", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            else:
                self.send(401, b"", X_Error_Message="Invalid username or password.")
            return None
        commit = self.hub.commit_of(repo, revision)
        if commit is None:
            self.send(404, b"", X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        return commit

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(f"/api/models/{MODEL}(?:/revision/(.+)|/tree/([^/]+)(/.*)?)?", path):
            self.listing(found[1], found[2] or found[3] or "main", tree=found[3] is not None, below=found[4])
        elif found := re.fullmatch(f"/{MODEL}/resolve/(.+)/([^/]+)", path):
            self.resolve(found[1], found[2], found[3])
        elif found := re.fullmatch("/large/([0-9a-f]{64})/(.+)", path):
            self.send(200, self.hub.changed.get(found[2]) or (self.hub.root / "large" / found[1]).read_bytes())
        else:
            self.send(404, b"", X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def listing(self, repo: str, revision: str, tree: bool, below: str | None) -> None:
        if (commit := self.readable(repo, revision)) is None:
            return
        entries = [self.hub.entry(path, content) for path, content in (self.hub.files(repo, commit) or {}).items()]
        if below:
            return self.send(404, b"", X_Error_Code="EntryNotFound")
        self.send(200, entries if tree else {"id": repo, "sha": commit, "private": repo in self.hub.private, "siblings": entries})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if (commit := self.readable(repo, revision)) is None:
            return
        files = self.hub.files(repo, commit) or {}
        if path not in files:
            return self.send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content, entry = files[path], self.hub.entry(path, files[path])
        if not is_large(path):
            return self.send(200, self.hub.changed.get(path, content), X_Repo_Commit=commit, ETag=f'"{entry["blobId"]}"')
        digest = entry["lfs"]["sha256"]
        (store := self.hub.root / "large").mkdir(exist_ok=True)
        (store / digest).write_bytes(content)
        other_host = f"http://localhost:{self.headers['Host'].rpartition(':')[2]}"  # as of large files
        self.send(302, b"", X_Repo_Commit=commit, X_Linked_Etag=f'"{digest}"', X_Linked_Size=str(len(content)),
                  Location=f"{other_host}/large/{digest}/{path}")

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.body()
        if not self.known:
            return self.send(401, b"", X_Error_Message="Invalid username or password.")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            head = re.match(r"---\n(.*?\n)---\n", json.loads(body)["content"], re.DOTALL)
            license = (yaml.safe_load(head[1]) if head else {}).get("license", "mit")
            errors = [] if license in LICENSES else [{"message": f'"license" must be one of [{", ".join(LICENSES)}]'}]
            return self.send(400 if errors else 200, {"errors": errors, "warnings": []})
        if found := re.fullmatch(f"/api/models/{MODEL}/preupload/main", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "lfs" if is_large(name) else "regular", "shouldIgnore": False} for name in names]
            return self.send(200, {"files": modes})
        if re.fullmatch(rf"/{MODEL}\.git/info/lfs/objects/batch", path):
            href = f"http://{self.headers['Host']}/large/"
            return self.send(200, {"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": href + one["oid"]}}} for one in json.loads(body)["objects"]]})
        if found := re.fullmatch(f"/api/models/{MODEL}/commit/main", path):
            name = self.hub.commit(found[1], self.files_of(body))
            return self.send(200, {"commitUrl": f"http://{self.headers['Host']}/{found[1]}/commit/{name}", "commitOid": name})
        return self.send(404)

    def create(self, wish: dict[str, Any]) -> None:
        repo = f"{wish['organization']}/{wish['name']}"
        if (self.hub.root / repo).exists():
            return self.send(409, {"error": "You already created it", "url": f"http://{self.headers['Host']}/{repo}"})
        (self.hub.root / repo).mkdir(parents=True)
        if wish.get("private") or wish.get("visibility") == "private":
            self.hub.private.add(repo)
        self.send(200, {"url": f"http://{self.headers['Host']}/{repo}", "id": repo, "name": repo})

    def files_of(self, body: bytes) -> dict[str, bytes]:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = (self.hub.root / "large" / value["oid"]).read_bytes()
        return files

    def do_PUT(self) -> None:
        digest, body = self.path.rpartition("/")[2], self.body()
        if hashlib.sha256(body).hexdigest() != digest:
            return self.send(400)
        (store := self.hub.root / "large").mkdir(exist_ok=True)
        (store / digest).write_bytes(body)
        self.send(200)


@contextmanager
def serving(root: Path) -> Iterator[tuple[Hub, ThreadingHTTPServer]]:
    "A hub on loopback inside the `with` block; `server.shutdown` and `server.server_close` end it earlier."
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub, server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
