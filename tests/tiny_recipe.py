"""A training recipe that runs in a second: 16 x 16 pictures, a few steps of networks 8 and 16 wide."""

CONFIG = """
seed = 3
resolution = 16

[vae_stage]
steps = 7
batch_size = 4
learning_rate = 2e-3
warmup_steps = 3
kl_weight = 1e-4

[unet_stage]
steps = 9
batch_size = 5
learning_rate = 2e-3
warmup_steps = 3
caption_dropout = 0.2

[vae]
sample_size = 16
block_out_channels = [8, 16]
down_block_types = ["DownEncoderBlock2D", "DownEncoderBlock2D"]
up_block_types = ["UpDecoderBlock2D", "UpDecoderBlock2D"]
norm_num_groups = 4

[tokenizer]
vocab_size = 540
model_max_length = 8

[text_encoder]
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2

[unet]
sample_size = 8
block_out_channels = [8, 16]
down_block_types = ["DownBlock2D", "CrossAttnDownBlock2D"]
up_block_types = ["CrossAttnUpBlock2D", "UpBlock2D"]
layers_per_block = 1
norm_num_groups = 4
cross_attention_dim = 16
attention_head_dim = 2
dropout = 0.1

[scheduler]
_class_name = "DDIMScheduler"
num_train_timesteps = 1000
beta_start = 0.00085
beta_end = 0.012
beta_schedule = "scaled_linear"
prediction_type = "v_prediction"
clip_sample = false
"""
