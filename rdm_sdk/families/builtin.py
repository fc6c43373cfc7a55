"""The SDK's own model families, registered as any plugin registers its own."""

from __future__ import annotations

from rdm_sdk.plugins.hookspecs import RegisterModel, hookimpl


@hookimpl
def rdm_register_models(register: RegisterModel) -> None:
    register("StableDiffusionPipeline", "rdm_sdk.families.sd:SDFamily", description="Stable Diffusion 1 and 2")
    register("StableDiffusionXLPipeline", "rdm_sdk.families.sdxl:SDXLFamily", description="Stable Diffusion XL")
    register("StableDiffusion3Pipeline", "rdm_sdk.families.sd3:SD3Family", description="Stable Diffusion 3 and 3.5")
    register("FluxPipeline", "rdm_sdk.families.flux:FluxFamily", description="FLUX.1 dev and schnell")
    register("Flux2KleinPipeline", "rdm_sdk.families.flux2:Flux2Family", description="FLUX.2 klein")
    register("QwenImagePipeline", "rdm_sdk.families.qwen_image:QwenImageFamily", description="Qwen-Image")
    register("ZImagePipeline", "rdm_sdk.families.z_image:ZImageFamily", description="Z-Image")
    register("SanaPipeline", "rdm_sdk.families.sana:SanaFamily", description="Sana")
    register("PixArtSigmaPipeline", "rdm_sdk.families.pixart:PixArtFamily", description="PixArt-Sigma")
