"""Rotary embeddings that follow a row's own positions, and models that cannot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_attention import make_attention, packed

ENDS = ((2, 3), (1, 1), (4, 6))


class Gpt(torch.nn.Module):
    """As much of a model as positions concern."""

    def __init__(self, rotary: torch.nn.Module, core_attention: torch.nn.Module, **settings: Any) -> None:
        super().__init__()
        self.rotary_pos_emb = rotary
        self.layer = torch.nn.Module()
        self.layer.core_attention = core_attention
        flags = ("apply_rope_fusion", "multi_latent_attention")
        self.config = SimpleNamespace(**{name: settings.pop(name, False) for name in flags})
        self.position_embedding_type = settings.pop("position_embedding_type", "rope")


def make_rotary(kind: str) -> Any:
    from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding

    if kind == "rope":
        return RotaryEmbedding(8, 1.0, use_cpu_initialization=True)
    return YarnRotaryEmbedding(8, scaling_factor=4.0, original_max_position_embeddings=4, use_cpu_initialization=True)


@pytest.mark.parametrize("kind", ["rope", "yarn"])
def test_each_token_gets_the_frequencies_of_its_own_position(one_rank: None, kind: str) -> None:
    from orpo_megatron.core.positions import follow_positions

    rotary = make_rotary(kind)
    model = Gpt(rotary, make_attention(), position_embedding_type=kind)
    follow_positions(model)
    follow_positions(model)  # changes nothing
    assert model.rotary_pos_emb.rotary is rotary

    def frequencies(embedding: Any, params: Any) -> torch.Tensor:
        length = embedding.get_rotary_seq_len(None, None, None, None, params)
        result = embedding(length, packed_seq=True, cp_group=None)
        assert isinstance(result, tuple) == (kind == "yarn")
        return result[0] if kind == "yarn" else result

    plain, shared = packed(), packed(ends=ENDS)
    base = frequencies(rotary, plain)
    assert len(base) == plain.max_seqlen_q == 9
    for params in (plain, shared):
        assert len(params.position_ids) == 15
        assert torch.equal(frequencies(model.rotary_pos_emb, params), base[params.position_ids])


def test_a_fused_kernel_is_left_to_count_for_itself(one_rank: None) -> None:
    from orpo_megatron.core.positions import follow_positions

    rotary = make_rotary("rope")
    model = Gpt(rotary, make_attention(), apply_rope_fusion=True)
    follow_positions(model)
    assert model.rotary_pos_emb is rotary


def test_a_model_that_would_mix_responses_up_is_refused(one_rank: None) -> None:
    from orpo_megatron.core.positions import check_takes_shared_prefix, follow_positions

    rotary, attention = make_rotary("rope"), make_attention()
    fitting = Gpt(rotary, attention)
    with pytest.raises(ValueError, match=r"rotary_pos_emb \(RotaryEmbedding\) must be Megatron-Core's own"):
        check_takes_shared_prefix(fitting)  # it does not follow positions yet
    follow_positions(fitting)
    check_takes_shared_prefix(fitting)
    with pytest.raises(ValueError, match=r"layer\.core_attention is Identity, which would let both responses"):
        check_takes_shared_prefix(Gpt(rotary, torch.nn.Identity()))
    with pytest.raises(ValueError, match=r"apply_rope_fusion \(True\) must be False"):
        check_takes_shared_prefix(Gpt(rotary, attention, apply_rope_fusion=True))
    with pytest.raises(ValueError, match=r"position_embedding_type \(mrope\) must be rope, yarn"):
        check_takes_shared_prefix(Gpt(rotary, attention, position_embedding_type="mrope"))
    with pytest.raises(ValueError, match=r"position_embedding_type \(latent\) must be rope, yarn"):
        check_takes_shared_prefix(Gpt(rotary, attention, multi_latent_attention=True))


def test_an_embedding_of_another_kind_is_left_alone(one_rank: None) -> None:
    """Such as Gemma 3's, which returns two tables at once."""
    from orpo_megatron.core.positions import follow_positions

    class Other(type(make_rotary("rope"))):  # type: ignore[misc]
        pass

    model = Gpt(Other(8, 1.0, use_cpu_initialization=True), make_attention())
    follow_positions(model)
    assert isinstance(model.rotary_pos_emb, Other)
