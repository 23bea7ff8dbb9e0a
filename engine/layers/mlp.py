"""The gated MLP: down(f(gate(x)) · up(x))."""

from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.layers.placement import Placement
from engine.model_config import ModelConfig
from engine.ops import Activations


class MLP:
    """Gate and up are one product; the intermediate numbers are split over the ranks."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        parts = {"gate_proj": inner, "up_proj": inner}
        self.gate_up_proj = ColumnParallelLinear(hidden, parts, config.mlp_bias, placement, "gate_up_proj")
        self.down_proj = RowParallelLinear("down_proj", inner, hidden, config.mlp_bias, placement)
        self.activation = config.activation

    def load(self, ckpt: Checkpoint) -> None:
        self.gate_up_proj.load(ckpt)
        self.down_proj.load(ckpt)

    def __call__(self, x: Activations) -> Tensor:
        gate_up, rounds_to = self.gate_up_proj, self.down_proj.weight.rounds_to
        return self.down_proj(gate_up.weight.apply_gated(x, gate_up.bias, self.activation, rounds_to))
