"""Several processes of one command: it starts itself again through a launcher, on each of them."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

STARTED = "DRIFTING_DIFFUSERS_STARTED"  # in the environment of what was started from here
PROGRAM = ("-m", "drifting_diffusers.cli")


def _option(help: str) -> Any:
    return field(default=None, metadata={"help": help})


@dataclass
class Launch:
    """Processes: a step is the same on any number of them, which must divide its labels."""

    num_processes: int | None = _option(
        "processes on all machines together, one for every accelerator, or any number on CPUs; 1 if not given"
    )
    num_machines: int | None = _option("machines; the same command is started on each; 1 if not given")
    machine_rank: int | None = _option("which of the machines this is, from 0")
    main_process_ip: str | None = _option("address of machine 0")
    main_process_port: int | None = _option("port of machine 0; any free one on a single machine")
    accelerate_config: str | None = _option("file of `accelerate config`, as in examples/accelerate_configs, for GPUs")

    def __post_init__(self):
        for name, least in (("num_processes", 1), ("num_machines", 1), ("machine_rank", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        machines = self.num_machines or 1
        if self.num_processes and self.num_processes % machines:
            raise ValueError(f"num_processes must be a multiple of num_machines, got {self.num_processes} and {machines}")
        if machines > 1 and None in (self.num_processes, self.machine_rank, self.main_process_ip) and self.accelerate_config is None:
            raise ValueError("several machines need num_processes (of all), machine_rank and main_process_ip, on each of them")
        if self.machine_rank is not None and self.machine_rank >= machines and self.accelerate_config is None:
            raise ValueError(f"machine_rank must lie from 0 to {machines - 1}, got {self.machine_rank}: is num_machines missing?")


def launch(choice: Launch, words: Sequence[str]) -> None:
    """Let a launcher take this process's place and start the command on every process; return where this is such a process, or none is asked for.

    Args:
        choice: how many processes, and where.
        words: of the command, without its name.

    Raises:
        ValueError: for more processes than there are, or than there is place for.
    """
    there = int(os.environ.get("WORLD_SIZE", "1"))
    if STARTED in os.environ or "WORLD_SIZE" in os.environ:
        if choice.num_processes not in (None, there):
            raise ValueError(
                f"num_processes is {choice.num_processes}, and the launcher started {there}: leave it out under torchrun or accelerate launch, "
                "and on CPUs leave accelerate_config out"
            )
        return
    if all(value in (None, 1 if name == "num_processes" else None) for name, value in asdict(choice).items()):
        return
    accelerators = _accelerators()
    here = (choice.num_processes or 1) // (choice.num_machines or 1)
    if accelerators and here > accelerators:
        raise ValueError(f"num_processes asks for {here} processes on this machine, which has {accelerators} accelerators: ask for fewer")
    command = [
        sys.executable,
        *(with_accelerate(choice) if accelerators or choice.accelerate_config else with_torchrun(choice)),
        *PROGRAM,
        *words,
    ]
    added = {STARTED: "1"} | ({} if accelerators else {"ACCELERATE_USE_CPU": "true"})
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // here))}  # else the launcher takes 1, and says so at length
    sys.stdout.flush()
    os.execve(command[0], command, threads | os.environ | added)  # in its place: signals and the exit code are the launcher's


def with_accelerate(choice: Launch) -> list[str]:
    """Arguments of python that start the processes through accelerate's launcher."""
    named = {name: value for name, value in asdict(choice).items() if value is not None}
    file = named.pop("accelerate_config", None)
    # What the launcher would guess, and say so at length; precision and compiling are choices of the run.
    guessed = (
        {"num_processes": 1, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"} if file is None else {"config_file": file}
    )
    flags = [word for name, value in (guessed | named).items() for word in (f"--{name}", str(value))]
    return ["-m", "accelerate.commands.accelerate_cli", "launch", *flags]


def with_torchrun(choice: Launch) -> list[str]:
    """The same through torchrun: on CPUs, accelerate's launcher starts one process whatever it is told."""
    machines = choice.num_machines or 1
    flags = [f"--nproc_per_node={(choice.num_processes or 1) // machines}"]
    if machines > 1:
        flags += [f"--nnodes={machines}", f"--node_rank={choice.machine_rank}", f"--master_addr={choice.main_process_ip}"]
        flags += [f"--master_port={choice.main_process_port or 29500}"]
    elif choice.main_process_port is not None:
        flags += [f"--master_port={choice.main_process_port}"]
    else:
        flags += ["--standalone"]
    return ["-m", "torch.distributed.run", *flags]


def _accelerators() -> int:
    import torch

    return 0 if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes") else torch.accelerator.device_count()
