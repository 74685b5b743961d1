"""PIPELINE of a command: a folder, a repository of the Hub, or the name of what comes with the package."""

import difflib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..shipped import SHIPPED, find_pipeline

INDEX = "model_index.json"
HELP = f"a folder, a repository of the Hub (user/name), or what comes along: {', '.join(SHIPPED)}"


def located(text: str, revision: str | None = None) -> str:
    """What `from_pretrained` takes; it is a folder with a pipeline or what may be a repository.

    Raises:
        OSError: where there can be no pipeline, with what may be meant instead.
        ValueError: for a revision of a folder.
    """
    source = find_pipeline(text)
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"--revision {revision} is of a repository, and {text} is a folder: leave it out")
        if (path / INDEX).is_file():
            return source
        inside = sorted(path.glob(f"*/{INDEX}"))
        raise FileNotFoundError(
            f"{text} holds no {INDEX}, so it is no pipeline: "
            + (f"did you mean {inside[0].parent}?" if inside else "give a folder that save_pretrained, save_model or convert wrote")
        )
    if path.exists():
        raise NotADirectoryError(f"{text} is a file: give the folder of a pipeline")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        near = difflib.get_close_matches(text, SHIPPED, n=1)
        hint = f"did you mean {near[0]}?" if near else f"PIPELINE is {HELP}"
        raise FileNotFoundError(f"there is no folder {text}, and it is neither user/name nor a model that comes along; {hint}")
    return source


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """What the Hub answers, in a sentence that says what to do.

    Raises:
        OSError: in place of errors of the Hub and of the network.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")  # of diffusers, to the Hub's client
            yield
    except Exception as error:
        kinds = {type(each) for each in _causes(error)}
        known = {
            GatedRepoError: f"{repository} asks for consent: give it on {constants.ENDPOINT}/{repository}, then log in with `hf auth login`",
            RepositoryNotFoundError: f"there is no folder {repository}, and no repository of that name that you may see on {constants.ENDPOINT}: "
            "a private one needs `hf auth login` or HF_TOKEN",
            RevisionNotFoundError: f"{repository} has no such revision: name a branch, a tag or a commit",
            OfflineModeIsEnabled: f"{repository} is no folder and not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub",
            LocalEntryNotFoundError: f"{repository} is no folder and not in the cache, and {constants.ENDPOINT} does not answer: is there a network?",
        }
        for kind, sentence in known.items():
            if any(issubclass(found, kind) for found in kinds):
                raise OSError(sentence) from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
