"""What a conversion holds in memory, in copies of the model: ``python -m benchmarks.convert [--layers 24]``.

tools/convert.py runs on a random Llama in bf16 and on one of a single layer. The difference of their peaks over the
difference of the models' sizes is what a byte of model costs, with nothing of Python's and Megatron's own in it. A
peak is the memory that the kernel cannot take back (anonymous and shared) of the process and its children, each shared
page counted once (proportional set size), read every 20 ms.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Bar, table, write_results

SHARD = 100 * 10**6
CONVERSIONS = {
    "import": ["import", "{hf}", "{megatron}"],
    "export": ["export", "{megatron}", "{back}", "--max-shard-size", f"{SHARD // 10**6}MB"],
    "export to one file": ["export", "{megatron}", "{one}", "--max-shard-size", "1TB"],
}


def main() -> int:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="of the large model, about 33 MB each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, large = (measure(Path(folder) / str(layers), layers) for layers in (1, args.layers))
    size = large["model_bytes"] - small["model_bytes"]
    copies = {name: (large[name] - small[name]) / size for name in CONVERSIONS}
    print(table(["conversion", "copies of the model"], [(name, f"{value:.2f}") for name, value in copies.items()]))
    bars = [
        Bar("copies in memory, import", copies["import"], 1.25),
        Bar("copies in memory, export", copies["export"], 1.25),
    ]
    print("\n".join(map(str, bars)))
    results = {
        "model_bytes": large["model_bytes"],
        "shard_bytes": SHARD,
        "peak_bytes": {"one layer": small, f"{args.layers} layers": large},
        "copies": copies,
        "bars": [bar.as_dict() for bar in bars],
    }
    print(write_results("convert", f"python -m benchmarks.convert --layers {args.layers}", results))
    return 0 if all(bar.passed for bar in bars) else 1


def measure(folder: Path, layers: int) -> dict[str, Any]:
    """Makes a model and converts it back and forth; returns its size and each conversion's peak, in bytes."""
    places = {name: str(folder / name) for name in ("hf", "megatron", "back", "one")}
    figures: dict[str, Any] = {"model_bytes": make_model(Path(places["hf"]), layers)}
    for name, arguments in CONVERSIONS.items():
        figures[name] = peak_of([argument.format(**places) for argument in arguments], folder / "cache")
    shutil.rmtree(folder)
    return figures


def make_model(folder: Path, layers: int) -> int:
    """Writes a Llama of random weights; returns its size in bytes."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=8192,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder, max_shard_size="200MB")
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def peak_of(arguments: list[str], cache_dir: Path) -> int:
    """Runs one conversion; returns the highest that it and its children held at once, in bytes."""
    command = [sys.executable, "tools/convert.py", *arguments, "--cache-dir", str(cache_dir)]
    process = subprocess.Popen(command)
    highest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.02):
            highest = max(highest, held_by_tree(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with status {code}.")
    return highest


def held_by_tree(pid: int) -> int:
    """Returns the memory of a process and its children that the kernel cannot take back, in bytes (Linux)."""
    try:
        pids = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for each in pids:
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        except OSError:  # ended meanwhile
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total


if __name__ == "__main__":
    sys.exit(main())
