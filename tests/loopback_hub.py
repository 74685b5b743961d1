"""A Hub on 127.0.0.1, as much of one as pushing to it and loading from it needs.

Repositories are dictionaries of commits, commits are dictionaries of files. Files are uploaded whole ("regular"), and larger ones by git-lfs where
`lfs_above` says so, which takes HF_HUB_DISABLE_XET=1; xet itself is not spoken.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    large: set[str] = field(default_factory=set)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode(), usedforsecurity=False).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        return sha

    def open(self, files: dict[str, bytes]) -> int:
        """The number of a new pull request that holds these files."""
        number = 1 + sum(ref.startswith("refs/pr/") for ref in self.refs)
        self.commit(files, f"refs/pr/{number}")
        return number

    def sha(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(revision, revision)]


@dataclass
class Fault:
    """What goes wrong with requests whose path contains `path`: with `times` of them, from the `first`-th on, counted from 1.

    Attributes:
        status: the answer, with `headers` and `message`.
        cut: instead, hang up after so many bytes of the request's body.
        gate: instead, go on once it is set.
        slow: instead, read the request and send the answer in pieces of so many bytes, with a pause after each.
        seen: how many requests there were to that path.
        arrived: set when the first of them meets the fault.
    """

    path: str
    first: int = 1
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "as the test wants"
    cut: int | None = None
    gate: threading.Event | None = None
    slow: int | None = None
    seen: int = 0
    arrived: threading.Event = field(default_factory=threading.Event)

    def hits(self, path: str) -> bool:
        if self.path not in path:
            return False
        self.seen += 1
        return self.first <= self.seen < self.first + self.times


class LoopbackHub:
    """With `with`: `url` is the endpoint, `repositories` what was pushed, `requests` what was asked for, `faults` what goes wrong.

    Files of more than `lfs_above` bytes come by git-lfs, and `objects` holds those that came.

    `cuts` holds files whose next download breaks off, with how many bytes it gets; `ranges` the bytes that downloads went on from.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.cuts: dict[str, int] = {}
        self.ranges: list[tuple[str, int]] = []
        self.lfs_above: int | None = None
        self.objects: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def fail(self, path: str, **how: object) -> Fault:
        """Have requests to a path go wrong; see `Fault`."""
        self.faults.append(Fault(path, **how))  # type: ignore[arg-type]
        return self.faults[-1]

    def __enter__(self) -> "LoopbackHub":
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self.route("GET")

    def do_HEAD(self) -> None:
        self.route("HEAD")

    def do_POST(self) -> None:
        self.route("POST")

    def do_PUT(self) -> None:
        self.route("PUT")

    def route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((method, path))
        faults = [fault for fault in self.hub.faults if fault.hits(path)]  # all of them count
        if faults and self.goes_wrong(faults[0]):
            return
        body = self.body()
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]  # a revision may have slashes
        if path in ("/api/whoami-v2", "/api/validate-yaml", "/api/repos/create"):
            self.account(parts[-1], body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch("/".join(parts[:2]).removesuffix(".git"), json.loads(body))
        elif path.startswith("/large/"):
            self.hub.objects[parts[1]] = body
            self.reply({})
        elif path.startswith("/api/models/"):
            self.api("/".join(parts[2:4]), parts[4:], body)
        elif "resolve" in parts:
            at = parts.index("resolve")
            self.resolve("/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]))
        else:
            self.reply({"error": f"no such endpoint: {method} {path}"}, status=404)

    def account(self, verb: str, body: bytes) -> None:
        if verb == "validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif verb == "whoami-v2":
            self.reply({"name": "tester", "type": "user", "orgs": []} if self.trusted else None, status=200 if self.trusted else 401)
        else:
            self.create(json.loads(body))

    def goes_wrong(self, fault: Fault) -> bool:
        """Whether that was all of the answer."""
        fault.arrived.set()
        if fault.gate is not None:
            fault.gate.wait()
            return False
        if fault.slow is not None:
            self.rfile, self.wfile = Slow(self.rfile, fault.slow), Slow(self.wfile, fault.slow)
            return False
        if fault.cut is not None:
            self.rfile.read(fault.cut)
            self.close_connection = True
            return True
        self.body()
        named = {name.replace("-", "_"): value for name, value in fault.headers.items()}
        self.reply({"error": fault.message}, status=fault.status, **named)
        return True

    @property
    def trusted(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, content: object = None, *, status: int = 200, raw: bytes | None = None, **headers: str) -> None:
        data = raw if raw is not None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.reply({"error": code}, status=status, X_Error_Code=code, X_Error_Message=code)

    def repository(self, name: str) -> Repository | None:
        """As on the Hub, a private repository does not exist for strangers."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.trusted):
            self.refuse(404 if self.trusted else 401, "RepoNotFound")
            return None
        return repository

    def create(self, wanted: dict) -> None:
        if not self.trusted:
            return self.refuse(401, "Unauthorized")
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        known = name in self.hub.repositories
        if not known:
            self.hub.repositories[name] = Repository(private=bool(wanted.get("private") or wanted.get("visibility") == "private"))
            self.hub.repositories[name].commit({".gitattributes": b""})
        return self.reply({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, status=409 if known else 200)

    def api(self, name: str, rest: list[str], body: bytes) -> None:
        repository = self.repository(name)
        if repository is None:
            return None
        verb, revision = (rest + ["revision", "main"][len(rest) :])[:2]
        if verb == "branch":
            return self.branch(repository, revision, json.loads(body or b"{}").get("startingPoint", "main"))
        if verb == "discussions":
            return self.discussion(repository, name, rest[1:])
        sha = repository.sha(revision)
        if sha is None:
            return self.refuse(404, "RevisionNotFound")
        files = repository.commits[sha]
        if verb == "preupload":
            asked, above = json.loads(body)["files"], self.hub.lfs_above
            mode = lambda file: "regular" if above is None or file["size"] <= above else "lfs"
            return self.reply({"files": [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False} for f in asked]})
        if verb == "commit":
            return self.commit(repository, name, revision, files, body)
        if verb == "tree":
            return self.reply([entry(path, data) for path, data in sorted(files.items())])
        return self.reply(
            {"id": name, "sha": sha, "private": repository.private, "siblings": [{"rfilename": path} for path in sorted(files)]}
        )

    def branch(self, repository: Repository, name: str, start: str) -> None:
        if name in repository.refs:
            return self.refuse(409, "BranchExists")
        repository.refs[name] = repository.sha(start) or start
        return self.reply({})

    def discussion(self, repository: Repository, name: str, number: list[str]) -> None:
        """An empty pull request, as the client opens one where it has xet, and what it wants to know of it."""
        num = int(number[0]) if number else repository.open(repository.files())
        about = {"num": num, "title": "a pull request", "status": "draft", "isPullRequest": True, "createdAt": "2026-01-01T00:00:00.000Z"}
        about |= {"author": {"name": "tester"}, "repo": {"name": name, "type": "model"}, "events": [], "diff": "", "filesWithConflicts": []}
        return self.reply(about | {"changes": {"base": "refs/heads/main"}})

    def batch(self, name: str, wanted: dict) -> None:
        """Where git-lfs is to put its objects; one that is here is not asked for again."""
        if self.repository(name) is None:
            return None
        if not self.trusted:
            return self.refuse(401, "Unauthorized")
        there = lambda oid: {"actions": {"upload": {"href": f"{self.hub.url}/large/{oid}"}}} if oid not in self.hub.objects else {}
        objects = [{"oid": wish["oid"], "size": wish["size"], **there(wish["oid"])} for wish in wanted["objects"]]
        return self.reply({"transfer": "basic", "objects": objects})

    def commit(self, repository: Repository, name: str, branch: str, files: dict[str, bytes], body: bytes) -> None:
        if not self.trusted:
            return self.refuse(401, "Unauthorized")
        files, message = dict(files), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            message = value.get("summary", message)
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
                repository.large.add(value["path"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
            elif line["key"] != "header":
                return self.refuse(400, f"Unknown:{line['key']}")
        answer = {}
        if "create_pr=1" in urlsplit(self.path).query:
            number = repository.open(files)
            branch, answer = f"refs/pr/{number}", {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}"}
        sha = repository.commit(files, branch)
        repository.messages.append(message)
        return self.reply(
            answer | {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "hookOutput": ""}
        )

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.repository(name)
        if repository is None:
            return None
        sha = repository.sha(revision)
        if sha is None:
            return self.refuse(404, "RevisionNotFound")
        data = repository.commits[sha].get(path)
        if data is None:
            return self.reply({}, status=404, X_Error_Code="EntryNotFound", X_Error_Message=path, X_Repo_Commit=sha)
        start = int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{blob(data)}"', "X_Repo_Commit": sha, "Content_Type": "application/octet-stream", "Accept_Ranges": "bytes"}
        if start:
            self.hub.ranges.append((path, start))
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and path in self.hub.cuts:
            return self.break_off(data[start:], self.hub.cuts.pop(path), headers)
        return self.reply(raw=data[start:] if start else data, status=206 if start else 200, **headers)

    def break_off(self, data: bytes, after: int, headers: dict[str, str]) -> None:
        """Promise everything, send a part and hang up."""
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data[:after])
        self.wfile.flush()
        self.close_connection = True


class Slow:
    """A connection that reads and writes a few bytes at a time."""

    def __init__(self, stream, piece: int):
        self.stream, self.piece = stream, piece

    def read(self, size: int) -> bytes:
        pieces = []
        while size > 0 and (got := self.stream.read(min(self.piece, size))):
            size -= len(got)
            pieces.append(got)
            threading.Event().wait(0.001)
        return b"".join(pieces)

    def write(self, data: bytes) -> int:
        for i in range(0, len(data), self.piece):
            self.stream.write(data[i : i + self.piece])
            self.stream.flush()
            threading.Event().wait(0.001)
        return len(data)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def environment_of(home: Path, endpoint: str) -> dict[str, str]:
    """What makes a process believe that `endpoint` is the Hub; it keeps everything in `home`."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return env | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def run_script(script: str, home: Path, endpoint: str, **environment: str) -> str:
    """Run a script in a process of its own, whose only argument is `home`, and return what it printed.

    The library reads its endpoint when it is imported, so what talks to the loopback Hub cannot run in the tests' process.
    """
    done = subprocess.run(
        [sys.executable, "-c", script, str(home)],
        env=environment_of(home, endpoint) | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@lru_cache  # of a large file once, not at every request
def blob(data: bytes) -> str:
    """The name git gives to a file."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


def entry(path: str, data: bytes) -> dict:
    return {"type": "file", "oid": blob(data), "size": len(data), "path": path}
