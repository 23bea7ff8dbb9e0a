"""The inference engine: it turns prompts into tokens and knows no HTTP, no terminal and no benchmark.

The way of a request: `async_engine` or `llm` (the front doors) → `core` → `scheduler` (`block_pool`) → `worker` →
`model_runner` → `models` → `layers` → `ops` → `kernels`, and back through `sampler` and `outputs`.
"""
