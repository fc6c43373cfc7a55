"""Tiny offline pipelines of the diffusers families: random weights, true classes, in-memory tokenizers.

For tests of model families. A pipeline is built in well under a second, reads no files, leaves the global random state
alone, and has the same weights for the same seed. Every VAE but Sana's makes latents of a quarter of the image's height
and width, and every VAE normalizes its latents, so that a family that forgets a constant gives another image. 32
pixels are enough for all of them.

Tokenizers spell texts in single letters. Their texts are therefore longer than those of the published ones, but padded
lengths, special tokens and the lengths of templates that pipelines cut off are the families' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
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
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from rdm_sdk.testing.models import tiny_clip_config, tiny_tokenizer

ModelT = TypeVar("ModelT", CLIPTextModel, CLIPTextModelWithProjection)

LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
WIDTH = 16
"""Channels of text encoders, except where two CLIPs must differ, and of transformers."""
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": WIDTH // 2}
LATENT_CHANNELS = 4
VAE_LEVELS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 8),
    "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 4,
    "sample_size": 32,
}
SD_STEPS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
QWEN_VOCABULARY = 512
"""More than `tiny_qwen_tokenizer` knows, with Qwen-Image's template too."""
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Qwen3's form of chats. Who wants no thinking gets an empty thought: FLUX.2 does, Z-Image does not."""


def tiny_sd(seed: int = 0, prediction_type: str = "epsilon") -> Any:
    """Return a `StableDiffusionPipeline` that predicts the noise ("epsilon", as 1.x) or v ("v_prediction", as 2.1)."""
    with _seeded(seed):
        pipeline = StableDiffusionPipeline(
            vae=_autoencoder_kl(scaling_factor=0.18215),
            text_encoder=_clip_text_encoder(CLIPTextModel, WIDTH),
            tokenizer=tiny_tokenizer(),
            unet=_unet(
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
    with _seeded(seed):
        pipeline = StableDiffusionXLPipeline(
            vae=_autoencoder_kl(scaling_factor=0.13025),
            text_encoder=_clip_text_encoder(CLIPTextModel, small),
            text_encoder_2=_clip_text_encoder(CLIPTextModelWithProjection, WIDTH),
            tokenizer=tiny_tokenizer(),
            tokenizer_2=_second_clip_tokenizer(),
            unet=_unet(
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


def tiny_sd3(seed: int = 0) -> Any:
    """Return a `StableDiffusion3Pipeline` with T5: CLIP tokens of 8 + 16 channels, padded by zeros to T5's 32."""
    small, t5_width = WIDTH // 2, 2 * WIDTH
    with _seeded(seed):
        pipeline = StableDiffusion3Pipeline(
            vae=_autoencoder_kl(scaling_factor=1.5305, shift_factor=0.0609, quant_conv=False),
            text_encoder=_clip_text_encoder(CLIPTextModelWithProjection, small),
            text_encoder_2=_clip_text_encoder(CLIPTextModelWithProjection, WIDTH),
            text_encoder_3=_t5_encoder(t5_width),
            tokenizer=tiny_tokenizer(),
            tokenizer_2=_second_clip_tokenizer(),
            tokenizer_3=tiny_t5_tokenizer(),
            transformer=SD3Transformer2DModel(
                sample_size=8,
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_layers=3,  # the last block has no text to update: two of the others
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
    with _seeded(seed):
        pipeline = FluxPipeline(
            vae=_autoencoder_kl(scaling_factor=0.3611, shift_factor=0.1159, quant_conv=False),
            text_encoder=_clip_text_encoder(CLIPTextModel, WIDTH),
            text_encoder_2=_t5_encoder(WIDTH),
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
    with _seeded(seed):
        pipeline: Any = Flux2KleinPipeline(
            vae=AutoencoderKLFlux2(**VAE_LEVELS),
            # One layer more than the pipeline reads: the last one's output would come out normalized.
            text_encoder=Qwen3ForCausalLM(_qwen3_config(num_hidden_layers=28)),
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
    with _seeded(seed):
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
    with _seeded(seed):
        pipeline = ZImagePipeline(
            vae=_autoencoder_kl(scaling_factor=0.3611, shift_factor=0.1159, quant_conv=False),
            text_encoder=Qwen3Model(_qwen3_config(num_hidden_layers=3)),
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
    with _seeded(seed):
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
    with _seeded(seed):
        pipeline = PixArtSigmaPipeline(
            tokenizer=tiny_t5_tokenizer(),
            text_encoder=_t5_encoder(WIDTH),
            vae=_autoencoder_kl(scaling_factor=0.13025),
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


def tiny_t5_tokenizer() -> T5Tokenizer:
    """Return a `T5Tokenizer` that spells texts in single letters and ends them with `</s>`; 512 tokens at most."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=512)


def tiny_gemma_tokenizer() -> GemmaTokenizer:
    """Return a `GemmaTokenizer` that spells texts in single letters, or bytes, after `<bos>`."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], add_bos_token=True)


def tiny_qwen_tokenizer(template: str = "") -> Qwen2Tokenizer:
    """Return a `Qwen2Tokenizer` that spells texts in bytes, with Qwen3's way to write chats.

    Args:
        template: its words, outside `<|...|>`, become one token each, as they are for the published tokenizer.
    """
    split: Any = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str
    words = [word for text in re.split(r"<\|\w+\|>", template) for word, _ in split(text)]
    # From left to right, a letter at a time, so that words that begin alike do not take each other's letters away.
    merges: Any = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    pieces = [*sorted(ByteLevel.alphabet()), *(start + letter for start, letter in merges)]
    return Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<think>", "</think>"],
        chat_template=QWEN_CHAT,
        model_max_length=4096,
    )


def _second_clip_tokenizer() -> CLIPTokenizer:
    """Return the tokenizer of SDXL's and SD3's second CLIP, which pads with "!", token 0."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "!"
    return tokenizer


def _clip_text_encoder(kind: type[ModelT], width: int) -> ModelT:
    """Return a text encoder `[N, 16, width]`; its projection, if it has one, is `[N, width / 2]`."""
    both = tiny_clip_config(width=width)
    config: Any = both.text_config
    config.projection_dim = both.projection_dim
    return kind(config)


def _t5_encoder(width: int) -> T5EncoderModel:
    """Return a text encoder `[N, L, width]` for `tiny_t5_tokenizer`."""
    config = T5Config(
        vocab_size=len(tiny_t5_tokenizer()),
        d_model=width,
        d_kv=width // 2,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def _qwen3_config(num_hidden_layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=QWEN_VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=WIDTH // 2,
        max_position_embeddings=4096,
    )


def _unet(**settings: Any) -> UNet2DConditionModel:
    """Return a UNet of two levels for latents `[N, 4, H, W]`, H and W even."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,  # the number of heads, as this class understands it
        **settings,
    )


def _autoencoder_kl(scaling_factor: float, shift_factor: float | None = None, quant_conv: bool = True) -> AutoencoderKL:
    """Return a VAE of images `[N, 3, 4H, 4W]` and latents `[N, 4, H, W]`."""
    return AutoencoderKL(
        **VAE_LEVELS,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from a state of its own, and put the global one back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed the GPUs too
        yield


def randomized(pipeline: Any) -> Any:
    """Draw all weights of a pipeline from the global random state, put it in evaluation mode, and return it.

    As networks start, some outputs are zero and the embeddings of all texts are alike. Here every layer keeps the size
    of what it gets, and scales of norms stay as they are.
    """
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
            for name, parameter in part.named_parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
                elif name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.1)
    return pipeline
