"""The mathematics of the token mixers in plain PyTorch: each operation with the token-by-token definition beside it."""

from jetlab.ops.backends import resolve_backend
from jetlab.ops.conv import (
    dynamic_conv,
    dynamic_conv_reference,
    generated_conv,
    short_conv,
    short_conv_reference,
)
from jetlab.ops.decode_attention import decode_attention, decode_attention_reference
from jetlab.ops.dplr_delta_rule import dplr_delta_rule, dplr_delta_rule_chunked, dplr_delta_rule_reference
from jetlab.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_chunked, gated_delta_rule_reference
from jetlab.ops.gated_linear_attention import (
    gated_linear_attention,
    gated_linear_attention_chunked,
    gated_linear_attention_reference,
)
from jetlab.ops.jetblock_step import jetblock_step, jetblock_step_reference
from jetlab.ops.mamba2_step import mamba2_step, mamba2_step_reference
from jetlab.ops.rotary import rotary, rotary_reference
from jetlab.ops.swiglu import swiglu, swiglu_reference

__all__ = [
    "decode_attention",
    "decode_attention_reference",
    "dplr_delta_rule",
    "dplr_delta_rule_chunked",
    "dplr_delta_rule_reference",
    "dynamic_conv",
    "dynamic_conv_reference",
    "gated_delta_rule",
    "gated_delta_rule_chunked",
    "gated_delta_rule_reference",
    "gated_linear_attention",
    "gated_linear_attention_chunked",
    "gated_linear_attention_reference",
    "generated_conv",
    "jetblock_step",
    "jetblock_step_reference",
    "mamba2_step",
    "mamba2_step_reference",
    "resolve_backend",
    "rotary",
    "rotary_reference",
    "short_conv",
    "short_conv_reference",
    "swiglu",
    "swiglu_reference",
]
