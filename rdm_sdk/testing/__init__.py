"""For authors of plugins: the contract kit, and tiny offline models to test with."""

from rdm_sdk.testing.models import save_tiny_clip, tiny_clip_config, tiny_tokenizer

__all__ = ["save_tiny_clip", "tiny_clip_config", "tiny_tokenizer"]
