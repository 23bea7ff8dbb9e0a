"""The layers that models are built from. Each allocates its own share of the weights and loads it."""
