"""The inference engine: it turns prompts into tokens and knows no HTTP, no terminal and no benchmark.

The way of a request: `async_engine` or `llm` (the front doors) → `core` → `scheduler` (`block_pool`) → `worker` →
`model_runner` → `models` → `layers` → `ops` → `kernels`, and back through `sampler` and `outputs`.
"""

import os

# A thread that waits for its share of a CPU op spins this often (some 0.1 ms, longer than the gap between two ops) and
# then sleeps. torch's OpenMP runtime, which reads this when it is loaded, would spin for milliseconds and keep the core
# from the thread it waits for, or from the server: 2 to 10 times slower wherever there are more threads than cores.
os.environ.setdefault("GOMP_SPINCOUNT", "4000")
