"""What knows Megatron-Bridge. Only ``settings`` and ``recipe`` may be imported without it."""
