"""A module with a Collaboration in it, asked as the Collaboration itself is: with a draft, with
another, and with the strong model alone.

    class Helpdesk(dspy.Module):
        def __init__(self):
            self.lookup = dspy.Predict("message -> question")
            self.collab = Collaboration("question -> answer")

        def forward(self, message):
            return self.collab(question=self.lookup(message=message).question)

    program = Embedded(helpdesk)
    program.ask_refine("A note.", message="...")       # what the module returns with that draft

``collect``, ``Influence`` and ``CoWest`` take the module itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import dspy

from cowest_dspy.errors import ProgramError
from cowest_dspy.program.collaboration import Collaboration, answering_by
from cowest_dspy.store.call_context import call_context, with_context
from cowest_dspy.store.record import recorded


class Embedded(Collaboration):
    """A copy of a module that contains one Collaboration, as a Collaboration.

    The score of a draft is that of what the whole module returns with it; alone, the module is
    asked with the strong model alone in the Collaboration's place. So influence is what the draft
    changes in the end, behind every other step.

    The module is run for each draft, alone, and each refined answer, and other steps are to say the
    same each time: their LMs are recorded, so that a store answers the same request once. A draft
    is never scored as an answer by itself.

    Args:
        module: its Collaboration is bound, and called once for each example.

    Raises:
        ProgramError: no Collaboration is in it, or more than one. When asked: it was called another
            number of times, or the module returned no ``dspy.Prediction``.
    """

    def __init__(self, module: dspy.Module) -> None:
        dspy.Module.__init__(self)
        self.module = module.deepcopy()
        own = {id(one) for _, one in self.inner.named_sub_modules(dspy.Predict)}
        parts: list[tuple[str, Any]] = list(self.module.named_sub_modules(dspy.Predict))
        for _, part in parts:
            lm = part.lm or dspy.settings.lm
            if id(part) not in own and isinstance(lm, dspy.LM):
                part.lm = recorded(lm)

    @property
    def inner(self) -> Collaboration:
        """The Collaboration in the module."""
        return _find_inner(self.module)[1]

    def __getattr__(self, name: str) -> Any:
        """What a Collaboration is made of is the inner one's: draft, refine, alone, draft_field,
        adapter."""
        if name in ("draft", "refine", "alone", "draft_field", "adapter"):
            return getattr(self.inner, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def ask_draft(self, **inputs: Any) -> dspy.Prediction:
        """The weak model's draft for what the module makes of the inputs; the steps after it are
        not run."""
        found: list[dspy.Prediction] = []

        def draft(program: Collaboration, given: dict[str, Any]) -> dspy.Prediction:
            found.append(program.ask_draft(**given))
            raise _Drafted

        with suppress(_Drafted):
            self._run(draft, inputs, calls=None)  # calls of other steps are not the draft's
        return found[0]

    def ask_refine(self, draft: str, **inputs: Any) -> dspy.Prediction:
        """What the module returns with this draft."""
        prediction = self._run(lambda program, given: program.ask_refine(draft, **given), inputs)
        prediction["draft"] = draft
        return prediction

    def ask_alone(self, **inputs: Any) -> dspy.Prediction:
        """What the module returns with the strong model alone in the Collaboration's place."""
        return self._run(lambda program, given: program.ask_alone(**given), inputs)

    def _run(
        self,
        step: Callable[[Collaboration, dict[str, Any]], dspy.Prediction],
        inputs: dict[str, Any],
        **context: Any,
    ) -> Any:
        """Run the module with ``step`` as what its Collaboration answers. How the call is sampled
        is for the Collaboration alone: other steps say what they always say. Where ``step`` fails,
        it fails, whatever the module makes of that."""
        outer, asked, ended = call_context(), [], list[BaseException]()

        def answer(program: Collaboration, given: dict[str, Any]) -> dspy.Prediction:
            asked.append(given)
            if len(asked) > 1:
                raise self._called(len(asked))
            try:
                with with_context(sampling=outer.sampling, calls=outer.calls), answering_by(None):
                    return step(program, given)
            except BaseException as error:
                ended.append(error)
                raise

        try:
            with with_context(sampling={}, **context), answering_by(answer):
                prediction = self.module(**inputs)
        finally:
            if ended:
                raise ended[0]
        if len(asked) != 1:
            raise self._called(len(asked))
        if not isinstance(prediction, dspy.Prediction):
            raise ProgramError(
                f"{type(self.module).__name__} returned a {type(prediction).__name__}: a "
                "dspy.Prediction is scored."
            )
        return prediction

    def _called(self, times: int) -> ProgramError:
        return ProgramError(
            f"{type(self.module).__name__} called its Collaboration "
            f"{'twice or more' if times else 'not at all'} for one example. Influence is that of "
            "one draft: compile the Collaboration by itself, on examples of what it is asked, and "
            "put the result in its place."
        )

    def bind(
        self, *, weak: dspy.LM | str | None = None, strong: dspy.LM | str | None = None
    ) -> Embedded:
        """A copy whose Collaboration is on these LMs."""
        made = self.deepcopy()
        made.inner.set_lms(weak=weak, strong=strong)
        return made

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """The state of the module and of the Collaboration in it, without any LM."""
        inner = self.inner.dump_state(json_mode=json_mode)
        return {"module": self.module.dump_state(json_mode=json_mode), "collaboration": inner}

    @property
    def answer_fields(self) -> tuple[str, ...]:
        """None: what a module returns is not known before."""
        return ()

    def holds_answer(self, outputs: Mapping[str, Any]) -> bool:
        """Never: a draft is not what the module returns."""
        return False

    @property
    def output_types(self) -> dict[str, Any]:
        """The types of the outputs of all steps, by name."""
        signatures: list[Any] = [one.signature for one in self.module.predictors()]
        return {
            name: field.annotation
            for signature in signatures
            for name, field in signature.output_fields.items()
        }


def as_collaboration(module: dspy.Module) -> Collaboration:
    """A Collaboration as it is, and a module that has one in it as :class:`Embedded`.

    Raises:
        ProgramError: no Collaboration is in it, or more than one.
    """
    return module if isinstance(module, Collaboration) else Embedded(module)


class _Drafted(BaseException):
    """The draft is there, and the module need not go on; no error, so that no module takes it for
    one."""


def tune_inside(module: dspy.Module, weak: dspy.LM) -> dspy.Module:
    """A copy of a module whose Collaboration drafts by another weak LM; its other steps are as they
    were."""
    made = module.deepcopy()
    _find_inner(made)[1].set_lms(weak=weak)
    return made


def _find_inner(module: dspy.Module) -> tuple[str, Collaboration]:
    found: list[tuple[str, Any]] = list(module.named_sub_modules(Collaboration))
    if len(found) != 1:
        names = f" ({', '.join(name for name, _ in found)})" if found else ""
        raise ProgramError(
            f"A Collaboration is wanted, or a module with one Collaboration in it; a "
            f"{type(module).__name__} was given, with {len(found) or 'none'} in it{names}."
        )
    return found[0]
