"""A vision-language model that answers yes or no, by the probabilities of its next token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForImageTextToText, AutoProcessor

from rdm_reward_vlm.answers import NO, YES, yes_share
from rdm_sdk import RewardError
from rdm_sdk.vision import expanded, load_pretrained, unavailable


class Judge(nn.Module):
    """An image-text model with its processor; `load_judge` makes one."""

    def __init__(self, model: Any, processor: Any, source: str) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.yes = answer_tokens(processor.tokenizer, YES, source)
        self.no = answer_tokens(processor.tokenizer, NO, source)
        self._control_texts = list(processor.tokenizer.get_added_vocab())
        # Logits of a whole prompt are gigabytes with today's vocabularies; most models can leave all but the last out.
        can_cut = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._only_last = {"logits_to_keep": 1} if can_cut else {}

    def can_ask(self, text: str) -> bool:
        """Whether a text is free of the model's control tokens, which would be read as image places or other roles."""
        return not any(control in text for control in self._control_texts)

    def length(self, question: str) -> int:
        """Return how many tokens a question has with all that surrounds it, its image counting as one."""
        return len(self.processor.tokenizer(self._text(question), add_special_tokens=False).input_ids)

    def batches(self, questions: Sequence[str], size: int) -> Iterator[list[int]]:
        """Yield the rows of N questions that may be asked together: of one `length`, `size` at most."""
        lengths = {question: self.length(question) for question in set(questions)}

        def length(row: int) -> int:
            return lengths[questions[row]]

        for _, group in groupby(sorted(range(len(questions)), key=length), key=length):
            alike = list(group)
            yield from (alike[start : start + size] for start in range(0, len(alike), size))

    def ask(self, images: Sequence[Image.Image], questions: Sequence[str]) -> Tensor:
        """Return `yes_share`, float32 `[N]`, for N images of one size and N questions of one `length`."""
        logits = self.next_logits(images, questions)
        return yes_share(logits[:, self.yes], logits[:, self.no])

    @torch.no_grad()
    def next_logits(self, images: Sequence[Image.Image], questions: Sequence[str]) -> Tensor:
        """Return the logits of the first token of N answers, float32 `[N, vocabulary]`.

        Equal lengths need no padding, which models treat differently, so that answers do not depend on the batch.
        """
        device, dtype = self.model.device, self.model.dtype
        output = self.model(**self._inputs(images, questions).to(device, dtype), **self._only_last)
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _inputs(self, images: Sequence[Image.Image], questions: Sequence[str]) -> Any:
        if self.processor.chat_template is None:
            texts = [self._text(question) for question in questions]
            return self.processor(images=list(images), text=texts, return_tensors="pt")
        chats = [_chat(question, image) for image, question in zip(images, questions, strict=True)]
        return self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def _text(self, question: str) -> str:
        if self.processor.chat_template is None:
            place = getattr(self.processor, "image_token", None)  # processors without one put the image in themselves
            return question if place is None else f"{place}\n{question}"
        text: str = self.processor.apply_chat_template(_chat(question), add_generation_prompt=True, tokenize=False)
        return text


def _chat(question: str, image: Image.Image | None = None) -> list[dict[str, Any]]:
    picture = {"type": "image"} if image is None else {"type": "image", "image": image}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]


def answer_tokens(tokenizer: Any, forms: Sequence[str], source: str) -> list[int]:
    """Return the ids of those forms of an answer that are one known token each.

    Raises:
        RewardError: none is.
    """
    found = set()
    for form in forms:
        ids = tokenizer.encode(form, add_special_tokens=False)
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            found.add(ids[0])
    if not found:
        raise RewardError(
            f"the tokenizer of {source!r} has no single token for {forms[0]!r} (tried "
            f"{', '.join(map(repr, forms))}), so its answer cannot be read off one token; pass path= another model"
        )
    return sorted(found)


def load_judge(source: str, revision: str | None, dtype: torch.dtype) -> Judge:
    """Return the judge at a hub id or local folder.

    Raises:
        RewardError: there is no model there that reads images and writes text, its processor cannot be loaded, or
            "yes" and "no" are no tokens of it.
    """
    where = expanded(source)
    try:
        config: Any = AutoConfig.from_pretrained(where, revision=revision)
    except Exception as error:
        raise unavailable(source, error) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise RewardError(
            f"{source!r} holds a model of type {config.model_type!r}, which does not read images and write text; pass "
            "path= a vision-language model that AutoModelForImageTextToText loads, such as Qwen/Qwen2.5-VL-3B-Instruct"
        )
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise RewardError(
            f"{source!r} ({config.model_type}) answers from a separate decoder, but the vlm reward reads the token "
            "after the question; pass path= a decoder-only vision-language model, such as Qwen/Qwen2.5-VL-3B-Instruct"
        )
    processor = _load_processor(source, where, revision)
    return Judge(
        load_pretrained(AutoModelForImageTextToText, source, config.model_type, revision, dtype), processor, source
    )


def _load_processor(source: str, where: str, revision: str | None) -> Any:
    try:
        processor: Any = AutoProcessor.from_pretrained(where, revision=revision)
    except Exception as error:
        said, hint = " ".join(str(error).split()).removesuffix("."), ""
        if find_spec("torchvision") is None:
            hint = (
                " torchvision is not installed, and processors that also read videos need it: pip install torchvision"
            )
        raise RewardError(
            f"the processor of {source!r} cannot be loaded: {type(error).__name__}: {said}.{hint}"
        ) from error
    # AutoProcessor falls back to a bare tokenizer or image processor where there is only one of the two.
    if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
        raise RewardError(
            f"{source!r} has a {type(processor).__name__} only, no processor for images and text; copy "
            "processor_config.json, preprocessor_config.json and the tokenizer's files beside the weights"
        )
    return processor
