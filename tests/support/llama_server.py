"""llama.cpp's server from the package xllamacpp, with the flags of llama.cpp's own `llama-server`
that the tests need: ``python llama_server.py --model X.gguf --port 8080``."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--model", required=True)
    add("--port", type=int, required=True)
    add("--parallel", type=int, default=4)
    add("--ctx-size", type=int, default=0)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--cache-ram", type=int, default=0)
    add("--lora", action="append", default=[])
    add("--lora-init-without-apply", action="store_true")
    given = parser.parse_args()

    import xllamacpp as installed

    xllamacpp: Any = installed  # its names are of a compiled module, which has no types
    wanted = xllamacpp.CommonParams()
    wanted.model.path = given.model
    wanted.hostnames, wanted.port = ["127.0.0.1"], given.port
    wanted.n_parallel, wanted.n_ctx = given.parallel, given.ctx_size
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = given.threads
    # Each connection holds a thread of the server, also while it waits for the next request.
    wanted.n_threads_http, wanted.cache_ram_mib, wanted.ui = 128, given.cache_ram, False
    wanted.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file) for file in given.lora]
    wanted.lora_init_without_apply = given.lora_init_without_apply
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    server = xllamacpp.Server(wanted)
    print(f"{Path(given.model).name} at {server.listening_address}/v1", flush=True)
    while not ended.wait(0.2):
        pass
    os._exit(0)  # its threads may be in the middle of a sum that nobody waits for any more


if __name__ == "__main__":
    main()
