"""The passes, in pipeline order: analyses first, then rewrites.

============================  ===================================================================
`find_layers`                 convolutions and linear layers, in execution order
`find_skips`                  residual, concat and gate edges
`find_blocks`                 stretches of layers between legal boundaries
`find_branches`               what residual sums add to their shortcuts
`find_attentions`             where values are mixed by weights that are computed
`find_costs`                  FLOPs, bytes kept for backward and parameters of each layer
`find_shapes`                 shapes of each layer's input, output and weight
`find_block_inputs`           what enters each block, and its shape
`find_outputs`                the tensors that leave the model, by name or index
`find_channels`               the channels that can only be cut together
`insert_local_updates`        a local update for each layer of the prefix
`replace_norms`               batch norms of the prefix keep their running statistics
`insert_cuts`                 no gradient over the boundary
`insert_no_grad`              no activations kept before it
`accumulate_deltas`           those of micro-batches add up to that of a step
`reduce_deltas`               deltas of local updates summed over data parallel ranks
`approximate_weight_grads`    another weight gradient for layers behind it
`assign_stages`               which stage each node lies in: local modules, or checkpoints
`insert_drops`                residual blocks for a part of the batch, or of the steps, alone
`insert_checkpoints`          stages whose activations the backward computes again
`insert_links`                the last layers of a module again, in front of the next one
`insert_losses`               a head, a loss and a backward for each module
`insert_replay`               replay buffers between modules
============================  ===================================================================
"""

from .approximate_weight_grads import approximate_weight_grads
from .assign_stages import assign_stages
from .find_attentions import find_attentions
from .find_block_inputs import find_block_inputs, find_outputs
from .find_blocks import find_blocks
from .find_branches import find_branches
from .find_channels import find_channels
from .find_costs import find_costs, find_shapes
from .find_layers import find_layers
from .find_skips import find_skips
from .insert_checkpoints import insert_checkpoints
from .insert_cuts import insert_cuts
from .insert_drops import insert_drops
from .insert_links import insert_links
from .insert_local_updates import insert_local_updates
from .insert_losses import insert_losses
from .insert_no_grad import insert_no_grad
from .insert_replay import insert_replay
from .reduce_deltas import accumulate_deltas, reduce_deltas
from .replace_norms import replace_norms

__all__ = [
    "accumulate_deltas",
    "approximate_weight_grads",
    "assign_stages",
    "find_attentions",
    "find_block_inputs",
    "find_blocks",
    "find_branches",
    "find_channels",
    "find_costs",
    "find_layers",
    "find_outputs",
    "find_shapes",
    "find_skips",
    "insert_checkpoints",
    "insert_cuts",
    "insert_drops",
    "insert_links",
    "insert_local_updates",
    "insert_losses",
    "insert_no_grad",
    "insert_replay",
    "reduce_deltas",
    "replace_norms",
]
