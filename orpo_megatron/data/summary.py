"""What a step plan comes to, in figures and in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlanSummary:
    """What a plan comes to.

    Attributes:
        num_pairs: Pairs in the data set.
        pairs_per_step: Pairs in a full step.
        num_steps: Optimizer steps.
        epochs: Passes over the data.
        rows_per_step: Packed rows in every step.
        num_tokens: Tokens of all steps, without padding, the prompt counted once for each side.
        tokens_per_step: Their mean over steps.
        fill: Positions without padding over rows times longest row, mean over steps: 1 is perfect balance.
        longest_row: Tokens of the longest row of all, with padding.
        max_tokens_per_row: The token budget.
    """

    num_pairs: int
    pairs_per_step: int
    num_steps: int
    epochs: float
    rows_per_step: int
    num_tokens: int
    tokens_per_step: float
    fill: float
    longest_row: int
    max_tokens_per_row: int

    def __str__(self) -> str:
        """Returns a few aligned lines."""
        lines = {
            "pairs": f"{self.num_pairs:,}, {self.pairs_per_step:,} a step",
            "steps": f"{self.num_steps:,} ({self.epochs:.2f} epochs)",
            "tokens": f"{self.num_tokens:,}, {self.tokens_per_step:,.0f} a step",
            "rows a step": f"{self.rows_per_step:,}, {self.fill:.1%} filled",
            "longest row": f"{self.longest_row:,} tokens of {self.max_tokens_per_row:,} allowed",
        }
        return "\n".join(f"{name:<12} {value}" for name, value in lines.items())
