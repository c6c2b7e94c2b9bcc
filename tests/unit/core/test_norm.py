"""The local norm: PyTorch's own values, the mark that sequence parallel needs, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def make_norm(eps: float = 1e-5, **config: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from orpo_megatron.core.norm import LocalNorm

    return LocalNorm(
        config=TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, **config), hidden_size=8, eps=eps
    )


@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_values_by_the_formula_and_by_torch(megatron_on_cpu: None, normalization: str, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((3, 1, 8), (8,), (8,)))
    norm, reference = make_norm(eps, normalization=normalization), getattr(torch.nn, normalization)(8, eps=eps)
    assert torch.equal(norm(x), reference(x))  # as it is before training
    with torch.no_grad():
        for values, parameters in ((weight, "weight"), (bias, "bias")):
            if hasattr(norm, parameters):
                getattr(norm, parameters).copy_(values)
    mean = x.mean(dim=-1, keepdim=True) if normalization == "LayerNorm" else 0.0
    scale = ((x - mean).square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    expected = (x - mean) * scale * weight + (bias if normalization == "LayerNorm" else 0.0)
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_parameter_says_whether_its_gradient_is_partial(
    megatron_on_cpu: None, normalization: str, sequence_parallel: bool
) -> None:
    norm = make_norm(normalization=normalization, sequence_parallel=sequence_parallel, tensor_model_parallel_size=2)
    marks = {name: parameter.sequence_parallel for name, parameter in norm.named_parameters()}
    names = ["weight"] if normalization == "RMSNorm" else ["weight", "bias"]
    assert marks == dict.fromkeys(names, sequence_parallel)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"normalization": "L2Norm"}, "L2Norm, layernorm_zero_centered_gamma False"),
        ({"normalization": "RMSNorm", "layernorm_zero_centered_gamma": True}, "RMSNorm, layernorm_zero_centered_gamm"),
        ({"layernorm_zero_centered_gamma": True}, "LayerNorm, layernorm_zero_centered_gamma True"),
    ],
)
def test_another_norm_is_refused(megatron_on_cpu: None, config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        make_norm(**config)
    assert str(error.value).startswith(f"The model's norm ({said}")
    assert str(error.value).endswith(
        "needs Transformer Engine: without it there are only LayerNorm and RMSNorm with plain weights. Install "
        "Transformer Engine and train on a GPU."
    )
