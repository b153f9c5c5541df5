"""Teaches a model something new from a few pictures: LoRA of its denoiser, trained by PEFT."""
