"""The objective against figures by hand, 60-digit arithmetic and plain autograd."""

import itertools
import math
from typing import Any

import mpmath
import pytest
import torch

from orpo_megatron.loss import EPSILON, PairLogps, capped_pairs, log_odds_ratio, odds_ratio_loss, orpo_loss

# Length-averaged log-probs from "hopeless" to "certain", and two that differ by one unit in fp32's last place.
GRID = [-20.0, -12.5, -7.3, -3.1, -1.0, -math.log(2), -0.35, -0.1, -1e-2, -1e-3, -1e-4, -1e-5, -1e-6, -3e-7]
GRID += [-1e-7, -5e-8, -1e-8, -1e-10, -1e-12, 0.0]
GRID += [torch.nextafter(torch.tensor(value), torch.tensor(0.0)).item() for value in (-3.1, -1.0, -1e-2, -1e-6)]


def worked_example(**changes: Any) -> PairLogps:
    """One pair, p_chosen 0.7 and p_rejected 0.4; the NLL covers one token of probability 0.7."""
    pair = dict(
        chosen_logps=torch.tensor([0.7]).log(),
        rejected_logps=torch.tensor([0.4]).log(),
        nll_sums=-torch.tensor([0.7]).log(),
        nll_lengths=torch.tensor([1]),
    )
    return PairLogps(**(pair | changes))


def random_pairs(pairs: int, seed: int = 0) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = -5 * torch.rand(2, pairs, generator=generator) - 0.01
    lengths = torch.randint(1, 90, (pairs,), generator=generator)
    nll_sums = 3 * lengths * torch.rand(pairs, generator=generator)
    return PairLogps(chosen.requires_grad_(), rejected.requires_grad_(), nll_sums.requires_grad_(), lengths)


def part(logps: PairLogps, pairs: slice) -> PairLogps:
    return PairLogps(
        logps.chosen_logps[pairs], logps.rejected_logps[pairs], logps.nll_sums[pairs], logps.nll_lengths[pairs]
    )


def gradients(loss: torch.Tensor, logps: PairLogps) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [logps.chosen_logps, logps.rejected_logps, logps.nll_sums]))


def test_worked_example() -> None:
    """Odds 7/3 and 2/3: log odds ratio ln 3.5, NLL -ln 0.7, odds-ratio loss ln(1 + 1/3.5) = ln(9/7)."""
    result = orpo_loss(worked_example(), beta=0.1, nll_reduction="tokens", num_nll_tokens=1, num_pairs=1)
    assert result.log_odds_ratio.item() == pytest.approx(1.252763, abs=1e-6)
    assert result.nll_sum.item() == pytest.approx(0.356675, abs=1e-6)
    assert result.odds_ratio_loss.item() == pytest.approx(0.251314, abs=1e-6)
    assert result.loss.item() == pytest.approx(0.381806, abs=1e-6)
    assert result.loss.dtype == torch.float32


def test_gradients_of_worked_example() -> None:
    """With p_c 0.7, p_r 0.4: D = 0.4 * 0.3 + 0.7 * 0.6 = 0.54; dL/dl_c = -0.4 / D, dL/dl_r = 0.4 * 0.3 / (0.6 D)."""
    chosen, rejected = torch.tensor([0.7]).log().requires_grad_(), torch.tensor([0.4]).log().requires_grad_()
    d_chosen, d_rejected = torch.autograd.grad(odds_ratio_loss(chosen, rejected).sum(), [chosen, rejected])
    assert d_chosen.item() == pytest.approx(-0.4 / 0.54, rel=1e-6)
    assert d_rejected.item() == pytest.approx(0.12 / (0.6 * 0.54), rel=1e-6)


def reference(l_c: float, l_r: float) -> dict[str, mpmath.mpf]:
    """Values and gradients by the textbook formulas in 60 digits, q floored where the docstring says so."""
    with mpmath.workdps(60):
        c, r = mpmath.mpf(l_c), mpmath.mpf(l_r)
        p_c, p_r = mpmath.exp(c), mpmath.exp(r)
        q_c, q_r = max(1 - p_c, mpmath.mpf(EPSILON)), max(1 - p_r, mpmath.mpf(EPSILON))
        x = mpmath.log(p_c / q_c) - mpmath.log(p_r / q_r)
        d = p_r * q_c + p_c * q_r
        loss = mpmath.log1p(mpmath.exp(-x))
        return dict(x=x, dx_c=1 / q_c, dx_r=-1 / q_r, loss=loss, dl_c=-p_r / d, dl_r=p_r * q_c / (q_r * d))


def ours(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same six quantities from the package."""
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    x, loss = log_odds_ratio(chosen, rejected), odds_ratio_loss(chosen, rejected)
    dx_c, dx_r = torch.autograd.grad(x.sum(), [chosen, rejected])
    dl_c, dl_r = torch.autograd.grad(loss.sum(), [chosen, rejected])
    return dict(x=x.detach(), dx_c=dx_c, dx_r=dx_r, loss=loss.detach(), dl_c=dl_c, dl_r=dl_r)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_against_60_digits(dtype: torch.dtype, tolerance: float) -> None:
    """All combinations of the grid; the reference sees the inputs as rounded to ``dtype``.

    Values are fp32 for either dtype; gradients come back in ``dtype``, so bf16 ones carry its rounding.
    """
    grid = torch.tensor(GRID).to(dtype)
    chosen, rejected = torch.tensor(list(itertools.product(grid.tolist(), repeat=2)), dtype=dtype).T
    found = ours(chosen, rejected)
    assert found["x"].dtype == found["loss"].dtype == torch.float32
    assert found["dl_c"].dtype == found["dl_r"].dtype == found["dx_c"].dtype == dtype
    for i, (l_c, l_r) in enumerate(zip(chosen.tolist(), rejected.tolist(), strict=True)):
        for name, expected in reference(l_c, l_r).items():
            value = found[name][i].item()
            assert math.isfinite(value), f"{name} at {l_c}, {l_r}"
            allowed = 1e-5 if name in ("x", "loss") else tolerance
            assert abs(value - expected) <= allowed * abs(expected), f"{name} at {l_c}, {l_r}: {value}, {expected}"
            assert abs(value) <= 1 / EPSILON


def test_floor_changes_nothing_outside_epsilon() -> None:
    """Where 1 - p is at least epsilon on both sides the floored reference is the unfloored formula."""
    for l_c, l_r in itertools.product([-20.0, -1.0, -1e-3, -1e-6, -6e-8], repeat=2):
        with mpmath.workdps(60):
            x = mpmath.mpf(l_c) - mpmath.mpf(l_r) - mpmath.log(mpmath.expm1(l_c) / mpmath.expm1(l_r))
            assert abs(reference(l_c, l_r)["x"] - x) < mpmath.mpf(10) ** -50


def test_rejected_gradient_is_bounded_inside_epsilon() -> None:
    """At p_r = 1 the true dL/dl_r is infinite; ours is the cap q_c / (eps (q_c + p_c eps)), just below 1/eps."""
    found = ours(torch.tensor([-1.0, 0.0]), torch.tensor([0.0, 0.0]))
    assert found["dl_r"][0].item() == pytest.approx(1 / EPSILON, rel=1e-6)
    assert found["dl_r"][1].item() == pytest.approx(0.5 / EPSILON, rel=1e-6)
    assert found["dl_c"][0].item() == pytest.approx(-1 / (1 - math.exp(-1)), rel=1e-6)
    assert found["loss"][1].item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(("l_c", "l_r"), [(-800.0, -900.0), (-900.0, -800.0), (-1e4, -1e-9), (0.0, -1e4)])
def test_finite_where_exp_underflows(l_c: float, l_r: float) -> None:
    """Below l = -745 p is 0 even in fp64, and p_r / D would be 0 / 0."""
    found = ours(torch.tensor([l_c]), torch.tensor([l_r]))
    for name, expected in reference(l_c, l_r).items():
        assert found[name].item() == pytest.approx(float(expected), rel=1e-5, abs=1e-37), name


def test_positive_logps_count_as_certain() -> None:
    """Rounding leaves far less than the 0.01 above 0 that is tried here, so that a difference would show."""
    certain, above, other = torch.tensor([0.0]), torch.tensor([0.01]), torch.tensor([-1.0])
    assert ours(above, other) == ours(certain, other)
    assert ours(other, above) == ours(other, certain)


def test_agrees_with_autograd_of_the_plain_formula() -> None:
    """In fp64 and away from the edge, with an upstream gradient that differs from pair to pair."""
    logps = -torch.logspace(-2, 1, 14, dtype=torch.float64)
    chosen, rejected = logps.clone().requires_grad_(), logps.flip(0).clone().requires_grad_()
    upstream = torch.arange(-5.0, 9.0, dtype=torch.float64)
    x = (chosen - (1 - chosen.exp()).log()) - (rejected - (1 - rejected.exp()).log())
    plain_loss = torch.nn.functional.softplus(-x)
    for value, plain in ((log_odds_ratio(chosen, rejected), x), (odds_ratio_loss(chosen, rejected), plain_loss)):
        torch.testing.assert_close(value.double(), plain, rtol=1e-6, atol=1e-7)
        found = torch.autograd.grad((value * upstream).sum(), [chosen, rejected])
        expected = torch.autograd.grad((plain * upstream).sum(), [chosen, rejected], retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_capped_pairs() -> None:
    chosen = torch.tensor([-1.0, -5e-8, -1.0, 1e-7, -7e-8])
    rejected = torch.tensor([-2.0, -2.0, 0.0, -2.0, -7e-8])
    assert capped_pairs(chosen, rejected).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("reduction", ["tokens", "pairs"])
def test_reductions(reduction: str) -> None:
    """Sums 6 and 2 over 3 and 2 tokens: 8/5 by tokens, (2 + 1)/2 by pairs."""
    logps = PairLogps(
        torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0]), torch.tensor([6.0, 2.0]), torch.tensor([3, 2])
    )
    result = orpo_loss(logps, beta=0.0, nll_reduction=reduction, num_nll_tokens=5, num_pairs=2)  # type: ignore[arg-type]
    assert result.loss.item() == pytest.approx({"tokens": 1.6, "pairs": 1.5}[reduction])
    assert (result.nll_sum.item(), result.nll_count.item()) == {"tokens": (8.0, 5), "pairs": (3.0, 2)}[reduction]


@pytest.mark.parametrize("reduction", ["tokens", "pairs"])
def test_beta_zero_is_sft(reduction: str) -> None:
    """The gradient is exactly the NLL's, also where the odds ratio's would be largest."""
    logps = random_pairs(5)
    certain = torch.zeros(5, requires_grad=True)
    logps = PairLogps(logps.chosen_logps, certain, logps.nll_sums, logps.nll_lengths)
    tokens = int(logps.nll_lengths.sum())
    result = orpo_loss(logps, beta=0.0, nll_reduction=reduction, num_nll_tokens=tokens, num_pairs=5)  # type: ignore[arg-type]
    nll = logps.nll_sums.sum() / tokens if reduction == "tokens" else (logps.nll_sums / logps.nll_lengths).mean()
    assert result.loss.item() == pytest.approx(nll.item(), rel=1e-6)
    inputs = [logps.chosen_logps, logps.rejected_logps, logps.nll_sums]
    d_chosen, d_rejected, d_nll = torch.autograd.grad(result.loss, inputs, allow_unused=True)
    assert d_chosen is None and d_rejected is None, "the odds-ratio term is in the graph"
    torch.testing.assert_close(d_nll, torch.autograd.grad(nll, logps.nll_sums)[0], rtol=1e-6, atol=0)
    assert result.odds_ratio_loss.isfinite().all()


@pytest.mark.parametrize("reduction", ["tokens", "pairs"])
def test_microbatches_add_up(reduction: str) -> None:
    """Seven pairs at once, and as microbatches of 3, 0, 1 and 3: same loss, same gradients."""
    logps = random_pairs(7)
    tokens = int(logps.nll_lengths.sum())
    arguments: dict[str, Any] = dict(beta=0.3, nll_reduction=reduction, num_nll_tokens=tokens, num_pairs=7)
    whole = orpo_loss(logps, **arguments).loss
    cuts = [slice(0, 3), slice(3, 3), slice(3, 4), slice(4, 7)]
    shares = torch.stack([orpo_loss(part(logps, pairs), **arguments).loss for pairs in cuts])
    assert shares.sum().item() == pytest.approx(whole.item(), rel=1e-6)
    assert shares[1].item() == 0
    torch.testing.assert_close(gradients(shares.sum(), logps), gradients(whole, logps), rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_no_pairs(beta: float) -> None:
    """A share of 0 that is attached, so that backward reaches the parameters with zeros."""
    weight = torch.ones(3, requires_grad=True)
    empty = weight[:0]
    logps = PairLogps(empty, empty, empty.double(), torch.zeros(0, dtype=torch.int64))
    loss = orpo_loss(logps, beta=beta, nll_reduction="tokens", num_nll_tokens=10, num_pairs=2).loss
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None and weight.grad.tolist() == [0, 0, 0]
