"""What is encoded before a run begins, and where it is kept."""

from __future__ import annotations

import logging

import psutil
from datasets import Dataset
from tqdm.auto import tqdm

from rdm_sdk.errors import ConfigError
from rdm_sdk.families.placement import drop_text_encoders
from rdm_sdk.training.config import RDMConfig
from rdm_sdk.training.models import RunModels
from rdm_sdk.training.processes import Processes
from rdm_sdk.training.prompt_cache import KEPT, TOGETHER
from rdm_sdk.training.prompt_store import PromptStore, encoder_key

logger = logging.getLogger(__name__)


def prepare_prompts(models: RunModels, args: RDMConfig, processes: Processes, *datasets: Dataset | None) -> None:
    """Make the prompts of a run's datasets known, and encode them now where the settings ask for that.

    With `prompt_cache`, each process encodes its share of what is not on disk yet, and all of them read the rest. With
    `text_encoders="drop"`, the encoders are let go of in the end.

    Raises:
        ConfigError: the encodings do not fit into memory, or the processes do not share the folder.
    """
    cache, quiet = models.encode, bool(args.disable_tqdm)
    for dataset in datasets:  # one by one: prompts for evaluation change nothing about how others are encoded
        cache.know(dataset["prompt"] if dataset is not None else ())
    if args.prompt_cache is not None:
        store = PromptStore(args.prompt_cache, encoder_key(models.family, args.guidance_scale))
        _encode_into(store, models, processes, quiet)
    elif args.text_encoders != "drop" and sum(map(len, cache.batches)) > KEPT:
        logger.warning(
            "there are more prompts than the %d whose encodings are kept in memory, and one that was let go of is "
            "encoded again with the %d others of its batch; a folder as prompt_cache keeps all of them",
            KEPT,
            TOGETHER - 1,
        )
    if args.text_encoders == "drop":
        cache([None])
        if args.prompt_cache is None:
            _encode_all(models, quiet)
        drop_text_encoders(models.family)
        cache.close(
            "text_encoders='drop' has let go of the encoders, and it is not among the datasets' prompts; add it there, "
            "or use text_encoders='offload'"
        )


def _encode_all(models: RunModels, quiet: bool) -> None:
    """Encode every known prompt into memory."""
    cache, batches = models.encode, models.encode.batches
    cache.capacity = None
    count = sum(map(len, batches))
    for batch in tqdm(batches, desc="encoding prompts", unit="batch", disable=quiet):
        cache.prepare(batch)
        kept, free = cache.bytes_kept, psutil.virtual_memory().available
        needed = kept / cache.kept * count
        if needed - kept > free:  # what is kept is no longer among what is free
            raise ConfigError(
                f"text_encoders='drop' keeps the encodings of all {count} prompts in memory, {needed / 1e9:.1f} "
                f"GB, and {free / 1e9:.1f} GB are free; give prompt_cache a folder, or use text_encoders='offload'"
            )


def _encode_into(store: PromptStore, models: RunModels, processes: Processes, quiet: bool) -> None:
    """Encode every known prompt that is not in a store yet, each process its share, and read from there on."""
    cache = models.encode
    cache.store = store
    missing = [batch for batch in cache.batches if not store.holds(batch)]
    processes.gather(None)  # before the first is written, so that all find the same ones missing
    mine = missing[processes.index :: processes.count]
    for batch in tqdm(mine, desc="encoding prompts", unit="batch", disable=quiet or not mine):
        cache.prepare(batch)
    processes.gather(None)
    unseen = [batch for batch in missing if not store.holds(batch)]
    if unseen:
        raise ConfigError(
            f"prompt_cache={str(store.folder.parent)!r}: process {processes.index} does not see what another has "
            f"encoded, such as {unseen[0][0]!r}; name a folder that all processes of the run share"
        )
