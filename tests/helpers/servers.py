"""Two web servers on 127.0.0.1, threads of the test process: a small Hugging Face Hub, and a mirror that can lie.

    with Hub() as hub:
        hub.add("datasets", "Salesforce/wikitext", {"README.md": b"..."})
        subprocess.run(..., env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": "a fresh folder"})

huggingface_hub reads HF_ENDPOINT when it is imported, so what talks to the Hub runs in a process of its own.
"""
import base64, contextlib, hashlib, io, json, re, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Server:
    "A ThreadingHTTPServer in a daemon thread; `log` keeps (method, path, headers) of every request."
    def __init__(self):
        self.log, owner = [], self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def log_message(self, *args): "Say nothing on stderr: a test reads `log`."
            def any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = unquote(urlsplit(self.path).path)
                owner.log.append((self.command, path, dict(self.headers)))
                try: owner.answer(self, path, body)
                except ConnectionError: self.close_connection = True  # the client has heard enough and hung up
            do_GET = do_HEAD = do_POST = do_PUT = any

        self.handler = Handler
        self.open()

    def open(self, port=0):
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self.handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @contextlib.contextmanager
    def closed(self):
        "Inside, nobody listens at `url`."
        self.__exit__()
        try: yield
        finally:
            self.open(self.server.server_port)
            self.__enter__()

    def paths(self, method=None): return [path for m, path, _ in self.log if method in (None, m)]


def send(request, status, body=b"", length=None, **headers):
    "Answer with `body`; `length` is what the header claims, where that differs."
    request.send_response(status)
    for name, value in headers.items(): request.send_header(name.replace("_", "-"), str(value))
    request.send_header("Content-Length", str(len(body) if length is None else length))
    request.end_headers()
    if request.command != "HEAD": request.wfile.write(body)


def send_file(request, body, ranges=True, **headers):
    "Answer with `body`, or with the part that a Range header asks for."
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if not (wanted and ranges): return send(request, 200, body, **headers)
    start, end = int(wanted[1]), min(int(wanted[2] or len(body) - 1), len(body) - 1)
    if start >= len(body): return send(request, 416, Content_Range=f"bytes */{len(body)}", **headers)
    send(request, 206, body[start:end + 1], Content_Range=f"bytes {start}-{end}/{len(body)}", **headers)


def asked_paths(body):
    "Of a request for some paths: `datasets` sends JSON, HfApi a form."
    return json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]


class Hub(Server):
    """The endpoints of huggingface.co that `load_dataset` and `from_pretrained` call: info, tree, paths-info, resolve;
    and those that change a repository of models: create, preupload, upload, commit, squash."""
    def __init__(self):
        super().__init__()
        self.repos, self.large, self.private = {}, {}, True  # large: SHA-256 -> the bytes that were uploaded
        self.account = "me"  # whose token is sent; None: nobody's, who sees no private repository
        self.refusals = {}  # beginning of a path -> the status that it gets: '/' is a Hub that is down
        self.gated = set()  # names of repositories that ask for a login

    def add(self, kind, name, files):
        "Serve `files` (path -> bytes) as the repository `name` of `kind` ('models' or 'datasets')."
        self.repos[kind, name] = dict(files)

    def answer(self, request, path, body):
        refused = next((status for start, status in self.refusals.items() if path.startswith(start)), None)
        if refused: return send(request, refused)
        if path == "/api/whoami-v2":
            known = json.dumps(dict(type="user", name=self.account, orgs=[dict(name="our-lab")])).encode()
            return send(request, 200, known, Content_Type="application/json") if self.account else send(request, 401)
        if any(f"/{name}/" in path for name in self.gated): return self.missing(request, "GatedRepo", 401)
        call = r"(?:/(revision|tree|paths-info|refs|auth-check)(?:/([^/]+)(?:/(.*))?)?)?"
        found = request.command != "PUT" and re.fullmatch(rf"/api/(models|datasets)/([^/]+(?:/[^/]+)??){call}", path)
        if found: return self.api(request, body, *found.groups())
        if request.command in ("POST", "PUT") and (answer := self.written(path, body)) is not None:
            return send(request, 200, json.dumps(answer).encode(), Content_Type="application/json")
        found = re.fullmatch(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)", path)
        if found: return self.resolve(request, "datasets" if found[1] else "models", *found.groups()[1:])
        send(request, 200 if path == "/" else 404)

    def missing(self, request, code, status=404):
        send(request, status, b'{"error":"not found"}', X_Error_Code=code, X_Error_Message=code,
             Content_Type="application/json")

    def commit(self, files):
        return hashlib.sha1(repr(sorted((p, hashlib.sha1(b).digest()) for p, b in files.items())).encode()).hexdigest()

    def api(self, request, body, kind, name, call, revision, folder):
        files = self.repos.get((kind, name))
        if files is None or not self.account and kind == "models": return self.missing(request, "RepoNotFound")
        commit = self.commit(files)
        if revision not in (None, "main", commit): return self.missing(request, "RevisionNotFound")
        if call == "tree":
            below, deep = f"{folder}/" if folder else "", "recursive=true" in request.path.lower()
            paths = [p for p in self.tree(files) if p.startswith(below) and (deep or "/" not in p[len(below):])]
            reply = self.entries(files, paths)
        elif call == "paths-info":
            reply = self.entries(files, [p for p in asked_paths(body) if p in self.tree(files)])
        elif call == "refs":
            reply = dict(branches=[dict(name="main", ref="refs/heads/main", targetCommit=commit)], tags=[], converts=[])
        else:
            reply = dict(id=name, modelId=name, sha=commit, private=self.private, gated=False, disabled=False, tags=[],
                         downloads=0, likes=0, createdAt="2022-03-02T23:29:22.000Z",
                         lastModified="2024-01-04T16:49:18.000Z",
                         siblings=[dict(rfilename=p) for p in files])
        if call == "tree" and folder and not reply: return self.missing(request, "EntryNotFound")
        send(request, 200, json.dumps(reply).encode(), Content_Type="application/json")

    def tree(self, files):
        return {**{"/".join(p.split("/")[:n]): None for p in files for n in range(1, p.count("/") + 1)}, **files}

    def entries(self, files, paths):
        def entry(path, content):
            if content is None:
                return dict(type="directory", path=path, size=0, oid=hashlib.sha1(path.encode()).hexdigest())
            git, sha256 = (hashlib.sha1(b"blob %d\0" % len(content) + content), hashlib.sha256(content).hexdigest())
            lfs = dict(lfs=dict(oid=sha256, size=len(content), pointerSize=134)) if sha256 in self.large else {}
            return dict(type="file", path=path, size=len(content), oid=git.hexdigest(), **lfs)
        return [entry(path, files.get(path)) for path in paths]

    def written(self, path, body):
        "What a request that changes something is answered; None where it is another."
        if path == "/api/repos/create":
            said = json.loads(body)
            name = "/".join(filter(None, [said.get("organization"), said["name"]]))
            self.repos.setdefault(("models", name), {})
            return dict(url=f"{self.url}/{name}", id=name)
        if found := re.fullmatch(r"/large/(\w+)", path): return self.large.update({found[1]: body}) or {}
        if path.endswith("/info/lfs/objects/batch"):
            upload = [dict(oid=o["oid"], size=o["size"], actions=dict(upload=dict(href=f"{self.url}/large/{o['oid']}")))
                      for o in json.loads(body)["objects"]]
            return dict(transfer="basic", objects=upload)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|super-squash)/main", path)
        if not found: return None
        if found[2] == "preupload":
            def mode(name): return "lfs" if name.endswith((".safetensors", ".pt")) else "regular"
            return dict(files=[dict(path=f["path"], uploadMode=mode(f["path"]), shouldIgnore=False)
                               for f in json.loads(body)["files"]])
        if found[2] == "commit": self.change(self.repos["models", found[1]], map(json.loads, body.splitlines()))
        return dict(success=True, commitOid="0" * 40, commitUrl=f"{self.url}/{found[1]}/commit/{'0' * 40}")

    def change(self, files, operations):
        for told in operations:
            kind, value = told["key"], told["value"]
            if kind == "file": files[value["path"]] = base64.b64decode(value["content"])
            if kind == "lfsFile": files[value["path"]] = self.large[value["oid"]]
            if kind == "deletedFile": del files[value["path"]]
            for path in [p for p in files if kind == "deletedFolder" and p.startswith(value["path"].rstrip("/") + "/")]:
                del files[path]

    def resolve(self, request, kind, name, revision, path):
        files = self.repos.get((kind, name))
        if files is None: return self.missing(request, "RepoNotFound")
        if revision not in ("main", self.commit(files)): return self.missing(request, "RevisionNotFound")
        if path not in files: return self.missing(request, "EntryNotFound")
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        send_file(request, files[path], ETag=etag, X_Repo_Commit=self.commit(files), Accept_Ranges="bytes")


class Mirror(Server):
    "`files` (path -> bytes) with Range, and `faults`: what each path does to its next requests before it is honest."
    def __init__(self, files=()):
        super().__init__()
        self.files, self.faults, self.ranges = dict(files), {}, True
        self.refuse = ()  # User-Agents that begin so get 403

    def lie(self, path, *faults):
        "The next requests for `path` meet `faults`, one each: 'wrong', 'cut', a status, or (status, headers)."
        self.faults[path] = list(faults)

    def answer(self, request, path, body):
        if (request.headers.get("User-Agent") or "").startswith(tuple(self.refuse) or ("\0",)):
            return send(request, 403, b"no robots")
        if path not in self.files: return send(request, 404)
        content, fault = self.files[path], self.faults.get(path) and self.faults[path].pop(0)
        if not fault: return send_file(request, content, self.ranges, ETag='"1"')
        if fault == "wrong": return send_file(request, bytes(b ^ 1 for b in content), self.ranges)
        if fault == "cut": return self.cut(request, content)
        status, headers = fault if isinstance(fault, tuple) else (fault, {})
        send(request, status, **headers)

    def cut(self, request, content):
        "Promise all that was asked for, send half of it and hang up."
        whole, request.wfile = request.wfile, io.BytesIO()
        send_file(request, content, self.ranges)
        head, rest = request.wfile.getvalue().split(b"\r\n\r\n", 1)
        request.wfile, request.close_connection = whole, True
        request.wfile.write(head + b"\r\n\r\n" + rest[:len(rest) // 2])
        request.wfile.flush()
