"""Attention within packed sequences against one masked softmax over the whole row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

LENGTHS = (5, 1, 9)
#: Ends of prompt and chosen side of each segment where pairs share their prompt.
SHARED = ((2, 3), (1, 1), (4, 6))
HEADS, GROUPS, DIM = 6, 2, 4


def make_attention(scale: float | None = None, **config: Any) -> torch.nn.Module:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from orpo_megatron.core.attention import PackedAttention

    settings = TransformerConfig(
        num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_query_groups=GROUPS, **config
    )
    groups = ProcessGroupCollection.use_mpu_process_groups(["cp"])
    return PackedAttention(settings, 1, softmax_scale=scale, pg_collection=groups)


def packed(
    lengths: tuple[int, ...] = LENGTHS, ends: tuple[tuple[int, int], ...] | None = None, cp: tuple[int, int] = (1, 0)
) -> Any:
    """Returns what attention is told of a row of such segments."""
    from orpo_megatron.batch import PackedRow
    from orpo_megatron.core.row import row_params

    prompt_ends, chosen_ends = zip(*(ends or zip(lengths, lengths, strict=True)), strict=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    row = PackedRow(
        tokens=nothing,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        padding_mask=torch.zeros(sum(lengths), dtype=torch.bool),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        prompt_ends=torch.tensor(prompt_ends),
        chosen_ends=torch.tensor(chosen_ends),
        **dict.fromkeys(("score_positions", "score_labels", "score_is_response", "score_lengths"), nothing),
        **dict.fromkeys(("num_scored_tokens", "num_response_tokens", "pair_ids"), nothing),
        num_nll_tokens=0,
        num_pairs=0,
    )
    return row_params(row, "cpu", *cp)


def row(dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Returns query, key and value of a row, of normal numbers that fp32 holds."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(LENGTHS), heads, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def masked_softmax(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, ends: Any = None
) -> torch.Tensor:
    """Attends over the whole row at once, with a mask that allows the own sequence up to the own place."""
    lengths = torch.tensor(LENGTHS)
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), lengths)
    place = torch.arange(len(segment))
    allowed = (segment[:, None] == segment) & (place[:, None] >= place)
    if ends is not None:
        inside = place - (lengths.cumsum(0) - lengths)[segment]
        prompt_ends, chosen_ends = torch.tensor(ends).T
        is_prompt, is_rejected = inside < prompt_ends[segment], inside >= chosen_ends[segment]
        allowed &= is_prompt | (is_rejected[:, None] == is_rejected)
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))  # head h reads group h // 3
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("ends", [None, SHARED], ids=["sequences", "shared prompts"])
def test_values_and_gradients_are_those_of_a_masked_softmax(
    one_rank: None, dtype: torch.dtype, tolerance: float, scale: float | None, ends: Any
) -> None:
    inputs, reference_inputs = row(dtype), row(torch.float64)
    output = make_attention(scale)(*inputs, None, packed_seq_params=packed(ends=ends))
    reference = masked_softmax(*reference_inputs, scale=DIM**-0.5 if scale is None else scale, ends=ends)
    assert output.shape == (sum(LENGTHS), HEADS, DIM) and output.dtype == dtype
    torch.testing.assert_close(output.double(), reference, rtol=0, atol=tolerance)
    upstream = torch.randn(reference.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(output, inputs, upstream.to(dtype))
    for ours, theirs in zip(gradients, torch.autograd.grad(reference, reference_inputs, upstream), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


def test_another_sequence_does_not_show_in_a_single_bit(one_rank: None) -> None:
    inputs = [x.detach() for x in row(torch.float32)]
    others = [x.detach() for x in row(torch.float32, seed=7)]
    changed = [x.clone() for x in inputs]
    for mine, other in zip(changed, others, strict=True):
        mine[:5], mine[6:] = other[:5] * 100, other[6:] * 100
    attention = make_attention()
    before, after = (attention(*x, None, packed_seq_params=packed()) for x in (inputs, changed))
    assert torch.equal(before[5:6], after[5:6])
    assert not torch.equal(before[:5], after[:5]) and not torch.equal(before[6:], after[6:])


def test_a_later_token_does_not_show_in_earlier_ones(one_rank: None) -> None:
    inputs = [x.detach() for x in row(torch.float32)]
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[10] += 1.0
    attention = make_attention()
    before, after = (attention(*x, None, packed_seq_params=packed()) for x in (inputs, changed))
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [True] * 10 + [False] * 5


def test_a_row_that_is_not_one_of_ours_is_refused(one_rank: None) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    for params in (None, PackedSeqParams(qkv_format="thd")):
        with pytest.raises(ValueError, match=r"PackedAttention needs the packed_seq_params that core/row\.py makes"):
            make_attention()(*row(torch.float32), None, packed_seq_params=params)


def test_a_window_shorter_than_a_sequence_is_refused(one_rank: None) -> None:
    inputs = row(torch.float32)
    wide = make_attention(window_size=(8, 0))(*inputs, None, packed_seq_params=packed())  # 9 tokens see one another
    assert torch.equal(wide, make_attention()(*inputs, None, packed_seq_params=packed()))
    make_attention(window_size=(-1, 0))(*inputs, None, packed_seq_params=packed())  # no window
    with pytest.raises(ValueError, match=r"A sequence of 9 tokens is longer than the model's attention window \(8\)"):
        make_attention(window_size=(7, 0))(*inputs, None, packed_seq_params=packed())


def spec_of(vp_stage: int | None = None, **config: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from orpo_megatron.core.attention import packed_local_layer_spec

    sizes: dict[str, Any] = dict(num_layers=2, hidden_size=8, num_attention_heads=2, normalization="RMSNorm")
    return packed_local_layer_spec(TransformerConfig(**{**sizes, **config}), vp_stage)


def test_the_layer_specification_is_importable(megatron_on_cpu: None) -> None:
    import pickle

    from orpo_megatron.core.attention import packed_local_layer_spec

    assert pickle.loads(pickle.dumps(packed_local_layer_spec)) is packed_local_layer_spec


def test_all_layers_have_packed_attention_and_norms_for_sequence_parallel(one_rank: None) -> None:
    from megatron.core.transformer.identity_op import IdentityOp

    from orpo_megatron.core.attention import PackedAttention
    from orpo_megatron.core.norm import LocalNorm

    for qk_layernorm in (False, True):
        block = spec_of(qk_layernorm=qk_layernorm)
        assert len(block.layer_specs) == 2 and block.layer_norm is LocalNorm
        for layer in (spec.submodules for spec in block.layer_specs):
            attention = layer.self_attention.submodules
            assert attention.core_attention is PackedAttention
            assert layer.input_layernorm is layer.pre_mlp_layernorm is LocalNorm
            expected = LocalNorm if qk_layernorm else IdentityOp
            assert attention.q_layernorm is attention.k_layernorm is expected


def test_a_virtual_stage_gets_its_own_layers(one_rank: None) -> None:
    """8 layers in 2 stages of 2 chunks: the first stage has layers 0 and 1, then 4 and 5; M stands for experts."""
    pattern = "MDDDMMDD"
    settings: dict[str, Any] = dict(
        num_layers=8,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        num_moe_experts=2,
        moe_layer_freq=[int(kind == "M") for kind in pattern],
    )
    for vp_stage, kinds in enumerate((pattern[0:2], pattern[4:6])):
        mlps = [layer.submodules.mlp for layer in spec_of(vp_stage, **settings).layer_specs]
        modules = [getattr(mlp, "module", None) or mlp.func for mlp in mlps]
        assert "".join("M" if "MoE" in module.__name__ else "D" for module in modules) == kinds
