"""Starting weights: every residual branch begins as nothing, so that a fresh network of any depth is the identity.

Convolutions and linear layers keep torch's fan-in uniform weights but for the last one of each residual branch, which
is zero (Goyal et al., 1706.02677, section 5.1; Dhariwal & Nichol, 2105.05233, as in their code), and the UNet's last
convolution, so that its first prediction is 0. A text encoder starts as CLIP does (Radford et al., 2103.00020, after
GPT): normal, with the deviations below.
"""

from __future__ import annotations

from torch import nn

from ldm_reference.blocks import Attention, ResnetBlock2D, Transformer2DModel
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.unet import UNet2DConditionModel


def initialise(network: nn.Module) -> None:
    """Set the starting weights of an autoencoder, a UNet or a text encoder in place, from torch's global generator."""
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            _zero(module.conv2)
        elif isinstance(module, Transformer2DModel):
            _zero(module.proj_out)
        elif isinstance(module, Attention) and module.group_norm is not None:
            _zero(module.to_out[0])
        elif isinstance(module, UNet2DConditionModel):
            _zero(module.conv_out)
        elif isinstance(module, CLIPTextModel):
            _initialise_text(module)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _initialise_text(network: CLIPTextModel) -> None:
    config = network.config
    nn.init.normal_(network.text_model.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(network.text_model.embeddings.position_embedding.weight, std=0.01)
    inner = config.hidden_size**-0.5
    outer = inner * (2 * config.num_hidden_layers) ** -0.5
    for name, parameter in network.text_model.encoder.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.endswith(("out_proj.weight", "fc2.weight")):
            nn.init.normal_(parameter, std=outer)
        elif "layer_norm" not in name:
            nn.init.normal_(parameter, std=inner)
