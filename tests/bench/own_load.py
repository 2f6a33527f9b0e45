"""llama_cpp's own load time, in a process that has nothing else: ``own_load.py MODEL OPTIONS`` prints milliseconds.

OPTIONS is the JSON of what a bridge resolved for that model (SHOW). The import is not counted, and neither is a
first step: the least that a load can cost.
"""

from __future__ import annotations

import os
import sys
import time

import llama_cpp
import msgspec


def main(path: str, text: str) -> None:
    options = msgspec.json.decode(text)
    llama_cpp.llama_backend_init()
    started = time.perf_counter()
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = options["repack"]
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = options["n_ctx"] * options["n_parallel"]
    params.n_seq_max = options["n_parallel"]
    params.n_batch = options["n_batch"]
    params.n_ubatch = options["n_ubatch"]
    params.n_threads = params.n_threads_batch = options["n_threads"]
    params.kv_unified = False
    if not model or not llama_cpp.llama_init_from_model(model, params):
        sys.exit("llama_cpp could not load it")
    print((time.perf_counter() - started) * 1000)


if __name__ == "__main__":
    main(*sys.argv[1:])
