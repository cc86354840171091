"""The prefill worker: turns prompts into KV blocks and lends them to decode workers."""
