"""Measurements of the engine and of any OpenAI-compatible server; it returns numbers and rows, and knows no terminal.

`workloads` makes the requests, `load` says when they are sent, `client` sends them, in `client_processes`; `serving`
drives a run against a server, `throughput` one without a server and `latency` its prefill and decode by batch size,
`baseline` the same prompts through transformers; `metrics` holds the definitions and the arithmetic, `floor`
what the hardware allows, `result` and `report` what is written down (and `result_page` as a page of `charts`), `parity`
whether the tokens are right, and `modes` whether they are in every mode of the engine. `compare` runs `engines`
side by side, `gate` two of them until `sequential` knows whether a limit is kept. `speed` is all of it in one go: the
workloads and goals of `figures`, and where the time goes, by `trace`. `quality` holds two checkpoints against each
other, each of them run by `observation`.
"""
