"""What serving adds: a program called directly, and the same program behind `cowest serve`'s
server, on loopback.

    python benchmarks/bench_serving.py                 # some minutes; wants wrk (a package of most
    systems) in PATH python benchmarks/bench_serving.py --seconds 3 --requests 2000

The server is a process of its own, run and stopped as the command runs it. The models are functions
that answer at once, so that what is measured is everything else; then models that take 50 ms each,
two in a row, as a request of quick real models would. The load comes from wrk, or, where it is not
installed, from httpx in this process, which is slower: the table says which. Load and server share
the machine's cores, so throughput is the least that the server can do, and what counts is what is
added to a call.

Then: how many requests are lost when the server is stopped under load; and the server's memory over
    many requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import httpx
import psutil
from marked import publish
from rich.console import Console
from rich.table import Table

from cowest_dspy.program.collaboration import Collaboration
from cowest_dspy.serve.config import ServeRules
from cowest_dspy.testing import ScriptedEngine
from cowest_dspy.utils.interrupts import handle_signals
from cowest_dspy.utils.notebook import format_plural

BODY = {"model": "bench", "messages": [{"role": "user", "content": "May the Arbel run at 25 bar?"}]}
LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = [[%s]]
"""
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}


class Forgetful(ScriptedEngine):
    """Keeps no list of what it was asked, which would grow."""

    def complete(self, request: Any) -> Any:
        """The scripted answer."""
        response = super().complete(request)
        self.asked.clear()
        return response


def program(latency: float) -> Collaboration:
    """Both models answer after so many seconds."""

    def lm(role: str, answer: str) -> dspy.LM:
        def said(_: dict[str, Any]) -> str:
            if latency:
                time.sleep(latency)
            return answer

        return Forgetful(said, model=f"scripted/{role}").lm()

    made = Collaboration("question -> answer")
    return made.bind(
        weak=lm("weak", "The Arbel may run at up to 31 bar."), strong=lm("strong", "yes")
    )


def serve(latency: float, concurrency: int) -> None:
    """The server's process: says its address, and serves until a signal comes."""
    from cowest_dspy.serve.app import make_app
    from cowest_dspy.serve.server import bind, make_service, run

    rules = ServeRules.model_validate({"limits": {"concurrency": concurrency}})
    with handle_signals(), bind("127.0.0.1", 0) as listener:
        service = make_service(program(latency), rules, "bench")
        run(make_app(service), listener, lambda text: print(text, flush=True))


@contextmanager
def served(latency: float, concurrency: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process: the process and its address."""
    command = [sys.executable, __file__, "--serve", str(latency), "--concurrency", str(concurrency)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address.startswith("http"), address
    try:
        yield process, address
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


@dataclass(frozen=True)
class Row:
    """One measurement: requests a second, milliseconds, and requests without a good answer."""

    name: str
    rate: float
    p50: float
    p99: float
    failed: int = 0


def row(name: str, seconds: list[float], took: float, failed: int = 0) -> Row:
    """From the seconds of each request, and of all together."""
    ordered = sorted(seconds)
    return Row(
        name,
        len(ordered) / took,
        1e3 * statistics.median(ordered),
        1e3 * ordered[int(0.99 * (len(ordered) - 1))],
        failed,
    )


def direct(latency: float, threads: int, seconds: float) -> Row:
    """The program called in this process, by so many threads."""
    made, end = program(latency), time.monotonic() + seconds
    taken: list[float] = []

    def calls() -> None:
        with dspy.context(trace=None, disable_history=True):
            while time.monotonic() < end:
                began = time.perf_counter()
                made(question="May the Arbel run at 25 bar?")
                taken.append(time.perf_counter() - began)

    made(question="warm up")
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(calls) for _ in range(threads)]:
            done.result()
    return row(
        f"called directly, {format_plural(threads, 'thread')}", taken, time.perf_counter() - began
    )


def loaded(address: str, connections: int, seconds: float) -> Row:
    """The server under load from so many connections."""
    program_ = shutil.which("wrk")
    return (
        by_wrk(program_, address, connections, seconds)
        if program_
        else by_httpx(address, connections, seconds)
    )


def by_wrk(program_: str, address: str, connections: int, seconds: float) -> Row:
    """What wrk says."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "chat.lua"
        script.write_text(LUA % json.dumps(BODY), encoding="utf-8")
        command = [
            program_,
            "-t1",
            f"-c{connections}",
            f"-d{seconds:g}s",
            "--timeout",
            "30s",
            "--latency",
            "-s",
            str(script),
        ]
        said = subprocess.run(
            [*command, f"{address}/chat/completions"], capture_output=True, text=True, check=True
        ).stdout
    shares = re.findall(r"^\s+(\d+)%\s+([\d.]+)(us|ms|s|m)\s*$", said, re.MULTILINE)
    times = {share: float(value) * UNITS[unit] for share, value, unit in shares}
    rate = float(re.findall(r"Requests/sec:\s+([\d.]+)", said)[0])
    wrong = re.findall(r"(?:Non-2xx or 3xx responses:|connect|read|write|timeout) (\d+)", said)
    failed = sum(map(int, wrong))
    return Row(
        f"served, {format_plural(connections, 'connection')} (wrk)",
        rate,
        times["50"],
        times["99"],
        failed,
    )


def by_httpx(address: str, connections: int, seconds: float) -> Row:
    """The same load from this process."""
    taken: list[float] = []
    failed = 0

    async def one(client: httpx.AsyncClient, end: float) -> None:
        nonlocal failed
        while time.monotonic() < end:
            began = time.perf_counter()
            said = await client.post(f"{address}/chat/completions", json=BODY)
            taken.append(time.perf_counter() - began)
            failed += said.status_code != 200

    async def all_of_them() -> None:
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:
            await asyncio.gather(
                *[one(client, time.monotonic() + seconds) for _ in range(connections)]
            )

    began = time.perf_counter()
    asyncio.run(all_of_them())
    return row(
        f"served, {format_plural(connections, 'connection')} (httpx)",
        taken,
        time.perf_counter() - began,
        failed,
    )


def stopped_under_load(connections: int) -> Counter[str]:
    """What became of every request of so many connections that ask on and on while the server is
    stopped after five seconds.

    "200" and "503" are answers; "refused" is a connection that was not taken any more; "lost" a
    request that got no answer. Who is told to come again later (Retry-After) does so, as the SDKs
    do.
    """
    found: Counter[str] = Counter()
    body = json.dumps(BODY).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
        f"application/json\r\nContent-Length: {len(body)}"
    )

    async def one(host: str, port: int) -> None:
        while True:
            try:
                reader, writer = await asyncio.open_connection(host, port)
            except OSError:
                found["refused"] += 1
                return
            said = b""
            while b"connection: close" not in said:
                try:
                    writer.write(head.encode() + b"\r\n\r\n" + body)
                    await writer.drain()
                    said = await reader.readuntil(b"\r\n\r\n")
                    await reader.readexactly(int(re.findall(rb"content-length: (\d+)", said)[0]))
                except (OSError, asyncio.IncompleteReadError):
                    found["lost"] += 1
                    return
                found[said.split()[1].decode()] += 1
            writer.close()
            await asyncio.sleep(sum(map(int, re.findall(rb"retry-after: (\d+)", said))))

    async def all_of_them(process: subprocess.Popen[str], address: str) -> None:
        host, port = re.findall(r"//(.*):(\d+)/", address)[0]
        asking = [asyncio.ensure_future(one(host, int(port))) for _ in range(connections)]
        await asyncio.sleep(5)
        process.send_signal(signal.SIGTERM)
        await asyncio.wait(asking, timeout=60)

    with served(0.05, 64) as (process, address):
        asyncio.run(all_of_them(process, address))
        process.wait(timeout=60)
        found["exit code"] = process.returncode
    return found


def memory(requests: int, seconds_each: int = 2) -> list[tuple[int, float]]:
    """The server's resident MiB after so many requests."""
    found: list[tuple[int, float]] = []
    with served(0.0, 8) as (process, address):
        server = psutil.Process(process.pid)

        def done() -> int:
            said = httpx.get(address.replace("/v1", "/metrics")).text
            return int(float(re.findall(r'cowest_requests_total{status="200"} (\S+)', said)[0]))

        loaded(address, 16, 1)
        for share in (0.1, 0.25, 0.5, 0.75, 1.0):
            while done() < share * requests:
                loaded(address, 16, seconds_each)
            found.append((done(), server.memory_info().rss / 2**20))
    return found


def shown(title: str, rows: list[Row]) -> Table:
    """A table, with what is added to the first row; printed, too."""
    table = Table(title=title)
    for head in ("", "requests/s", "p50 ms", "p99 ms", "p50 added", "p99 added", "failed"):
        table.add_column(head, justify="right" if head else "left")
    for one in rows:
        added = (one.p50 - rows[0].p50, one.p99 - rows[0].p99)
        more = [f"{value:+.1f}" for value in added] if one is not rows[0] else ["", ""]
        table.add_row(
            one.name, f"{one.rate:.0f}", f"{one.p50:.1f}", f"{one.p99:.1f}", *more, str(one.failed)
        )
    Console(width=120).print(table)
    return table


def main() -> None:
    """Prints the tables, and puts them into README.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10, help="of each row")
    parser.add_argument("--requests", type=int, default=10_000, help="for memory")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--concurrency", type=int, default=8, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        serve(given.serve, given.concurrency)
        return
    with served(0.0, 8) as (_, address):
        rows = [
            direct(0.0, 1, given.seconds),
            *(loaded(address, many, given.seconds) for many in (1, 8, 32, 200)),
        ]
    made: list[Table | str] = [shown("models that answer at once, 8 requests at once", rows)]
    with served(0.05, 256) as (_, address):
        rows = [
            direct(0.05, 8, given.seconds),
            *(loaded(address, many, given.seconds) for many in (1, 8, 32, 200)),
        ]
    made.append(shown("models of 50 ms each, 256 requests at once", rows))
    ends = stopped_under_load(200)
    said = (
        f"{ends['200']:,} answers, {ends['503']:,} times 503 with Retry-After, "
        f"{ends['refused']:,} refused connections"
    )
    said += f"; lost: {ends['lost']}; exit code {ends['exit code']}"
    made.append(f"Stopped by SIGTERM under 200 connections that ask on: {said}.")
    sizes = ", ".join(f"{size:.1f} after {count:,}" for count, size in memory(given.requests))
    made.append(f"Memory of the server, MiB after requests: {sizes}.")
    print("\n".join(map(str, made[2:])))
    publish("serving", made)


if __name__ == "__main__":
    main()
