"""Images of candidates: sampled once, kept by content, taken from there the next time."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rdm_sdk.errors import ConfigError, described
from rdm_sdk.evaluation.candidates import Candidate
from rdm_sdk.evaluation.images import check_images
from rdm_sdk.evaluation.provenance import digest
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.fingerprint import fingerprint
from rdm_sdk.families.load import load_family
from rdm_sdk.files import replacing
from rdm_sdk.training.export import load_student
from rdm_sdk.training.pictures import to_uint8


class Sampler:
    """Samples the candidates of one base.

    Args:
        model: a hub id, a path, or a loaded pipeline, which is left as it was.
        guidance_scale: the teacher's.
        seed: the images of a candidate are the same for the same seed, whatever else was sampled.
        batch_size: images at a time; images depend on it, by their last bits and by their noise.
        dtype: of the base, where it is loaded here, float32 by default.
        device: where it works.
        other_base: take students of another base of the same family, as `load_student`.
        cache: a folder for the images, 8 bits a channel, by a hash of all that decides them; None keeps none.

    Raises:
        ConfigError: the guidance scale is below 0 or not finite.
        ModelError: the base is missing or of an unsupported family.
    """

    def __init__(
        self,
        model: object,
        guidance_scale: float,
        seed: int,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str,
        cache: Path | None = None,
        other_base: bool = False,
    ) -> None:
        check_guidance(guidance_scale)
        self.guidance_scale, self.seed, self.batch_size, self.cache = guidance_scale, seed, batch_size, cache
        self.other_base = other_base
        self.family: ModelFamily = load_family(model, dtype or torch.float32)
        self.fingerprint = self.family.fingerprint()
        around = self.family.frozen_parts() | {"scheduler": self.family.pipeline.scheduler}
        self.parts = {name: _hash_of(part) for name, part in around.items()}
        if str(self.family.pipeline.device) != str(device):  # one that is spread over devices refuses to be moved
            self.family.pipeline.to(device)

    def images(
        self, candidate: Candidate, prompts: Sequence[str], stream: str, done: Callable[[int], None]
    ) -> tuple[Tensor, int]:
        """Return a candidate's images of prompts, one each, and how many of them were sampled just now.

        Args:
            candidate: what is sampled.
            prompts: N prompts.
            stream: names the noise, so that two sets of images of the same candidate and prompts can be independent.
            done: called with the number of images after each batch.

        Returns:
            uint8 `[N, 3, H, W]`, and a count.

        Raises:
            ConfigError: the pipeline cannot be called so.
        """
        pieces = []
        starts = range(0, len(prompts), self.batch_size)
        keys = [self._key(candidate, prompts[start : start + self.batch_size], stream, start) for start in starts]
        kept = [self._kept(key) for key in keys]
        missing = [row for row, images in enumerate(kept) if images is None]
        loaded: AbstractContextManager[dict[str, Any]] = self._loaded(candidate) if missing else nullcontext({})
        with loaded as call:
            for row, (start, images) in enumerate(zip(starts, kept, strict=True)):
                batch = list(prompts[start : start + self.batch_size])
                if images is None:
                    images = self._sample(call, batch, _seed(self.seed, stream, start))
                    self._keep(keys[row], images)
                pieces.append(images)
                done(len(batch))
        sampled = sum(len(pieces[row]) for row in missing)
        return torch.cat(pieces), sampled

    # ---- Sampling -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _sample(self, call: Mapping[str, Any], prompts: list[str], seed: int) -> Tensor:
        pipeline = self.family.pipeline
        pipeline.set_progress_bar_config(disable=True)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                images = pipeline(prompt=prompts, output_type="pt", **call).images
            except (ValueError, TypeError) as error:  # what the pipeline does not take
                raise ConfigError(f"{type(pipeline).__name__} cannot be called so: {described(error)}") from error
        return to_uint8(check_images(images.float(), "sampled images")).permute(0, 3, 1, 2).contiguous()

    @contextmanager
    def _loaded(self, candidate: Candidate) -> Iterator[dict[str, Any]]:
        """Put a candidate into the pipeline, give the arguments of its call, and put the base back afterwards."""
        family, pipeline = self.family, self.family.pipeline
        scheduler, backbone = pipeline.scheduler, family.backbone
        call = dict(candidate.call)
        try:
            if candidate.student is None:
                pipeline.scheduler = family.student_scheduler(candidate.steps, None, stochastic=False)
                call |= {"num_inference_steps": candidate.steps, **family.guidance_call(self.guidance_scale)}
            else:
                # On a copy: adapters are put into layers in place, and the next candidate needs the base.
                place = backbone.device
                pipeline.register_modules(**{family.component: copy.deepcopy(backbone)})
                if place.type != "cpu":
                    backbone.to("cpu")
                load_student(pipeline, candidate.student, other_base=self.other_base)
                if candidate.regrid:
                    pipeline.scheduler = family.student_scheduler(candidate.steps, candidate.shift, stochastic=False)
            yield call
        finally:
            if getattr(pipeline, family.component) is not backbone:
                place = getattr(pipeline, family.component).device
                pipeline.register_modules(**{family.component: backbone.to(place)})
            pipeline.scheduler = scheduler

    # ---- The cache ------------------------------------------------------------------------------------------------

    def _key(self, candidate: Candidate, prompts: Sequence[str], stream: str, start: int) -> str:
        guidance = self.guidance_scale if candidate.student is None else None
        content = {
            "base": [type(self.family.pipeline).__name__, self.fingerprint, self.parts, str(self.family.dtype)],
            "student": candidate.fingerprint,
            "steps": candidate.steps,
            "guidance_scale": guidance,
            "call": dict(candidate.call),
            "prompts": list(prompts),
            "noise": [self.seed, stream, start],
        }
        return digest(content)

    def _kept(self, key: str) -> Tensor | None:
        path = None if self.cache is None else self.cache / f"{key}.safetensors"
        if path is None or not path.is_file():
            return None
        try:
            return load_file(path)["images"]
        except (SafetensorError, KeyError):  # it was not written by this SDK, or damaged since: sampled again
            return None

    def _keep(self, key: str, images: Tensor) -> None:
        if self.cache is not None:
            with replacing(self.cache / f"{key}.safetensors") as staged:
                try:
                    save_file({"images": images}, staged)
                except SafetensorError as error:  # what a full disk is there
                    raise OSError(f"images cannot be kept at {str(staged)!r}: {error}; is the disk full?") from error


def check_guidance(scale: float) -> None:
    """Raise `ConfigError` unless a teacher can be sampled with a guidance scale."""
    if not 0 <= scale < math.inf:
        raise ConfigError(f"guidance_scale={scale} cannot be used; it must be 0 or more (1 is no guidance)")


def _hash_of(part: object) -> str:
    """Return a hash of a part of a pipeline beside its backbone: its class, samples of its weights, its settings."""
    weights = fingerprint(part) if isinstance(part, nn.Module) else None
    config = part.config if isinstance(part, ConfigMixin) else {}
    # Names that begin with _ say where it was loaded from, and by which version.
    return digest([type(part).__name__, weights, {key: repr(v) for key, v in config.items() if key[0] != "_"}])


def _seed(seed: int, stream: str, start: int) -> int:
    """Return the seed of a batch: other noise for every batch, and for every stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}/{start}".encode()).digest()[:4])
