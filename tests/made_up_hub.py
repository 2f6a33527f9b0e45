"""A Hub on loopback that answers just what the library asks, and redirects to another host for the bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.web import Page, Web

COMMIT = "a" * 40


class MadeUpHub:
    """``front`` knows repositories and who may have what, ``store`` has the bytes."""

    def __init__(self, front: Web, store: Web) -> None:
        self.front = front
        self.store = store
        self.url = front.url

    def add(self, repo: str, files: dict[str, bytes], *, lfs: bool = True) -> None:
        siblings = []
        for name, content in files.items():
            digest = hashlib.sha256(content).hexdigest()
            sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": "b" * 40}
            if lfs:
                sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
            headers = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            self.store.pages[f"/blobs/{digest}"] = Page(content)
            location = f"{self.store.url}/blobs/{digest}?signature=1"
            self.front.pages[f"/{repo}/resolve/{COMMIT}/{name}"] = Page(location=location, headers=headers)
        info = {"id": repo, "sha": COMMIT, "siblings": siblings}
        self.front.pages[f"/api/models/{repo}"] = Page(json.dumps(info).encode(), etag=None)

    def refuse(self, repo: str, status: int, code: str | None = None) -> None:
        """``code`` is what the Hub says in X-Error-Code."""
        headers = {"X-Error-Code": code} if code else {}
        self.front.pages[f"/api/models/{repo}"] = Page(statuses=[status] * 9, headers=headers)

    def blob(self, content: bytes) -> Page:
        return self.store.pages[f"/blobs/{hashlib.sha256(content).hexdigest()}"]


@contextmanager
def made_up_hub() -> Iterator[MadeUpHub]:
    with Web().serving() as front, Web().serving() as store:
        yield MadeUpHub(front, store)
