r"""ORPO from one of Megatron-Bridge's own recipes. The two lines that make it ORPO are marked.

    torchrun --nproc-per-node 8 examples/bridge_recipe.py llama31_8b_sft_2gpu_h100_bf16_config pairs.jsonl \
        model.tensor_model_parallel_size=2 train.global_batch_size=32 \
        checkpoint.save=runs/llama/checkpoints checkpoint.load=runs/llama/checkpoints

Overrides are Bridge's own. `train.global_batch_size` is the number of pairs in a step. The same command goes on.
"""

import argparse

from orpo_megatron.machine import use_machine

use_machine()  # only for a machine without a GPU, which Megatron takes for granted: before it is imported

from megatron.bridge import recipes
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

from orpo_megatron.bridge import orpo  # ORPO, line 1

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name of a function of megatron.bridge.recipes")
    parser.add_argument("data", help="preference pairs")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_args()

    config = getattr(recipes, args.recipe)()
    config = process_config_with_overrides(config, cli_overrides=args.overrides)
    pretrain(*orpo(config, data=args.data, beta=0.1))  # ORPO, line 2
