"""Pushing folders to the Hub while a run goes on: in the background, in order, of several for one place only the newest, and never at training's expense.

What is pushed is a snapshot: weights are hard-linked where the file system can, everything else is copied, into a hidden folder beside the original
that lives until the push is done. So the original may be deleted or replaced at once. Only rewriting a linked file in place would reach into the
snapshot; it is noticed, and the push fails.
"""

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from .cards import PICTURES, README
from .remote import NotDone, Patience, in_words, open_repository

logger = logging.getLogger(__name__)

LINKED = (".safetensors", ".bin", ".pt", ".pth", ".pkl")
"""Endings of large files, which are written once: they are hard-linked. Logs and the like grow, so they are copied."""

SNAPSHOT = ".push-"


@dataclass(frozen=True)
class _Push:
    """A folder on its way. `linked` holds, per linked file, what changes when somebody writes into it."""

    source: Path
    message: str
    path_in_repo: str
    model: Any
    folder: tempfile.TemporaryDirectory
    linked: dict[Path, tuple[int, int]]


class Pusher:
    """Uploads folders to one repository, one after the other, in a background thread that neither training nor the interpreter's exit waits for.

    Errors of the network and of the server are retried, with waits that double; what does not pass is told as a warning and kept in `failures`. A
    request to a server that never answers is never given up by huggingface_hub: later pushes then wait, and `finish` says so. Only where hf_xet is
    missing, exit waits for large files on their way: huggingface_hub then sends them from threads of its own.

    Args:
        repo_id: the repository, made if it is new; without a user's name it is the token's own.
        private: make it private, should it be new; one that is public already is refused.
        revision: branch to push to, made if it is new; the main branch if not given.
        token: of the Hub; the stored one if not given.
        attempts, first_wait, longest_wait: how often a push is tried, and how long is waited in between; see `Patience`.
        wait: waits for so many seconds; by default until `finish` has had enough, if that is sooner.

    Raises:
        ValueError: for a name that no repository can have, and for numbers that are not positive.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        attempts: int = 8,
        first_wait: float = 2.0,
        longest_wait: float = 300.0,
        wait: Callable[[float], Any] | None = None,
    ):
        validate_repo_id(repo_id)
        self.repo_id, self.private, self.revision, self.token = repo_id, private, revision, token
        self.patience = Patience(attempts, first_wait, longest_wait)
        self._api = HfApi(token=token)
        self._given_up = threading.Event()
        self._wait = wait or self._given_up.wait
        self._changed = threading.Condition()
        self._waiting: dict[str, _Push] = {}
        self._in_flight: _Push | None = None
        self._failures: list[str] = []
        self._finished = False
        self._prepared = False
        self._thread: threading.Thread | None = None

    @property
    def failures(self) -> list[str]:
        """What could not be pushed, and why, in sentences."""
        with self._changed:
            return list(self._failures)

    def push(
        self,
        folder: str | os.PathLike,
        *,
        message: str,
        path_in_repo: str = "",
        ignore: Sequence[str] = ("checkpoint-*",),
        model: Any = None,
    ) -> None:
        """Take a snapshot of a folder and have it uploaded; returns at once.

        A push to the same `path_in_repo` that still waits is dropped: only the newest counts. The one that is being uploaded is finished.

        Args:
            folder: what to push; it may be gone when this returns.
            message: of the commit.
            path_in_repo: the folder there, which becomes exactly this one; by default files go to the root and join those that are there.
            ignore: patterns of files to leave out, relative to the folder.
            model: the pipeline or network that the card in the root is of; without it no card is written. A README of the user stays in any case.

        Raises:
            ValueError: if there is nothing to push, for a card outside the root, and after `finish`.
        """
        folder, path_in_repo = Path(folder), path_in_repo.strip("/")
        if model is not None and path_in_repo:
            raise ValueError(f"a card stands in the root of a repository, got path_in_repo={path_in_repo!r}: leave `model` out")
        names = _names_in(folder, ignore)
        if not names:
            raise ValueError(f"there is nothing to push in {str(folder)!r}: give a folder with files that `ignore` leaves, got {[*ignore]}")
        with self._changed:
            if self._finished:
                raise ValueError("this pusher has finished: make another one")
        try:
            held, linked = _snapshot(folder, names)
        except OSError as error:  # as of a full disk
            self._fail(message, path_in_repo, f"its files could not be held: {error}")
            return
        with self._changed:
            replaced = self._waiting.pop(path_in_repo, None)
            self._waiting[path_in_repo] = _Push(folder, message, path_in_repo, model, held, linked)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="pusher", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if replaced is not None:
            replaced.folder.cleanup()

    def finish(self, timeout: float | None = 600.0) -> list[str]:
        """Wait until everything is pushed, but no longer than `timeout` seconds; returns `failures`. Nothing can be pushed after that."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._waiting and self._in_flight is None, timeout)
            told, late = self._given_up.is_set(), [self._in_flight, *self._waiting.values()]
            self._waiting = {}
            self._given_up.set()
        for push in () if done or told else late:
            if push is not None:
                self._fail(push.message, push.path_in_repo, f"it was not done after {timeout} s of waiting at the end")
        for push in late[1:]:
            push.folder.cleanup()
        return self.failures

    def _work(self) -> None:
        while True:
            with self._changed:
                self._in_flight = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._finished)
                if not self._waiting:
                    return
                push = self._in_flight = self._waiting.pop(next(iter(self._waiting)))
            with push.folder:
                why = self._upload_patiently(push)
            if why is not None and not self._given_up.is_set():  # else `finish` has told it
                self._fail(push.message, push.path_in_repo, why)

    def _upload_patiently(self, push: _Push) -> str | None:
        """None for a push that arrived, else why it did not."""
        tell = lambda why: logger.info("Pushing %r to %s: %s; once more", push.message, self.repo_id, why)
        try:
            self.patience.ask(lambda: self._upload(push), wait=self._wait, given_up=self._given_up.is_set, tell=tell)
        except NotDone as error:
            return str(error)
        except Exception as error:  # nothing that happens here may reach training
            return in_words(error)
        return None

    def _upload(self, push: _Push) -> None:
        if not self._prepared:
            self.repo_id = open_repository(self._api, self.repo_id, private=self.private, revision=self.revision)
            self._prepared = True
        folder = Path(push.folder.name)
        theirs = [] if push.path_in_repo else self._settle(folder, push.model)
        _check_unchanged(push)
        self._api.upload_folder(
            repo_id=self.repo_id,
            folder_path=folder,
            path_in_repo=push.path_in_repo,
            commit_message=push.message,
            revision=self.revision,
            ignore_patterns=theirs,
            delete_patterns="*" if push.path_in_repo else None,
        )
        _check_unchanged(push)

    def _settle(self, folder: Path, model: Any) -> list[str]:
        """What a user put there or here, card or pictures, stays; else our card of the model. Returns what is to be left out of the push."""
        if model is None and not any((folder / name).exists() for name in (README, *PICTURES)):
            return []
        from .hub import settle_card  # brings all of diffusers

        return settle_card(self._api, model, folder, self.repo_id, revision=self.revision)

    def _fail(self, message: str, path_in_repo: str, why: str) -> None:
        place = f"{self.repo_id}/{path_in_repo}" if path_in_repo else self.repo_id
        by_hand = " ".join(["hf upload", self.repo_id, "FOLDER", *([path_in_repo] if path_in_repo else [])])
        sentence = f"Pushing {message!r} to {place} failed: {why}. By hand: {by_hand}"
        with self._changed:
            self._failures.append(sentence)
        logger.warning(sentence)


def _names_in(folder: Path, ignore: Sequence[str]) -> list[str]:
    """The files below a folder that are to be pushed; what is half-written or held by a push is not."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    whole = (path for path in paths if not any(part.startswith(SNAPSHOT) or part.endswith(".partial") for part in path.parts))
    return sorted(filter_repo_objects((path.as_posix() for path in whole), ignore_patterns=[*ignore]))


def _snapshot(folder: Path, names: Sequence[str]) -> tuple[tempfile.TemporaryDirectory, dict[Path, tuple[int, int]]]:
    """The files in a folder of their own, and the stamps of those that are linked."""
    try:
        held = tempfile.TemporaryDirectory(prefix=SNAPSHOT, dir=folder.resolve().parent, ignore_cleanup_errors=True)
    except OSError:  # not ours to write in
        held = tempfile.TemporaryDirectory(prefix=SNAPSHOT, ignore_cleanup_errors=True)
    linked = {}
    try:
        for name in names:
            source, target = folder / name, Path(held.name, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix in LINKED and _link(source, target):
                linked[target] = _stamp(target)
            else:
                shutil.copy2(source, target)
    except OSError:
        held.cleanup()
        raise
    return held, linked


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        return False
    return True


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when somebody writes into a file."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _check_unchanged(push: _Push) -> None:
    for path, stamp in push.linked.items():
        if _stamp(path) != stamp:
            name = path.relative_to(push.folder.name)
            raise ValueError(f"{push.source / name} was written into while it was pushed: write another file and give it this name then")
