"""State_dicts under their authors' names, read without executing anything in them.

A ``.pth`` or ``.pt`` is a pickle: torch reads tensors from it and refuses every other object. They and ``.safetensors``
are mapped into memory, so that of a file of many gigabytes only the tensors that a network takes are read.
"""

import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from anymal.errors import UserError


@dataclass(frozen=True, kw_only=True)
class StateDict:
    """The tensors of a file, looked up by the names of our modules."""

    path: str
    """Of the file, for messages."""
    tensors: Mapping[str, Tensor]
    """By published name."""
    prefix: str
    """Of every published name in this file, such as ``llma.``."""
    names: Mapping[str, str]
    """The key map: substrings of our names → substrings of the published ones."""

    def key(self, name: str) -> str:
        """The published name of one of ours."""
        for ours, theirs in self.names.items():
            name = name.replace(ours, theirs, 1)
        return self.prefix + name

    def tensor(self, name: str) -> Tensor:
        """Raises `UserError`: It is missing, or not of floating point."""
        key = self.key(name)
        if key not in self.tensors:
            raise UserError(f"{self.path} lacks the tensor {key}: it is cut off, or of another network")
        if not self.tensors[key].is_floating_point():
            raise UserError(f"{self.path}: {key} is of {self.tensors[key].dtype}; weights are of floating point")
        return self.tensors[key]

    def shape(self, name: str, *wanted: int | None) -> tuple[int, ...]:
        """The shape of a tensor; its length, and the sizes that are not None, are checked.

        Raises:
            UserError: It is missing, or has another shape.
        """
        shape = tuple(self.tensor(name).shape)
        pairs = zip(wanted, shape, strict=False)
        if len(shape) != len(wanted) or any(size not in (None, actual) for size, actual in pairs):
            sizes = ", ".join("any" if size is None else str(size) for size in wanted)
            raise UserError(f"{self.path}: {self.key(name)} has the shape {list(shape)}; wanted is [{sizes}]")
        return shape

    def blocks(self) -> int:
        """How many transformer blocks there are.

        Raises:
            UserError: One of them is missing.
        """
        numbered = re.compile(re.escape(self.key("blocks.")) + r"(\d+)\.")
        numbers = {int(match[1]) for key in self.tensors if (match := numbered.match(key))}
        for number in range(len(numbers)):
            if number not in numbers:
                raise UserError(f"{self.path} lacks {self.key('blocks.')}{number}, but has block {max(numbers)}")
        return len(numbers)

    def load(self, network: nn.Module, prefixes: tuple[str, ...], unused: tuple[str, ...]) -> None:
        """Copy the tensors into the network.

        Args:
            network: Whose state_dict's names are "ours".
            prefixes: Of published names, all of which belong to the network.
            unused: Prefixes of those among them that it does not need.

        Raises:
            UserError: A tensor is missing, of another shape, or one that the network does not know.
        """
        weights = network.state_dict()
        for name, weight in weights.items():
            self.shape(name, *weight.shape)
        known = {self.key(name) for name in weights}
        own, needless = (tuple(self.prefix + name for name in names) for names in (prefixes, unused))
        for key in self.tensors:
            if key.startswith(own) and key not in known and not key.startswith(needless):
                raise UserError(f"{self.path} holds {key}, which this network does not have: it is another one")
        network.load_state_dict({name: self.tensor(name) for name in weights})


_WANTED = "wanted is a state_dict as torch.save(network.state_dict(), path) writes it, or a .safetensors of it"


def read_state_dict(path: str) -> dict[str, Tensor]:
    """The tensors of a ``.pth``, ``.pt`` or ``.safetensors``, mapped into memory: only what is used is read.

    Raises:
        UserError: There is no such file, it cannot be read, or holds objects that only unpickling would make.
    """
    if not Path(path).is_file():
        raise UserError(f"model.modalities.imu.encoder={path}: there is no such file")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors, and objects are not unpickled; {_WANTED}") from error
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"{path} cannot be read: {reason}; {_WANTED}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}; {_WANTED}")
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds a dict of {listed(list(loaded)[:5])}; {_WANTED}")
    return tensors


def listed(names: Iterable[str]) -> str:
    """Names as a message shows them: ``a, b``, or ``nothing``."""
    return ", ".join(map(str, names)) or "nothing"
