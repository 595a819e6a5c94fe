"""An output file that several processes write: each a part, which then become one.

Process I of N has the rows I, I + N, ... and writes them to OUTPUT.part-I-of-N, a
`RunFile` of its own. So has group I of N where processes share a copy of the weights:
its first one writes. What parts a killed run has left, also one of another number of
processes, the next run takes over.
"""

import contextlib
import hashlib
import heapq
import itertools
import json
import operator
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lrd_jax.errors import UserError
from lrd_jax.processes import Team
from lrd_jax.runfile import RunFile

Ids = Sequence[int | str]


class Follower(RunFile):
    """A file of results as a process sees it that makes them too, but does not write.

    It is told how many are done, and never opened.
    """

    def __init__(
        self, path: pathlib.Path, ids: Ids, num_done: int, nonfinite: list[int | str]
    ) -> None:
        super().__init__(path, {}, ids, lock=False)
        self.num_done = num_done
        self.nonfinite = nonfinite

    def start(self) -> None:
        """Nothing: another process does."""

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Nothing: another process does."""


@contextlib.contextmanager
def open_output(
    path: pathlib.Path | str, settings: Mapping[str, Any], ids: Ids, team: Team
) -> Iterator[tuple[RunFile, slice]]:
    """The output of a run; when the body has succeeded in all processes it is whole.

    Args:
        path: the output, on a file system that all processes share.
        settings: as for `RunFile`.
        ids: of all results, in order.
        team: the processes, in their groups. A single one writes the output itself.

    Yields:
        The file for the results of this process, and which of all they are; a
        `Follower` where another process of its group writes them. If the
        output is complete already, that is the output itself, and all.

    Raises:
        UserError: as for `RunFile`, in any process; the processes were started with
            different settings; a process has died.
    """
    path = pathlib.Path(path)
    _check_same(team, [path.name, dict(settings), list(ids)])
    with contextlib.ExitStack() as stack:

        def start() -> tuple[RunFile, RunFile, slice]:
            whole = RunFile(path, settings, ids, lock=team.leads)
            stack.enter_context(whole)
            if team.groups == 1 or whole.num_done == len(ids):
                file, share = whole, slice(None)
            else:
                share = slice(team.group, None, team.groups)
                part = _part_path(path, team.group, team.groups)
                file = RunFile(part, settings, ids[share], lock=team.writes)
                stack.enter_context(file)
            if not team.writes:
                return whole, file, share
            # Parts of this run are being written, and none has rows of another.
            left = [p for p in _parts(path) if _process(p)[1] != team.groups]
            sources = [whole.path, *left] if file is not whole else left
            _take_over(file, range(len(ids))[share], sources, settings, ids)
            return whole, file, share

        def finish() -> None:
            if team.leads:
                if team.groups > 1:
                    _join(whole, settings, ids)
                _remove_parts(path)

        whole, file, share = team.together(start)
        yield _as_written(file, ids[share], team), share
        team.exchange()  # All have decoded.
        team.together(finish)


def _as_written(file: RunFile, ids: Ids, team: Team) -> RunFile:
    """The file, as the process knows it that writes it."""
    told = team.exchange(json.dumps([file.num_done, file.nonfinite]))
    if team.writes:
        return file
    return Follower(file.path, ids, *json.loads(told[team.group * team.span]))


def _check_same(team: Team, told: Any) -> None:
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    for process, theirs in enumerate(team.exchange(digest)):
        if theirs != digest:
            raise UserError(
                f"process {process} has other settings or another input than process "
                f"{team.id}: start all with the same command but for `--process-id`."
            )


def _join(whole: RunFile, settings: Mapping[str, Any], ids: Ids) -> None:
    """Brings the parts into the output."""
    parts = _parts(whole.path)
    _take_over(whole, range(len(ids)), parts, settings, ids)
    if whole.num_done < len(ids):
        raise UserError(
            f"{whole.path}: the result of id {ids[whole.num_done]!r} is in none of the "
            f"{len(parts)} part files beside it: `--output` must be on a file system "
            "that all processes share."
        )


def _take_over(
    file: RunFile,
    numbers: range,
    sources: Sequence[pathlib.Path],
    settings: Mapping[str, Any],
    ids: Ids,
) -> None:
    """Adds to `file` the results that come next in it, as far as others have them.

    Args:
        file: open.
        numbers: of all its rows.
        sources: outputs and parts of the same run.
        settings: of the run.
        ids: of all results of the run.
    """
    wanted = numbers[file.num_done :]
    if not wanted:
        return
    streams = []
    for path in sources:
        process, count = _process(path)
        share = slice(process, None, count)
        with RunFile(path, settings, ids[share], lock=False) as source:
            streams.append(zip(range(len(ids))[share], source.lines(), strict=False))
    lines = _following(heapq.merge(*streams, key=operator.itemgetter(0)), wanted)
    for first in lines:  # Else there is nothing to take, and `file` is left alone.
        file.start()
        file.extend(itertools.chain([first], lines))


def _following(found: Iterable[tuple[int, bytes]], wanted: range) -> Iterator[bytes]:
    """The lines of `wanted`, up to the first that is not found."""
    rest = iter(wanted)
    number: int | None = next(rest, None)
    for there, line in found:
        if number is None or there > number:
            return
        if there == number:
            yield line
            number = next(rest, None)


def _part_path(path: pathlib.Path, process: int, count: int) -> pathlib.Path:
    return path.with_name(f"{path.name}.part-{process}-of-{count}")


def _process(path: pathlib.Path) -> tuple[int, int]:
    """I and N of a part's name; an output is all rows, as of one process."""
    match = re.search(r"\.part-([0-9]+)-of-([1-9][0-9]*)$", path.name)
    return (int(match[1]), int(match[2])) if match else (0, 1)


def _parts(path: pathlib.Path) -> list[pathlib.Path]:
    """The parts beside an output."""
    try:
        names = [there.name for there in path.parent.iterdir()]
    except OSError:
        return []  # `RunFile` says what is the matter.
    pattern = re.escape(path.name) + r"\.part-[0-9]+-of-[1-9][0-9]*"
    return [path.with_name(n) for n in sorted(names) if re.fullmatch(pattern, n)]


def _remove_parts(path: pathlib.Path) -> None:
    for part in _parts(path):
        part.unlink()
        # In this order, as a part without its settings would be refused.
        RunFile(part, {}, []).meta_path.unlink(missing_ok=True)
