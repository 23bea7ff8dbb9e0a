"""The inference engine: it turns prompts into tokens and knows no HTTP, no terminal and no benchmark.

The way of a request: `async_engine` or `llm` (the front doors) → `core` → `scheduler` (`block_pool`) → `worker` →
`model_runner` → `models` → `layers` → `ops` → `kernels`, and back through `sampler` and `outputs`.
"""

import os

# A thread of torch's OpenMP runtime that waits for work spins this often (some 0.1 ms) and then sleeps. By default it
# would spin for milliseconds after each op and keep its core from the threads of our own kernels or from other
# processes: decoding 16 requests is 10 % slower then, prefill beside two busy processes on two cores 2 times.
os.environ.setdefault("GOMP_SPINCOUNT", "4000")
