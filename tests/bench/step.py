"""What Python costs in a step of the engine: ``step.py MODEL OPTIONS SEQUENCES STEPS`` prints JSON.

Runs the worker's engine in this process, without a daemon, and counts the time of every function of llama_cpp; the rest
of a step, and of telling it to the daemon, is Python. OPTIONS is JSON of LOAD's options. For ``greedy`` and
``sampled`` it prints ``step_ms`` and ``python_ms``, the means of all steps, each of which decoded one token of each
sequence.
"""

from __future__ import annotations

import sys
import time

import llama_cpp
import msgspec
from clocked import Clock

from bridge import ipc
from bridge.frames import encode
from bridge.worker.engine import Engine

SAMPLINGS = {
    "greedy": ipc.Sampling(temperature=0, ignore_eos=True),
    "sampled": ipc.Sampling(seed=1, ignore_eos=True),
}


def main(path: str, options: str, sequences: str, steps: str) -> None:
    clock = Clock()
    clock.wrap(llama_cpp, "llama_")
    from bridge.worker.llama import LlamaBackend  # not before its functions are wrapped, in case it keeps some

    backend = LlamaBackend(ipc.Load(path=path, options=ipc.Options(**msgspec.json.decode(options))))
    engine = Engine(backend)
    figures = {
        name: measure(engine, clock, sampling, name, int(sequences), int(steps)) for name, sampling in SAMPLINGS.items()
    }
    print(msgspec.json.encode(figures).decode())


def measure(
    engine: Engine, clock: Clock, sampling: ipc.Sampling, name: str, sequences: int, steps: int
) -> dict[str, float]:
    """Leaves the engine idle."""
    for number in range(sequences):
        engine.handle(
            ipc.Generate(
                rid=1 + number,
                prompt=f"{number} {name} stories: tell me number {number}",
                sampling=sampling,
                max_tokens=2 * steps,
                stop=[],
                stream=True,
                received=time.monotonic(),
            )
        )
    talking: set[int] = set()
    while len(talking) < sequences:
        if engine.idle:
            sys.exit(f"only {len(talking)} of {sequences} sequences said something")
        engine.step()
        talking |= {event.rid for event in engine.take_events() if isinstance(event, ipc.Text)}
    clock.take()
    started = time.perf_counter()
    for _ in range(steps):
        engine.step()
        encode(ipc.Step(events := engine.take_events()))
    took = time.perf_counter() - started
    inside = clock.take()
    if any(not isinstance(event, ipc.Text) for event in events):
        sys.exit("a sequence ended while steps were measured")
    while not engine.idle:
        engine.step()
        engine.take_events()
    return {"step_ms": took / steps * 1000, "python_ms": (took - inside) / steps * 1000}


if __name__ == "__main__":
    main(*sys.argv[1:])
