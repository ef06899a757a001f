"""A small server that speaks as much of the Hub's protocol as `huggingface_hub` uses to keep models, on loopback."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_good"
USER = "me"


def blob_oid(data):
    """The name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Repo:
    """A repository: its branches, each a list of commits, each a dict from path to content."""

    def __init__(self, private=False):
        self.private = private
        self.branches = {"main": []}
        self.pulls = 0
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def commit(self, branch, changes, message):
        history = self.branches[branch]
        files = (history[-1]["files"] if history else {}) | changes
        files = {path: content for path, content in files.items() if content is not None}
        oid = hashlib.sha1(repr((branch, len(history), sorted(files), message)).encode()).hexdigest()
        history.append({"oid": oid, "files": files, "message": message})
        return oid

    def at(self, revision):
        for name, history in self.branches.items():
            for commit in reversed(history):
                if revision in (name, commit["oid"]):
                    return commit
        return None


class HubServer(ThreadingHTTPServer):
    """Listens on a free port of 127.0.0.1.

    Attributes:
        repos: Repositories by name.
        requests: "METHOD path" of every request.
        faults: What to do instead of answering: lists of [method, pattern of the path,
            status or "cut" or "drop", times].
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self):
        self.repos, self.large, self.requests, self.faults = {}, {}, [], []

    def handle_error(self, request, client_address):
        pass  # a client that hangs up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def answer(self):
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {self.route}")
        self.cut = False
        for fault in self.server.faults:
            method, pattern, what, times = fault
            if times and method == self.command and re.search(pattern, self.route):
                fault[3] -= 1
                if what == "drop":
                    self.close_connection = True
                    return
                if what != "cut":
                    self.send(what, {"error": f"fault {what}"})
                    return
                self.cut = True
        for method, pattern, run in ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in method:
                run(self, *match.groups())
                return
        self.send(404, {"error": f"no route {self.route}"})

    def send(self, status, content=b"", headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), "X-Request-Id": "1"} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.cut:
                data = data[: len(data) // 2]
                self.close_connection = True
            self.wfile.write(data)

    def missing(self, what):
        self.send(401 if what == "Auth" else 404, {"error": what}, {"X-Error-Code": what, "X-Error-Message": what})

    @property
    def is_authorised(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name):
        """The repository, if the request may see it."""
        found = self.server.repos.get(name)
        if found is None or (found.private and not self.is_authorised):
            self.send(404 if self.is_authorised else 401, {"error": "no repo"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def writable(self, name):
        if not self.is_authorised:
            self.send(401, {"error": "Invalid username or password."})
            return None
        return self.repo(name)

    def found(self, name, revision):
        """A commit of a repository, or None, and the answer that there is none."""
        repo = self.repo(name)
        commit = repo and repo.at(revision)
        if repo and commit is None:
            self.missing("RevisionNotFound")
        return repo, commit

    def whoami(self):
        self.send(*((200, {"name": USER, "orgs": []}) if self.is_authorised else (401, {"error": "who are you"})))

    def create(self):
        if not self.is_authorised:
            self.send(401, {"error": "Invalid username or password."})
            return
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if name in self.server.repos:
            self.send(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
            return
        self.server.repos[name] = Repo("private" in (wanted.get("visibility"), wanted.get("private") and "private"))
        self.send(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def branch(self, name, branch):
        repo = self.writable(name)
        if repo is None:
            return
        if branch in repo.branches:
            self.send(409, {"error": "Reference already exists"})
            return
        repo.branches[branch] = list(repo.branches["main"])
        self.send(200, {})

    def info(self, name, revision="main"):
        repo, commit = self.found(name, revision)
        if commit is None:
            return
        files = [{"rfilename": path} for path in commit["files"]]
        self.send(200, {"id": name, "modelId": name, "sha": commit["oid"], "private": repo.private, "siblings": files})

    def tree(self, name, revision):
        _, commit = self.found(name, revision)
        if commit:
            files = commit["files"].items()
            self.send(200, [{"type": "file", "path": p, "size": len(d), "oid": blob_oid(d)} for p, d in files])

    def paths(self, name, revision):
        repo = self.repo(name)
        commit = repo and repo.at(revision)
        if commit:
            wanted = parse_qs(self.body.decode()).get("paths") or json.loads(self.body or b"{}").get("paths", [])
            files = [(p, commit["files"][p]) for p in wanted if p in commit["files"]]
            self.send(200, [{"type": "file", "path": p, "size": len(d), "oid": blob_oid(d)} for p, d in files])

    def preupload(self, name, revision):
        repo = self.writable(name)
        commit = repo and repo.at(revision)
        if repo and commit is None:
            self.missing("RevisionNotFound")
        elif repo:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": self.oid(commit["files"].get(f["path"]), f["path"]),
                }
                for f in json.loads(self.body)["files"]
            ]
            self.send(200, {"files": files})

    @staticmethod
    def oid(data, path):
        if data is None:
            return None
        return hashlib.sha256(data).hexdigest() if path.endswith(".safetensors") else blob_oid(data)

    def batch(self, name):
        if self.writable(name) is None:
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.server.url}/upload/{wanted['oid']}", "header": {}}
            objects.append(wanted | ({} if wanted["oid"] in self.server.large else {"actions": {"upload": upload}}))
        self.send(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.send(400, {"error": "wrong content"})
            return
        self.server.large[oid] = self.body
        self.send(200)

    def commit(self, name, revision):
        repo = self.writable(name)
        if repo is None:
            return
        changes, message = {}, ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                changes[value["path"]] = self.server.large[value["oid"]]
            elif item["key"] == "deletedFile":
                changes[value["path"]] = None
        answer = {}
        if self.query.get("create_pr"):
            repo.pulls += 1
            number, revision_of_pull = repo.pulls, f"refs/pr/{repo.pulls}"
            repo.branches[revision_of_pull] = list(repo.branches[revision])
            revision = revision_of_pull
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{number}"
        oid = repo.commit(revision, changes, message)
        self.send(200, answer | {"commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def resolve(self, name, revision, path):
        _, commit = self.found(name, revision)
        if commit is None:
            return
        data = commit["files"].get(path)
        headers = {"X-Repo-Commit": commit["oid"]}
        if data is None:
            self.send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
            return
        headers |= {"ETag": f'"{self.oid(data, path)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not asked:
            self.send(200, data, headers)
            return
        start = int(asked[1])
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send(206, data[start:], headers)


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    (["GET"], r"/api/whoami-v2", Handler.whoami),
    (["POST"], r"/api/repos/create", Handler.create),
    (["POST"], r"/api/validate-yaml", lambda handler: handler.send(200, {"errors": [], "warnings": []})),
    (["POST"], rf"/api/models/{NAME}/branch/(.+)", Handler.branch),
    (["POST"], rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (["POST"], rf"/api/models/{NAME}/paths-info/(.+)", Handler.paths),
    (["POST"], rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
    (["GET"], rf"/api/models/{NAME}/tree/(.+)", Handler.tree),
    (["GET"], rf"/api/models/{NAME}/revision/(.+)", Handler.info),
    (["GET"], rf"/api/models/{NAME}", Handler.info),
    (["POST"], rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (["PUT"], r"/upload/(\w+)", Handler.upload),
    (["GET", "HEAD"], rf"/{NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", Handler.resolve),
]
