"""The model card of an exported model: what was trained, on what, how, and how well."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

FILE_ENDINGS = (".gguf", ".json", ".jsonl", ".gz", ".parquet", ".csv", ".arrow", ".zst")
HYPERPARAMETERS = (
    ("β (weight of the odds-ratio term)", "orpo.beta"),
    ("NLL over", "orpo.nll_scope"),
    ("NLL averaged by", "orpo.nll_reduction"),
    ("Pairs per step", "data.pairs_per_step"),
    ("Longest prompt, longest sequence (tokens)", "data.max_prompt_length data.max_length"),
    ("Pairs that are too long", "data.overlong"),
    ("Steps", "train.train_iters"),
    ("Epochs", "train.num_epochs"),
    ("Optimizer", "optimizer.optimizer"),
    ("Learning rate", "optimizer.lr"),
    ("Lowest learning rate", "optimizer.min_lr"),
    ("Schedule", "scheduler.lr_decay_style"),
    ("Warm-up steps", "scheduler.lr_warmup_iters"),
    ("Weight decay", "optimizer.weight_decay"),
    ("Gradient clipping", "optimizer.clip_grad"),
    ("Precision", "mixed_precision"),
    ("Seed", "rng.seed"),
)
METRICS = (
    ("Loss", "loss"),
    ("NLL (nats per token)", "nll_loss"),
    ("Odds-ratio loss", "odds_ratio_loss"),
    ("Accuracy (chosen above rejected)", "rewards/accuracies"),
    ("Margin (nats per token)", "logps/margins"),
    ("Log-probability of chosen", "logps/chosen"),
    ("Log-probability of rejected", "logps/rejected"),
)
OBJECTIVE = r"""ORPO ([arXiv 2403.07691](https://arxiv.org/abs/2403.07691)) aligns a model in one phase, without a
reference model: supervised fine-tuning on the chosen response $y_c$ plus a penalty on the odds of the rejected one
$y_r$,

$$
\mathcal{L} = \mathcal{L}_{\mathrm{NLL}}(y_c) -
\beta \, \log \sigma \left( \log \frac{\mathrm{odds}(y_c \mid x)}{\mathrm{odds}(y_r \mid x)} \right),
\qquad \mathrm{odds}(y \mid x) = \frac{p(y \mid x)}{1 - p(y \mid x)},
$$

where $\log p(y \mid x)$ is the mean log-probability of the response's tokens."""
USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the hub name it was uploaded under
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
"""
USAGE_CHAT = """messages = [{"role": "user", "content": "Why is the sky blue?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
"""
USAGE_TEXT = """inputs = tokenizer("The sky is blue because", return_tensors="pt")
"""
USAGE_END = """output = model.generate(**inputs, max_new_tokens=200)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""
CITATION = """```bibtex
@inproceedings{hong2024orpo,
  title     = {{ORPO}: Monolithic Preference Optimization without Reference Model},
  author    = {Hong, Jiwoo and Lee, Noah and Thorne, James},
  booktitle = {Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing},
  year      = {2024},
  url       = {https://arxiv.org/abs/2403.07691}
}
```"""


def model_card(
    *,
    base_model: str,
    recipe: Mapping[str, Any],
    data_report: Mapping[str, Any] | None,
    metrics: Mapping[str, Any] | None,
    versions: Mapping[str, str],
) -> str:
    """Writes the README.md of an exported Hugging Face folder.

    Args:
        base_model: What training started from: a hub name, or a folder or file; empty for random weights.
        recipe: The resolved recipe's sections.
        data_report: The training data's report, as ``DataReport.to_dict`` gives it; None where it is lost.
        metrics: The last step's figures by name, held-out ones with the prefix ``eval_``; None where there are none.
        versions: Version by package.

    Returns:
        Markdown with YAML front matter. A local path appears by its last part only.
    """
    name = base_model if _is_hub_name(base_model) else os.path.basename(base_model.rstrip("/"))
    num_pairs = f"{data_report['num_pairs']:,} preference pairs" if data_report else "preference pairs"
    sections = [
        _front_matter(base_model, recipe),
        f"# {_title(name)}",
        f"This model was trained with ORPO by `orpo-megatron`, from {f'`{name}`' if name else 'random weights'}, on "
        f"{num_pairs}.",
        "## Objective\n\n" + OBJECTIVE,
        "## Use\n\n" + _usage(chat=bool(data_report and data_report["chat_template"] is not None)),
        "## Training\n\n" + _table(["Setting", "Value"], _hyperparameters(recipe)),
    ]
    if data_report:
        sections.append("## Data\n\n" + _data(data_report))
    if metrics:
        sections.append("## Results\n\n" + _results(metrics))
    sections.append("## Versions\n\n" + _table(["Package", "Version"], [[*item] for item in versions.items()]))
    sections.append("## Citation\n\n" + CITATION)
    return "\n\n".join(sections) + "\n"


def _is_hub_name(source: str) -> bool:
    """Tells ``owner/name`` from a file or folder of this machine."""
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) is not None
    return is_name and not source.endswith(FILE_ENDINGS) and not os.path.exists(source)


def _title(name: str) -> str:
    return f"{name.split('/')[-1].removesuffix('.gguf')} aligned with ORPO" if name else "A model aligned with ORPO"


def _front_matter(base_model: str, recipe: Mapping[str, Any]) -> str:
    """Returns the metadata that the hub reads; a local base model or data file is not named in it."""
    values: dict[str, Any] = {}
    if _is_hub_name(base_model):
        values["base_model"] = base_model
    values |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["orpo", "preference", "megatron"],
    }
    train = recipe["data"]["train"]
    datasets = [source for source in ([train] if isinstance(train, str) else train) if _is_hub_name(source)]
    if datasets:
        values["datasets"] = datasets
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _usage(chat: bool) -> str:
    return USAGE + (USAGE_CHAT if chat else USAGE_TEXT) + USAGE_END


def _hyperparameters(recipe: Mapping[str, Any]) -> list[list[str]]:
    """Returns the settings that the recipe gives, each with its name in the recipe."""
    rows = []
    for title, names in HYPERPARAMETERS:
        values = [_setting(recipe, name) for name in names.split()]
        if all(value is not None for value in values):
            rows.append([f"{title}, `{names.replace(' ', '`, `')}`", ", ".join(_number(value) for value in values)])
    return rows


def _setting(recipe: Mapping[str, Any], name: str) -> Any:
    """Looks up ``section.name``, or a whole section that is one value; None where it is not given."""
    value: Any = recipe
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if isinstance(value, Mapping) else value


def _data(report: Mapping[str, Any]) -> str:
    """Counts pairs and tokens, and says how prompt and response meet."""
    rows = [
        ["Pairs", f"{report['num_pairs']:,} of {report['rows_read']:,} rows"],
        ["Truncated pairs", f"{report['num_truncated']:,}"],
    ]
    for part in ("prompt", "chosen", "rejected"):
        tokens = report["tokens"][part]
        rows.append([f"Tokens of {part}", f"{tokens['mean']:g} on average, {tokens['max']:,} at most"])
    for reason, count in report["bad_row_counts"].items():
        rows.append([f"Unusable rows: {reason}", f"{count:,}"])
    rows.append(["Files", ", ".join(f"`{os.path.basename(file)}`" for file in report["files"])])
    return _table(["", ""], rows) + f"\n\n{report['boundary_note']}"


def _results(metrics: Mapping[str, Any]) -> str:
    """Sets the last training step's figures beside the last evaluation's."""
    rows = [
        [title, *(_number(metrics[key]) if metrics.get(key) is not None else "" for key in (name, f"eval_{name}"))]
        for title, name in METRICS
    ]
    step = f"Figures at step {metrics['step']:,}.\n\n" if "step" in metrics else ""
    return step + _table(["", "Training", "Held out"], [row for row in rows if any(row[1:])])


def _number(value: Any) -> str:
    """Writes a value: floats with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "not finite"
    return str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
