"""What the stand-in Hub does with requests that write: repositories, large files, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stand_in_hub import Request, StandinHub, Stored


class HubWrites:
    """The writing half of a stand-in Hub. Objects are kept in a folder, by their sha256."""

    def __init__(self, hub: StandinHub, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        self.token: str | None = None  # the one that may write; None: any may
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []  # of the commits

    def answer(self, handler: Any, request: Request, body: bytes) -> None:
        """Answer a POST or a PUT."""
        if self.token is not None and not request.path.startswith("/lfs/") and request.token != f"Bearer {self.token}":
            return self.hub._send(handler, request, 403, b"{}", {"X-Error-Message": "no right to write"})
        for pattern, route in (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._modes),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/lfs/([0-9a-f]{64})", self._object),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
        ):
            if match := re.fullmatch(pattern, request.path):
                return route(handler, request, body, *match.groups())
        return self.hub._send(handler, request, 404, b"{}", {})

    def _create(self, handler: Any, request: Request, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.hub._commits:
            return self.hub._send(handler, request, 409, json.dumps({"url": f"{self.hub.url}/{repo}"}).encode(), {})
        self.private[repo] = asked.get("private", False) or asked.get("visibility") == "private"
        self._add(repo, {})
        return self.hub._json(handler, request, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def _validate(self, handler: Any, request: Request, body: bytes) -> None:
        assert json.loads(body)["content"].startswith("---\n")
        self.hub._json(handler, request, {"errors": [], "warnings": []})

    def _modes(self, handler: Any, request: Request, body: bytes, repo: str, _: str) -> None:
        there = self._files(repo)
        files = [
            {
                "path": (path := each["path"]),
                "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": there[path].blob_id if path in there else None,
            }
            for each in json.loads(body)["files"]
        ]
        self.hub._json(handler, request, {"files": files})

    def _batch(self, handler: Any, request: Request, body: bytes, repo: str) -> None:
        objects = []
        for each in json.loads(body)["objects"]:
            wanted = {"oid": each["oid"], "size": each["size"]}
            if not (self.folder / each["oid"]).is_file():
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            objects.append(wanted)
        self.hub._json(handler, request, {"transfer": "basic", "objects": objects})

    def _object(self, handler: Any, request: Request, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.hub._send(handler, request, 400, b"{}", {})
        (self.folder / oid).write_bytes(body)
        return self.hub._send(handler, request, 200, b"", {})

    def _commit(self, handler: Any, request: Request, body: bytes, repo: str, _: str) -> None:
        files = dict(self._files(repo))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
                if value.get("parentCommit") not in (None, self.hub._branches[repo, "main"]):
                    return self.hub._send(handler, request, 412, b'{"error": "the branch moved"}', {})
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                data = base64.b64decode(value["content"]) if line["key"] == "file" else None
                oid = value["oid"] if data is None else hashlib.sha256(data).hexdigest()
                if data is not None:
                    (self.folder / oid).write_bytes(data)
                files[value["path"]] = self.hub._stored(self.folder / oid, lfs=data is None)
        commit = self._add(repo, files)
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"}
        return self.hub._json(handler, request, answer)

    def _files(self, repo: str) -> dict[str, Stored]:
        return self.hub._commits[repo][self.hub._branches[repo, "main"]]

    def _add(self, repo: str, files: dict[str, Stored]) -> str:
        named = [*sorted((n, f.sha256) for n, f in files.items()), len(self.hub._commits.get(repo, {}))]
        commit = hashlib.sha1(repr(named).encode()).hexdigest()
        self.hub._commits.setdefault(repo, {})[commit] = files
        self.hub._branches[repo, "main"] = commit
        return commit
