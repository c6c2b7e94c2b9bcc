"""What is prepared and checked before Megatron is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig

from launch import hub_folder
from orpo_megatron.bridge.prepare import (
    check_pretrained,
    load_hf_config,
    local_model,
    model_source,
    num_steps,
    padding,
    prepare_run,
)
from orpo_megatron.bridge.recipe import build_recipe
from orpo_megatron.config import ConfigError

Values = dict[str, Any]


@pytest.mark.parametrize(
    ("train", "num_pairs", "steps"),
    [
        ({"train_iters": 7}, 20, 7),
        ({"num_epochs": 1}, 16, 2),
        ({"num_epochs": 1}, 17, 3),  # ragged: 8 + 8 + 1
        ({"num_epochs": 3}, 17, 9),
        ({"num_epochs": 0.5}, 17, 2),  # half of 3 steps
        ({"num_epochs": 1}, 3, 1),
    ],
)
def test_steps_follow_from_epochs_of_whole_and_ragged_steps(
    values: Values, train: Values, num_pairs: int, steps: int
) -> None:
    assert num_steps(build_recipe({**values, "train": train}), num_pairs) == steps


@pytest.mark.parametrize(
    ("model", "precision", "multiples"),
    [
        ({}, None, (1, 1)),
        ({"tensor_model_parallel_size": 4}, None, (1, 1)),
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True}, None, (1, 4)),
        ({"tensor_model_parallel_size": 4, "sequence_parallel": False}, "bf16_mixed", (1, 1)),
        ({}, "bf16_with_fp8_current_scaling_mixed", (1, 16)),
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True}, "bf16_with_mxfp8_mixed", (1, 128)),
        ({"tensor_model_parallel_size": 3, "sequence_parallel": True}, {"fp8": "hybrid"}, (1, 48)),
        ({}, {"bf16": True}, (1, 1)),
        ({}, {"bf16": True, "fp8": None}, (1, 1)),
        ({"context_parallel_size": 2}, None, (4, 4)),  # two chunks a rank
        ({"context_parallel_size": 3}, "bf16_mixed", (6, 6)),
        ({"context_parallel_size": 2, "tensor_model_parallel_size": 2}, None, (4, 4)),
        # A rank's share, half or a third of the sequence, is cut again over the tensor ranks.
        ({"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}, None, (4, 4)),
        ({"context_parallel_size": 2, "tensor_model_parallel_size": 3, "sequence_parallel": True}, None, (4, 12)),
        ({"context_parallel_size": 3, "tensor_model_parallel_size": 4, "sequence_parallel": True}, None, (6, 12)),
        ({"context_parallel_size": 2}, "bf16_with_fp8_current_scaling_mixed", (4, 32)),
        ({"context_parallel_size": 2}, {"fp8": "hybrid", "fp8_recipe": "mxfp8"}, (4, 64)),
        (
            {"context_parallel_size": 2, "tensor_model_parallel_size": 4, "sequence_parallel": True},
            "bf16_with_mxfp8_mixed",
            (4, 256),
        ),
    ],
)
def test_sequences_and_rows_are_padded_to_what_kernels_and_splits_demand(
    values: Values, model: Values, precision: Any, multiples: tuple[int, int]
) -> None:
    values["model"].update(model)
    assert padding(build_recipe({**values, "mixed_precision": precision})) == multiples


@pytest.mark.parametrize(
    ("given", "model", "multiples"),
    [
        (6, {}, (6, 6)),
        (6, {"context_parallel_size": 2}, (12, 12)),
        (64, {"context_parallel_size": 2}, (64, 64)),  # 4 divides it
        (6, {"tensor_model_parallel_size": 4, "sequence_parallel": True}, (6, 12)),
    ],
)
def test_sequences_are_padded_to_what_the_recipe_asks_for_as_well(
    values: Values, given: int, model: Values, multiples: tuple[int, int]
) -> None:
    values["data"]["pad_to_multiple_of"] = given
    values["model"].update(model)
    assert padding(build_recipe(values)) == multiples


def test_fp4_is_refused(values: Values) -> None:
    for precision in ("bf16_with_nvfp4_mixed", {"fp4": "e2m1"}):
        with pytest.raises(ConfigError, match=r"^mixed_precision \(.*\) must not be FP4: this version does not train"):
            padding(build_recipe({**values, "mixed_precision": precision}))


def weights_of(values: Values) -> dict[str, torch.Tensor]:
    return load_file(Path(model_source(build_recipe(values)), "model.safetensors"))


def test_random_weights_follow_from_the_seed_and_the_architecture_alone(values: Values, tmp_path: Path) -> None:
    first = weights_of(values)
    torch.manual_seed(1)  # not what they are drawn with
    values["run"]["cache_dir"] = str(tmp_path / "elsewhere")
    again = weights_of(values)
    other = weights_of({**values, "rng": {"seed": 5}})
    assert first.keys() == again.keys() == other.keys() and len(first) > 30
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.0.mlp.up_proj.weight"
    assert first[name].dtype == torch.float32 and first[name].shape == (64, 32)
    assert not torch.equal(first[name], other[name])
    assert len(list((tmp_path / "elsewhere" / "models").glob("random-*"))) == 2


def test_random_weights_leave_the_generator_of_the_process_alone(values: Values) -> None:
    before = torch.get_rng_state()
    model_source(build_recipe(values))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "lama"},
            "model.config.model_type ('lama') must be an architecture that transformers knows, such as llama or",
        ),
        ({"model_type": None}, "model.config.model_type (None) must be an architecture that transformers knows"),
        (
            {"hidden_size": "wide"},
            "model.config is no language model that transformers can build: StrictDataclassFieldValidationError: "
            "Validation error for field 'hidden_size'",
        ),
        ({"hidden_size": 33}, "model.config is no language model that transformers can build: "),
        ({"num_attention_heads": 0}, "model.config is no language model that transformers can build: "),
        ({"hidden_act": "swoosh"}, "model.config is no language model that transformers can build: KeyError: 'swoo"),
        ({"model_type": "vit"}, "model.config is no language model that transformers can build: "),
    ],
)
def test_an_architecture_that_cannot_be_built_is_one_short_line(
    values: Values, tmp_path: Path, config: Values, message: str
) -> None:
    values["model"]["config"].update(config)
    with pytest.raises(ConfigError) as error:
        load_hf_config(build_recipe(values))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert list(tmp_path.glob("runs/cache/models/random-*")) == []


def test_a_model_that_is_not_there_is_named(values: Values, tmp_path: Path) -> None:
    values["data"]["tokenizer"] = "some/tokenizer"
    missing = tmp_path / "no_model"
    with pytest.raises(ConfigError) as error:
        load_hf_config(build_recipe({**values, "model": {"hf": str(missing)}}))
    assert str(error.value).startswith(f"Model or tokenizer '{missing}': there is no such file or folder. Give a")
    missing.mkdir()
    with pytest.raises(ConfigError) as error:
        load_hf_config(build_recipe({**values, "model": {"hf": str(missing)}}))
    assert str(error.value).startswith(f"The model {missing} (model.hf) cannot be had: ")
    assert str(error.value).endswith("Give a Hugging Face folder or a GGUF file if this machine reaches no hub.")


def test_a_dry_run_takes_the_architecture_at_its_word(values: Values, tmp_path: Path) -> None:
    """Nothing is drawn, and a hub is not asked."""
    assert load_hf_config(build_recipe(values), dry_run=True).num_hidden_layers == 4
    values["model"]["hf"] = "org/no-such-model"
    assert load_hf_config(build_recipe(values), dry_run=True).hidden_size == 32
    with pytest.raises(ConfigError, match=r"^The model org/no-such-model \(model.hf\) cannot be had: "):
        load_hf_config(build_recipe(values))
    assert list(tmp_path.glob("runs/**/*")) == []
    values["model"]["config"]["model_type"] = "lama"
    with pytest.raises(ConfigError, match=r"^model.config.model_type \('lama'\) must be an architecture that"):
        load_hf_config(build_recipe(values), dry_run=True)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"num_hidden_layers": 3}, "model.config.num_hidden_layers (4) must be 3, as in the config.json of {hf}. "),
        ({"rms_norm_eps": 1e-5}, "model.config.rms_norm_eps (1e-06) must be 1e-05, as in the config.json of {hf}. "),
        (  # what is left out is a default of the architecture's, and declared as well
            {"attention_bias": True},
            "model.config.attention_bias (False) must be True, as in the config.json of {hf}. ",
        ),
        ({"use_cache": False, "eos_token_id": 7, "initializer_range": 0.5, "dtype": "bfloat16"}, None),
    ],
)
def test_the_declared_architecture_is_held_against_the_weights(
    values: Values, tmp_path: Path, theirs: Values, message: str | None
) -> None:
    config = values["model"]["config"]
    LlamaConfig(**{**config, **theirs}).save_pretrained(tmp_path / "model")
    values["model"]["hf"] = str(tmp_path / "model")
    if message is None:
        assert load_hf_config(build_recipe(values)).num_hidden_layers == 4
        return
    with pytest.raises(ConfigError) as error:
        load_hf_config(build_recipe(values))
    remedy = "Correct it, or set model.config=null to take theirs."
    assert str(error.value) == message.format(hf=tmp_path / "model") + remedy
    values["model"]["config"] = None
    assert load_hf_config(build_recipe(values)).model_type == "llama"


def test_weights_of_a_hub_id_are_a_folder(values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As adapters need those of their frozen base model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    recipe = build_recipe({**values, "model": {"hf": "org/model"}})
    with pytest.raises(ConfigError, match=r"^The model org/model \(model.hf\) cannot be had: "):
        local_model(recipe)
    folder = hub_folder("org/model", tmp_path / "home")
    (folder / "model.safetensors").touch()
    assert Path(local_model(recipe)) == folder
    assert local_model(build_recipe({**values, "model": {"hf": str(folder)}})) == str(folder)


def test_a_run_is_prepared_for_its_ranks(runnable: Values) -> None:
    runnable["model"]["tensor_model_parallel_size"] = 2
    recipe = build_recipe({**runnable, "train": {"num_epochs": 2}})
    prepared = prepare_run(recipe, load_hf_config(recipe), 6, None, show_progress=False)
    assert (len(prepared.store), len(prepared.eval_store or [])) == (20, 6)
    assert prepared.plan.num_steps == 6  # 20 pairs, 8 a step: 3 steps an epoch
    assert prepared.plan.rows_per_step == 3  # one for each data-parallel replica
    assert prepared.plan.max_tokens_per_row == 128 and prepared.plan.nll_scope == "prompt_and_response"
    assert prepared.eval_plan is not None and prepared.eval_plan.num_pairs(0) == 6
    assert prepared.store.pad_token_id == 2
    fixed = prepare_run(recipe, load_hf_config(recipe), 6, 9, show_progress=False)
    assert fixed.plan.rows_per_step == 9  # as a checkpoint has it
    with pytest.raises(ConfigError, match=r"^data.rows_per_step \(9\) must be a multiple of 2"):
        prepare_run(recipe, load_hf_config(recipe), 4, 9, show_progress=False)


@pytest.mark.parametrize(
    ("model", "world_size", "rows"),
    [
        ({}, 4, 4),
        ({"context_parallel_size": 2}, 4, 2),  # context ranks share a row
        ({"pipeline_model_parallel_size": 2}, 4, 2),
        # Under a virtual pipeline each of the data-parallel replicas takes as many rows at once as there are stages,
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, 4, 4),
        ({"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 1}, 4, 1),
        # or as the recipe says.
        (
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "microbatch_group_size_per_vp_stage": 3,
            },
            4,
            6,
        ),
    ],
)
def test_rows_are_a_multiple_of_what_all_ranks_take_at_once(
    runnable: Values, model: Values, world_size: int, rows: int
) -> None:
    """Eight of these pairs fit a single row, so that the fewest rows are what the split demands."""
    runnable["model"].update(model)
    runnable["data"]["max_tokens_per_row"] = 1024
    recipe = build_recipe(runnable)
    prepared = prepare_run(recipe, load_hf_config(recipe), world_size, None, show_progress=False)
    assert prepared.eval_plan is not None
    assert (prepared.plan.rows_per_step, prepared.eval_plan.rows_per_step) == (rows, rows)
    for plan in (prepared.plan, prepared.eval_plan):
        assert (plan.sequence_multiple_of, plan.row_length_multiple_of) == padding(recipe)
    if rows > 1:
        with pytest.raises(
            ConfigError, match=rf"^data.rows_per_step \({rows + 1}\) must be a multiple of {rows}, the"
        ):
            prepare_run(recipe, load_hf_config(recipe), world_size, rows + 1, show_progress=False)


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(runnable: Values, tokenizer_folder: str) -> None:
    recipe = build_recipe(runnable)
    with pytest.raises(ConfigError) as error:
        prepare_run(recipe, LlamaConfig(vocab_size=49151), 1, None, show_progress=False)
    assert str(error.value) == (
        f"The tokenizer {tokenizer_folder} has 49152 tokens but the model's vocabulary has 49151. Use the model's "
        "own tokenizer (leave data.tokenizer out) or a model with more."
    )


CHECKPOINT = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 8, "ffn_hidden_size": 64, "vocab_size": 96}


def checkpoint(folder: Path, **sizes: Any) -> str:
    """Writes what names the model in a Megatron checkpoint and returns the checkpoint's folder."""
    folder.mkdir(parents=True)
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": {**CHECKPOINT, **sizes}}))
    return str(folder)


def check(values: Values, path: str | None) -> None:
    config = LlamaConfig(**values["model"]["config"])
    check_pretrained(build_recipe({**values, "checkpoint": {"pretrained_checkpoint": path}}), config)


def test_a_checkpoint_of_the_model_passes(values: Values, tmp_path: Path) -> None:
    check(values, None)
    check(values, checkpoint(tmp_path / "plain"))
    check(values, checkpoint(tmp_path / "unsaid", vocab_size=None))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    check(values, str(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("size", "theirs", "ours"),
    [
        ("num_layers", 5, 4),
        ("hidden_size", 64, 32),
        ("num_attention_heads", 4, 8),
        ("ffn_hidden_size", 128, 64),
        ("vocab_size", 97, 96),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    values: Values, tmp_path: Path, size: str, theirs: int, ours: int
) -> None:
    path = checkpoint(tmp_path / "other", **{size: theirs})
    with pytest.raises(ConfigError) as error:
        check(values, path)
    assert str(error.value) == (
        f"The checkpoint {path} is of another model: its {size} is {theirs}, the recipe's model has {ours}. Give the "
        "checkpoint's model as model.hf or model.config."
    )


def test_the_latest_of_several_checkpoints_counts(values: Values, tmp_path: Path) -> None:
    checkpoint(tmp_path / "run" / "iter_0000002", hidden_size=64)
    checkpoint(tmp_path / "run" / "iter_0000010")
    checkpoint(tmp_path / "run" / "iter_0000012", hidden_size=64)  # was never completed
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("10")
    check(values, str(tmp_path / "run"))


def test_a_folder_of_which_bridge_would_make_nothing_is_refused(values: Values, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{tmp_path} holds no Megatron checkpoint \(no run_config\.yaml in it"):
        check(values, str(tmp_path))
    latest = tmp_path / "checkpoints" / "iter_0000010"
    checkpoint(latest)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("10")
    with pytest.raises(ConfigError) as error:
        check(values, str(tmp_path))
    assert str(error.value) == (
        f"checkpoint.pretrained_checkpoint ({tmp_path}) must be a checkpoint, or a folder with "
        f"latest_checkpointed_iteration.txt. Give {latest}."
    )
    check(values, str(latest))
