"""Slots against static batches of the same size, on one file, in one run.

    python tests/measure_slots.py --ckpt DIR [--rows 240] [--slots 8] [--repeats 3]

Not a test: it prints wall and CPU times of the two in turn, compiling left out, and how
many rows differ.
"""

import argparse
import itertools
import json
import statistics
import time

import numpy as np

import lrd_jax
from lrd_jax import tasks
from lrd_jax.batches import Row, make_batches
from lrd_jax.decode.slots import make_slots
from lrd_jax.engine import Engine
from lrd_jax.scheduler import Scheduler
from lrd_jax.text import encode_prompt


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


def static(engine, rows, size, model, gen_length):
    """Decodes batch after batch; gives (tokens, forwards) and the batch forwards."""
    found, spent = [], 0
    for batch in make_batches(rows, size, model.config, gen_length):
        result = engine.decode(batch)
        spent += int(result.num_forwards.max())
        for i in range(len(batch.rows)):
            found.append((result.tokens[i].tolist(), int(result.num_forwards[i])))
    return found, spent


def streamed(scheduler, rows):
    return [
        (result.tokens[0].tolist(), int(result.num_forwards[0]))
        for _, result in scheduler.stream(rows)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", required=True)
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
    decode_fn = lrd_jax.make_decode_fn(model.denoiser, cfg)
    engine = Engine(decode_fn, model.params, 0)
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
        before = engine.run_seconds, scheduler.run_seconds
        times = [time.process_time()]
        found, spent = static(engine, rows, args.slots, model, cfg.gen_length)
        times.append(time.process_time())
        same = streamed(scheduler, rows)
        times.append(time.process_time())
        if repeat:  # The first time compiles.
            wall["static"].append(engine.run_seconds - before[0])
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
                "compile_seconds": [engine.compile_seconds, scheduler.compile_seconds],
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
