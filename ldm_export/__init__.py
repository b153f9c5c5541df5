"""Take a latent diffusion model trained in PyTorch and make it something an application can ship."""

__version__ = "0.1.0"
