"""The Space in a process of its own, as a visitor meets it: no network, an empty cache, a free port."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 240  # seconds for a page to be there; 6 on an idle core


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[tuple[str, "subprocess.Popen[str]", Path]]:
    """The address of `drifting-diffusers WORDS`, its process and the file of what it says."""
    log = folder / "log.txt"
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    environment |= {"GRADIO_TEMP_DIR": str(folder / "gradio"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "drifting_diffusers.cli", *words, "--no-browser", "--port", "0"]
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, text=True, preexec_fn=_heard) as process,
    ):
        try:
            yield _address(process, log), process, log
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()


def _heard() -> None:
    """Ctrl-C ends the process also where its parent was started in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _address(process: "subprocess.Popen[str]", log: Path) -> str:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"^(http://\S+)", log.read_text(), flags=re.MULTILINE)
        if found:
            return found[1]
        time.sleep(0.1)  # between two looks; the deadline is above
    raise AssertionError(f"no page: {log.read_text()}")
