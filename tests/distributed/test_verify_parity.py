"""``tools/verify_parity.py``: what it says of a right sharding and of a wrong one, and by which exit status."""

from pathlib import Path

import pytest

from launch import TINY, Outcome, TinyRecipe

pytestmark = pytest.mark.slow

TOOL = "tools/verify_parity.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def verify(tiny: TinyRecipe, run_dir: Path, *arguments: str, script: str = TOOL) -> Outcome:
    """Runs the tool on two processes, on the tiny recipe at tensor parallel size 2."""
    split = "model.tensor_model_parallel_size=2"
    return tiny.command(*TORCHRUN, script, *tiny.arguments(run_dir, split, *arguments)).wait()


def figures(output: str) -> dict[str, list[str]]:
    """Returns the cells of each line of the table, by the line's first."""
    lines = (line.split() for line in output.splitlines())
    return {cells[0]: cells[1:] for cells in lines if cells}


def test_a_right_sharding_passes(tiny: TinyRecipe, tmp_path: Path) -> None:
    outcome = verify(tiny, tmp_path / "run")

    assert outcome.code == 0, outcome.output
    assert "recipe       tensor 2" in outcome.output and "reference    data 2" in outcome.output
    rows = figures(outcome.output)
    reference, recipe, error = map(float, rows["loss"])
    assert recipe == pytest.approx(reference, rel=1e-5) and error < 1e-5
    assert rows["gradient,"][:4] == ["worst", "10", "of", "26"]
    assert outcome.output.splitlines()[-2].startswith("PASS: ")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["logs"]  # no checkpoints, no scratch files


def test_shared_prompts_are_held_against_separate_sequences(tiny: TinyRecipe, tmp_path: Path) -> None:
    outcome = verify(tiny, tmp_path / "run", "data.share_prefix=on", "data.rows_per_step=2")

    assert outcome.code == 0, outcome.output
    assert "recipe       tensor 2, prompts computed once a pair" in outcome.output
    assert figures(outcome.output)["gradient,"][:4] == ["worst", "10", "of", "26"]
    assert outcome.output.splitlines()[-2].startswith("PASS: ")


def test_adapters_are_compared_from_the_same_weights(tiny: TinyRecipe, tmp_path: Path) -> None:
    """LoRA's weights are drawn at random, differently for each sharding, and half of them are zero at the start."""
    outcome = verify(tiny, tmp_path / "run", "peft.dim=4", "--against", "tp=1,pp=2")

    assert outcome.code == 0, outcome.output
    assert "reference    pipeline 2" in outcome.output
    assert "worst 10 of 32" in outcome.output and "adapter.linear_in.weight" in outcome.output


def test_a_doubled_loss_fails(tiny: TinyRecipe, tmp_path: Path) -> None:
    outcome = verify(tiny, tmp_path / "run", script="tests/distributed/doubled_loss.py")

    assert outcome.code == 1, outcome.output
    assert "FAIL: 26 of 39 figures are wrong; the worst error is 1.0e+00, the bound 1e-05." in outcome.output
    worst = {name: cells for name, cells in figures(outcome.output).items() if cells[-1:] == ["<"] and "." in name}
    assert list(worst.values()) == [["1.0e+00", "<"]] * 10  # all 26 are twice what they should be: any ten of them


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "tp=2,xp=1"], "--against xp=1 is not a size of a sharding, such as tp=2."),
        (["--against", "tp=3"], "The number of processes (1) must be a multiple of"),
        (["model.tensor_model_parallel_size=3"], "The number of processes (1) must be a multiple of"),
        (["orpo.bta=1"], "orpo.bta"),
        (
            ["model.recompute_granularity=selective", "model.recompute_modules=[layernorm]"],
            "model.recompute_modules (['layernorm']) must not name layernorm without Transformer Engine",
        ),
    ],
)
def test_a_bad_recipe_is_refused_in_one_message(
    tiny: TinyRecipe, tmp_path: Path, arguments: list[str], message: str
) -> None:
    outcome = tiny.command(TOOL, str(TINY), f"run.dir={tmp_path}", *arguments).wait()

    assert outcome.code == 2, outcome.output
    assert message in outcome.output and "Traceback" not in outcome.output
