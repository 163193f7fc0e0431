"""A small Hub on localhost, so that the real client can be tested where there is no network.

One process-wide server listens on two ports: the Hub itself, and the place that large files are stored, which is
another origin as it is in the world. Requests are routed on the raw path, because a revision such as
``refs/pr/1`` travels as one quoted segment.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote

import uvicorn
import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".npz")
LICENSES = {"apache-2.0", "mit", "other", "llama3.2", "cc-by-4.0"}
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
TREE_PAGE = 4
PIECE = 1 << 20


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass
class Blob:
    """A file in a repository; ``data`` is None where only another store holds the bytes."""

    size: int
    oid: str
    sha256: str | None = None
    data: bytes | None = None

    def entry(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
            entry["xetHash"] = hashlib.sha256(self.sha256.encode()).hexdigest()
        return entry


def small_blob(data: bytes) -> Blob:
    return Blob(len(data), git_oid(data), None, data)


def large_blob(sha256: str, size: int, data: bytes | None) -> Blob:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Blob(size, git_oid(pointer.encode()), sha256, data)


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    stored: dict[str, tuple[int, bytes | None]] = field(default_factory=dict)
    pull_requests: int = 0
    committing: bool = False

    def commit(self, ref: str, files: dict[str, Blob], message: str = "") -> str:
        seed = f"{len(self.commits)} {ref} {message} {sorted((path, blob.oid) for path, blob in files.items())}"
        oid = hashlib.sha1(seed.encode(), usedforsecurity=False).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        self.messages.append(message)
        return oid

    def large(self) -> dict[str, Blob]:
        """Returns the large files of all commits, on whatever branch, by their digests."""
        return {blob.sha256: blob for files in self.commits.values() for blob in files.values() if blob.sha256}

    def files(self, revision: str = "main") -> dict[str, Blob]:
        return self.commits[self.refs.get(revision, revision)]


@dataclass
class Fault:
    """Something that goes wrong with the next few requests whose method and raw path match."""

    pattern: str
    times: int
    answer: Callable[[], Response] | None = None
    cut_after: int | None = None
    hang_up: bool = False
    garble: bool = False
    flip: bool = False
    pause: float = 0.0


@dataclass
class Seen:
    """A request that was answered."""

    method: str
    path: str
    range: str | None
    authorized: bool
    port: int
    sent: int = 0


class Refused(Exception):  # noqa: N818 - an answer, not an error
    """Ends the handling of a request with an error response."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.response = JSONResponse({"error": message}, status, headers)


class Hub:
    """The state of the server, and what a test may do to it."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens = {"hf_writer": "write", "hf_reader": "read"}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.multipart_above = 1 << 40
        self.part_size = 1 << 16
        self.xet_store: Path | None = None
        self.watch: Callable[[str], None] = lambda line: None
        self.believes = False
        self.commit_takes = 0.0
        self.parts: dict[str, dict[int, bytes]] = {}
        self.hub_port = self.store_port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.hub_port}"

    @property
    def store(self) -> str:
        return f"http://127.0.0.1:{self.store_port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which another process takes this for the Hub, and sends through LFS."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def add(self, repo_id: str, folder: Path, **settings) -> Repo:
        """Makes a repository of a folder's files."""
        repo = self.repos[repo_id] = Repo(**settings)
        self.update(repo_id, folder)
        return repo

    def update(self, repo_id: str, folder: Path, ref: str = "main") -> str:
        """Commits a folder's files."""
        files = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                data = path.read_bytes()
                name = path.relative_to(folder).as_posix()
                files[name] = (
                    large_blob(hashlib.sha256(data).hexdigest(), len(data), data)
                    if name.endswith(LFS_SUFFIXES)
                    else small_blob(data)
                )
        return self.repos[repo_id].commit(ref, files, "seed")

    def fault(self, pattern: str, *, times: int = 1, status: int | None = None, headers=None, **how) -> None:
        """Makes the next requests that match fail: by a status, or by what ``Fault`` says."""
        answer = (lambda: JSONResponse({"error": "injected"}, status, headers or {})) if status else None
        self.faults.append(Fault(pattern, times, answer, **how))

    def sent(self, pattern: str = "") -> int:
        """Returns how many body bytes went out to requests that match."""
        return sum(seen.sent for seen in self.seen if re.search(pattern, f"{seen.method} {seen.path}"))

    def requests(self, pattern: str) -> list[Seen]:
        return [seen for seen in self.seen if re.search(pattern, f"{seen.method} {seen.path}")]

    # What follows answers requests.

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        path = scope["raw_path"].decode()
        role = self.tokens.get(request.headers.get("authorization", "").removeprefix("Bearer "))
        seen = Seen(request.method, path, request.headers.get("range"), role is not None, scope["server"][1])
        self.seen.append(seen)
        self.watch(f"{request.method} {path}")
        fault = self._fault(f"{request.method} {path}")
        cut = None
        try:
            if fault and fault.pause:
                import anyio

                await anyio.sleep(fault.pause)
            if fault and fault.hang_up:
                # The connection breaks while the request's body is still on its way.
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
                return
            if fault and fault.garble:
                body = await request.body()
                request._body = body[:-1] + bytes([body[-1] ^ 1])
            if fault and fault.answer:
                response = fault.answer()
            else:
                response = await self._answer(request, path, role)
                if fault and fault.flip and response.body:
                    response.body = bytes(response.body[:-1]) + bytes([response.body[-1] ^ 1])
                cut = fault.cut_after if fault else None
        except Refused as refusal:
            response = refusal.response
        body = b"" if request.method == "HEAD" else response.body
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        if cut is not None and cut < len(body):
            seen.sent = cut
            await send({"type": "http.response.body", "body": bytes(body[:cut]), "more_body": True})
            return  # uvicorn closes the connection: the body is shorter than was announced
        # In pieces, so that a client that goes away is noticed, and gets no more than it takes.
        for start in range(0, len(body), PIECE):
            if start and await request.is_disconnected():
                return
            piece = bytes(body[start : start + PIECE])
            seen.sent += len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def _fault(self, line: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, line):
                fault.times -= 1
                return fault
        return None

    async def _answer(self, request: Request, path: str, role: str | None) -> Response:
        for method, pattern, handler in _ROUTES:
            if method == request.method and (match := re.fullmatch(pattern, path)):
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return await handler(self, request, role, **parts)
        return JSONResponse({"error": f"no such route: {path}"}, 404)

    def _repo(self, repo: str, role: str | None, *, write: bool = False) -> Repo:
        found = self.repos.get(repo)
        if found is None or (found.private and role is None):
            raise Refused(401 if role is None else 404, "RepoNotFound", "Repository not found")
        if write and role is None:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        if write and role != "write":
            raise Refused(403, None, "You don't have the rights to write to this repository")
        return found

    def _files(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]]:
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repo.commits[oid]

    async def create(self, request, role) -> Response:
        body = await request.json()
        repo_id = f"{body['organization']}/{body['name']}"
        if role is None:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        if role != "write":
            raise Refused(403, None, "You don't have the rights to create a model under this namespace")
        if repo_id in self.repos:
            # With its address, which the client returns where that is no error.
            return JSONResponse(
                {"error": "You already created this model repo", "url": f"{self.endpoint}/{repo_id}"}, 409
            )
        repo = self.repos[repo_id] = Repo(private=body.get("visibility") == "private")
        repo.commit("main", {".gitattributes": small_blob(b"*.safetensors filter=lfs\n")}, "initial commit")
        return JSONResponse({"url": f"{self.endpoint}/{repo_id}"})

    async def validate_yaml(self, request, role) -> Response:
        errors, notices = check_card((await request.json())["content"])
        return JSONResponse(
            {
                "errors": [{"message": text} for text in errors],
                "warnings": [{"message": text} for text in notices],
            },
            400 if errors else 200,
        )

    async def info(self, request, role, repo, revision="main") -> Response:
        found = self._repo(repo, role)
        oid, files = self._files(found, revision)
        card = files.get("README.md")
        match = re.match(r"---\n(.*?)\n---", card.data.decode(), re.DOTALL) if card and card.data else None
        return JSONResponse(
            {
                "id": repo,
                "sha": oid,
                "private": found.private,
                "gated": "auto" if found.gated else False,
                "siblings": [{"rfilename": path} for path in files],
                "cardData": yaml.safe_load(match[1]) if match else None,
            }
        )

    async def tree(self, request, role, repo, revision) -> Response:
        _, files = self._files(self._repo(repo, role), revision)
        start = int(request.query_params.get("cursor", 0))
        names = sorted(files)
        headers = {}
        if start + TREE_PAGE < len(names):
            url = f"{self.endpoint}{request.scope['raw_path'].decode()}?recursive=true&cursor={start + TREE_PAGE}"
            headers["Link"] = f'<{url}>; rel="next"'
        return JSONResponse([files[name].entry(name) for name in names[start : start + TREE_PAGE]], headers=headers)

    async def paths_info(self, request, role, repo, revision) -> Response:
        _, files = self._files(self._repo(repo, role), revision)
        wanted = parse_qs((await request.body()).decode()).get("paths", [])
        return JSONResponse([files[name].entry(name) for name in wanted if name in files])

    async def refs(self, request, role, repo) -> Response:
        found = self._repo(repo, role)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in found.refs.items()
            if not name.startswith("refs/")
        ]
        return JSONResponse({"branches": branches, "converts": [], "tags": []})

    async def branch(self, request, role, repo, branch) -> Response:
        found = self._repo(repo, role, write=True)
        if branch in found.refs:
            raise Refused(409, None, "Reference already exists")
        start = (await request.json()).get("startingPoint", "main")
        found.refs[branch], _ = self._files(found, start)
        return JSONResponse({})

    async def delete_branch(self, request, role, repo, branch) -> Response:
        found = self._repo(repo, role, write=True)
        if branch == "main":
            raise Refused(403, None, "The default branch cannot be deleted")
        self._files(found, branch)
        del found.refs[branch]
        return JSONResponse({})

    async def preupload(self, request, role, repo, revision) -> Response:
        found = self._repo(repo, role)
        if role != "write" and "create_pr" not in request.query_params:
            self._repo(repo, role, write=True)
        _, files = self._files(found, revision)
        answer = []
        for file in (await request.json())["files"]:
            blob = files.get(file["path"])
            large = file["path"].endswith(LFS_SUFFIXES)
            answer.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": (blob.sha256 or blob.oid) if blob else None,
                }
            )
        return JSONResponse({"files": answer})

    async def batch(self, request, role, repo) -> Response:
        found = self._repo(repo, role, write=True)
        objects = []
        for item in (await request.json())["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in found.stored:
                entry["actions"] = {
                    "upload": self._upload_action(repo, item),
                    "verify": {"href": f"{self.endpoint}/{repo}.git/info/lfs/objects/verify"},
                }
            objects.append(entry)
        return JSONResponse({"objects": objects, "transfer": "basic"})

    def _upload_action(self, repo: str, item: dict) -> dict:
        oid, size = item["oid"], item["size"]
        if size <= self.multipart_above:
            return {"href": f"{self.store}/put/{repo}/{oid}"}
        count = -(-size // self.part_size)
        header = {f"{number + 1:05d}": f"{self.store}/part/{oid}/{number + 1}" for number in range(count)}
        return {
            "href": f"{self.endpoint}/complete/{repo}/{oid}",
            "header": {"chunk_size": str(self.part_size), **header},
        }

    async def put(self, request, role, repo, oid) -> Response:
        self._store(repo, oid, await request.body())
        return Response()

    async def put_part(self, request, role, oid, number) -> Response:
        self.parts.setdefault(oid, {})[int(number)] = await request.body()
        return Response(headers={"ETag": f'"{oid}-{number}"'})

    async def complete(self, request, role, repo, oid) -> Response:
        parts = self.parts.pop(oid)
        self._store(repo, oid, b"".join(parts[number] for number in sorted(parts)))
        return JSONResponse({})

    def _store(self, repo: str, oid: str, data: bytes) -> None:
        if not self.believes and hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, None, "checksum mismatch")
        self.repos[repo].stored[oid] = (len(data), data)

    async def verify(self, request, role, repo) -> Response:
        body = await request.json()
        stored = self.repos[repo].stored.get(body["oid"])
        if stored is None or stored[0] != body["size"]:
            raise Refused(404, None, "object not found")
        return JSONResponse({})

    async def duplicate(self, request, role, repo) -> Response:
        source = self._repo(repo, role)
        body = await request.json()
        target = self._repo(body["target"]["name"], role, write=True)
        known = source.large()
        failed = []
        for item in body["files"]:
            blob = known.get(item["sha256"])
            if blob is None:
                failed.append({"sha256": item["sha256"], "error": "not found"})
            else:
                target.stored[item["sha256"]] = (blob.size, blob.data)
        return JSONResponse({"failed": failed})

    async def xet_token(self, request, role, repo, revision) -> Response:
        self._repo(repo, role, write=True)
        if self.xet_store is None:
            raise Refused(404, None, "no Xet here")
        headers = {
            "X-Xet-Cas-Url": f"local://{self.xet_store}",
            "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": str(int(time.time()) + 3600),
        }
        body = {"casUrl": headers["X-Xet-Cas-Url"], "accessToken": "xet", "exp": int(time.time()) + 3600}
        return JSONResponse(body, headers=headers)

    async def commit(self, request, role, repo, revision) -> Response:
        creates = "create_pr" in request.query_params
        found = self._repo(repo, role, write=not creates)
        if role is None:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line]
        if found.committing:
            raise Refused(409, None, "Another commit operation is in progress for this repository")
        if self.commit_takes:
            import anyio

            found.committing = True
            try:
                await anyio.sleep(self.commit_takes)
            finally:
                found.committing = False
        parent, before = self._files(found, revision)
        header = lines[0]["value"]
        if header.get("parentCommit", parent) != parent:
            raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(before)
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = small_blob(base64.b64decode(value["content"]))
                case "lfsFile":
                    known = found.large().get(value["oid"])
                    if value["oid"] in found.stored:
                        size, data = found.stored[value["oid"]]
                    elif known is not None:
                        size, data = known.size, known.data
                    elif self.xet_store is not None:
                        size, data = value["size"], None
                    else:
                        raise Refused(400, None, f"LFS pointer to {value['oid']}, which was not uploaded")
                    files[value["path"]] = large_blob(value["oid"], size, data)
                case "deletedFile":
                    del files[value["path"]]
                case "deletedFolder":
                    kept = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
                    if len(kept) == len(files):
                        raise Refused(404, "EntryNotFound", "A folder with this name doesn't exist")
                    files = kept
                case key:
                    raise Refused(400, None, f"unknown key {key}")
        answer = {}
        ref = revision
        if creates:
            found.pull_requests += 1
            ref = f"refs/pr/{found.pull_requests}"
            answer["pullRequestUrl"] = f"{self.endpoint}/{repo}/discussions/{found.pull_requests}"
        oid = found.commit(ref, files, header["summary"])
        return JSONResponse(answer | {"commitUrl": f"{self.endpoint}/{repo}/commit/{oid}", "commitOid": oid})

    async def resolve(self, request, role, repo, revision, path) -> Response:
        found = self._repo(repo, role)
        if found.gated and role is None:
            raise Refused(401, "GatedRepo", f"Access to model {repo} is restricted and you are not authenticated")
        if found.gated and role != "write":
            raise Refused(403, "GatedRepo", f"Access to model {repo} is restricted; ask for access")
        oid, files = self._files(found, revision)
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        blob = files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.sha256 or blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.sha256:
            headers |= {
                "X-Linked-Etag": f'"{blob.sha256}"',
                "X-Linked-Size": str(blob.size),
                "Location": f"{self.store}/blob/{repo}/{blob.sha256}",
            }
            return Response(status_code=302, headers=headers)
        return _ranged(request, blob.data, headers)

    async def blob(self, request, role, repo, oid) -> Response:
        if "authorization" in request.headers:
            raise Refused(400, None, "a token was sent to another origin")
        for files in self.repos[repo].commits.values():
            for blob in files.values():
                if blob.sha256 == oid and blob.data is not None:
                    return _ranged(request, blob.data, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})
        raise Refused(404, None, "no such blob")


def _ranged(request: Request, data: bytes, headers: dict) -> Response:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if match is None:
        return Response(data, headers=headers)
    start, end = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
    if start >= len(data):
        return Response(status_code=416, headers={"Content-Range": f"bytes */{len(data)}"})
    found = headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
    return Response(memoryview(data)[start : end + 1], 206, found)


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Returns errors and warnings of a model card's metadata, by the rules the Hub documents."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"], []
    errors = []
    if data.get("license") not in LICENSES | {None}:
        errors.append(f'"license" must be one of a list, found {data["license"]!r}')
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required with license "other"')
    languages = data.get("language") or []
    for language in [languages] if isinstance(languages, str) else languages:
        if not re.fullmatch(r"[a-z]{2,3}", str(language)):
            errors.append(f'"language" must be an ISO 639 code, found {language!r}')
    models = data.get("base_model") or []
    for model in [models] if isinstance(models, str) else models:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
            errors.append(f'"base_model" must be a repository, found {model!r}')
    if data.get("base_model_relation") not in RELATIONS | {None}:
        errors.append('"base_model_relation" is not one of a list')
    if not all(isinstance(tag, str) for tag in data.get("tags") or []):
        errors.append('"tags" must be texts')
    for model in data.get("model-index") or []:
        if not model.get("name"):
            errors.append('"model-index[0].name" is required')
        for result in model["results"]:
            if not result["task"].get("type"):
                errors.append("a result needs a task")
            if not result["dataset"].get("type") or not result["dataset"].get("name"):
                errors.append("a result needs a dataset with type and name")
            if any(metric.get("type") is None or metric.get("value") is None for metric in result["metrics"]):
                errors.append("a metric needs a type and a value")
    return errors, []


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", Hub.create),
    ("POST", "/api/validate-yaml", Hub.validate_yaml),
    ("GET", f"/api/models/{_REPO}", Hub.info),
    ("GET", f"/api/models/{_REPO}/revision/{_REVISION}", Hub.info),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}", Hub.tree),
    ("POST", f"/api/models/{_REPO}/paths-info/{_REVISION}", Hub.paths_info),
    ("GET", f"/api/models/{_REPO}/refs", Hub.refs),
    ("POST", f"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", Hub.branch),
    ("DELETE", f"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", Hub.delete_branch),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", Hub.preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", Hub.commit),
    ("POST", f"/api/models/{_REPO}/lfs-files/duplicate", Hub.duplicate),
    ("GET", f"/api/models/{_REPO}/xet-write-token/{_REVISION}", Hub.xet_token),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", Hub.batch),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/verify", Hub.verify),
    ("POST", f"/complete/{_REPO}/(?P<oid>\\w+)", Hub.complete),
    ("PUT", f"/put/{_REPO}/(?P<oid>\\w+)", Hub.put),
    ("PUT", r"/part/(?P<oid>\w+)/(?P<number>\d+)", Hub.put_part),
    ("GET", f"/blob/{_REPO}/(?P<oid>\\w+)", Hub.blob),
    ("GET", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", Hub.resolve),
    ("HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", Hub.resolve),
]


class Server:
    """Runs a hub in a thread, on two ports of localhost."""

    def __init__(self) -> None:
        self.hub = Hub()
        self._sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        for each in self._sockets:
            # asyncio sees to this only where a socket names its protocol; without it each answer waits 40 ms.
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.hub.hub_port, self.hub.store_port = (each.getsockname()[1] for each in self._sockets)
        config = uvicorn.Config(
            self._app,
            log_level="critical",
            interface="asgi3",
            timeout_graceful_shutdown=1,
            lifespan="off",
            access_log=False,
            ws="none",
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": self._sockets}, daemon=True)

    async def _app(self, scope, receive, send) -> None:
        await self.hub(scope, receive, send)

    def fresh(self) -> Hub:
        """Returns a hub without repositories, at the same address."""
        hub = Hub()
        hub.hub_port, hub.store_port = self.hub.hub_port, self.hub.store_port
        self.hub = hub
        return hub

    def __enter__(self) -> "Server":
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        for each in self._sockets:
            each.close()
