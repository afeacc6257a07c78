"""KnownAdapters: which PEFT adapters an engine has. Identity is content: an adapter is named by the
hash of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from cowest_dspy.errors import ModelError


class KnownAdapters:
    """Adapters of one base model; a model id is the base's, or that and "+" and the adapter's name.

    ``by_name`` has the folder of each adapter under its name, the hash of its weights.
    """

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.by_name: dict[str, Path] = {}

    def add(self, name: str, folder: Path) -> str:
        """Makes an adapter known; gives its model id. The first folder with these weights stays."""
        self.by_name.setdefault(name, Path(folder).resolve())
        return f"{self.model_id}+{name}"

    def __contains__(self, model: str) -> bool:
        """Whether ``model`` is the base or a known adapter."""
        return model == self.model_id or model in self.folders()

    def name_of(self, model: str) -> str | None:
        """The name of the adapter that a model id means; None for the base.

        Raises:
            ModelError: an id that is neither the base nor a known adapter.
        """
        if model not in self:
            raise ModelError(
                f"{model} is not loaded here: the engine has {[self.model_id, *self.folders()]}."
            )
        return None if model == self.model_id else model.rpartition("+")[2]

    def folder_of(self, model: str) -> Path | None:
        """The folder of that adapter; None for the base. Raises ModelError as :meth:`name_of`."""
        name = self.name_of(model)
        return None if name is None else self.by_name[name]

    def folders(self) -> dict[str, str]:
        """Model id -> folder, as it is saved with an engine's state."""
        return {f"{self.model_id}+{name}": str(folder) for name, folder in self.by_name.items()}


def load_again(load_adapter: Callable[[Path], str], folders: Mapping[str, str]) -> None:
    """Loads the adapters of a saved state.

    Raises:
        ModelError: a folder is gone, or holds other weights than when the state was saved.
    """
    for model, folder in folders.items():
        if load_adapter(Path(folder)) != model:
            raise ModelError(f"{folder} does not hold the weights of {model} any more.")
