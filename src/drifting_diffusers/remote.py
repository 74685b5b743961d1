"""A repository on the Hub as seen from here: made ready, looked into, and asked again where another attempt may help.

What does not pass is one sentence with a way out, for those who push while a run goes on as for those who wait for it.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

Answer = TypeVar("Answer")

PASSING = {408, 412, 425, 429}
"""Answers of 4xx that another attempt may not get; at 412 another commit came in between."""
WAYS_OUT = {
    401: "the token is missing or not valid: run `hf auth login`, or set HF_TOKEN",
    403: "the token may not do that there: to push, take one with write permission or a repository of your own; to load, accept its terms on the Hub",
    404: "the repository, or its revision, is gone or hidden from this token: check the name and the token",
}


class NotDone(OSError):
    """The Hub did not do what it was asked for; the message says why."""


@dataclass(frozen=True)
class Patience:
    """How often something is tried, and what is waited for in between.

    Args:
        attempts: how often, at least 1.
        first_wait: seconds before the second attempt; each later wait is twice as long.
        longest_wait: no wait is longer; a server that asks for more is not asked again.

    Raises:
        ValueError: for numbers that are not positive.
    """

    attempts: int = 8
    first_wait: float = 2.0
    longest_wait: float = 300.0

    def __post_init__(self):
        attempts, first_wait, longest_wait = self.attempts, self.first_wait, self.longest_wait
        if attempts < 1 or first_wait <= 0 or longest_wait <= 0:
            raise ValueError(f"attempts must be at least 1 and waits positive, got {attempts=}, {first_wait=}, {longest_wait=}")

    def ask(
        self,
        call: Callable[[], Answer],
        *,
        wait: Callable[[float], Any] | None = None,
        given_up: Callable[[], bool] = lambda: False,
        tell: Callable[[str], Any] = lambda why: None,
    ) -> Answer:
        """What `call` returns.

        Args:
            call: asks the Hub for something, and may do so again.
            wait: waits for so many seconds; `time.sleep` if not given.
            given_up: whether nobody waits for the answer any more.
            tell: is told why another attempt is made.

        Raises:
            NotDone: for what the Hub, the network or the disk did not do. Any other error of `call` is not for this to judge and comes as it is.
        """
        why, failed = "", None
        for attempt in range(self.attempts):
            try:
                return call()
            except (HTTPError, OSError, RuntimeError) as error:  # the last is hf_xet's, and huggingface_hub's for a large file
                failed, why, asked = error, in_words(error), seconds_asked_for(error)
            if not passes(failed):
                raise NotDone(why) from failed
            if asked is not None and asked > self.longest_wait:
                raise NotDone(f"{why}; the server asks for {asked:.0f} s of patience, more than {self.longest_wait:g}") from failed
            if attempt + 1 < self.attempts:
                tell(why)
                (wait or time.sleep)(min(self.first_wait * 2**attempt, self.longest_wait) if asked is None else asked)
            if given_up():
                break
        raise NotDone(f"{why}, {self.attempts} times in a row" if self.attempts > 1 else why) from failed


def open_repository(api: HfApi, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """The repository's whole name; it is made if it is new, and so is the branch.

    Raises:
        ValueError: if it should be private, is there already, and everybody may read it.
    """
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if private and api.model_info(repo_id).private is False:
        raise ValueError(
            f"{repo_id} is public already, so private=True would hide nothing: make it private in its settings, give another name, or leave "
            "private out"
        )
    if revision is not None and not revision.startswith("refs/"):  # a pull request is no branch, and is there
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def file_there(api: HfApi, repo_id: str, name: str, revision: str | None = None) -> bytes | None:
    """The repository's file, None if it has none; never a cached one, and an error if that cannot be known."""
    with tempfile.TemporaryDirectory() as fresh:
        try:
            return Path(api.hf_hub_download(repo_id, name, revision=revision, local_dir=fresh)).read_bytes()
        except RemoteEntryNotFoundError:  # the Hub says so; a network that fails says nothing of what is there
            return None


def passes(error: BaseException) -> bool:
    """Whether another attempt may not meet this error."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in PASSING or status >= 500 or (status == 409 and "in progress" in str(error))
    if isinstance(error, LocalEntryNotFoundError | RuntimeError):  # a download or an upload that failed, for the reason that it carries
        return error.__cause__ is None or passes(error.__cause__)
    if isinstance(error, OfflineModeIsEnabled | LocalTokenNotFoundError):
        return False
    return isinstance(error, HTTPError | OSError)


def in_words(error: BaseException) -> str:
    """Why it failed, and the way out where there is one."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = " ".join((error.server_message or "").split())
        way_out = WAYS_OUT.get(status, "")
        return f"the Hub answered {status}" + (f" ({said})" if said else "") + (f": {way_out}" if way_out else "")
    if isinstance(error, LocalEntryNotFoundError | RuntimeError) and error.__cause__ is not None:
        return in_words(error.__cause__)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def seconds_asked_for(error: BaseException) -> float | None:
    """How long a busy server wants to be left alone, if it says so."""
    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in (429, 503):
        return None
    headers: Mapping[str, str] = error.response.headers
    value = headers.get("retry-after", "")
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a time zone
        limit = parse_ratelimit_headers(headers)
        return None if limit is None else float(limit.reset_in_seconds)
