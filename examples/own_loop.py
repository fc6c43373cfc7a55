"""The method without a Trainer: loop, optimizers, clipping and export are yours.

python examples/own_loop.py --output outputs/own_loop --steps 150

`docs/step.md` explains the parts.
"""

import torch
from peft import LoraConfig
from shared import digits_settings, flags

from rdm_sdk import digits
from rdm_sdk.families.load import load_family
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.training.export import save_student, student_info
from rdm_sdk.training.judge import Judge
from rdm_sdk.training.models import RunModels
from rdm_sdk.training.optimizers import critic_groups
from rdm_sdk.training.step import DistillationStep


def main() -> None:
    options = flags(__doc__, steps=150).parse_args()
    settings = digits_settings(options, "unused", critic_steps=5)
    rewards = resolve_rewards("dm + 0.1*legibility")
    family = load_family(digits.teacher_path(), torch.float32, max_sequence_length=settings.max_sequence_length)
    lora = LoraConfig(r=32, lora_alpha=32)
    family.add_roles({"student": lora, "fake": lora}, {}, settings.steps_told)
    models = RunModels(family, settings, settings.device)
    step = DistillationStep(Judge(models, rewards, settings), settings)
    student = torch.optim.AdamW(models.parameters_of("student"), lr=1e-3, betas=(0.0, 0.99))
    critic = torch.optim.AdamW(critic_groups(family.roles, 2e-3), betas=(0.0, 0.99))

    for number in range(options.steps):
        chosen = torch.randperm(len(digits.prompts()))[: options.batch // settings.num_generations].tolist()
        prompts = [digits.prompts()[place] for place in chosen for _ in range(settings.num_generations)]
        step.begin([{"prompts": prompts, "columns": {}}], number)
        for turn in range(settings.critic_steps):
            for loss in step.critic_losses(turn):
                loss.backward()
            step.end_critics()  # clips, and stops at what is not finite
            critic.step()
            critic.zero_grad()
        result = step.student_loss(0)
        result.loss.backward()
        step.end(number + 1)
        torch.nn.utils.clip_grad_norm_(models.parameters_of("student"), settings.max_grad_norm)
        student.step()
        student.zero_grad()
        if number % 10 == 0:
            print(number, {name: round(value, 4) for name, value in result.pulls.items()})
    save_student(options.output / "student", family, student_info(settings, models.shift, rewards))


if __name__ == "__main__":
    main()
