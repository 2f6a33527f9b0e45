"""What LoRA adapters cost in a batch, and going from one set of them to another: ``adapters.py MODEL [RANK]``.

Makes two adapters of random matrices for all matrices of the model's layers, and prints milliseconds of one thread's
CPU a batch, the lower quartile of some: of other work on the machine these tell little.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np

from bridge import ipc
from bridge.models.gguf import read_header
from bridge.worker.backend import Adapters, Batch
from bridge.worker.llama import LlamaBackend

SLOTS = 8
NONE: Adapters = ()
A: Adapters = (("a", 1.0),)
B: Adapters = (("b", 1.0),)


def main(path: str, rank: str = "16") -> None:
    options = ipc.Options(n_ctx=1024, n_parallel=SLOTS, n_threads=1, n_gpu_layers=0, repack=False)
    bench = Bench(LlamaBackend(ipc.Load(path, options)))
    with tempfile.TemporaryDirectory() as folder:
        for seed, key in enumerate("ab"):
            file = write_adapter(path, Path(folder, f"{key}.gguf"), int(rank), seed)
            started = time.process_time()
            bench.llama.load_adapter(key, str(file))
            print(f"load {file.stat().st_size / 1e6:.1f} MB: {1000 * (time.process_time() - started):.1f} ms")
    series = {"none": [NONE], "a": [A], "a+b": [(*A, *B)], "none | a": [NONE, A], "a | b": [A, B]}
    for slots in (range(1), range(4), range(SLOTS)):
        for name, sets in series.items():
            print(f"{len(slots)} streams, {name}: {bench.decode(sets, slots):.2f}")
    print(f"2 streams, a, neighbours: {bench.decode([A], [0, 1]):.2f}; with a gap: {bench.decode([A], [0, 2]):.2f}")
    for name, sets in (("none", [NONE]), ("a", [A]), ("a | b", [A, B])):
        print(f"a prompt of 256, {name}: {bench.prompt(sets):.1f}")


def write_adapter(model: str, path: Path, rank: int, seed: int) -> Path:
    """For every matrix of a layer; of 16 bits, as the converter writes them by default."""
    header = read_header(model)
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, header.metadata["general.architecture"])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for name, tensor in header.tensors.items():
        if name.startswith("blk.") and len(tensor.shape) == 2:
            n_in, n_out = tensor.shape
            a = random.standard_normal((rank, n_in), dtype=np.float32) / n_in**0.5
            b = random.standard_normal((n_out, rank), dtype=np.float32) * 0.02
            writer.add_tensor(f"{name}.lora_a", a.astype(np.float16))
            writer.add_tensor(f"{name}.lora_b", b.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Bench:
    """Where there are several sets, batches go from one to the next."""

    def __init__(self, llama: LlamaBackend) -> None:
        self.llama = llama
        for slot in range(SLOTS):
            llama.open(slot, ipc.Sampling(temperature=0.0), [])

    def decode(self, sets: Sequence[Adapters], slots: Sequence[int]) -> float:
        """A token of each of these slots."""
        position = 0

        def once(adapters: Adapters) -> float:
            nonlocal position
            batch = Batch(adapters=adapters)
            for slot in slots:
                batch.add(slot, position, [100], output=True)
            position += 1
            return self._time(batch)

        took = quartile(once, sets, 40)
        self._clear()
        return took

    def prompt(self, sets: Sequence[Adapters]) -> float:
        def once(adapters: Adapters) -> float:
            batch = Batch(adapters=adapters)
            batch.add(0, 0, [100 + 37 * index % 1000 for index in range(256)], output=True)
            took = self._time(batch)
            self._clear()
            return took

        return quartile(once, sets, 6)

    def _time(self, batch: Batch) -> float:
        started = time.process_time()
        self.llama.decode(batch)
        return 1000 * (time.process_time() - started)

    def _clear(self) -> None:
        for slot in range(SLOTS):
            self.llama.rewind(slot, 0)


def quartile(once: Callable[[Adapters], float], sets: Sequence[Adapters], count: int) -> float:
    """The lower one of each set's batches, and of these the mean."""
    for adapters in sets:
        once(adapters)
    rounds = [[once(adapters) for adapters in sets] for _ in range(count)]
    return sum(sorted(took)[count // 4] for took in zip(*rounds, strict=True)) / len(sets)


if __name__ == "__main__":
    main(*sys.argv[1:])
