"""Every term of every loss, against the paper's formula written out, and who gets which gradient."""

from __future__ import annotations

import copy
import math
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from ldm_reference.alignment import AlignmentHeads
from ldm_reference.autoencoder import AutoencoderKL, sample_posterior
from ldm_reference.discriminator import PatchDiscriminator
from ldm_reference.features import feature_network
from ldm_reference.initialisation import initialise
from ldm_reference.losses import (
    contrastive_loss,
    diffusion_target,
    discriminator_hinge,
    kl_divergence,
    min_snr_weight,
    perceptual_distance,
)
from ldm_reference.noise import noise_from_config
from ldm_reference.objectives import AutoencoderObjective, ContrastiveObjective, DenoiserObjective
from ldm_reference.schedules import add_noise, alphas_cumprod_from_config
from ldm_reference.text_encoder import CLIPTextModel
from ldm_reference.unet import UNet2DConditionModel
from torch import Tensor, nn

VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}
ALPHAS_CUMPROD = torch.tensor([0.99, 0.9, 0.5, 0.2, 0.02])


def objective(vae: nn.Module, **changes: Any) -> AutoencoderObjective:
    off = {
        "reconstruction": "mse",
        "kl_weight": 0.0,
        "kl_warmup_steps": 0,
        "perceptual_weight": 0.0,
        "perceptual": None,
        "adversarial_weight": 0.0,
        "adversarial_start": 0,
        "discriminator": None,
    }
    return AutoencoderObjective(vae, **{**off, **changes})  # type: ignore[arg-type]


def at(step: int, rows: int = 2) -> Tensor:
    return torch.full((rows,), step)


def new_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL.from_config(VAE)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)


# --- autoencoder ----------------------------------------------------------------------------------------------------


def test_divergence_is_torch_s() -> None:
    parameters = torch.randn(3, 8, 4, 4)
    mean, logvar = parameters.chunk(2, dim=1)
    judge = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(kl_divergence(parameters), judge.mean())


@pytest.mark.parametrize(("kind", "distance"), [("mse", F.mse_loss), ("l1", F.l1_loss)])
def test_reconstruction_and_divergence(kind: str, distance: Any) -> None:
    vae, (pictures, noise) = new_vae(), batch()
    terms = objective(vae, reconstruction=kind, kl_weight=0.3)(at(0), pictures, noise)
    parameters = vae.encode(pictures)
    expected = distance(vae.decode(sample_posterior(parameters, noise)), pictures)
    torch.testing.assert_close(terms["reconstruction"], expected)
    torch.testing.assert_close(terms["loss"], expected + 0.3 * kl_divergence(parameters))


def test_the_divergence_warms_up() -> None:
    vae, (pictures, noise) = new_vae(), batch()
    whole = objective(vae, kl_weight=0.3, kl_warmup_steps=10)
    shares = []
    for step in (0, 4, 9, 50):
        terms = whole(at(step), pictures, noise)
        shares.append(((terms["loss"] - terms["reconstruction"]) / (0.3 * terms["kl"])).item())
    assert shares == pytest.approx([0.1, 0.5, 1.0, 1.0], abs=1e-4)


def test_perceptual_distance_grows_with_blur_and_is_nothing_for_equals() -> None:
    torch.manual_seed(0)
    network, picture = feature_network(), torch.rand(2, 3, 32, 32) * 2 - 1
    blurred = [F.avg_pool2d(F.pad(picture, [k] * 4, mode="replicate"), 2 * k + 1, 1) for k in (0, 1, 2, 4)]
    distances = [perceptual_distance(network, other, picture).item() for other in blurred]
    assert distances[0] == 0.0
    assert distances == sorted(distances)
    assert distances[1] > 0.01
    grey = picture[:, :1]
    torch.testing.assert_close(
        perceptual_distance(network, blurred[2][:, :1], grey),
        perceptual_distance(network, blurred[2][:, :1].repeat(1, 3, 1, 1), grey.repeat(1, 3, 1, 1)),
    )


def test_perceptual_distance_is_lpips_s_formula() -> None:
    torch.manual_seed(0)
    network = feature_network()
    a, b = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    expected = 0.0
    for x, y in zip(network.stages(a, 4), network.stages(b, 4), strict=True):
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                one, two = (F.normalize(z[0, :, row, column], dim=0) for z in (x, y))
                expected += (one - two).square().sum().item() / (x.shape[2] * x.shape[3])
    assert perceptual_distance(network, a, b).item() == pytest.approx(expected, rel=1e-4)


def test_the_feature_network_judges_and_does_not_learn() -> None:
    vae, (pictures, noise) = new_vae(), batch()
    network = copy.deepcopy(feature_network())
    before = copy.deepcopy(network.state_dict())
    whole = objective(vae, perceptual=network, perceptual_weight=2.0).train()
    assert not any(module.training for module in network.modules())
    terms = whole(at(0), pictures, noise)
    torch.testing.assert_close(terms["loss"], terms["reconstruction"] + 2.0 * terms["perceptual"])
    plain = torch.autograd.grad(terms["reconstruction"], vae.decoder.conv_out.weight, retain_graph=True)[0]
    terms["loss"].backward()
    assert vae.decoder.conv_out.weight.grad is not None
    assert not torch.allclose(vae.decoder.conv_out.weight.grad, plain)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_the_discriminator_and_the_generator_get_their_own_gradients() -> None:
    vae, (pictures, noise) = new_vae(), batch()
    discriminator = PatchDiscriminator(3, 8)
    objective(vae, discriminator=discriminator, adversarial_weight=0.7)(at(0), pictures, noise)["loss"].backward()
    given = {key: parameter.grad for key, parameter in vae.named_parameters()}
    given_discriminator = [parameter.grad for parameter in discriminator.parameters()]

    drawn = vae.decode(sample_posterior(vae.encode(pictures), noise))
    alone = F.mse_loss(drawn, pictures) - 0.7 * discriminator(drawn).mean()
    expected = torch.autograd.grad(alone, list(vae.parameters()), retain_graph=True)
    for key, gradient in zip(given, expected, strict=True):
        torch.testing.assert_close(given[key], gradient, rtol=1e-4, atol=1e-6)
    hinge = discriminator_hinge(discriminator(pictures), discriminator(drawn.detach()))
    expected = torch.autograd.grad(hinge, list(discriminator.parameters()))
    for one, other in zip(given_discriminator, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_discriminator_waits_for_its_start() -> None:
    vae, (pictures, noise) = new_vae(), batch()
    discriminator = PatchDiscriminator(3, 8)
    whole = objective(vae, discriminator=discriminator, adversarial_weight=0.7, adversarial_start=5)
    terms = whole(at(4), pictures, noise)
    torch.testing.assert_close(terms["loss"], terms["reconstruction"])
    terms["loss"].backward()
    assert all(not parameter.grad.any() for parameter in discriminator.parameters() if parameter.grad is not None)
    terms = whole(at(5), pictures, noise)
    both = terms["reconstruction"] + 0.7 * terms["generator"] + terms["discriminator"]
    torch.testing.assert_close(terms["loss"], both)


def test_hinge() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert discriminator_hinge(real, fake).item() == pytest.approx(0.5 * (0.25 + 1.0))


# --- denoiser -------------------------------------------------------------------------------------------------------


def test_diffusion_targets() -> None:
    latents, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    alphas_cumprod, timesteps = torch.tensor([0.9, 0.36]), torch.tensor([1, 0])
    assert diffusion_target("epsilon", latents, noise, alphas_cumprod, timesteps) is noise
    assert diffusion_target("sample", latents, noise, alphas_cumprod, timesteps) is latents
    v = diffusion_target("v_prediction", latents, noise, alphas_cumprod, timesteps)
    torch.testing.assert_close(v[0], 0.6 * noise[0] - 0.8 * latents[0])


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_one_x0_error_alike_in_every_objective(gamma: float) -> None:
    """A guess of x0, turned into one of epsilon and of v: its weighted error is min(SNR, gamma) |x0 error|² in all."""
    timesteps = torch.arange(5)
    latents, noise = torch.randn(5, 4, 3, 3).double(), torch.randn(5, 4, 3, 3).double()
    alphas = ALPHAS_CUMPROD.double()[:, None, None, None]
    noisy = add_noise(latents, noise, ALPHAS_CUMPROD.double(), timesteps)
    guess = latents + 0.1 * torch.randn_like(latents)
    guesses = {"sample": guess, "epsilon": (noisy - alphas.sqrt() * guess) / (1 - alphas).sqrt()}
    guesses["v_prediction"] = alphas.sqrt() * guesses["epsilon"] - (1 - alphas).sqrt() * guess
    snr = ALPHAS_CUMPROD.double() / (1 - ALPHAS_CUMPROD.double())
    expected = snr.clamp(max=gamma) * (guess - latents).square().mean(dim=(1, 2, 3))
    for kind, value in guesses.items():
        target = diffusion_target(kind, latents, noise, ALPHAS_CUMPROD.double(), timesteps)
        weight = min_snr_weight(kind, ALPHAS_CUMPROD.double(), timesteps, gamma)
        torch.testing.assert_close(weight * (value - target).square().mean(dim=(1, 2, 3)), expected)


def test_min_snr_off_and_at_pure_noise() -> None:
    assert min_snr_weight("epsilon", ALPHAS_CUMPROD, torch.arange(5), None).tolist() == [1.0] * 5
    weights = min_snr_weight("v_prediction", torch.tensor([0.5, 0.0]), torch.tensor([0, 1]), 5.0)
    assert weights.tolist() == [0.5, 1.0]


class Guess(nn.Module):
    """Predicts the same for everything and remembers what it was given."""

    def forward(self, sample: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        self.seen = sample, timesteps, conditions
        return torch.full_like(sample, 0.25)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_denoiser_s_loss(kind: str) -> None:
    latents, noise, timesteps = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3), torch.arange(5)
    config = {"num_train_timesteps": 5, "beta_schedule": "linear", "beta_start": 0.01, "beta_end": 0.6}
    alphas_cumprod = alphas_cumprod_from_config(config).float()
    unet = Guess()
    process = noise_from_config({**config, "prediction_type": kind})
    whole = DenoiserObjective(unet, None, noise=process, min_snr_gamma=2.0)  # type: ignore[arg-type]
    states = torch.randn(5, 7, 6)
    terms = whole(latents, noise, timesteps, encoder_hidden_states=states)
    errors = (0.25 - diffusion_target(kind, latents, noise, alphas_cumprod, timesteps)).square().mean(dim=(1, 2, 3))
    weights = min_snr_weight(kind, alphas_cumprod, timesteps, 2.0)
    torch.testing.assert_close(terms["loss"], (errors * weights).mean())
    torch.testing.assert_close(terms["error"], errors.mean())
    torch.testing.assert_close(unet.seen[0], add_noise(latents, noise, alphas_cumprod, timesteps))
    assert unet.seen[2]["encoder_hidden_states"] is states


def test_the_denoiser_s_loss_by_flow_matching() -> None:
    """diffusers' scheduler mixes the noisy latents; the target is their slope along the straight line."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    process = noise_from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler.config})
    latents, noise, timesteps = torch.randn(4, 4, 3, 3), torch.randn(4, 4, 3, 3), scheduler.timesteps[[0, 3, 500, 999]]
    unet = Guess()
    whole = DenoiserObjective(unet, None, noise=process, min_snr_gamma=None)  # type: ignore[arg-type]
    terms = whole(latents, noise, timesteps)
    torch.testing.assert_close(unet.seen[0], scheduler.scale_noise(latents, timesteps, noise))
    torch.testing.assert_close(unet.seen[1], timesteps)
    slope = (scheduler.scale_noise(latents, timesteps, noise) - latents) / (timesteps / 1000)[:, None, None, None]
    torch.testing.assert_close(terms["loss"], (0.25 - slope).square().mean(), rtol=1e-3, atol=0)


# --- text -----------------------------------------------------------------------------------------------------------


def unit(rows: int, width: int = 6) -> Tensor:
    return F.normalize(torch.randn(rows, width), dim=-1)


def test_contrastive_loss_is_clip_s_where_every_picture_is_another() -> None:
    text, pictures, scale = unit(5), unit(5), torch.tensor([1.5])
    logits = scale.exp() * text @ pictures.T
    own = torch.arange(5)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(contrastive_loss(text, pictures, scale, torch.tensor([7, 3, 9, 1, 2])), expected)


def test_two_captions_of_one_picture_are_no_mistake_for_each_other() -> None:
    text, scale, same = unit(3), torch.tensor([2.0]), torch.tensor([4, 8, 4])
    pictures = unit(3)[[0, 1, 0]]
    expected = 0.0
    for a, b in ((text, pictures), (pictures, text)):
        log = (scale.exp() * a @ b.T).log_softmax(dim=1)
        for row in range(3):
            right = [column for column in range(3) if same[column] == same[row]]
            expected -= sum(log[row, column].item() for column in right) / len(right) / 3 / 2
    assert contrastive_loss(text, pictures, scale, same).item() == pytest.approx(expected, rel=1e-5)


def test_the_contrastive_stage_learns_which_picture_a_caption_is_of() -> None:
    torch.manual_seed(0)
    text_encoder = CLIPTextModel.from_config(
        {
            **{"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "max_position_embeddings": 4, "eos_token_id": 19},
        }
    )
    whole = ContrastiveObjective(text_encoder, AlignmentHeads(16, 8))
    ids = torch.tensor([[0, word, 19, 19] for word in range(1, 13)])
    features, owner = torch.rand(12, 1280), torch.arange(12)
    adam = torch.optim.Adam(whole.parameters(), 3e-3)
    accuracies = []
    for _ in range(60):
        terms = whole(ids, features, owner)
        accuracies.append(terms["accuracy"].item())
        adam.zero_grad()
        terms["loss"].backward()
        adam.step()
    assert accuracies[0] < 0.5
    assert accuracies[-1] == 1.0


# --- starting weights -----------------------------------------------------------------------------------------------


def test_a_fresh_unet_predicts_nothing_and_its_blocks_are_the_identity() -> None:
    unet = UNet2DConditionModel.from_config(
        {
            **{"block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 6},
            **{"down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D"], "attention_head_dim": 2},
            "up_block_types": ["AttnUpBlock2D", "CrossAttnUpBlock2D"],
        }
    )
    initialise(unet)
    out = unet(torch.randn(2, 4, 8, 8), torch.tensor([5]), torch.randn(2, 3, 6))
    assert not out.any()
    x, temb, context = torch.randn(2, 16, 4, 4), torch.randn(2, 32), torch.randn(2, 3, 6)
    assert unet.mid_block is not None
    assert torch.equal(unet.mid_block(x, temb, context), x)
    assert torch.equal(unet.down_blocks[1].attentions[0](x), x)
    vae = new_vae()
    initialise(vae)
    wide = torch.randn(1, 16, 4, 4)
    assert torch.equal(vae.decoder.mid_block(wide), wide)


def test_a_fresh_text_encoder_is_clip_s() -> None:
    torch.manual_seed(0)
    encoder = CLIPTextModel.from_config(
        {**{"vocab_size": 600, "hidden_size": 64, "intermediate_size": 256}, "num_hidden_layers": 3, "eos_token_id": 5}
    )
    initialise(encoder)
    deviations = {
        "embeddings.token_embedding.weight": 0.02,
        "embeddings.position_embedding.weight": 0.01,
        "encoder.layers.1.self_attn.q_proj.weight": 64**-0.5,
        "encoder.layers.1.self_attn.out_proj.weight": (64 * 6) ** -0.5,
        "encoder.layers.1.mlp.fc1.weight": 64**-0.5,
        "encoder.layers.1.mlp.fc2.weight": (64 * 6) ** -0.5,
    }
    state = encoder.text_model.state_dict()
    for key, deviation in deviations.items():
        assert state[key].std().item() == pytest.approx(deviation, rel=0.05), key
    assert not state["encoder.layers.1.mlp.fc1.bias"].any()
    assert math.isclose(state["encoder.layers.1.layer_norm1.weight"].mean().item(), 1.0)
