"""Tiny offline pipelines of the diffusers families: random weights, true classes, in-memory tokenizers.

For tests of model families. A pipeline is built in well under a second, reads no files, leaves the global random state
alone, and has the same weights for the same seed. Every VAE but Sana's makes latents of a quarter of the image's height
and width, and every VAE normalizes its latents, so that a family that forgets a constant gives another image. 32
pixels are enough for all of them.

Tokenizers spell texts in single letters. Their texts are therefore longer than those of the published ones, but padded
lengths, special tokens and the lengths of templates that pipelines cut off are the families' own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_parts import (
    HEADS,
    LATENT_CHANNELS,
    QWEN_VOCABULARY,
    VAE_LEVELS,
    WIDTH,
    autoencoder_kl,
    clip_text_encoder,
    qwen3_config,
    second_clip_tokenizer,
    seeded,
    t5_encoder,
    unet,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from rdm_sdk.testing import (
    randomized,
    tiny_gemma_tokenizer,
    tiny_qwen_tokenizer,
    tiny_t5_tokenizer,
    tiny_tokenizer,
)

SD_STEPS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def tiny_sd(seed: int = 0, prediction_type: str = "epsilon") -> Any:
    """Return a `StableDiffusionPipeline` that predicts the noise ("epsilon", as 1.x) or v ("v_prediction", as 2.1)."""
    with seeded(seed):
        pipeline = StableDiffusionPipeline(
            vae=autoencoder_kl(scaling_factor=0.18215),
            text_encoder=clip_text_encoder(CLIPTextModel, WIDTH),
            tokenizer=tiny_tokenizer(),
            unet=unet(
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=WIDTH,
            ),
            scheduler=DDIMScheduler(
                **SD_STEPS, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return randomized(pipeline)


def tiny_sdxl(seed: int = 0) -> Any:
    """Return a `StableDiffusionXLPipeline`: CLIP embeddings of 8 and 16 channels side by side, sizes as conditions."""
    small = WIDTH // 2
    with seeded(seed):
        pipeline = StableDiffusionXLPipeline(
            vae=autoencoder_kl(scaling_factor=0.13025),
            text_encoder=clip_text_encoder(CLIPTextModel, small),
            text_encoder_2=clip_text_encoder(CLIPTextModelWithProjection, WIDTH),
            tokenizer=tiny_tokenizer(),
            tokenizer_2=second_clip_tokenizer(),
            unet=unet(
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=small + WIDTH,
                transformer_layers_per_block=(1, 2),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + WIDTH // 2,  # six sizes and the pooled text
            ),
            scheduler=EulerDiscreteScheduler(**SD_STEPS, timestep_spacing="leading"),
        )
        return randomized(pipeline)


def tiny_sd3(seed: int = 0, num_layers: int = 3) -> Any:
    """Return a `StableDiffusion3Pipeline` with T5: CLIP tokens of 8 + 16 channels, padded by zeros to T5's 32."""
    small, t5_width = WIDTH // 2, 2 * WIDTH
    with seeded(seed):
        pipeline = StableDiffusion3Pipeline(
            vae=autoencoder_kl(scaling_factor=1.5305, shift_factor=0.0609, quant_conv=False),
            text_encoder=clip_text_encoder(CLIPTextModelWithProjection, small),
            text_encoder_2=clip_text_encoder(CLIPTextModelWithProjection, WIDTH),
            text_encoder_3=t5_encoder(t5_width),
            tokenizer=tiny_tokenizer(),
            tokenizer_2=second_clip_tokenizer(),
            tokenizer_3=tiny_t5_tokenizer(),
            transformer=SD3Transformer2DModel(
                sample_size=8,
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_layers=num_layers,  # the last block has no text to update: two of the others
                joint_attention_dim=t5_width,
                caption_projection_dim=WIDTH,
                pooled_projection_dim=(small + WIDTH) // 2,
                pos_embed_max_size=32,
                qk_norm="rms_norm",
                **HEADS,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        return randomized(pipeline)


def tiny_flux(seed: int = 0, guidance_embeds: bool = True) -> Any:
    """Return a `FluxPipeline`: [dev], which embeds the guidance scale, or [schnell], without that and unshifted."""
    with seeded(seed):
        pipeline = FluxPipeline(
            vae=autoencoder_kl(scaling_factor=0.3611, shift_factor=0.1159, quant_conv=False),
            text_encoder=clip_text_encoder(CLIPTextModel, WIDTH),
            text_encoder_2=t5_encoder(WIDTH),
            tokenizer=tiny_tokenizer(),
            tokenizer_2=tiny_t5_tokenizer(),
            transformer=FluxTransformer2DModel(
                in_channels=4 * LATENT_CHANNELS,
                num_layers=2,
                num_single_layers=2,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(2, 2, 4),
                **HEADS,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds
            ),
        )
        return randomized(pipeline)


def tiny_flux2(seed: int = 0) -> Any:
    """Return an undistilled `Flux2KleinPipeline`: text from layers 9, 18 and 27 of a Qwen3, whitened latents."""
    with seeded(seed):
        pipeline: Any = Flux2KleinPipeline(
            vae=AutoencoderKLFlux2(**VAE_LEVELS),
            # One layer more than the pipeline reads: the last one's output would come out normalized.
            text_encoder=Qwen3ForCausalLM(qwen3_config(num_hidden_layers=28)),
            tokenizer=tiny_qwen_tokenizer(),
            transformer=Flux2Transformer2DModel(
                in_channels=4 * LATENT_CHANNELS,
                num_layers=2,
                num_single_layers=2,
                joint_attention_dim=3 * WIDTH,
                timestep_guidance_channels=WIDTH,
                axes_dims_rope=(2, 2, 2, 2),
                guidance_embeds=False,
                **HEADS,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            is_distilled=False,
        )
        statistics = pipeline.vae.bn
        statistics.running_mean.normal_()
        statistics.running_var.uniform_(0.25, 4.0)
        return randomized(pipeline)


def tiny_qwen_image(seed: int = 0) -> Any:
    """Return a `QwenImagePipeline`: a Qwen2.5-VL whose first 34 tokens are the template's, and a video VAE."""
    text = {
        "vocab_size": QWEN_VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [1],
    }
    with seeded(seed):
        pipeline: Any = QwenImagePipeline(
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=LATENT_CHANNELS,
                dim_mult=[1, 1, 2],
                num_res_blocks=1,
                temperal_downsample=[False, True],
                latents_mean=[-0.7571, 0.9653, 0.1075, 1.5508],
                latents_std=[2.8184, 1.4541, 0.6558, 3.2687],
            ),
            text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
            tokenizer=tiny_qwen_tokenizer(),
            transformer=QwenImageTransformer2DModel(
                in_channels=4 * LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_layers=2,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(2, 2, 4),
                **HEADS,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                time_shift_type="exponential",
                base_shift=0.5,
                max_shift=0.9,
                max_image_seq_len=8192,
                shift_terminal=0.02,
            ),
        )
        pipeline.register_modules(tokenizer=tiny_qwen_tokenizer(pipeline.prompt_template_encode))
        return randomized(pipeline)


def tiny_z_image(seed: int = 0) -> Any:
    """Return a `ZImagePipeline`: text from the last but one layer of a Qwen3, without padding."""
    with seeded(seed):
        pipeline = ZImagePipeline(
            vae=autoencoder_kl(scaling_factor=0.3611, shift_factor=0.1159, quant_conv=False),
            text_encoder=Qwen3Model(qwen3_config(num_hidden_layers=3)),
            tokenizer=tiny_qwen_tokenizer(),
            transformer=ZImageTransformer2DModel(
                in_channels=LATENT_CHANNELS,
                dim=WIDTH,
                n_layers=2,
                n_refiner_layers=2,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=WIDTH,
                axes_dims=[4, 2, 2],
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        return randomized(pipeline)


def tiny_sana(seed: int = 0) -> Any:
    """Return a `SanaPipeline`: Gemma 2, linear attention, and a VAE of a latent for 8 x 8 pixels of the image."""
    levels = (8, 8, 16, 16)
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock")
    scales = ((), (), (5,), (5,))
    gemma = Gemma2Config(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=WIDTH // 2,
        query_pre_attn_scalar=WIDTH // 2,
    )
    with seeded(seed):
        pipeline = SanaPipeline(
            tokenizer=tiny_gemma_tokenizer(),
            text_encoder=Gemma2Model(gemma),
            vae=AutoencoderDC(
                latent_channels=LATENT_CHANNELS,
                attention_head_dim=8,
                encoder_block_types=blocks,
                decoder_block_types=blocks,
                encoder_block_out_channels=levels,
                decoder_block_out_channels=levels,
                encoder_layers_per_block=(1, 1, 1, 1),
                decoder_layers_per_block=(1, 1, 1, 1),
                encoder_qkv_multiscales=scales,
                decoder_qkv_multiscales=scales,
                scaling_factor=0.41407,
            ),
            transformer=SanaTransformer2DModel(
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_layers=2,
                num_cross_attention_heads=2,
                cross_attention_head_dim=WIDTH // 2,
                cross_attention_dim=WIDTH,
                caption_channels=WIDTH,
                sample_size=16,  # the pipeline takes only 16, 32, 64 and 128, for bins of 512 to 4,096 pixels
                **HEADS,
            ),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
        return randomized(pipeline)


def tiny_pixart(seed: int = 0) -> Any:
    """Return a `PixArtSigmaPipeline`: T5, DDPM steps, and, behind the noise, a variance that the pipeline drops."""
    with seeded(seed):
        pipeline = PixArtSigmaPipeline(
            tokenizer=tiny_t5_tokenizer(),
            text_encoder=t5_encoder(WIDTH),
            vae=autoencoder_kl(scaling_factor=0.13025),
            transformer=PixArtTransformer2DModel(
                in_channels=LATENT_CHANNELS,
                out_channels=2 * LATENT_CHANNELS,
                num_layers=2,
                cross_attention_dim=WIDTH,
                caption_channels=WIDTH,
                norm_num_groups=4,
                sample_size=32,  # the pipeline takes only 32, 64, 128 and 256, for bins of 256 to 2,048 pixels
                use_additional_conditions=False,
                **HEADS,
            ),
            scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        )
        return randomized(pipeline)


TINY_PIPELINES: dict[str, Callable[..., Any]] = {
    "StableDiffusionPipeline": tiny_sd,
    "StableDiffusionXLPipeline": tiny_sdxl,
    "StableDiffusion3Pipeline": tiny_sd3,
    "FluxPipeline": tiny_flux,
    "Flux2KleinPipeline": tiny_flux2,
    "QwenImagePipeline": tiny_qwen_image,
    "ZImagePipeline": tiny_z_image,
    "SanaPipeline": tiny_sana,
    "PixArtSigmaPipeline": tiny_pixart,
}
"""What makes a tiny pipeline, by the name of its class."""
