"""A small Hub on loopback: real HTTP, real files, the endpoints that sharing and loading a checkpoint need."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

WRITER, READER = "hf_writer", "hf_reader"


class HubStandIn:
    """Repositories in memory.

    Attributes
    ----------
    commits
        Repository -> list of (sha, {file: content}), the newest last.
    branches
        Repository -> {branch: place in `commits`}.
    private
        Repositories that need a token.
    requests
        Lines of what was asked.
    break_off
        Name of a file whose next download stops half-way; None: no more.
    """

    def __init__(self):
        self.commits, self.branches, self.private, self.blobs = {}, {}, set(), {}
        self.requests, self.break_off, self.address = [], None, ""

    def commit(self, repo, branch, operations):
        base = self.branches[repo][branch]
        files = dict(self.commits[repo][base][1])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"], None)
        content = repr(sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items()))
        sha = hashlib.sha1(f"{len(self.commits[repo])}{content}".encode()).hexdigest()
        self.commits[repo].append((sha, files))
        self.branches[repo][branch] = len(self.commits[repo]) - 1
        return sha

    def at(self, repo, revision):
        """Return (sha, files) of a branch or commit; None without."""
        if revision in self.branches[repo]:
            return self.commits[repo][self.branches[repo][revision]]
        return next((found for found in self.commits[repo] if found[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    do_GET = do_POST = do_PUT = do_HEAD  # noqa: N815 - the base class's names

    def answer(self):
        url = urlparse(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path} {self.headers.get('Range') or ''}".strip())
        for pattern, call in ROUTES:
            found = re.fullmatch(pattern, path)
            if found:
                call(self, *found.groups(), body=body, query=parse_qs(url.query))
                return
        self.send(404, {"error": f"no such endpoint: {path}"})

    @property
    def token(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def send(self, status, value=None, *, content=None, error=None, **headers):
        data = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        if error is not None:
            self.send_header("X-Error-Code", error)
        for name, one in headers.items():
            self.send_header(name.replace("_", "-"), one)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def may(self, repo, *, write=False):
        """Return whether the token allows it; otherwise the answer was given."""
        if self.token and self.token not in (WRITER, READER):
            self.send(401, {"error": "Invalid credentials"})
        elif write and self.token != WRITER:
            self.send(403 if self.token else 401, {"error": "no right to write"})
        elif repo not in self.hub.commits or (repo in self.hub.private and not self.token):
            self.send(401 if not self.token else 404, {"error": "Repository not found"}, error="RepoNotFound")
        else:
            return True
        return False

    def create(self, *, body, query):
        asked = json.loads(body)
        repo = asked["name"] if not asked.get("organization") else f"{asked['organization']}/{asked['name']}"
        if self.token != WRITER:
            self.send(403 if self.token == READER else 401, {"error": "no right to create"})
        elif repo in self.hub.commits:
            self.send(409, {"error": "exists", "url": f"{self.hub.address}/{repo}"})
        else:
            self.hub.commits[repo], self.hub.branches[repo] = [("0" * 40, {})], {"main": 0}
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(repo)
            self.send(200, {"url": f"{self.hub.address}/{repo}", "name": repo, "id": repo})

    def create_branch(self, repo, branch, *, body, query):
        if self.may(repo, write=True):
            self.hub.branches[repo].setdefault(branch, self.hub.branches[repo]["main"])
            self.send(200, {})

    def validate(self, *, body, query):
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, repo, revision, *, body, query):
        if self.may(repo, write=True):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".npy", ".png")) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self.send(200, {"files": files})

    def batch(self, repo, *, body, query):
        if self.may(repo, write=True):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self.send(200, {"transfer": "basic", "objects": objects})

    def put_blob(self, oid, *, body, query):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self.send(200, {})

    def make_commit(self, repo, revision, *, body, query):
        if self.may(repo, write=True):
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            sha = self.hub.commit(repo, revision, [line for line in lines if line["key"] != "header"])
            self.send(200, {"commitUrl": f"{self.hub.address}/{repo}/commit/{sha}", "commitOid": sha})

    def found(self, repo, revision):
        if not self.may(repo):
            return None
        known = self.hub.at(repo, revision)
        if known is None:
            self.send(404, {"error": "Revision not found"}, error="RevisionNotFound")
        return known

    def info(self, repo, revision=None, *, body, query):
        known = self.found(repo, revision or "main")
        if known is not None:
            siblings = [{"rfilename": name} for name in known[1]]
            self.send(200, {"id": repo, "sha": known[0], "siblings": siblings, "private": repo in self.hub.private})

    def tree(self, repo, revision, *, body, query):
        known = self.found(repo, revision)
        if known is not None:
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in known[1].items()
            ]
            self.send(200, files)

    def resolve(self, repo, revision, name, *, body, query):
        known = self.found(repo, revision)
        if known is None:
            return
        sha, files = known
        if name not in files:
            self.send(404, {"error": "Entry not found"}, error="EntryNotFound", X_Repo_Commit=sha)
            return
        data = files[name]
        facts = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first = int(wanted[1]) if wanted else 0
        if wanted:
            facts["Content_Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if self.hub.break_off == name and self.command == "GET":
            self.hub.break_off = None
            self.send_response(200)
            for key, value in facts.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.send(206 if wanted else 200, content=data[first:], **facts)


ROUTES = [
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.validate),
    (r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", Handler.create_branch),
    (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", Handler.preupload),
    (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", Handler.make_commit),
    (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", Handler.tree),
    (r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", Handler.info),
    (r"/api/models/([^/]+/[^/]+)", Handler.info),
    (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    (r"/lfs/([0-9a-f]{64})", Handler.put_blob),
    (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def running_hub():
    """Give a stand-in that answers at its `address`."""
    hub = HubStandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
