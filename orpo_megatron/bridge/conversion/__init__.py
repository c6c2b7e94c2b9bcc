"""Checkpoints between Hugging Face and Megatron: read, written, exported and held against one another."""
