"""What knows Megatron-Core and no framework above it."""
