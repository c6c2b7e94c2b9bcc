"""What Megatron-Core's optimizer needs on a CPU: the norm of all gradients, and PyTorch's Adam."""

from __future__ import annotations

import functools
from typing import Any


def mend_adam_checkpoints(cls: Any) -> None:
    """Lets a run resume with PyTorch's Adam, which Megatron-Core takes where there are no fused ones.

    Its distributed optimizer reads ``step`` from a state that does not exist before the first step, so that loading
    fails; then it puts one tensor for all parameters in, which each of them would count up; and overwrites it with
    the placeholder that loading began with, or misses it in a checkpoint that can be loaded on other ranks.
    """
    import torch

    describe, load, set_states = cls.sharded_state_dict, cls.load_state_dict, cls._set_main_param_and_optimizer_states

    def set_step(optimizer: torch.optim.Optimizer, step: float) -> None:
        for state in optimizer.state.values():
            state["step"] = torch.tensor(float(step))

    @functools.wraps(describe)
    def sharded_state_dict(
        self: Any, model_sharded_state_dict: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if is_loading:
            self.init_state_fn(self.optimizer, self.config)
            set_step(self.optimizer, 0)
        return describe(self, model_sharded_state_dict, is_loading, *args, **kwargs)

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        set_step(self.optimizer, state_dict["optimizer"]["param_groups"][0]["step"])

    @functools.wraps(set_states)
    def set_states_but_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        own = self._get_main_param_and_optimizer_states(model_param)
        set_states(self, model_param, {**tensors, "step": own.get("step")})

    cls.sharded_state_dict, cls.load_state_dict = sharded_state_dict, load_state_dict
    cls._set_main_param_and_optimizer_states = set_states_but_step


def fuse_adam(cls: Any) -> None:
    """Has PyTorch's Adam take a step in one pass over the weights: a sixth of the time of a dozen passes."""
    import torch

    init = cls.__init__

    @functools.wraps(init)
    def init_and_fuse(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        init(self, optimizer, *args, **kwargs)
        if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            for group in optimizer.param_groups:
                group["fused"] = True

    cls.__init__ = init_and_fuse


def l2_norm(chunk_size: int, noop_flag: Any, tensor_lists: list[list[Any]], per_tensor: bool) -> tuple[Any, None]:
    """Returns the L2 norm of all tensors, fp32 [1]; the call is that of apex's ``amp_C.multi_tensor_l2norm``."""
    import torch

    # By pieces, since PyTorch makes an fp64 copy of what it takes the norm of.
    pieces = [part for tensors in tensor_lists for tensor in tensors for part in tensor.reshape(-1).split(2**18)]
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in pieces]
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    return total.float().reshape(1), None
