"""A model hub on the loopback interface: the few endpoints that the real client uses to publish and load a model.

It keeps repositories in memory, as one dict of files per commit. Safetensors go the way of large files (a batch of
upload addresses, a PUT each, an `lfsFile` line in the commit), everything else into the commit, as on the Hub.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


@dataclass
class Repository:
    private: bool = False
    commits: dict = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict = field(default_factory=lambda: {"main": "0" * 40})

    def commit_of(self, revision):
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Hub:
    """What a test sees: repositories, large objects, the requests in order, and how many of them shall fail first."""

    repositories: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    failures: dict = field(default_factory=dict)
    endpoint: str = ""

    def files(self, repo_id, revision="main"):
        repository = self.repositories[repo_id]
        return repository.commits[repository.commit_of(revision)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    @property
    def hub(self):
        return self.server.hub

    def handle_any(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        for pattern, left in self.hub.failures.items():
            if left and re.search(pattern, path):
                self.hub.failures[pattern] -= 1
                return self.answer(503)
        for (command, pattern), answer in ROUTES.items():
            found = re.fullmatch(pattern, path)
            if found and command == self.command.replace("HEAD", "GET"):
                return self.authorized(answer, found.groupdict())
        return self.answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def authorized(self, answer, parts):
        repository = self.hub.repositories.get(parts.get("repo"))
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        writes = self.command in ("POST", "PUT") and "lfs_oid" not in parts and "yaml" not in parts
        if (writes or (repository and repository.private)) and not known:
            return self.answer(401, headers={"X-Error-Code": "RepoNotFound"})
        if "repo" in parts and repository is None:
            return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
        revision = parts.get("revision")
        if revision and repository.commit_of(revision) is None and "branch" not in parts:
            return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        return answer(self, repository, **parts)

    def answer(self, status, content=b"", headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def whoami(self, repository):
        self.answer(200, {"type": "user", "name": "user", "orgs": [], "auth": {"type": "access_token"}})

    def validate(self, repository, yaml):
        self.answer(200, {"errors": [], "warnings": []})

    def create(self, repository):
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        status = 409 if repo_id in self.hub.repositories else 200
        self.hub.repositories.setdefault(repo_id, Repository(private))
        self.answer(status, {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id})

    def create_branch(self, repository, repo, branch):
        status = 409 if branch in repository.branches else 200
        repository.branches.setdefault(branch, repository.branches["main"])
        self.answer(status, {})

    def preupload(self, repository, repo, revision):
        files = [
            {"path": file["path"], "uploadMode": mode_of(file["path"]), "shouldIgnore": False}
            for file in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, repository, repo):
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}", "header": {}}
            known = asked["oid"] in self.hub.objects
            objects.append({**asked, **({} if known else {"actions": {"upload": upload}})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put_object(self, repository, lfs_oid):
        if hashlib.sha256(self.body).hexdigest() != lfs_oid:
            return self.answer(400)
        self.hub.objects[lfs_oid] = self.body
        return self.answer(200)

    def commit(self, repository, repo, revision):
        files = dict(repository.commits[repository.commit_of(revision)])
        for line in self.body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                files[item["value"]["path"]] = self.hub.objects[item["value"]["oid"]]
        oid = hashlib.sha1(self.body + str(len(repository.commits)).encode()).hexdigest()
        repository.commits[oid] = files
        repository.branches[revision] = oid
        url = f"{self.hub.endpoint}/{repo}/commit/{oid}"
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def info(self, repository, repo, revision="main"):
        oid = repository.commit_of(revision)
        siblings = [{"rfilename": path} for path in repository.commits[oid]]
        self.answer(200, {"id": repo, "modelId": repo, "sha": oid, "private": repository.private, "tags": [],
                          "siblings": siblings})  # fmt: skip

    def tree(self, repository, repo, revision, folder=""):
        files = repository.commits[repository.commit_of(revision)]
        self.answer(200, [describe(path, content) for path, content in files.items() if path.startswith(folder)])

    def resolve(self, repository, repo, revision, path):
        oid = repository.commit_of(revision)
        content = repository.commits[oid].get(path)
        if content is None:
            return self.answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
        etag = describe(path, content).get("lfs", {}).get("oid") or git_oid(content)
        return self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": oid})


def mode_of(path):
    return "lfs" if path.endswith(".safetensors") else "regular"


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def describe(path, content):
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if mode_of(path) == "lfs":
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = {
    ("GET", "/api/whoami-v2"): Handler.whoami,
    ("POST", "/api/(?P<yaml>validate-yaml)"): Handler.validate,
    ("POST", "/api/repos/create"): Handler.create,
    ("POST", f"/api/models/{REPO}/branch/(?P<branch>.+)"): Handler.create_branch,
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}"): Handler.preupload,
    ("POST", f"/{REPO}.git/info/lfs/objects/batch"): Handler.batch,
    ("PUT", "/lfs/(?P<lfs_oid>[0-9a-f]{64})"): Handler.put_object,
    ("POST", f"/api/models/{REPO}/commit/{REVISION}"): Handler.commit,
    ("GET", f"/api/models/{REPO}"): Handler.info,
    ("GET", f"/api/models/{REPO}/revision/{REVISION}"): Handler.info,
    ("GET", f"/api/models/{REPO}/tree/{REVISION}"): Handler.tree,
    ("GET", f"/api/models/{REPO}/tree/{REVISION}/(?P<folder>.+)"): Handler.tree,
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)"): Handler.resolve,
}


@contextmanager
def serving():
    """Serve an empty hub on a free port of the loopback interface."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = Hub(endpoint=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)  # a test waits for its end
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
