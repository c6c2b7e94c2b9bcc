"""Recipes: what a file and overrides may say, and the message for everything else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import DeepseekV3Config, LlamaConfig, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from orpo_megatron.bridge.recipe import RECORD, build_recipe, check_layout, load_recipe, num_routed_experts
from orpo_megatron.bridge.settings import bridge_settings
from orpo_megatron.config import ConfigError

Values = dict[str, Any]


def changed(values: Values, **settings: Any) -> Values:
    """Returns the values with some settings changed, named ``section__key``; None stays None."""
    fresh = copy.deepcopy(values)
    for name, value in settings.items():
        section, _, key = name.partition("__")
        if key:
            fresh.setdefault(section, {})[key] = value
        else:
            fresh[section] = value
    return fresh


def refusal(values: Values) -> str:
    """Returns the message with which a recipe is refused."""
    with pytest.raises(ConfigError) as error:
        build_recipe(values)
    return str(error.value)


def write(tmp_path: Path, content: Any) -> str:
    """Writes a recipe and returns its path."""
    path = tmp_path / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def test_a_recipe_is_its_sections_with_defaults(values: Values, tmp_path: Path) -> None:
    recipe = build_recipe(changed(values, rng__seed=7, model__tensor_model_parallel_size=2))
    assert recipe.hf is None and recipe.hf_config == values["model"]["config"]
    assert recipe.sections["model"] == {"tensor_model_parallel_size": 2}  # hf and config are ours, not Bridge's
    assert recipe.setting("optimizer.lr") == 1e-3 and recipe.setting("optimizer.min_lr", 5.0) == 5.0
    assert (recipe.seed, build_recipe(values).seed) == (7, 1234)
    assert recipe.tokenizer == "some/tokenizer"
    assert recipe.run_dir == tmp_path / "runs" / "tiny" and recipe.cache_dir == tmp_path / "runs" / "cache"
    assert [recipe.parallel_size(kind) for kind in ("tensor_model", "pipeline_model", "context")] == [2, 1, 1]
    assert recipe.data_parallel_size(8) == 4


def test_the_tokenizer_is_the_models_own_unless_given(values: Values) -> None:
    own = changed(values, model={"hf": "org/model"}, data={"train": "a"})
    assert build_recipe(own).tokenizer == "org/model"
    assert build_recipe(changed(own, data__tokenizer="other")).tokenizer == "other"


def test_an_architecture_may_stand_beside_the_weights(values: Values) -> None:
    both = build_recipe(changed(values, model__hf="org/model"))
    assert (both.hf, both.hf_config) == ("org/model", values["model"]["config"])
    assert both.as_dict()["model"] == {"hf": "org/model", "config": values["model"]["config"]}
    assert build_recipe(changed(values, model__hf="org/model", model__config=None)).as_dict()["model"] == {
        "hf": "org/model"
    }


def test_a_section_may_be_empty(values: Values) -> None:
    assert build_recipe(changed(values, orpo=None, scheduler=None)).orpo.beta == 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modle": {}}, "modle is not a section of a recipe. Did you mean 'model'?"),
        ({"scheduller": None}, "scheduller is not a section of a recipe. Did you mean 'scheduler'?"),
        ({"orpo__bta": 1}, "orpo.bta is not a setting. Did you mean 'beta'?"),
        ({"data__max_lenght": 1}, "data.max_lenght is not a setting. Did you mean 'max_length'?"),
        ({"optimizer__lrr": 1}, "optimizer.lrr is not a setting. Did you mean 'lr'?"),
        (
            {"model__tensor_paralel_size": 2},
            "model.tensor_paralel_size is not a setting. Did you mean 'tensor_model_parallel_size'?",
        ),
        ({"optimizer": 3}, "optimizer must be a mapping of settings, not 3."),
        ({"run": {}}, "run.dir is missing: the recipe must give it."),
        ({"data": None}, "data.train is missing: the recipe must give it."),
        ({"data": {"train": "a"}}, "data.tokenizer is missing: a model from model.config has no tokenizer"),
        ({"model": {}}, "A recipe gives model.hf (a Hugging Face id or folder, or a GGUF file, to start from), "),
        ({"model": {"hf": 3}}, "model.hf (3) must be a Hugging Face id, a folder or a GGUF file."),
        ({"model": {"config": "llama"}}, "model.config ('llama') must be a mapping, as in a config.json."),
        ({"train": {}}, "A recipe gives train.train_iters (steps) or train.num_epochs (passes over the pairs): one."),
        ({"train__num_epochs": 1}, "A recipe gives train.train_iters (steps) or train.num_epochs (passes over the"),
        ({"train__train_iters": 2.5}, "train.train_iters (2.5) must be a whole number of at least 1."),
        ({"train__train_iters": True}, "train.train_iters (True) must be a whole number of at least 1."),
        ({"train": {"num_epochs": 0}}, "train.num_epochs (0) must be a number above 0."),
        ({"train": {"num_epochs": float("inf")}}, "train.num_epochs (inf) must be a number above 0."),
        ({"train": {"num_epochs": "3"}}, "train.num_epochs ('3') must be a number above 0."),
        ({"rng__seed": -1}, "rng.seed (-1) must be a whole number of at least 1."),
        ({"rng__seed": "today"}, "rng.seed ('today') must be a whole number of at least 1."),
        ({"validation__eval_interval": 5}, "validation.eval_interval is set but data.eval is not: there is nothing"),
        (
            {"data__eval": "e.jsonl", "validation__eval_interval": 0.5},
            "validation.eval_interval (0.5) must be a whole number of at least 1.",
        ),
        ({"model__tensor_model_parallel_size": 0}, "model.tensor_model_parallel_size (0) must be a whole number"),
        ({"model__tensor_model_parallel_size": "2"}, "model.tensor_model_parallel_size ('2') must be a whole number"),
        ({"model__pipeline_model_parallel_size": True}, "model.pipeline_model_parallel_size (True) must be a whole"),
        (
            {"model__context_parallel_size": 1.0},
            "model.context_parallel_size (1.0) must be a whole number of at least",
        ),
        (
            {"model__virtual_pipeline_model_parallel_size": 0},
            "model.virtual_pipeline_model_parallel_size (0) must be a whole number of at least 1.",
        ),
        ({"model__expert_model_parallel_size": "2"}, "model.expert_model_parallel_size ('2') must be a whole number"),
        ({"model__expert_tensor_parallel_size": 0}, "model.expert_tensor_parallel_size (0) must be a whole number of"),
    ],
)
def test_what_is_wrong_is_named(values: Values, settings: Values, message: str) -> None:
    assert refusal(changed(values, **settings)).startswith(message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": {}}, "The section dataset is not written in a recipe. Describe the data in the section data."),
        ({"tokenizer": None}, "The section tokenizer is not written in a recipe. Name the tokenizer in data.tokenize"),
        ({"train__global_batch_size": 8}, "train.global_batch_size is not set in a recipe. Bridge would count packed"),
        ({"train__micro_batch_size": 1}, "train.micro_batch_size is not set in a recipe. A microbatch is one packed"),
        ({"validation__eval_iters": 1}, "validation.eval_iters is not set in a recipe. An evaluation always covers"),
        ({"model__seq_length": 1}, "model.seq_length is not set in a recipe. It follows from data.max_tokens_per_row"),
        ({"model__should_pad_vocab": True}, "model.should_pad_vocab is not set in a recipe. The vocabulary is padded"),
        ({"checkpoint__save": "a"}, "checkpoint.save is not set in a recipe. Checkpoints lie in run.dir."),
        (
            {"checkpoint__load": "a"},
            "checkpoint.load is not set in a recipe. A run resumes from run.dir by itself. To start from a Megatron "
            "checkpoint, give checkpoint.pretrained_checkpoint.",
        ),
        ({"rng__data_parallel_random_init": True}, "rng.data_parallel_random_init is not set in a recipe."),
        (
            {"model__hidden_dropout": 0.1},
            "model.hidden_dropout (0.1) must be 0.0: the loss would depend on how ranks are laid out. Leave it out.",
        ),
        ({"model__attention_dropout": 0.1}, "model.attention_dropout (0.1) must be 0.0: the loss would"),
        (
            {"model__calculate_per_token_loss": True},
            "model.calculate_per_token_loss (True) must be False: the loss is divided by counts of the whole global "
            "batch already. Leave it out.",
        ),
        (
            {"model__moe_expert_capacity_factor": 1.25},
            "model.moe_expert_capacity_factor (1.25) must be None: the loss would depend on how "
            "ranks are laid out. Leave it out.",
        ),
        (
            {"model__moe_expert_rank_capacity_factor": 2.0},
            "model.moe_expert_rank_capacity_factor (2.0) must be None: the loss would depend on how",
        ),
        (
            {"model__moe_input_jitter_eps": 0.01},
            "model.moe_input_jitter_eps (0.01) must be None: the loss would depend on how ranks are laid",
        ),
        (
            {"peft": {"dropout": 0.1}},
            "peft.dropout (0.1) must be 0.0: the loss would depend on how ranks are laid out.",
        ),
        (
            {"peft": {"target_modules": ["linear_qkv", "output_layer"]}},
            "peft.target_modules (output_layer) must not hold the vocabulary's layers",
        ),
        (
            {"model__moe_router_force_load_balancing": True},
            "model.moe_router_force_load_balancing (True) must be False: it routes at random.",
        ),
        (
            {"comm_overlap": {"tp_comm_overlap": True}},
            "comm_overlap.tp_comm_overlap (True) must be False: its buffers have one size, and rows differ in length.",
        ),
        (
            {"model__overlap_moe_expert_parallel_comm": True},
            "model.overlap_moe_expert_parallel_comm (True) must be False: its schedule takes no output processor.",
        ),
        ({"model__hybrid_context_parallel": True}, "model.hybrid_context_parallel (True) must be False"),
        ({"dist": {"use_decentralized_pg": True}}, "dist.use_decentralized_pg (True) must be False"),
        ({"ddp": {"check_for_nan_in_grad": True}}, "ddp.check_for_nan_in_grad (True) must be False: one rank would"),
        (
            {"rerun_state_machine": {"check_for_nan_in_loss": False}},
            "rerun_state_machine.check_for_nan_in_loss is not set in a recipe. run.on_nonfinite says",
        ),
        (
            {"model__microbatch_group_size_per_vp_stage": 0},
            "model.microbatch_group_size_per_vp_stage (0) must be a whole number of at least 1.",
        ),
    ],
)
def test_a_setting_that_would_break_the_run_is_refused(values: Values, settings: Values, message: str) -> None:
    assert refusal(changed(values, **settings)).startswith(message)


def test_an_exact_setting_may_be_spelt_out(values: Values) -> None:
    exact = {
        "model__hidden_dropout": 0.0,
        "model__calculate_per_token_loss": False,
        "model__moe_input_jitter_eps": None,
    }
    assert build_recipe(changed(values, **exact)).setting("model.hidden_dropout") == 0.0


def test_every_kind_of_split_has_its_size(values: Values) -> None:
    sizes = dict(
        tensor_model=2, pipeline_model=3, virtual_pipeline_model=4, context=5, expert_model=6, expert_tensor=7
    )
    split = build_recipe(changed(values, **{f"model__{kind}_parallel_size": size for kind, size in sizes.items()}))
    assert {kind: split.parallel_size(kind) for kind in sizes} == sizes
    assert split.data_parallel_size(60) == 2  # tensor x pipeline x context ranks hold one replica; experts cut across
    assert [build_recipe(values).parallel_size(kind) for kind in sizes] == [1] * 6
    none = build_recipe(changed(values, model__virtual_pipeline_model_parallel_size=None))
    assert none.parallel_size("virtual_pipeline_model") == 1


def test_every_replaced_or_exact_setting_exists_in_bridge() -> None:
    from orpo_megatron.bridge import recipe

    known = bridge_settings()
    uneven = [f"model.{name}" for name in recipe.UNEVEN_STAGES]
    for name in [*recipe._REPLACED_SETTINGS, *recipe.EXACT_SETTINGS, *recipe._WHOLE_NUMBERS, *uneven]:
        section, key = name.split(".")
        assert key in known[section], name
    assert set(recipe._REPLACED_SECTIONS) <= set(known)


def test_overrides_win_and_are_read_as_yaml(values: Values, tmp_path: Path) -> None:
    path = write(tmp_path, changed(values, scheduler__lr_warmup_iters=3))
    recipe = load_recipe(
        path,
        [
            "optimizer.lr=5e-6",
            "orpo.beta=1",
            "data.train=[a.jsonl, b.jsonl]",
            "scheduler.lr_warmup_iters=null",
            "model.config.rope_parameters.rope_theta=1e4",
            "model.config.num_hidden_layers=2",
            "ddp.overlap_grad_reduce=true",
            "run.dir=runs/a=b",
            "mixed_precision=bf16_mixed",
            "env_vars.NCCL_DEBUG=INFO",
        ],
    )
    lr = recipe.setting("optimizer.lr")
    assert lr == 5e-6 and isinstance(lr, float)
    assert isinstance(recipe.orpo.beta, float) and recipe.orpo.beta == 1.0
    assert recipe.data.train == ["a.jsonl", "b.jsonl"] and recipe.run.dir == "runs/a=b"
    assert recipe.sections["scheduler"] == {"lr_warmup_iters": None}
    assert recipe.hf_config == {
        **values["model"]["config"],
        "num_hidden_layers": 2,
        "rope_parameters": {"rope_theta": 10000.0},
    }
    assert recipe.setting("ddp.overlap_grad_reduce") is True
    assert recipe.sections["mixed_precision"] == "bf16_mixed"
    assert recipe.sections["env_vars"] == {"NCCL_DEBUG": "INFO"}


@pytest.mark.parametrize("override", ["orpo.beta", "--orpo.beta=1", "=1"])
def test_what_is_no_override_is_named(values: Values, tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(write(tmp_path, values), [override])
    assert str(error.value) == (f"{override} is not an override. Write section.key=value, such as orpo.beta=0.2.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run: [\n", "cannot be read: while parsing a flow node expected the node content, but found '<stream end>'"),
        ("run: {dir: a}\nrun: {dir: b}\n", "cannot be read: while constructing a mapping"),
        ("orpo:\n  beta: 1\n  beta: 2\n", "found duplicate key beta"),
        ("- a\n- b\n", "must be a mapping of sections, not a list."),
        ("3\n", "cannot be read: Invalid loaded object type: int"),
        ("", "data.train is missing"),
        ("run: {dir: '${nothing}'}\n", "cannot be read: Interpolation key 'nothing' not found"),
        ("run: {dir: '???'}\n", "cannot be read: Missing mandatory value: dir full_key: run.dir"),
        ("run: !!python/object/apply:os.getcwd []\n", "could not determine a constructor for the tag"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00run")
    with pytest.raises(ConfigError, match="binary.yaml cannot be read: 'utf-8' codec can't decode byte 0xff"):
        load_recipe(str(tmp_path / "binary.yaml"))
    with pytest.raises(ConfigError, match=f"^There is no recipe at {tmp_path}/none.yaml.$"):
        load_recipe(str(tmp_path / "none.yaml"))


def test_a_resolved_recipe_reads_back_as_itself(values: Values, tmp_path: Path) -> None:
    recipe = build_recipe(
        changed(
            values,
            data__train=["a.jsonl", "b.jsonl"],
            data__max_bad_rows=3,
            data__chat_template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
            mixed_precision="bf16_mixed",
            optimizer__lr=5e-6,
            scheduler__lr_decay_style="cosine",
            env_vars={"A": "on"},
        )
    )
    record = {"versions": {"torch": "2.0"}, "rows_per_step": 4}
    written = {**recipe.as_dict(), RECORD: record}
    assert build_recipe(written) == recipe
    assert load_recipe(write(tmp_path, yaml.safe_dump(written, sort_keys=False))) == recipe
    hf = build_recipe(changed(values, model={"hf": "org/model", "tensor_model_parallel_size": 2}))
    assert build_recipe(hf.as_dict()) == hf
    assert hf.as_dict()["model"] == {"hf": "org/model", "tensor_model_parallel_size": 2}


SHIPPED = sorted((Path(__file__).resolve().parents[3] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_accepted(path: Path) -> None:
    assert load_recipe(str(path)).run.dir.startswith("runs/")


MODEL = LlamaConfig(hidden_size=96, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=4, vocab_size=100)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "world_size", "model", "message"),
    [
        (
            2,
            1,
            3,
            {},
            "The number of processes (3) must be a multiple of tensor x pipeline x context parallel size "
            "(2 x 1 x 1 = 2). Start 4 processes (torchrun --nproc-per-node), or split less.",
        ),
        (2, 4, 1, {}, "The number of processes (1) must be a multiple of tensor x pipeline x context parallel size "),
        (
            8,
            1,
            8,
            {},
            "The model's 12 attention heads cannot be split over model.tensor_model_parallel_size (8). "
            "Use 3 or 4 or 6.",
        ),
        (
            6,
            1,
            6,
            {},
            "The model's 4 key-value heads cannot be split over model.tensor_model_parallel_size (6). "
            "Use 1 or 2 or 4.",
        ),
        (
            1,
            4,
            4,
            {},
            "The model's 6 layers cannot be split over model.pipeline_model_parallel_size (4). Use 1 or 2 or 3.",
        ),
    ],
)
def test_a_layout_that_does_not_divide_is_named_with_what_does(
    values: Values, tensor: int, pipeline: int, world_size: int, model: Values, message: str
) -> None:
    parallel = {"model__tensor_model_parallel_size": tensor, "model__pipeline_model_parallel_size": pipeline}
    with pytest.raises(ConfigError) as error:
        check_layout(
            build_recipe(changed(values, **parallel)), LlamaConfig(**{**MODEL.to_dict(), **model}), world_size
        )
    assert str(error.value).startswith(message)


def test_a_layout_that_divides_passes(values: Values) -> None:
    parallel = {"model__tensor_model_parallel_size": 4, "model__pipeline_model_parallel_size": 2}
    check_layout(build_recipe(changed(values, **parallel)), MODEL, 16)
    odd = LlamaConfig(**{**MODEL.to_dict(), "vocab_size": 101})  # it is padded
    check_layout(build_recipe(changed(values, **parallel)), odd, 16)
    few = LlamaConfig(**{**MODEL.to_dict(), "num_key_value_heads": 2})  # each on two ranks
    check_layout(build_recipe(changed(values, **parallel)), few, 16)


MIXTURE = MixtralConfig(**{**MODEL.to_dict(), "model_type": "mixtral", "num_local_experts": 6})


@pytest.mark.parametrize(
    ("sizes", "world_size", "model", "message"),
    [
        (
            {"tensor_model": 2, "pipeline_model": 2, "context": 3},
            16,
            MODEL,
            "The number of processes (16) must be a multiple of tensor x pipeline x context parallel size "
            "(2 x 2 x 3 = 12). Start 24 processes (torchrun --nproc-per-node), or split less.",
        ),
        (
            {"virtual_pipeline_model": 2},
            1,
            MODEL,
            "model.virtual_pipeline_model_parallel_size (2) needs model.pipeline_model_parallel_size above 1. Leave "
            "it out, or split the model into stages.",
        ),
        (
            {"pipeline_model": 2, "virtual_pipeline_model": 2},
            2,
            MODEL,
            "The 3 layers of each pipeline stage cannot be split over model.virtual_pipeline_model_parallel_size (2). "
            "Use 1.",
        ),
        (
            {"pipeline_model": 4, "virtual_pipeline_model": 2},
            4,
            MODEL,
            "The model's 6 layers cannot be split over model.pipeline_model_parallel_size (4). Use 1 or 2 or 3.",
        ),
        (
            {"expert_model": 2},
            2,
            MODEL,
            "model.expert_model_parallel_size (2) must be 1: the model has no experts.",
        ),
        (
            {"expert_model": 4},
            4,
            MIXTURE,
            "The model's 6 experts cannot be split over model.expert_model_parallel_size (4). Use 1 or 2 or 3.",
        ),
        (
            {"expert_model": 3, "expert_tensor": 2, "pipeline_model": 2},
            16,
            MIXTURE,
            "The number of processes (16) must be a multiple of expert x expert-tensor x pipeline parallel size "
            "(3 x 2 x 2 = 12). Start 24 processes (torchrun --nproc-per-node), or split less.",
        ),
        (
            {"tensor_model": 8},
            8,
            MIXTURE,
            "The model's 12 attention heads cannot be split over model.tensor_model_parallel_size (8). Use 3 or 4 or",
        ),
    ],
)
def test_every_other_split_that_does_not_divide_is_named(
    values: Values, sizes: Values, world_size: int, model: PretrainedConfig, message: str
) -> None:
    recipe = build_recipe(changed(values, **{f"model__{kind}_parallel_size": size for kind, size in sizes.items()}))
    with pytest.raises(ConfigError) as error:
        check_layout(recipe, model, world_size)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("settings", "world_size", "model"),
    [
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3}, 2, MODEL),
        ({"pipeline_model_parallel_size": 3, "virtual_pipeline_model_parallel_size": 1}, 3, MODEL),
        ({"context_parallel_size": 4, "tensor_model_parallel_size": 2}, 8, MODEL),
        ({"expert_model_parallel_size": 3, "expert_tensor_parallel_size": 2}, 6, MIXTURE),
        # The experts' ranks are the dense layers' ranks, grouped in another way.
        ({"expert_model_parallel_size": 6, "tensor_model_parallel_size": 2, "context_parallel_size": 3}, 6, MIXTURE),
        # A recipe that spreads the layers itself is not asked whether they divide.
        ({"pipeline_model_parallel_size": 4, "num_layers_in_first_pipeline_stage": 3}, 4, MODEL),
        ({"pipeline_model_parallel_size": 4, "num_layers_in_last_pipeline_stage": 3}, 4, MODEL),
        ({"pipeline_model_parallel_size": 4, "account_for_embedding_in_pipeline_split": True}, 4, MODEL),
        ({"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|ttttt|tL"}, 2, MODEL),
    ],
)
def test_every_other_split_that_divides_passes(
    values: Values, settings: Values, world_size: int, model: PretrainedConfig
) -> None:
    check_layout(build_recipe(changed(values, **{f"model__{k}": v for k, v in settings.items()})), model, world_size)


def test_experts_are_found_under_the_names_of_transformers() -> None:
    assert num_routed_experts(MODEL) == 0
    assert num_routed_experts(MixtralConfig(num_local_experts=6)) == 6
    assert num_routed_experts(Qwen3MoeConfig(num_experts=10)) == 10
    assert num_routed_experts(DeepseekV3Config(n_routed_experts=12)) == 12
