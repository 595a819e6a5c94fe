"""The whole benchmark: all that is compared, in turn, in one run."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from lrd_jax.benchmark import parts, peak, torch_peer
from lrd_jax.benchmark.clock import (
    Seconds,
    combine,
    interleave,
    memory_growth,
    spread,
)
from lrd_jax.benchmark.ours import Ours, Outcome, compile_method
from lrd_jax.benchmark.request import (
    PEER_THRESHOLD,
    PUBLISHED,
    THRESHOLD,
    Request,
)
from lrd_jax.benchmark.subject import Subject
from lrd_jax.settings import plain

MIB = 2**20


def measure(request: Request, subject: Subject) -> dict[str, Any]:
    """All figures as JSON values."""
    peer = None
    if request.flags.peer is not None:
        peer = torch_peer.build(subject.config, subject.params)
    report = measure_parts(request, subject, peer)
    if request.flags.decode:
        decodes, loops = measure_decodes(request, subject, peer)
        for name, figures in decodes.items():
            report["methods"][name] |= figures
        if peer is not None:
            report["peer"]["loops"] = loops
    return report


def measure_parts(
    request: Request, subject: Subject, peer: torch_peer.TorchModel | None
) -> dict[str, Any]:
    """The parts of a forward of each method, the plain forward and the peaks."""
    flags, batch = request.flags, subject.batches[0]
    forward = parts.plain_forward(
        subject.denoiser, subject.params, batch, flags.gen_length
    )
    runs = {"forward": forward, "peak": peak.jax_peak()}
    if peer is not None:
        peer_forward = torch_peer.forward_run(peer, batch, flags.gen_length)
        runs |= {"torch forward": peer_forward, "torch peak": peak.torch_peak()}
    for method in request.methods:
        of_method = parts.part_runs(subject.denoiser, subject.params, method.cfg, batch)
        runs |= {f"{method.name}: {part}": run for part, run in of_method.items()}
    seconds = interleave(runs, flags.repeats)
    report: dict[str, Any] = {
        "peak_gflops": {"jax": peak.gflops(seconds, "peak")},
        "forward_ms": spread(seconds["forward"], 1e3),
        "methods": {
            method.name: {
                "method": method.cfg.method,
                "settings": plain(method.cfg),
                "parts": parts.summarise_parts(_of(seconds, f"{method.name}: ")),
            }
            for method in request.methods
        },
    }
    if peer is not None:
        report["peak_gflops"]["torch"] = peak.gflops(seconds, "torch peak")
        apart = np.abs(np.asarray(forward()) - peer_forward().numpy()).max()
        report["peer"] = _compare_forwards(seconds) | {
            "largest_logit_difference": float(apart)
        }
    return report


def _of(seconds: Seconds, prefix: str) -> Seconds:
    """Those whose name begins so, by the rest of it."""
    return {
        name.removeprefix(prefix): rounds
        for name, rounds in seconds.items()
        if name.startswith(prefix)
    }


def _compare_forwards(seconds: Seconds) -> dict[str, Any]:
    """Our forward against the peer's, as it is and for equal matrix products."""
    ratio = combine(lambda a, b: a / b, seconds["forward"], seconds["torch forward"])
    # Slower products mean a lower peak: the quotient of the peaks, torch's over ours.
    peaks = combine(lambda a, b: a / b, seconds["peak"], seconds["torch peak"])
    return {
        "forward_ms": spread(seconds["torch forward"], 1e3),
        "forward_ratio": spread(ratio),
        "peak_ratio": spread(peaks),
        "forward_ratio_at_equal_peak": spread(
            combine(lambda r, p: r / p, ratio, peaks)
        ),
    }


def measure_decodes(
    request: Request, subject: Subject, peer: torch_peer.TorchModel | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whole decodes of all prompts: of each of our methods, and of the peer's loops."""
    flags = request.flags
    ours = {
        method.name: compile_method(subject, method.cfg, flags.seed)
        for method in request.methods
    }
    runs: dict[str, Callable[[], Outcome]] = {n: one.run for n, one in ours.items()}
    if peer is not None:
        runs |= {
            f"torch {loop}": functools.partial(
                torch_peer.decode_all, subject, functools.partial(fn, peer)
            )
            for loop, fn in peer_loops(flags.gen_length).items()
        }
    known = {name: memory_growth(run) for name, run in runs.items()}
    seconds = interleave(runs, flags.repeats)
    rates = {
        name: [int(outcome.useful_tokens.sum()) / one for one in seconds[name]]
        for name, (outcome, _) in known.items()
    }
    figures = {
        name: _decode_figures(subject, *known[name], seconds[name], rates[name])
        for name in runs
    }
    loops = {}
    for loop, twin in request.twins.items():
        theirs, rows = f"torch {loop}", known[twin][0].tokens
        differ = np.any(known[theirs][0].tokens != rows, axis=1)
        loops[loop] = figures[theirs] | {
            "same_as": twin,
            "rows_that_differ": int(np.sum(differ)),
        }
        for name in ours:
            speed_up = _speed_up(rates[name], rates[theirs])
            figures[name].setdefault("speed_up", {})[loop] = speed_up
    decodes = {
        name: figures[name] | _compile_figures(one) for name, one in ours.items()
    }
    return decodes, loops


def _speed_up(rates: list[float], theirs: list[float]) -> dict[str, float] | None:
    """Of each round; None over a peer that gave no useful token."""
    if not all(theirs):
        return None
    return spread(combine(lambda a, b: a / b, rates, theirs))


def peer_loops(gen_length: int) -> dict[str, Callable[..., Outcome]]:
    """The peer's loops: `(model, ids, real)` -> Outcome."""
    return {
        PUBLISHED: functools.partial(torch_peer.published_loop, gen_length=gen_length),
        THRESHOLD: functools.partial(
            torch_peer.threshold_loop, gen_length=gen_length, threshold=PEER_THRESHOLD
        ),
    }


def _decode_figures(
    subject: Subject,
    outcome: Outcome,
    growth: int | None,
    seconds: list[float],
    rates: list[float],
) -> dict[str, Any]:
    useful, turns = int(outcome.useful_tokens.sum()), outcome.turns
    return {
        "seconds": spread(seconds),
        "ms_per_forward": None if turns is None else spread(seconds, 1e3 / turns),
        "forwards_per_prompt": float(outcome.num_forwards.mean()),
        "tokens_per_forward": useful / int(outcome.num_forwards.sum()),
        "tokens_per_second": spread(rates),
        "useful_tokens": useful,
        "accuracy": subject.accuracy(outcome.tokens),
        "memory_growth_mib": _mib(growth),
    }


def _compile_figures(ours: Ours) -> dict[str, Any]:
    return {
        "compile_seconds": ours.compile_seconds,
        "temporaries_mib": _mib(ours.temporaries),
    }


def _mib(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else num_bytes / MIB
