"""The latent diffusion model as it is trained: networks, schedules, samplers, data and the training loop, in PyTorch.

The networks carry the parameter names and the config keys of diffusers' ``AutoencoderKL`` and ``UNet2DConditionModel``
and of transformers' ``CLIPTextModel``: what is trained here opens there, and the other way round.
"""
