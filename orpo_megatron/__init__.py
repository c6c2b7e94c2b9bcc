"""ORPO for NVIDIA's stack: Megatron-Core, Megatron-Bridge and NeMo."""

__version__ = "0.1.0"
