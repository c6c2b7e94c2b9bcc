"""From preference rows to packed rows of token ids, without Megatron."""
