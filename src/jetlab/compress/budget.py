"""The memory of a NemotronH at a context and a batch, and the budget that it must fit (arXiv:2508.14444, Sec 4).

Weights, keys and values, recurrent states and the columns that the short convolutions carry. Activations are not counted:
what a budget leaves for them is part of the budget. Sizes are in bytes, 1 GiB = 2^30.
"""

from dataclasses import dataclass

from jetlab.inference import roofline
from jetlab.models.zoo import Shape, n_params

GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """`n_bytes` for the weights and all that `batch` sequences of `context` tokens hold.

    Raises ValueError for a size that is not positive.
    """

    n_bytes: int
    context: int  # tokens
    batch: int = 1  # sequences
    weight_bytes_per_value: int = 2  # bf16
    cache_bytes_per_value: int = 2  # keys, values and the columns of convolutions
    state_bytes_per_value: int = 4  # fp32, as NemotronH keeps its states

    def __post_init__(self):
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} of a budget must be positive, got {value}; give bytes, tokens or sequences")


@dataclass(frozen=True)
class Needed:
    """What a model takes of a budget, in bytes."""

    weights: int
    kv_cache: int
    states: int
    conv: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.states + self.conv


def nano2_budget() -> Budget:
    """Nemotron Nano 2's: an A10G's 22.06 GiB less 5 % for the framework less 1.3 GiB for a vision encoder, 19.66 GiB.

    At 128K tokens, batch 1, in bf16 with states in fp32 (Sec 4).
    """
    return Budget(n_bytes=int((22.06 * 0.95 - 1.3) * GIB), context=131072, batch=1)


def conv_bytes(shape: Shape, batch: int = 1, *, bytes_per_value: int = 2) -> int:
    """Columns that the convolutions of Mamba2 layers carry, in bytes: n_mamba2 · W · (H·P + 2·G·N) · bytes · batch.

    `roofline.state_bytes` leaves them out. W is the full width of the kernel: Transformers keeps one column more than the
    next token needs. 28 layers of the 12B hold 2.8 MB.
    """
    if shape.linear is None:
        return 0
    dims = shape.linear
    channels = dims.n_heads * dims.head_dim_v + 2 * dims.n_groups * dims.head_dim
    return shape.count("mamba2") * dims.conv_size * channels * bytes_per_value * batch


def needed(shape: Shape, budget: Budget) -> Needed:
    """What the model takes at the budget's context, batch and bytes per value, whether it fits or not."""
    return Needed(
        weights=n_params(shape) * budget.weight_bytes_per_value,
        kv_cache=_kv_cache(shape, budget) * budget.batch,
        states=roofline.state_bytes(shape, budget.batch, bytes_per_value=budget.state_bytes_per_value),
        conv=conv_bytes(shape, budget.batch, bytes_per_value=budget.cache_bytes_per_value),
    )


def fits(shape: Shape, budget: Budget) -> bool:
    """Whether the model takes no more than the budget's bytes."""
    return needed(shape, budget).total <= budget.n_bytes


def largest_batch(shape: Shape, budget: Budget) -> int:
    """Sequences of the budget's context that its bytes hold beside the weights; 0 if none. Its own `batch` plays no part.

    Raises ValueError for a model that holds nothing of a sequence, where there is no largest batch.
    """
    found = needed(shape, budget)
    of_one = (found.total - found.weights) // budget.batch
    if not of_one:
        raise ValueError(f"{shape.name} has MLPs alone, so no batch is the largest; keep a layer that mixes tokens")
    return max(0, (budget.n_bytes - found.weights) // of_one)


def bytes_per_token(shape: Shape, budget: Budget) -> float:
    """Memory traffic of one decoded token of one sequence at the budget's context, in bytes; lower is faster.

    (weights but for the rows of the input embedding that are not looked up) / batch + keys and values read once + states and
    columns of convolutions read and written: `roofline.decode_bytes` / batch with the budget's bytes per value.
    """
    weights = roofline.weight_bytes_per_step(shape, bytes_per_value=budget.weight_bytes_per_value)
    states = roofline.state_bytes(shape, bytes_per_value=budget.state_bytes_per_value)
    columns = conv_bytes(shape, bytes_per_value=budget.cache_bytes_per_value)
    return weights / budget.batch + _kv_cache(shape, budget) + 2 * (states + columns)


def _kv_cache(shape: Shape, budget: Budget) -> int:
    return roofline.kv_cache_bytes(shape, budget.context, bytes_per_value=budget.cache_bytes_per_value)
