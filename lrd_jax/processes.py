"""Several processes that share a run: who they are, and what they tell each other.

Each decodes rows of its own, on its own devices; where a copy of the weights needs the
devices of several, these are a group, which decodes the same rows together. What else
passes between processes are a few words through JAX's coordination service, never an
array.
"""

import dataclasses
import io
import itertools
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from lrd_jax.errors import UserError
from lrd_jax.staging import first_line

# JAX is imported in the functions, so that a mistake in a flag is answered without it.

AUTO = "auto"
PAUSE = 0.2  # Seconds between two looks at what the others have told.
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Where the processes of a run find each other.

    Attributes:
        coordinator: HOST:PORT of process 0, or `auto` for what JAX finds by itself.
        num_processes: how many there are; None with `auto`.
        process_id: which of them this is, from 0; None with `auto`.
    """

    coordinator: str
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass(frozen=True)
class Team:
    """The processes that share a run, seen from one of them.

    Attributes:
        id: which of them this is, from 0.
        count: how many there are.
        span: how many in a row make a group, which shares a copy of the weights.
    """

    id: int = 0
    count: int = 1
    span: int = 1
    _steps: Iterator[int] = dataclasses.field(
        default_factory=itertools.count, repr=False, compare=False
    )

    @property
    def leads(self) -> bool:
        """Whether this is the one process that does what is done once."""
        return self.id == 0

    @property
    def writes(self) -> bool:
        """Whether this is the one process of its group that writes the results."""
        return self.id % self.span == 0

    @property
    def group(self) -> int:
        """Which group this process is in, from 0."""
        return self.id // self.span

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return self.count // self.span

    def in_groups(self, span: int) -> "Team":
        """The same processes, in groups of that many."""
        return dataclasses.replace(self, span=span)

    def exchange(self, text: str = "") -> list[str]:
        """The texts of all processes, in order, once each has told its own.

        All call this, and `together`, equally often.

        Raises:
            UserError: another process has died.
        """
        if self.count == 1:
            return [text]
        # JAX's public barriers are collectives: programs over all devices, which do not
        # wait long for a slower one. Who dies is found by JAX's heartbeats.
        from jax import errors
        from jax._src.distributed import global_state

        client, folder = global_state.client, f"lrd_jax/{next(self._steps)}/"
        assert client is not None
        try:
            client.key_value_set(f"{folder}{self.id}", text)
            while len(told := client.key_value_dir_get(folder)) < self.count:
                time.sleep(PAUSE)  # Which Ctrl-C ends, unlike a wait inside of JAX.
        except errors.JaxRuntimeError as error:
            raise UserError(
                "another process of this run has ended; what is done is kept: start "
                f"all of them again with the same commands ({first_line(error)})."
            ) from None
        of_process = {int(key.rpartition("/")[2]): text for key, text in told}
        return [of_process[process] for process in range(self.count)]

    def together(self, act: Callable[[], T]) -> T:
        """What `act` gives here, once it has succeeded in every process.

        Args:
            act: may raise a `UserError`, which then all processes raise.

        Raises:
            UserError: it failed, here or in another process.
        """
        try:
            made = act()
        except UserError as error:
            self.exchange(str(error))
            raise
        for process, message in enumerate(self.exchange()):
            if message:
                raise UserError(f"process {process}: {message}")
        return made


def parse_meeting(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    output: str | None,
) -> Meeting | None:
    """What the flags of these names ask for; None for one process.

    Raises:
        UserError: one of them is not well-formed, or they do not go together.
    """
    given = {"--num-processes": num_processes, "--process-id": process_id}
    if coordinator is None:
        for flag, value in given.items():
            if value is not None:
                raise UserError(
                    f"`{flag} {value}` needs `--coordinator HOST:PORT` of process 0."
                )
        return None
    if output is None:
        raise UserError(
            "`--coordinator` needs `--output`: the results of several processes are "
            "put together in a file."
        )
    if coordinator == AUTO:
        for flag, value in given.items():
            if value is not None:
                raise UserError(
                    f"`--coordinator auto` finds all by itself: leave out `{flag} "
                    f"{value}`, or give HOST:PORT of process 0."
                )
        return Meeting(AUTO)
    match = re.fullmatch(r"\S+:([0-9]{1,5})", coordinator)
    if match is None or not 1 <= int(match[1]) <= 65535:
        raise UserError(
            "`--coordinator` must be HOST:PORT of process 0, as `10.0.0.1:1234`, or "
            f"`auto`, got {coordinator!r}."
        )
    if num_processes is None or process_id is None:
        raise UserError(
            f"`--coordinator {coordinator}` needs `--num-processes N` and "
            "`--process-id I`; only `auto` does without."
        )
    if num_processes < 1:
        raise UserError(f"`--num-processes` must be at least 1, got {num_processes}.")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"`--process-id` must be in [0, {num_processes}), as `--num-processes` "
            f"says, got {process_id}."
        )
    return Meeting(coordinator, num_processes, process_id)


def join(meeting: Meeting | None) -> Team:
    """Meets the other processes; call it before JAX computes anything.

    Raises:
        UserError: they were not found, or the port of process 0 is taken.
    """
    if meeting is None:
        return Team()
    if meeting.process_id == 0:
        _check_port_free(meeting.coordinator)
    import jax

    address = None if meeting.coordinator == AUTO else meeting.coordinator
    try:
        jax.distributed.initialize(address, meeting.num_processes, meeting.process_id)
    except (ValueError, RuntimeError) as error:
        reason = first_line(error)
        if address is None:
            reason += " Give `--coordinator HOST:PORT` and its two companions instead."
        raise UserError(f"`--coordinator {meeting.coordinator}`: {reason}") from None
    _keep_stdout()
    return Team(jax.process_index(), jax.process_count())


def _check_port_free(coordinator: str) -> None:
    """Raises a `UserError` where JAX's own server would crash."""
    port = int(coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(
            f"`--coordinator {coordinator}`: port {port} of this machine cannot be "
            f"used ({reason}): choose another, or is another process started with "
            "`--process-id 0`?"
        ) from None


def _keep_stdout() -> None:
    """What a library prints goes to stderr from here on, and Python's own to stdout.

    Gloo, which joins CPUs, tells of each connection where only results belong.
    """
    sys.stdout.flush()
    own = open(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = io.TextIOWrapper(
        own, encoding=sys.stdout.encoding, errors=sys.stdout.errors, line_buffering=True
    )
