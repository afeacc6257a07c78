"""Every reach into private names of other libraries, each with the version that it was read in;
and what a coming version of DSPy changes.

Private are names that begin with an underscore, and attributes of classes that their library does
not document. tests/test_compat.py fails when one of them is gone, and when another file reaches
into one.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import dspy

if TYPE_CHECKING:
    import torch

_logger = logging.getLogger("cowest_dspy.serve")


@contextmanager
def compact_lm_head() -> Iterator[None]:
    """A context in which TRL projects only tokens that carry loss onto the vocabulary, on CPUs as
    on GPUs. The loss is the same.

    TRL 1.16, ``trl.trainer.utils._use_triton``: it does so where Triton runs and otherwise projects
    the prompts, too, and throws the result away: a third of a small model's time.
    """
    utils: Any = importlib.import_module("trl.trainer.utils")
    original = getattr(utils, "_use_triton", None)
    if original is None:
        yield
        return
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = original


def attention_name(config: Any) -> str | None:
    """The name of the attention that a transformers model of this ``config`` computes with.

    Transformers 5.23, ``PretrainedConfig._attn_implementation``: ``set_attn_implementation`` is
    public, and nothing public reads what it set.
    """
    return getattr(config, "_attn_implementation", None)


def cached(config: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword argument with which a causal model of this ``config`` takes a cache.

    Transformers 5.24 calls it ``cache``; before it is ``past_key_values``, which goes in 5.40.
    """
    return {_cache_argument(type(config)): cache}


@lru_cache
def _cache_argument(config_class: type) -> str:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
    taken = inspect.signature(model.forward).parameters if model else ()
    return "cache" if "cache" in taken else "past_key_values"


def has_vnni() -> bool:
    """Whether the processor has AVX-512 instructions for sums of 8-bit products.

    PyTorch 2.13, ``torch.cpu._is_vnni_supported``, since 2.1; ``torch.cpu.get_capabilities`` says
    the same, and is not in 2.6, the oldest that we take.
    """
    import torch

    return torch.cpu._is_vnni_supported()


def int8_product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The matrix product of two int8 matrices, int32.

    PyTorch 2.13, ``torch._int_mm``, since 2.1: the only one that it has; torchao calls it, too.
    """
    import torch

    return torch._int_mm(one, other)  # pyright: ignore[reportPrivateImportUsage]


def quantized_rows(whole: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """A quantized tensor of these int8 rows, with a scale and a zero point for each.

    PyTorch 2.13, ``torch._make_per_channel_quantized_tensor``: ``torch.quantize_per_channel`` is
    public, and wants a float copy of the weights.
    """
    import torch

    make: Any = torch._make_per_channel_quantized_tensor  # pyright: ignore[reportPrivateImportUsage]
    with warnings.catch_warnings():
        # Of a later PyTorch, which will not have FBGEMM: see int8.packs.
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        return make(whole, scales, zeros, 0)


def connection_class(head_seconds: float, keep_alive: float) -> Any:
    """Uvicorn's protocol for HTTP/1.1, which closes a connection whose first request does not come
    in ``head_seconds``, one that is idle after an answer for ``keep_alive`` seconds, and one on
    which no answer can be sent any more.

    Uvicorn 0.54, ``H11Protocol``: ``app``, ``cycle``, ``loop``, ``timeout_keep_alive_task`` and
    ``transport``. It has no time limit for the first request, and what comes after an answer, such
    as the rest of a body that was refused, ends its wait for the next request.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(head_seconds, self.close_without_request)
            self.app = self.close_when_broken(self.app)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            answered = self.cycle is not None and self.cycle.response_complete
            if answered and self.timeout_keep_alive_task is None:
                self.timeout_keep_alive_task = self.loop.call_later(
                    keep_alive, self.transport.close
                )

        def close_when_broken(self, app: Any) -> Any:
            async def answer(scope: Any, receive: Any, send: Any) -> None:
                try:
                    await app(scope, receive, send)
                except Exception as error:
                    # The application answers and logs every error of its own: here the client has
                    # sent what is no HTTP, so that nothing can be sent to it.
                    _logger.debug("a connection was broken: %s", type(error).__name__)
                    self.transport.abort()
                    await asyncio.sleep(0)  # Uvicorn is told of the end before it looks.

            return answer

        def close_without_request(self) -> None:
            if self.cycle is None:
                self.transport.abort()

    return Connection


def count_mipro_trials(predictors: int, zero_shot: bool, candidates: int) -> int:
    """The trials of ``dspy.MIPROv2(auto=...)`` for a program with so many predictors.

    DSPy 3.4.1, ``MIPROv2._set_num_trials_from_num_candidates``: it looks at the number of the
    program's predictors only.
    """
    program = SimpleNamespace(predictors=lambda: range(predictors))
    find: Any = dspy.MIPROv2._set_num_trials_from_num_candidates
    return find(None, program, zero_shot, candidates)


def has_async_engine(lm: dspy.LM) -> bool:
    """Whether ``await lm.acall(...)`` has an engine: DSPy's own, or one that came with it.

    DSPy 3.4.1, ``LM._async_engine_spec``: without one beside an engine of one's own, acall is an
    LMUnsupportedFeatureError, and nothing public says so before.
    """
    return isinstance(lm.engine, str) or lm._async_engine_spec is not None


def prompt_messages(
    adapter: dspy.Adapter,
    signature: type[dspy.Signature],
    demos: Sequence[Any],
    inputs: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return the prompt that an adapter makes, as messages of OpenAI's chat.

    DSPy 3.4.1, ``Adapter.format``, which is public; that of DSPy 3.5 returns a Prompt instead.
    """
    return adapter.format(signature, list(demos), dict(inputs))


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what a failed call of ``huggingface_hub`` raises: refused, or no connection.

    huggingface_hub 1.33 asks by httpx, 2.4 by httpx2, whose errors have no base in common:
    ``HTTPError`` of ``huggingface_hub.errors`` is that of the one which it has.
    """
    return importlib.import_module("huggingface_hub.errors").HTTPError, OSError
