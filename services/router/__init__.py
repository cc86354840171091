"""The router: serves OpenAI's HTTP API in front of decode and prefill workers."""
