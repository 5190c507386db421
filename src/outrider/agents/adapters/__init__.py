"""What engines say, in their own words: answers (OpenAI, Anthropic), metrics (vLLM's names), our own for Prometheus."""
