"""A recipe: YAML plus dotted overrides, read strictly and checked before Megatron is imported."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from orpo_megatron.bridge.compose import read_composed
from orpo_megatron.bridge.settings import bridge_settings
from orpo_megatron.config import ConfigError, DataConfig, OrpoConfig, RunConfig, build_section, nearest
from orpo_megatron.exact import EXACT_SETTINGS, check_adapted_modules

#: Bridge's sections that a recipe does not write, and where their content comes from instead.
_REPLACED_SECTIONS = {
    "dataset": "Describe the data in the section data.",
    "tokenizer": "Name the tokenizer in data.tokenizer; the model's own is the default.",
    "optimizer_config_override_provider": "It takes Python objects; use orpo_megatron from Python for that.",
}
#: Bridge's settings that follow from others here, and from which.
_REPLACED_SETTINGS = {
    "train.global_batch_size": "Bridge would count packed rows by it. Give data.pairs_per_step; rows are planned.",
    "train.micro_batch_size": "A microbatch is one packed row. Its size is data.max_tokens_per_row.",
    "train.train_samples": "Give train.train_iters or train.num_epochs.",
    "train.rampup_batch_size": "A step has data.pairs_per_step pairs throughout.",
    "train.step_batch_size_schedule": "A step has data.pairs_per_step pairs throughout.",
    "train.eval_iters": "An evaluation always covers all of data.eval.",
    "train.eval_interval": "Give validation.eval_interval.",
    "train.exit_signal": "SIGTERM and Ctrl-C both save a checkpoint and stop.",
    "train.exit_signal_handler": "SIGTERM and Ctrl-C both save a checkpoint and stop.",
    "validation.eval_iters": "An evaluation always covers all of data.eval.",
    "validation.eval_global_batch_size": "Evaluation rows are planned as training rows are.",
    "validation.eval_micro_batch_size": "A microbatch is one packed row.",
    "model.seq_length": "It follows from data.max_tokens_per_row.",
    "model.vocab_size": "It follows from the model.",
    "model.should_pad_vocab": "The vocabulary is padded to a multiple of the tensor parallel size by itself. Give "
    "model.make_vocab_size_divisible_by to pad it further.",
    "model.variable_seq_lengths": "It is on wherever pipeline stages exchange packed rows.",
    "model.transformer_layer_spec": "It is Transformer Engine's where that is installed, else the local one.",
    "model.cuda_graph_scope": "Rows differ in length, so that there are no CUDA graphs.",
    "model.cuda_graph_modules": "Rows differ in length, so that there are no CUDA graphs.",
    "checkpoint.save": "Checkpoints lie in run.dir.",
    "checkpoint.load": "A run resumes from run.dir by itself. To start from a Megatron checkpoint, give "
    "checkpoint.pretrained_checkpoint.",
    "checkpoint.ckpt_step": "A run goes on from its latest checkpoint. To start from an earlier one, give it to "
    "another run as checkpoint.pretrained_checkpoint.",
    "checkpoint.finetune": "A run goes on from its latest checkpoint. To start from its weights alone, give them to "
    "another run as checkpoint.pretrained_checkpoint.",
    "checkpoint.non_persistent_ckpt_type": "A run goes on from checkpoints in run.dir. Give checkpoint.save_interval, "
    "and checkpoint.most_recent_k to keep few of them.",
    "logger.tensorboard_dir": "TensorBoard files lie in run.dir.",
    "rng.data_parallel_random_init": "Replicas must start alike.",
    "rerun_state_machine.check_for_nan_in_loss": "run.on_nonfinite says what happens then, on all ranks alike.",
    "model.cross_entropy_loss_fusion": "The head computes log-probs, not Megatron's cross entropy.",
}
#: Bridge's settings that are used before Bridge could check them.
_WHOLE_NUMBERS = (
    "train.train_iters",
    "validation.eval_interval",
    "checkpoint.save_interval",
    "rng.seed",
    "model.microbatch_group_size_per_vp_stage",
    "model.make_vocab_size_divisible_by",
) + tuple(
    f"model.{kind}_parallel_size"
    for kind in (
        "tensor_model",
        "pipeline_model",
        "virtual_pipeline_model",
        "context",
        "expert_model",
        "expert_tensor",
    )
)
#: Bridge's settings by which stages get different numbers of layers.
UNEVEN_STAGES = (
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
#: Settings that say how a run is laid out and computed: they change neither its model nor its data.
LAYOUT_SETTINGS = frozenset(
    f"model.{name}"
    for name in (
        "microbatch_group_size_per_vp_stage",
        "make_vocab_size_divisible_by",
        "overlap_p2p_comm",
        "batch_p2p_comm",
        "cp_comm_type",
        "hierarchical_context_parallel_sizes",
        "moe_token_dispatcher_type",
        "deallocate_pipeline_outputs",
        *UNEVEN_STAGES,
    )
) | {"optimizer.use_distributed_optimizer", "optimizer.overlap_param_gather", "data.pad_to_multiple_of"}
#: Settings of the model section that are ours.
_MODEL_SOURCE = ("hf", "config")
#: What a run writes about itself beside its settings; a recipe that holds it can be used again.
RECORD = "record"


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        orpo: The objective.
        data: The preference pairs.
        run: Where the run lives.
        hf: HF id or folder, or GGUF file, to start from; None for random weights.
        hf_config: Architecture in Hugging Face's terms: that of ``hf``, or of a model with random weights.
        sections: Bridge's sections as given, without ``model.hf`` and ``model.config``.
    """

    orpo: OrpoConfig
    data: DataConfig
    run: RunConfig
    hf: str | None
    hf_config: dict[str, Any] | None
    sections: dict[str, Any] = field(default_factory=dict)

    def setting(self, name: str, default: Any = None) -> Any:
        """Returns one of Bridge's settings by its dotted name, as given."""
        section, key = name.split(".")
        value = (self.sections.get(section) or {}).get(key)
        return default if value is None else value

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.run.dir)

    @property
    def cache_dir(self) -> Path:
        """The folder for tokenised data and converted models."""
        return Path(self.run.cache_dir) if self.run.cache_dir else self.run_dir.parent / "cache"

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer comes from."""
        return self.data.tokenizer or self.hf or ""

    @property
    def seed(self) -> int:
        """Seed of the weights' initialisation and of the order of pairs (Bridge's default is 1234)."""
        return int(self.setting("rng.seed", 1234))

    def parallel_size(self, kind: str) -> int:
        """Returns the size of one kind of parallelism.

        Args:
            kind: ``tensor_model``, ``pipeline_model``, ``virtual_pipeline_model`` (chunks a stage), ``context``,
                ``expert_model`` or ``expert_tensor``.
        """
        return int(self.setting(f"model.{kind}_parallel_size", 1))

    def data_parallel_size(self, world_size: int) -> int:
        """Returns how many data-parallel replicas a world of ranks holds."""
        model = self.parallel_size("tensor_model") * self.parallel_size("pipeline_model")
        return world_size // (model * self.parallel_size("context"))

    def as_dict(self) -> dict[str, Any]:
        """Returns the recipe as plain values, every setting of ours written out."""
        source = {name: value for name, value in (("hf", self.hf), ("config", self.hf_config)) if value is not None}
        sections = dict(self.sections)
        model = {"model": {**source, **sections.pop("model", {})}}
        ours = {name: dataclasses.asdict(getattr(self, name)) for name in ("orpo", "data", "run")}
        return {**ours, **model, **sections}


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: YAML file; ``base`` in it names files that it builds on (``read_composed``).
        overrides: ``section.key=value``, values in YAML; they win over all files.

    Returns:
        The checked recipe.

    Raises:
        ConfigError: If the file, a key, a value or a combination is not right.
    """
    for override in overrides:
        if "=" not in override or override.startswith(("-", "=")):
            raise ConfigError(f"{override} is not an override. Write section.key=value, such as orpo.beta=0.2.")
    try:
        merged = OmegaConf.merge(read_composed(Path(path)), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"The recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    return build_recipe(cast(dict[str, Any], values))


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """Checks a recipe's plain values; see ``load_recipe``."""
    known = bridge_settings()
    ours = {"orpo": OrpoConfig, "data": DataConfig, "run": RunConfig}
    sections: dict[str, Any] = {}
    for name, section in values.items():
        if name in _REPLACED_SECTIONS:
            raise ConfigError(f"The section {name} is not written in a recipe. {_REPLACED_SECTIONS[name]}")
        if name in ours or name == RECORD:
            continue
        if name not in known:
            usable = [*ours, *(k for k in known if k not in _REPLACED_SECTIONS)]
            raise ConfigError(f"{name} is not a section of a recipe.{nearest(str(name), usable)}")
        if section is None:
            continue
        sections[name] = _checked_section(str(name), section, known[name])
    model = dict(sections.pop("model", {}))
    hf, hf_config = model.pop("hf", None), model.pop("config", None)
    recipe = Recipe(
        orpo=build_section(OrpoConfig, values.get("orpo") or {}, "orpo"),
        data=build_section(DataConfig, values.get("data") or {}, "data"),
        run=build_section(RunConfig, values.get("run") or {}, "run"),
        hf=hf,
        hf_config=hf_config,
        sections={"model": model, **sections},
    )
    _check_whole(recipe)
    return recipe


def _checked_section(name: str, section: Any, known: frozenset[str]) -> Any:
    """Checks the names in one of Bridge's sections."""
    if name == "mixed_precision" and isinstance(section, str):
        return section
    if not isinstance(section, Mapping):
        raise ConfigError(f"{name} must be a mapping of settings, not {section!r}.")
    if name == "env_vars":
        return dict(section)
    names = known | set(_MODEL_SOURCE) if name == "model" else known
    for key, value in section.items():
        full = f"{name}.{key}"
        if key not in names:
            raise ConfigError(f"{full} is not a setting.{nearest(str(key), names)}")
        if full in _REPLACED_SETTINGS and value is not None:
            raise ConfigError(f"{full} is not set in a recipe. {_REPLACED_SETTINGS[full]}")
        if full in EXACT_SETTINGS and value not in (None, EXACT_SETTINGS[full][0]):
            exact, reason = EXACT_SETTINGS[full]
            raise ConfigError(f"{full} ({value}) must be {exact}: {reason}. Leave it out.")
    return dict(section)


def _check_whole(recipe: Recipe) -> None:
    """Checks what several settings say together."""
    if recipe.hf is None and recipe.hf_config is None:
        raise ConfigError(
            "A recipe gives model.hf (a Hugging Face id or folder, or a GGUF file, to start from), model.config (its "
            "architecture in Hugging Face's terms; without model.hf the weights are random), or both."
        )
    if recipe.hf is not None and not isinstance(recipe.hf, str):
        raise ConfigError(f"model.hf ({recipe.hf!r}) must be a Hugging Face id, a folder or a GGUF file.")
    if recipe.hf_config is not None and not isinstance(recipe.hf_config, dict):
        raise ConfigError(f"model.config ({recipe.hf_config!r}) must be a mapping, as in a config.json.")
    if not recipe.tokenizer:
        raise ConfigError("data.tokenizer is missing: a model from model.config has no tokenizer of its own.")
    iters, epochs = recipe.setting("train.train_iters"), recipe.setting("train.num_epochs")
    if (iters is None) == (epochs is None):
        raise ConfigError("A recipe gives train.train_iters (steps) or train.num_epochs (passes over the pairs): one.")
    if epochs is not None and (type(epochs) not in (int, float) or not 0 < epochs < math.inf):
        raise ConfigError(f"train.num_epochs ({epochs!r}) must be a number above 0.")
    check_adapted_modules(recipe.setting("peft.target_modules") or ())
    for name in _WHOLE_NUMBERS:
        value = recipe.setting(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{name} ({value!r}) must be a whole number of at least 1.")
    if recipe.setting("validation.eval_interval") and recipe.data.eval is None:
        raise ConfigError("validation.eval_interval is set but data.eval is not: there is nothing to evaluate.")


def check_layout(recipe: Recipe, hf_config: Any, world_size: int) -> None:
    """Checks that the model can be split as the recipe says over the ranks there are.

    Args:
        recipe: The recipe.
        hf_config: The model's Hugging Face configuration.
        world_size: Number of ranks.

    Raises:
        ConfigError: If ranks, heads or layers do not divide.
    """
    sizes = {kind: recipe.parallel_size(kind) for kind in ("tensor_model", "pipeline_model", "context")}
    _check_world(world_size, sizes)
    heads = getattr(hf_config, "num_attention_heads", None)
    groups = getattr(hf_config, "num_key_value_heads", None) or heads
    parts = [("attention heads", heads, "tensor_model"), ("key-value heads", groups, "tensor_model")]
    num_experts = num_routed_experts(hf_config)
    if num_experts:
        _check_world(
            world_size, {k: recipe.parallel_size(k) for k in ("expert_model", "expert_tensor", "pipeline_model")}
        )
        parts.append(("experts", num_experts, "expert_model"))
    elif recipe.parallel_size("expert_model") > 1:
        raise ConfigError(
            f"model.expert_model_parallel_size ({recipe.parallel_size('expert_model')}) must be 1: the model has no "
            "experts."
        )
    for what, count, kind in parts:
        size = recipe.parallel_size(kind)
        copied = what == "key-value heads" and count and size % count == 0  # one for several ranks
        if count is not None and count % size and not copied:
            raise ConfigError(
                f"The model's {count} {what} cannot be split over model.{kind}_parallel_size ({size}). "
                f"Use {_largest_divisors(count, size)}."
            )
    _check_stages(recipe, getattr(hf_config, "num_hidden_layers", None))


def _check_stages(recipe: Recipe, layers: int | None) -> None:
    """Checks that the layers divide over pipeline stages and their chunks, unless the recipe spreads them itself."""
    pp, vp = recipe.parallel_size("pipeline_model"), recipe.parallel_size("virtual_pipeline_model")
    if vp > 1 and pp == 1:
        raise ConfigError(
            f"model.virtual_pipeline_model_parallel_size ({vp}) needs model.pipeline_model_parallel_size above 1. "
            "Leave it out, or split the model into stages."
        )
    group = recipe.setting("model.microbatch_group_size_per_vp_stage")
    if group is not None and group < pp:
        raise ConfigError(
            f"model.microbatch_group_size_per_vp_stage ({group}) must be at least model.pipeline_model_parallel_size "
            f"({pp}). Leave it out to have it so."
        )
    if layers is None or any(recipe.setting(f"model.{name}") for name in UNEVEN_STAGES):
        return
    if layers % pp:
        raise ConfigError(
            f"The model's {layers} layers cannot be split over model.pipeline_model_parallel_size ({pp}). Use "
            f"{_largest_divisors(layers, pp)}."
        )
    if layers // pp % vp:
        raise ConfigError(
            f"The {layers // pp} layers of each pipeline stage cannot be split over "
            f"model.virtual_pipeline_model_parallel_size ({vp}). Use {_largest_divisors(layers // pp, vp)}."
        )


def _largest_divisors(count: int, below: int) -> str:
    """Returns up to three numbers below ``below`` that divide ``count``, in words."""
    return " or ".join([str(n) for n in range(1, below) if count % n == 0][-3:])


def num_routed_experts(hf_config: Any) -> int:
    """Returns how many experts the model routes between, 0 for a dense one."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((int(count) for name in names if (count := getattr(hf_config, name, None))), 0)


def _check_world(world_size: int, sizes: Mapping[str, int]) -> None:
    """Checks that the ranks are a multiple of the product of some parallel sizes."""
    product = math.prod(sizes.values())
    if world_size % product:
        names = " x ".join(kind.removesuffix("_model").replace("_", "-") for kind in sizes)
        raise ConfigError(
            f"The number of processes ({world_size}) must be a multiple of {names} parallel size "
            f"({' x '.join(map(str, sizes.values()))} = {product}). Start {-(-world_size // product) * product} "
            "processes (torchrun --nproc-per-node), or split less."
        )
