"""What is left after pruning: the layers that stay and the widths that all of them have."""

import dataclasses

from jetlab.models.nemotron import layer_string, require_groups
from jetlab.models.zoo import Shape


@dataclasses.dataclass(frozen=True)
class Target:
    """`layers` are the indices that stay, ascending; widths are those of the pruned model."""

    layers: tuple[int, ...]
    d_model: int
    d_ff: int
    n_mamba_heads: int

    def of(self, shape: Shape) -> Shape:
        """The shape that pruning `shape` to this target leaves.

        Raises ValueError for no layer, for one that the model has not or that is named twice, for a width below 1 or above
        the model's, and for heads that do not fill the groups.
        """
        if not self.layers or list(self.layers) != sorted(set(self.layers) & set(range(shape.n_layers))):
            raise ValueError(
                f"the layers that stay must be at least one of 0 … {shape.n_layers - 1}, each once and ascending, "
                f"got {self.layers}; to remove none give tuple(range({shape.n_layers}))"
            )
        for name, width, most in (
            ("d_model", self.d_model, shape.d_model),
            ("d_ff", self.d_ff, shape.d_ff),
            ("n_mamba_heads", self.n_mamba_heads, shape.linear.n_heads),
        ):
            if not 1 <= width <= most:
                raise ValueError(
                    f"pruning takes widths away, so {name} must be 1 … {most}, got {width}; try {min(max(width, 1), most)}"
                )
        require_groups(self.n_mamba_heads, shape.linear.n_groups)
        kinds = tuple(shape.layer_kinds[layer] for layer in self.layers)
        return dataclasses.replace(
            shape,
            name=f"{shape.name} pruned to {layer_string(kinds)}, {self.d_model}, {self.d_ff}, {self.n_mamba_heads}",
            d_model=self.d_model,
            n_layers=len(kinds),
            d_ff=self.d_ff,
            layer_kinds=kinds,
            linear=dataclasses.replace(shape.linear, n_heads=self.n_mamba_heads),
        )


def whole(shape: Shape) -> Target:
    """The target that removes nothing."""
    return Target(tuple(range(shape.n_layers)), shape.d_model, shape.d_ff, shape.linear.n_heads)
