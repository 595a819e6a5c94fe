"""Slots against static batches of the same size, on the same prompts, in one run.

    python tests/measure_slots.py [--ckpt DIR] [--rows 240] [--slots 8] [--repeats 3]

Not a test: it prints wall and CPU times of the two in turn, compiling left out, and how
many rows differ.
"""

import argparse
import itertools
import json
import statistics
import time

import jax
import numpy as np

import lrd_jax
from lrd_jax import tasks
from lrd_jax.batches import Row, stack
from lrd_jax.decode.slots import make_slots
from lrd_jax.scheduler import Scheduler
from lrd_jax.text import bucket, encode_prompt


def mixed_rows(model, count, longest):
    """Prompts of all tasks in turn, so that neighbours differ in every respect."""
    streams = [tasks.instances(task, "train", 0) for task in tasks.TASKS.values()]
    rows = []
    for problem in itertools.chain.from_iterable(zip(*streams, strict=True)):
        ids = encode_prompt(model.tokenizer, model.config, prompt=problem.prompt)
        if len(ids) <= longest:
            rows.append(Row(id=len(rows), line=len(rows), ids=ids))
        if len(rows) == count:
            return rows
    raise AssertionError("the streams of training problems have no end")


class Static:
    """Decodes batch after batch, each as long as its slowest row takes."""

    def __init__(self, model, cfg, size):
        self.compile_seconds = self.run_seconds = 0.0
        self._model, self._cfg, self._size = model, cfg, size
        self._decode_fn = lrd_jax.make_decode_fn(model.denoiser, cfg)
        self._compiled = {}

    def decode(self, rows):
        """(tokens, forwards) of each row, and the forwards of all batches."""
        config = self._model.config
        longest = config.max_length - self._cfg.gen_length
        found, spent = [], 0
        for start in range(0, len(rows), self._size):
            part = rows[start : start + self._size]
            length = bucket(max(len(row.ids) for row in part), longest)
            filled = [*part, *[None] * (self._size - len(part))]
            batch = stack(filled, length, config.pad_id, infill=False)
            result = self._run(batch)
            spent += int(result.num_forwards.max())
            for i in range(len(part)):
                found.append((result.tokens[i].tolist(), int(result.num_forwards[i])))
        return found, spent

    def _run(self, batch):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), batch.lines)
        arrays = (self._model.params, batch.ids, batch.mask, keys)
        start = time.perf_counter()
        if batch.ids.shape not in self._compiled:
            lowered = self._decode_fn.lower(*arrays)
            self._compiled[batch.ids.shape] = lowered.compile()
            self.compile_seconds += time.perf_counter() - start
            start = time.perf_counter()
        result = jax.device_get(self._compiled[batch.ids.shape](*arrays))
        self.run_seconds += time.perf_counter() - start
        return result


def streamed(scheduler, rows):
    return [
        (result.tokens[0].tolist(), int(result.num_forwards[0]))
        for _, result in scheduler.stream(rows)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", default="tiny")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--block-length", type=int, default=8)
    parser.add_argument("--threshold", type=float, default=0.9)
    args = parser.parse_args()

    model = lrd_jax.load(args.ckpt)
    cfg = lrd_jax.DecodeConfig(
        gen_length=args.gen_length,
        block_length=args.block_length,
        threshold=args.threshold,
        max_refine_steps=1,
    )
    rows = mixed_rows(model, args.rows, model.config.max_length - cfg.gen_length)
    batches = Static(model, cfg, args.slots)
    scheduler = Scheduler(
        make_slots(model.denoiser, cfg),
        model.params,
        0,
        num_slots=args.slots,
        config=model.config,
        gen_length=cfg.gen_length,
    )
    wall = {"static": [], "slots": []}
    cpu = {"static": [], "slots": []}
    for repeat in range(args.repeats + 1):
        before = batches.run_seconds, scheduler.run_seconds
        times = [time.process_time()]
        found, spent = batches.decode(rows)
        times.append(time.process_time())
        same = streamed(scheduler, rows)
        times.append(time.process_time())
        if repeat:  # The first time compiles.
            wall["static"].append(batches.run_seconds - before[0])
            wall["slots"].append(scheduler.run_seconds - before[1])
            cpu["static"].append(times[1] - times[0])
            cpu["slots"].append(times[2] - times[1])
    forwards = np.array([count for _, count in found])
    lengths = [len(row.ids) for row in rows]
    print(
        json.dumps(
            {
                "rows": len(rows),
                "slots": args.slots,
                "prompt_tokens": np.percentile(lengths, [0, 50, 100]).tolist(),
                "forwards_of_a_row": np.percentile(forwards, [0, 50, 100]).tolist(),
                "differing_rows": sum(a != b for a, b in zip(found, same, strict=True)),
                "slot_use_static": float(forwards.sum() / (args.slots * spent)),
                "compile_seconds": [batches.compile_seconds, scheduler.compile_seconds],
                "wall_seconds": wall,
                "cpu_seconds": cpu,
                "wall_ratio": ratio(wall),
                "cpu_ratio": ratio(cpu),
            },
            indent=1,
        )
    )


def ratio(seconds):
    return statistics.median(seconds["static"]) / statistics.median(seconds["slots"])


if __name__ == "__main__":
    main()
