"""llama.cpp's server for who has only pip: ``python -m cowest_dspy.lms.llama_server --model X.gguf
--port 8080``

It runs the server that the package xllamacpp brings (pip install "cowest-dspy[llama_cpp]"), in the
foreground, until SIGTERM or Ctrl-C. The flags are called as those of llama.cpp's own llama-server,
so that a command in a TOML fits either:

    python -m cowest_dspy.lms.llama_server --model SmolLM2.BF16.gguf --port 8080 --parallel 8
    --ctx-size 16384
    llama-server                           --model SmolLM2.BF16.gguf --port 8080 --parallel 8
        --ctx-size 16384

It answers under http://127.0.0.1:8080/v1 as OpenAI's API does. xllamacpp's wheel is built for any
processor; a llama-server that was compiled on the machine is faster.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# How many connections are served at once; each holds a thread of the server, also while it waits
# for the next request.
CONNECTIONS = 128


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(
        prog="python -m cowest_dspy.lms.llama_server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        "-m",
        type=Path,
        required=True,
        help="a GGUF file; for a small model a BF16 one: 8-bit sums spoil its answers",
    )
    add(
        "--port",
        type=int,
        default=8080,
        help="0 takes a free one, which is printed (default: 8080)",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="where to listen (default: 127.0.0.1, this machine only)",
    )
    add("--alias", help="the name under which the model is served (default: the file's path)")
    add(
        "--parallel",
        "-np",
        type=int,
        default=4,
        metavar="N",
        help="prompts computed together (default: 4)",
    )
    add(
        "--ctx-size",
        "-c",
        type=int,
        default=0,
        metavar="N",
        help="tokens of all parallel prompts together (default: the model's)",
    )
    add(
        "--threads",
        "-t",
        type=int,
        metavar="N",
        help="threads that compute (default: one per core that this process may use)",
    )
    add(
        "--threads-http",
        type=int,
        default=CONNECTIONS,
        metavar="N",
        help=f"connections at once (default: {CONNECTIONS})",
    )
    add(
        "--cache-ram",
        type=int,
        default=0,
        metavar="MiB",
        help="for prompts of earlier requests; 0 with adapters (default: 0)",
    )
    add(
        "--lora",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an adapter as GGUF; may be given several times",
    )
    add(
        "--lora-init-without-apply",
        action="store_true",
        help="an adapter speaks only in requests that name it",
    )
    return parser.parse_args(argv)


def parameters(given: argparse.Namespace) -> Any:
    """What was typed, as xllamacpp wants it."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    wanted = xllamacpp.CommonParams()
    wanted.model.path = str(given.model)
    wanted.hostnames, wanted.port = [given.host], given.port
    wanted.model_alias = {given.alias or str(given.model)}
    wanted.n_parallel, wanted.n_ctx = given.parallel, given.ctx_size
    threads = given.threads or len(os.sched_getaffinity(0))
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = threads
    wanted.n_threads_http, wanted.cache_ram_mib, wanted.ui = (
        given.threads_http,
        given.cache_ram,
        False,
    )
    wanted.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file)) for file in given.lora]
    wanted.lora_init_without_apply = given.lora_init_without_apply
    return wanted


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is asked to end. Exit status: 0 then, 1 when it cannot start (the reason is
    on standard error)."""
    given = arguments(argv)
    missing = [str(file) for file in (given.model, *given.lora) if not file.is_file()]
    if missing:
        print(
            f"llama_server: there is no file {', '.join(missing)}. `make models` makes the demo's.",
            file=sys.stderr,
        )
        return 1
    if importlib.util.find_spec("xllamacpp") is None:
        print(
            'llama_server: needs the package xllamacpp: pip install "cowest-dspy[llama_cpp]"',
            file=sys.stderr,
        )
        return 1
    xllamacpp: Any = importlib.import_module("xllamacpp")
    asked_to_end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked_to_end.set())
    try:
        server = xllamacpp.Server(parameters(given))
    except RuntimeError as error:
        print(f"llama_server: {error} What llama.cpp says about it stands above.", file=sys.stderr)
        return 1
    print(f"llama_server: {given.model} at {server.listening_address}/v1", flush=True)
    while not asked_to_end.wait(0.2):
        pass
    # Its threads may be in the middle of a sum that nobody waits for any more.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
