"""Token mixers by kind.

`MIXERS[kind]` imports the module of that kind alone, on first use, so that work with one block depends on no other.
"""

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module

_CLASS_NAMES = {  # kind: module and class
    "attention": ("attention", "Attention"),
    "sliding_attention": ("attention", "SlidingAttention"),
    "jetblock": ("jetblock", "JetBlock"),
    "gated_deltanet": ("gated_deltanet", "GatedDeltaNet"),
    "deltanet": ("deltanet", "DeltaNet"),
    "gla": ("gla", "GLA"),
    "mamba2": ("mamba2", "Mamba2"),
    "retnet": ("retnet", "RetNet"),
    "rwkv7": ("rwkv7", "RWKV7"),
}


class UnknownMixerError(KeyError):
    """A kind of token mixer that does not exist."""

    def __str__(self) -> str:  # KeyError itself shows the repr of its message
        return self.args[0]


class _Mixers(Mapping):
    def __getitem__(self, kind: str) -> type:
        if kind not in _CLASS_NAMES:
            close = difflib.get_close_matches(str(kind), _CLASS_NAMES, n=1, cutoff=0.0)
            raise UnknownMixerError(
                f"a layer kind must be one of {', '.join(_CLASS_NAMES)}, got {kind!r}; closest is {close[0]!r}"
            )
        module, name = _CLASS_NAMES[kind]
        return getattr(import_module(f"jetlab.layers.{module}"), name)

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASS_NAMES)

    def __len__(self) -> int:
        return len(_CLASS_NAMES)

    def __contains__(self, kind: object) -> bool:  # without the import that a look-up costs
        return kind in _CLASS_NAMES


MIXERS: Mapping[str, type] = _Mixers()
