"""Images of candidates: sampled once, kept by content, taken from there the next time."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

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

Images = dict[str, Tensor]
"""A batch as it is kept: its `PIXELS`, uint8 `[N, 3, H, W]`, and which of them are `BLACK`, bool `[N]`."""
PIXELS, BLACK = "images", "blacked_out"


class Sampled(NamedTuple):
    """What a candidate's images are."""

    images: Tensor
    """uint8 `[N, 3, H, W]`."""
    fresh: int
    """How many were sampled just now."""
    blacked_out: int
    """How many the base's safety checker has made black."""

    def warning(self, name: str) -> str | None:
        """Return what is to be said of black images, if there are any."""
        if not self.blacked_out:
            return None
        return (
            f"{self.blacked_out} of {len(self.images)} images of {name} were made black by the base's safety checker "
            "and count as they are; a base that is saved without one (safety_checker=None) has them"
        )


class Sampler:
    """Samples the candidates of one base.

    Args:
        model: a hub id, a path, or a loaded pipeline, which is left as it was.
        guidance_scale: the teacher's.
        seed: the images of a candidate are the same for the same seed, whatever else was sampled.
        batch_size: images at a time; images depend on it, by their last bits and by their noise.
        candidates: those that will be asked for, which are checked now; they have one text length.
        dtype: of the base, where it is loaded here, float32 by default.
        device: where it works.
        other_base: take students of another base of the same family, as `load_student`.
        cache: a folder for the images, 8 bits a channel, by a hash of all that decides them; None keeps none.

    Raises:
        ConfigError: the base cannot be sampled with the guidance scale, or a candidate with its size, length or steps.
        ModelError: the base is missing or of an unsupported family.
    """

    def __init__(
        self,
        model: object,
        guidance_scale: float,
        seed: int,
        batch_size: int,
        candidates: Sequence[Candidate] = (),
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str,
        cache: Path | None = None,
        other_base: bool = False,
    ) -> None:
        check_guidance(guidance_scale)
        self.guidance_scale, self.seed, self.batch_size, self.cache = guidance_scale, seed, batch_size, cache
        self.other_base = other_base
        length = next((one.call.get("max_sequence_length") for one in candidates), None)
        self.family: ModelFamily = load_family(model, dtype or torch.float32, max_sequence_length=length)
        _check_guides(self.family, guidance_scale)
        self._check(candidates)
        self.fingerprint = self.family.fingerprint()
        around = self.family.frozen_parts() | {"scheduler": self.family.pipeline.scheduler}
        self.parts = {name: _hash_of(part) for name, part in around.items()}
        if str(self.family.pipeline.device) != str(device):  # one that is spread over devices refuses to be moved
            self.family.pipeline.to(device)

    def _check(self, candidates: Sequence[Candidate]) -> None:
        """Raise `ConfigError` for one that cannot be sampled with its size or steps."""
        for candidate in candidates:
            try:
                self._latent_shape(candidate)
                self._scheduler(candidate)
            except ConfigError as error:
                raise ConfigError(f"{candidate.name}: {error}") from error

    def images(self, candidate: Candidate, prompts: Sequence[str], stream: str, done: Callable[[int], None]) -> Sampled:
        """Return a candidate's images of prompts, one each.

        Args:
            candidate: what is sampled.
            prompts: N prompts.
            stream: names the noise, so that two sets of images of the same candidate and prompts can be independent.
            done: called with the number of images after each batch.

        Raises:
            ConfigError: the pipeline cannot be called so.
        """
        pieces: list[Images] = []
        starts = range(0, len(prompts), self.batch_size)
        keys = [self._key(candidate, prompts[start : start + self.batch_size], stream, start) for start in starts]
        kept = [self._kept(key) for key in keys]
        missing = [row for row, images in enumerate(kept) if images is None]
        loaded: AbstractContextManager[dict[str, Any]] = self._loaded(candidate) if missing else nullcontext({})
        with loaded as call:
            for row, (start, images) in enumerate(zip(starts, kept, strict=True)):
                batch = list(prompts[start : start + self.batch_size])
                if images is None:
                    images = self._sample(candidate.name, call, batch, _seed(self.seed, stream, start))
                    self._keep(keys[row], images)
                pieces.append(images)
                done(len(batch))
        return Sampled(
            torch.cat([piece[PIXELS] for piece in pieces]),
            sum(len(pieces[row][PIXELS]) for row in missing),
            sum(int(piece[BLACK].sum()) for piece in pieces),
        )

    # ---- Sampling -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _sample(self, name: str, call: Mapping[str, Any], prompts: list[str], seed: int) -> Images:
        pipeline = self.family.pipeline
        pipeline.set_progress_bar_config(disable=True)
        with torch.random.fork_rng(), _decoding_any_dtype(pipeline.vae):
            torch.manual_seed(seed)
            try:
                made = pipeline(prompt=prompts, output_type="pt", **call)
            except (ValueError, TypeError) as error:  # what the pipeline does not take
                raise ConfigError(f"{type(pipeline).__name__} cannot be called so: {described(error)}") from error
        pixels = to_uint8(check_images(made.images.float(), f"the images of {name}")).permute(0, 3, 1, 2).contiguous()
        flagged = getattr(made, "nsfw_content_detected", None) or [False] * len(prompts)
        return {PIXELS: pixels, BLACK: torch.tensor(flagged)}

    def _latent_shape(self, candidate: Candidate) -> tuple[int, ...]:
        return self.family.latent_shape(candidate.call.get("height"), candidate.call.get("width"))

    def _scheduler(self, candidate: Candidate) -> Any:
        """Return a scheduler of a candidate's steps, on the base's grid for its size; None to take the student's."""
        if candidate.student is not None and not candidate.regrid:
            return None
        shift = self.family.base_shift(self._latent_shape(candidate)) if candidate.shift is None else candidate.shift
        return self.family.student_scheduler(candidate.steps, shift, stochastic=False)

    def call_of(self, candidate: Candidate) -> dict[str, Any]:
        """Return the arguments of the pipeline's call beside the prompt; a student's are in its `inference.json`."""
        if candidate.student is not None:
            return dict(candidate.call)
        call = self.family.inference_call(candidate.steps)  # what its calls need, such as no rounding of sizes
        return call | dict(candidate.call) | self.family.guidance_call(self.guidance_scale)

    @contextmanager
    def _loaded(self, candidate: Candidate) -> Iterator[dict[str, Any]]:
        """Put a candidate into the pipeline, give the arguments of its call, and put the base back afterwards."""
        family, pipeline = self.family, self.family.pipeline
        scheduler, backbone = pipeline.scheduler, family.backbone
        own_scheduler = self._scheduler(candidate)
        try:
            if candidate.student is not None:
                # On a copy: adapters are put into layers in place, and the next candidate needs the base.
                place = backbone.device
                pipeline.register_modules(**{family.component: copy.deepcopy(backbone)})
                if place.type != "cpu":
                    backbone.to("cpu")
                load_student(pipeline, candidate.student, other_base=self.other_base)
            if own_scheduler is not None:
                pipeline.scheduler = own_scheduler
            yield self.call_of(candidate)
        finally:
            if getattr(pipeline, family.component) is not backbone:
                place = getattr(pipeline, family.component).device
                pipeline.register_modules(**{family.component: backbone.to(place)})
            pipeline.scheduler = scheduler

    # ---- The cache ------------------------------------------------------------------------------------------------

    def _key(self, candidate: Candidate, prompts: Sequence[str], stream: str, start: int) -> str:
        scheduler = self._scheduler(candidate)
        content = {
            "base": [type(self.family.pipeline).__name__, self.fingerprint, self.parts, str(self.family.dtype)],
            "student": candidate.fingerprint,
            "scheduler": None if scheduler is None else _hash_of(scheduler),
            "call": self.call_of(candidate),
            "prompts": list(prompts),
            "noise": [self.seed, stream, start],
        }
        return digest(content)

    def _kept(self, key: str) -> Images | None:
        path = None if self.cache is None else self.cache / f"{key}.safetensors"
        if path is None or not path.is_file():
            return None
        try:
            kept = load_file(path)
            return {name: kept[name] for name in (PIXELS, BLACK)}
        except (SafetensorError, KeyError):  # it was not written by this SDK, or damaged since: sampled again
            return None

    def _keep(self, key: str, images: Images) -> None:
        if self.cache is not None:
            with replacing(self.cache / f"{key}.safetensors") as staged:
                try:
                    save_file(images, staged)
                except SafetensorError as error:  # what a full disk is there
                    raise OSError(f"images cannot be kept at {str(staged)!r}: {error}; is the disk full?") from error


@contextmanager
def _decoding_any_dtype(vae: Any) -> Iterator[None]:
    """Let a VAE decode latents of another dtype than its own: pipelines hand on the backbone's, some as they are."""
    decode = vae.decode

    def decode_cast(latents: Tensor, *rest: Any, **named: Any) -> Any:
        return decode(latents.to(vae.dtype), *rest, **named)

    before = vars(vae).get("decode")
    vae.decode = decode_cast
    try:
        yield
    finally:
        del vae.decode
        if before is not None:  # somebody else has put it there
            vae.decode = before


def _check_guides(family: ModelFamily, scale: float) -> None:
    """Raise `ConfigError` for a scale that the base's pipeline would ignore."""
    if family.guidance == "none" and scale != 1:
        raise ConfigError(
            f"guidance_scale={scale}: {family.base_name!r} was distilled without guidance, and its pipeline ignores "
            "it; use 1"
        )
    if family.guidance == "classifier-free" and scale < 1:
        raise ConfigError(f"guidance_scale={scale}: the pipeline takes what is below 1 for no guidance; use 1 or more")


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
