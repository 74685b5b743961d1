"""What goes wrong is told in one sentence; where it went wrong stands in the log of the server."""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except gr.Error:
        raise
    except (ValueError, TypeError, OSError) as error:  # sentences of ours, and of what reads files
        text = " ".join(str(error).split())
        raise gr.Error(text[:400], title="That does not work", print_exception=False) from None
    except Exception as error:
        logging.getLogger(__name__).exception("the demo failed")
        raise gr.Error(
            f"{type(error).__name__}: the log of the server says more.", title="Something broke here", print_exception=False
        ) from None


def with_messages(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, or the iterator that it returns, with errors as messages of the page."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def iterate(*given: Any) -> Iterator[Any]:
            with _told():
                yield from function(*given)

        return iterate

    @functools.wraps(function)
    def call(*given: Any) -> Any:
        with _told():
            return function(*given)

    return call
