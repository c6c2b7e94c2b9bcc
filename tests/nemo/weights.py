"""A Hugging Face Llama as a NeMo checkpoint of Megatron-Core's local layers, which NeMo's own importer cannot make."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

LAYERS, GROUPS = 4, 2  # of the tiny recipe


def megatron_state(folder: Path) -> dict[str, torch.Tensor]:
    """Returns a Llama's weights under the names that Megatron-Core's local layers have, for tensor parallel size 1."""
    source = load_file(folder / "model.safetensors")
    state = {
        "embedding.word_embeddings.weight": source["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": source["model.norm.weight"],
    }
    for layer in range(LAYERS):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        # Megatron-Core keeps the queries of a group beside its key and value.
        heads = [source[f"{theirs}self_attn.{name}_proj.weight"].chunk(GROUPS) for name in "qkv"]
        state |= {
            f"{ours}input_layernorm.weight": source[f"{theirs}input_layernorm.weight"],
            f"{ours}pre_mlp_layernorm.weight": source[f"{theirs}post_attention_layernorm.weight"],
            f"{ours}self_attention.linear_proj.weight": source[f"{theirs}self_attn.o_proj.weight"],
            f"{ours}self_attention.linear_qkv.weight": torch.cat(
                [part for group in zip(*heads, strict=True) for part in group]
            ),
            f"{ours}mlp.linear_fc1.weight": torch.cat(
                [source[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up")]
            ),
            f"{ours}mlp.linear_fc2.weight": source[f"{theirs}mlp.down_proj.weight"],
        }
    return state


def save_nemo_checkpoint(folder: Path, output: Path) -> None:
    """Writes the tiny recipe's weights as a NeMo checkpoint, as NeMo's importers do."""
    from orpo_megatron import cpu

    cpu.activate()
    import fiddle
    from nemo.lightning.io import ModelConnector

    from orpo_megatron.core.attention import packed_local_layer_spec
    from orpo_megatron.core.local import turn_off_fusions
    from orpo_megatron.nemo.recipes import tiny_cpu

    model = fiddle.build(tiny_cpu().model)
    model.config.transformer_layer_spec = packed_local_layer_spec
    turn_off_fusions(model.config)
    connector = ModelConnector(str(folder))
    trainer = connector.nemo_setup(model, ckpt_async_save=False)
    state = megatron_state(folder)
    missing, unexpected = model.module.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if not name.endswith("_extra_state")], (
        missing,
        unexpected,
    )
    connector.nemo_save(output, trainer)
