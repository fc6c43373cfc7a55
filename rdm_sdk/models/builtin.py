"""The SDK's own model families, registered as any plugin registers its own."""

from __future__ import annotations

from rdm_sdk.hookspecs import RegisterModel, hookimpl


@hookimpl
def rdm_register_models(register: RegisterModel) -> None:
    register("StableDiffusionPipeline", "rdm_sdk.models.sd:SDAdapter", description="Stable Diffusion 1 and 2")
    register("StableDiffusionXLPipeline", "rdm_sdk.models.sdxl:SDXLAdapter", description="Stable Diffusion XL")
    register("StableDiffusion3Pipeline", "rdm_sdk.models.sd3:SD3Adapter", description="Stable Diffusion 3 and 3.5")
    register("FluxPipeline", "rdm_sdk.models.flux:FluxAdapter", description="FLUX.1 dev and schnell")
    register("Flux2KleinPipeline", "rdm_sdk.models.flux2:Flux2Adapter", description="FLUX.2 klein")
    register("QwenImagePipeline", "rdm_sdk.models.qwen_image:QwenImageAdapter", description="Qwen-Image")
    register("ZImagePipeline", "rdm_sdk.models.z_image:ZImageAdapter", description="Z-Image")
    register("SanaPipeline", "rdm_sdk.models.sana:SanaAdapter", description="Sana")
    register("PixArtSigmaPipeline", "rdm_sdk.models.pixart:PixArtAdapter", description="PixArt-Sigma")
