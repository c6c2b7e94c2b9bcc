"""docs/models.md: what this package does with each model family that Megatron-Bridge converts."""

from __future__ import annotations

from importlib.metadata import version

import transformers

from orpo_megatron.bridge.conversion.families import Family, known_families
from orpo_megatron.bridge.layers import use_local_layers
from orpo_megatron.bridge.model import CompletedBridge, check_exact
from orpo_megatron.config import ConfigError

CPU, GPU, UNKNOWN, NO = "CPU and GPU", "GPU", "not known here", "no"
#: Names of parameters in local layers, where Transformer Engine's have others.
_LOCAL_NORM = "decoder.layers.0.input_layernorm.weight"
_LOCAL_EXPERT = "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight"


def support_of(family: Family) -> tuple[str, str]:
    """Returns where a family trains, and why not elsewhere, for its default configuration.

    Args:
        family: The family.

    Returns:
        ``CPU``, ``GPU``, ``NO`` or ``UNKNOWN``, and a reason.
    """
    if not family.takes_head:
        return NO, f"Megatron's {family.target.__name__} takes no ORPO head"
    known = getattr(transformers, family.architecture, None)
    if known is None:
        return UNKNOWN, "its code comes with the model (`--trust-remote-code`)"
    config = known.config_class(architectures=[family.architecture])
    try:
        bridge = CompletedBridge.from_hf_config(config)
        provider = bridge.to_megatron_provider(load_weights=False)
    except Exception as error:  # Bridge reads settings that a default configuration need not have
        return UNKNOWN, f"its default configuration makes no model ({type(error).__name__})"
    try:
        check_exact(provider)
    except ConfigError as error:
        return NO, _reason(error)
    try:
        use_local_layers(provider)
    except ConfigError as error:
        return GPU, _reason(error)
    local_names = [_LOCAL_NORM, *([_LOCAL_EXPERT] if provider.num_moe_experts else [])]
    if not all(bridge.knows(name) for name in local_names):
        return GPU, "Bridge converts it in Transformer Engine's layers only"
    return CPU, ""


def _reason(error: ConfigError) -> str:
    """Returns the first sentence of an error."""
    return str(error).split(". ")[0].rstrip(".")


def families_page() -> str:
    """Returns the table of all families, as Markdown."""
    rows = [(family, *support_of(family)) for family in known_families().values()]
    order = [CPU, GPU, UNKNOWN, NO]
    lines = [
        "# Models",
        "",
        f"What Megatron-Bridge {version('megatron-bridge')} converts, and where this package trains it: read from its "
        "registry by",
        "`python tools/convert.py families` for each family's default configuration, without weights. GPU means: with",
        "Transformer Engine, and not yet run. `tools/convert.py` converts on a CPU what trains there, else on a GPU.",
        "",
        "| architecture | Megatron model | trains on | why not elsewhere |",
        "|---|---|---|---|",
        *(
            f"| `{family.architecture}` | {family.target.__name__} | {where} | {why} |"
            for family, where, why in sorted(rows, key=lambda row: order.index(row[1]))
        ),
    ]
    return "\n".join(lines) + "\n"
