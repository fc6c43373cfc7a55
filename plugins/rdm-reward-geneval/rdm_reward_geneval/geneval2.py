"""GenEval 2's Soft-TIFA: how probable a vision-language model finds the right answers about a prompt's atoms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from rdm_reward_vlm.judge import answer_tokens, load_judge
from rdm_reward_vlm.pictures import to_pil
from torch import Tensor

from rdm_reward_geneval.atoms import COLUMN, Atom, asked, parse, soft_tifa, spellings
from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig, RewardError
from rdm_sdk.testing import example_images
from rdm_sdk.vision import PretrainedConfig

HUB = "Qwen/Qwen3-VL-8B-Instruct"


class GenEval2(Reward):
    """Soft-TIFA of GenEval 2 (arXiv 2512.16853): the mean probability of the right answers; in [0, 1], no gradient.

    The questions about a prompt and their right answers stand in the dataset's column `vqa_list`, as in GenEval 2's
    data. `geneval2:gm` (the default) is their geometric mean, which one wrong atom brings down, `geneval2:am` the
    arithmetic one. A probability is that of the answer's first token, among all tokens, summed over its spellings.
    """

    name = "geneval2"
    capabilities = Capabilities(
        space="pixel", gradient="none", columns=(COLUMN,), range=(0.0, 1.0), parameters=8_767_123_696
    )

    class Config(PretrainedConfig):
        variant: Literal["gm", "am"] = "gm"
        """The mean over a prompt's atoms: geometric or arithmetic; as in `geneval2:am`."""
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
        """Dtype of the model's weights."""
        batch_size: int = Field(default=8, ge=1)
        """Questions that the model is asked at a time, at most; those of other lengths never go together."""

    config: Config

    def __init__(self, config: RewardConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        self.source = self.config.path or HUB
        self.judge = load_judge(self.source, self.config.revision, self.config.torch_dtype)
        self.preprocessing = f"8 bits, {type(self.judge.processor.image_processor).__name__}"
        self._tokens: dict[str, list[int]] = {}

    def applies(self, prompts: Sequence[str], columns: Mapping[str, Sequence[object]]) -> list[bool]:
        """Return which samples have questions.

        Raises:
            RewardError: an entry of `vqa_list` is no list of pairs, or holds what the model cannot be asked, or cannot
                answer in one token. A run asks before it trains.
        """
        entries = [parse(entry) for entry in columns.get(COLUMN, [None] * len(prompts))]
        for atom in {atom for atoms in entries for atom in atoms}:
            self._answer(atom)
        return [bool(atoms) for atoms in entries]

    def score(self, batch: RewardBatch) -> Tensor:
        entries = [parse(entry) for entry in batch.columns[COLUMN]]
        places = [(row, atom) for row, atoms in enumerate(entries) for atom in atoms]
        logarithms = self._judged(batch.images, places).split([len(atoms) for atoms in entries])
        return torch.stack([soft_tifa(values, self.config.variant) for values in logarithms]).float()

    def _judged(self, images: Tensor, places: Sequence[tuple[int, Atom]]) -> Tensor:
        """Return the log probability, float64 `[len(places)]`, of the right answer about each row and atom."""
        questions = [asked(atom) for _, atom in places]
        judged = torch.full((len(places),), torch.nan, dtype=torch.float64)
        for together in self.judge.batches(questions, self.config.batch_size):
            pictures = [to_pil(images[places[place][0]]) for place in together]
            logits = self.judge.next_logits(pictures, [questions[place] for place in together])
            for place, logarithms in zip(together, logits.double().log_softmax(-1), strict=True):
                judged[place] = logarithms[self._answer(places[place][1])].logsumexp(-1)
        return judged

    def _answer(self, atom: Atom) -> list[int]:
        """Return the tokens of the right answer; the model must be able to read the question."""
        if not self.judge.can_ask(atom.question):
            raise RewardError(
                f"geneval2: the question {atom.question!r} in the column {COLUMN!r} holds a control token of "
                f"{self.source!r}; write it without"
            )
        if atom.answer not in self._tokens:
            tokenizer = self.judge.processor.tokenizer
            self._tokens[atom.answer] = answer_tokens(tokenizer, spellings(atom.answer), self.source)
        return self._tokens[atom.answer]

    def example(self) -> RewardBatch:
        one: list[object] = [["Are there any foxes in the image?", "Yes"], ["Are the foxes red?", "Yes"]]
        two: list[object] = [["How many boats are in the image?", "two"], ["Are there any boats in the image?", "Yes"]]
        columns: dict[str, list[object]] = {COLUMN: [one, one, two, two]}
        return RewardBatch.from_images(example_images(4), ["a red fox"] * 2 + ["two boats"] * 2, 2, columns)
