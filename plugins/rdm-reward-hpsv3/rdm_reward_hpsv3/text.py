"""The words that HPSv3 was trained to read, which are part of the model: other words give other scores.

They are those of hpsv3/dataset/data_collator_qwen.py of MizzenAI/HPSv3 (MIT license), spaces at the ends of lines
included, inside the chat template of Qwen/Qwen2-VL-7B-Instruct.
"""

# ruff: noqa: E501 - the model was trained on lines of this length

REWARD_TOKEN = "<|Reward|>"
"""A token of HPSv3's, added to Qwen2-VL's vocabulary; the score is read where it stands."""

BEFORE_IMAGE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER_IMAGE = "<|vision_end|>"

_QUALITY = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being the best. \n"
    "\n**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n"
)
_ALIGNMENT = (
    "\n**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align with the textual description. The subject should match the description in terms of number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image logically fit the scenario described in the prompt. The environment should support and enhance the subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. The generated content should not introduce elements that conflict with or distort the original description.\n"
)
_PROMPT = "Textual prompt - "
_RATING = "\n\n\n\nPlease provide the overall ratings of this image: "


def after_image(prompt: str) -> str:
    """Return all that the model reads after the image of a prompt, up to and with the reward token.

    What follows in training ("\\n\\nEND\\n" and the template's end) is left out: attention is causal, so that it cannot
    change what is read at the reward token.
    """
    return f"{AFTER_IMAGE}{_QUALITY}{_ALIGNMENT}{_PROMPT}{prompt}{_RATING}{REWARD_TOKEN}"
