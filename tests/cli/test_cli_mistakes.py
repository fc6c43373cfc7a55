"""What users mistype on the command line: one line on standard error, status 2, nothing written."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from rdm_sdk.cli.main import main

TRAIN = "train --model digits"
PLAN = "plan --model digits"
EVAL = "eval --model digits"
SAMPLE = "sample --model digits --student student --prompt x"
FILES = {
    "typo.yaml": b"num_generation: 4\n",
    "hyphen.yaml": b"model: digits\nlora-r: 4\n",
    "broken.yaml": b"a: [1\n",
    "list.yaml": b"- a\n- b\n",
    "empty.yaml": b"",
    "latin.yaml": "rewards: d\xe9j\xe0\n".encode("latin-1"),
    "word.yaml": b"model: digits\nmax_steps: many\n",
    "fraction.yaml": b"model: digits\nnum_generations: 4.5\n",
    "yes.yaml": b"model: digits\nnum_generations: true\n",
    "null.yaml": b"model: digits\nlearning_rate: null\n",
    "sequence.yaml": b"model: digits\nnum_generations: [4]\n",
    "models.yaml": b"model: [digits, digits]\n",
    "choice.yaml": b"model: digits\nsampler: renoize\n",
    "flag.yaml": b"model: digits\nuse_cpu: maybe\n",
    "env.yaml": b"model: digits\nenv: 3\n",
    "number.yaml": b"model: digits\n3: 4\n",
    "good.yaml": b"model: digits\nmax_steps: 1\nmax_sequence_length: 4\nuse_cpu: true\n",
    "latin.txt": "un d\xe9j\xe0 vu\n".encode("latin-1"),
    "empty.txt": b"\n\n",
    "file": b"in the way",
    "student/README.md": b"a folder, and no student",
    "four/inference.json": b'{"num_inference_steps": 4}',
    "pipeline/model_index.json": b"{",
    "prompts.txt": b"a cat\n",
    "files.csv": b"file,prompt\nbroken.png,a cat\n",
    "pictures/broken.png": b"no picture",
    "renoising/inference.json": b'{"num_inference_steps": 4}',
    "renoising/scheduler/scheduler_config.json": b'{"_class_name": "LCMScheduler"}',
}
MISTAKES = [
    # Which command.
    ("", "which command? One of demo, train, sample, eval, score"),
    ("trian", "invalid choice: 'trian'"),
    ("--verison", "unrecognized arguments: --verison"),
    # Names of settings.
    (f"{TRAIN} --learning_rte 1e-4", "unknown setting 'learning_rte'. Did you mean 'learning_rate'?"),
    (f"{TRAIN} --num_gen 4", "unknown setting 'num_gen'"),
    (f"{TRAIN} --resume latest", "unknown setting 'resume'"),
    (f"{TRAIN} --batch 8", "unknown setting 'batch'"),
    (f"{TRAIN} --memory 8", "unknown setting 'memory'"),
    (f"{TRAIN} stray", "unrecognized words: stray"),
    (f"{TRAIN} -x", "unrecognized words: -x"),
    (f"{TRAIN} --max_steps", "--max_steps/--max-steps: expected one argument"),
    # Values of settings.
    (f"{TRAIN} --max_steps many", "invalid int value: 'many'"),
    (f"{TRAIN} --learning_rate fast", "invalid float value: 'fast'"),
    (f"{TRAIN} --learning_rate -1", "learning_rate=-1.0 cannot be used"),
    (f"{TRAIN} --use_cpu maybe", "maybe"),
    (f"{TRAIN} --sampler renoize", "renoize"),
    (f"{TRAIN} --text_encoders away", "away"),
    (f"{TRAIN} --num_generations 0", "num_generations=0 cannot be used"),
    (f"{TRAIN} --num_generations 3", "must be a multiple of num_generations=3"),
    (f"{TRAIN} --per_device_train_batch_size 0", "per_device_train_batch_size=0 cannot be used"),
    (f"{TRAIN} --gradient_accumulation_steps 0", "gradient_accumulation_steps=0 cannot be used"),
    (f"{TRAIN} --adam_beta1 1.5", "adam_beta1=1.5 cannot be used"),
    (f"{TRAIN} --seed -1", "seed=-1 cannot be used"),
    (f"{TRAIN} --fp16", "fp16=True is not supported"),
    (f"{TRAIN} --resolutions 32by32", "'32by32' is no size"),
    (f"{TRAIN} --weighting balanced", "balanced"),
    (f"{TRAIN} --reward_route tlit", "tlit"),
    (f"{TRAIN} --optim adamm", "adamm"),
    (f"{TRAIN} --lr_scheduler_type lineer", "lineer"),
    (f"{TRAIN} --report_to wandbb --use_cpu", "there is no such tracker. Did you mean 'wandb'?"),
    (f"{TRAIN} --report_to comet_ml --use_cpu", "report_to='comet_ml' needs its package"),
    (f"{TRAIN} --optim_args lr --use_cpu", "optim="),
    (f"{TRAIN} --eval_strategy steps --eval_steps 5", "eval_strategy needs prompts"),
    (f"{TRAIN} --load_best_model_at_end", "load_best_model_at_end"),
    (f"{TRAIN} --lora_r 0", "--lora_r must be at least 1; got 0"),
    (f"{TRAIN} --lora-alpha -3", "--lora_alpha must be at least 1; got -3"),
    (f"{TRAIN} --student_weights full --critic_weights full --lora_r 4 --use_cpu", "--lora_r describes adapters"),
    (f"{TRAIN} --quantization 4bit --student_weights full", "cannot be trained in full"),
    # The file.
    ("train --config", "--config: expected one argument"),
    ("train --config no/such.yaml", "there is no file 'no/such.yaml'"),
    ("train --config=no/such.yaml", "there is no file 'no/such.yaml'"),
    ("train --config student", "there is no file 'student'"),
    ("train --config typo.yaml", "unknown setting 'num_generation'. Did you mean 'num_generations'?"),
    ("train --config hyphen.yaml", "unknown setting 'lora-r'. Did you mean 'lora_r'?"),
    ("train --config broken.yaml", "broken.yaml is not valid YAML"),
    ("train --config list.yaml", "must map settings to values"),
    ("train --config empty.yaml", "must map settings to values"),
    ("train --config latin.yaml", "latin.yaml is no text in UTF-8"),
    ("train --config word.yaml", "max_steps='many' cannot be used; it must be a whole number"),
    ("train --config fraction.yaml", "num_generations=4.5 cannot be used; it must be a whole number"),
    ("train --config yes.yaml", "num_generations=True cannot be used; it must be a whole number"),
    ("train --config null.yaml", "learning_rate=None cannot be used; it must be a number"),
    ("train --config sequence.yaml", "num_generations=[4] cannot be used"),
    ("train --config models.yaml", "model=['digits', 'digits'] cannot be used; it must be a text"),
    ("train --config choice.yaml", "sampler='renoize' cannot be used; it must be one of renoise, cps"),
    ("train --config flag.yaml", "use_cpu='maybe' cannot be used; it must be true or false"),
    ("train --config env.yaml", "env in env.yaml must map names"),
    ("train --config number.yaml", "unknown setting '3'"),
    ("train --config good.yaml --max_steps many", "invalid int value: 'many'"),
    # Model, prompts, rewards, folders.
    ("train --prompts latin.txt", "--model is missing"),
    ("train --model some/model", "--prompts is missing"),
    (f"{TRAIN} --use_cpu --save_to student", "student/README.md is no model card of rdm-sdk and would be overwritten"),
    ("train --model ./nowhere --prompts file --use_cpu", "there is no such folder"),
    ("train --model student --prompts file --use_cpu", "the folder has no model_index.json"),
    ("train --model pipeline --prompts file --use_cpu", "cannot load the base model 'pipeline'"),
    (f"{TRAIN} --prompts nowhere.txt --use_cpu", "--prompts: there is no file at 'nowhere.txt'"),
    (f"{TRAIN} --prompts latin.txt --use_cpu", "'latin.txt' is no text in UTF-8"),
    (f"{TRAIN} --prompts empty.txt --use_cpu", "--prompts holds no prompts"),
    (f"{TRAIN} --rewards 'dm + klip' --use_cpu", "klip"),
    (f"{TRAIN} --rewards 'dm +' --use_cpu", "dm +"),
    (f"{TRAIN} --rewards 0*dm --use_cpu", "every reward has weight 0"),
    (f"{TRAIN} --reward_weights 1 2 --use_cpu", "reward_weights has 2 entries for 1 rewards"),
    (f"{TRAIN} --rewards legibility --weighting balance --use_cpu", "weighs rewards against 'dm'"),
    (f"{TRAIN} --critic_steps 0 --use_cpu", "critic_steps=0"),
    (f"{TRAIN} --output_dir file/run --use_cpu", "output_dir='file/run' cannot be written to"),
    (f"{TRAIN} --save_to file --use_cpu", "save_to='file' cannot be written to"),
    (f"{TRAIN} --resume_from_checkpoint nowhere --use_cpu", "cannot resume: there is no folder 'nowhere'"),
    (f"{TRAIN} --resume_from_checkpoint student --use_cpu", "it is no checkpoint of this SDK"),
    # Planning.
    ("plan", "--model is missing"),
    (f"{PLAN} --memory 0", "--memory must be a positive number of GB; got 0.0"),
    (f"{PLAN} --memory much", "invalid float value: 'much'"),
    (f"{PLAN} --learning_rte 1e-4", "unknown setting 'learning_rte'"),
    (f"{PLAN} --rewards klip", "klip"),
    (f"{PLAN} --rewards 0*dm", "every reward has weight 0"),
    ("plan --config typo.yaml", "unknown setting 'num_generation'"),
    ("plan --config word.yaml", "max_steps='many' cannot be used"),
    ("plan --model ./nowhere", "there is no such folder"),
    ("plan --model pipeline", "cannot read"),
    # The others.
    ("sample", "the following arguments are required: --model"),
    ("sample --model digits --prompt x", "there is nothing to sample: give --student, or --teacher"),
    ("sample --model digits --teacher 2", "there are no prompts: give --prompt, or a file by --prompts"),
    ("sample --model ./nowhere --teacher 2 --prompt x", "there is no such folder"),
    ("sample --model digits --teacher 2 --prompts nowhere.txt", "nowhere.txt"),
    ("sample --model digits --teacher 2 --prompt ''", "must be a text that is not empty"),
    ("sample --model digits --student renoising --prompt x --num_inference_steps 2", "re-noises after each of its 4"),
    ("sample --model digits --teacher 2 --prompt x --device gpu", "'gpu' is no device"),
    ("sample --model digits --teacher 2 --prompt x --device cuda:77", "there is no cuda:77"),
    ("sample --model digits --teacher 2 --prompt x --dtype float8", "invalid choice: 'float8'"),
    ("sample --model digits --teacher 2 --prompt x --files file", "file cannot be a folder"),
    ("report", "the following arguments are required: run"),
    ("report nowhere", "there is no folder 'nowhere'"),
    ("report student", "'student' holds no log of a run: log.jsonl is written from the first log on"),
    ("report student --output pictures", "pictures is a folder"),
    ("report student --ouput page.html", "unrecognized arguments: --ouput page.html"),
    ("sample --model digits --student nowhere --prompt x", "there is no folder nowhere"),
    (SAMPLE, "student has no inference.json, so it is no student"),
    (f"{SAMPLE} --height tall", "must be a whole number, at least 1; got 'tall'"),
    ("sample --model digits --student four --prompt x --num_inference_steps 8", "was trained for 4 steps, and its"),
    (f"{SAMPLE} --num_inference_steps 0", "must be a whole number, at least 1; got '0'"),
    (f"{SAMPLE} --seed -1", "must be a whole number, at least 0"),
    (f"{SAMPLE} --output student", "student is a folder"),
    (f"{SAMPLE} --output file/picture.png", "file is a file"),
    ("eval", "the following arguments are required: --model"),
    (EVAL, "there is nothing to evaluate: give students, or teacher_steps"),
    ("eval --model some/model --teacher_steps 1", "--prompts is missing"),
    ("eval --model some/model --prompts prompts.txt --teacher_steps 1", "--features is missing: give 'dinov2'"),
    ("eval --model ./nowhere --prompts prompts.txt --features dinov2 --teacher_steps 1", "there is no such folder"),
    (f"{EVAL} --student nowhere", "there is no folder 'nowhere'"),
    (f"{EVAL} --student student", "student has no inference.json, so it is no student"),
    (f"{EVAL} --student renoising --steps 1 2", "re-noises after each of its 4 steps"),
    (f"{EVAL} --teacher_steps none", "must be a whole number, at least 1; got 'none'"),
    (f"{EVAL} --teacher_steps 1 --samples 1001", "samples=1001 must be a multiple of the 10 different prompts"),
    (f"{EVAL} --teacher_steps 1 --prompts nowhere.txt", "there is no file at 'nowhere.txt'"),
    (f"{EVAL} --teacher_steps 1 --rewards klip", "klip"),
    (f"{EVAL} --teacher_steps 1 --rewards dm", "needs the models of a training run"),
    (f"{EVAL} --teacher_steps 1 --real student", "--real: there are no pictures in 'student'"),
    (f"{EVAL} --teacher_steps 1 --features ./nowhere", "'./nowhere' cannot be loaded"),
    (f"{EVAL} --teacher_steps 1 --guidance_scale strong", "invalid float value: 'strong'"),
    (f"{EVAL} --teacher_steps 1 --output file", "file cannot be a folder"),
    (f"{EVAL} --teacher-steps 1", "unrecognized arguments: --teacher-steps 1"),
    ("score", "the following arguments are required: folder, --rewards"),
    ("score nowhere --rewards jpeg", "there is no folder 'nowhere'"),
    ("score student --rewards jpeg", "there are no pictures in 'student'"),
    ("score pictures --rewards klip", "klip"),
    ("score pictures --rewards legibility", "reads prompts"),
    ("score pictures --rewards jpeg", "pictures/broken.png' cannot be read"),
    ("score pictures --rewards jpeg --prompts prompts.txt", "must end in .csv or .jsonl, or be 'names'"),
    ("score pictures --rewards jpeg --prompts nowhere.csv", "there is no file 'nowhere.csv'"),
    ("score pictures --rewards jpeg --prompts files.csv", "row 1 of 'files.csv' needs file_name and prompt"),
    ("score pictures --rewards jpeg --output scores.txt", "must end in .json or .csv"),
    ("score pictures --rewards jpeg --output student", "student is a folder"),
    ("demo --samples 7", "--samples must be a multiple of 10"),
    ("demo --samples many", "invalid int value: 'many'"),
    ("demo --steps 0", "must be a whole number, at least 1; got '0'"),
    ("demo --output file", "file cannot be a folder"),
    ("demo --stepps 3", "unrecognized arguments: --stepps 3; see 'rdm-sdk demo --help'"),
    ("presets", "required"),
    ("presets shwo gndm", "invalid choice: 'shwo'"),
    ("presets show gdnm", "there is no preset 'gdnm'. Did you mean 'gndm'?"),
    ("rewards info klip", "klip"),
    ("rewards info 'dm['", "dm["),
    ("rewards check klip", "klip"),
    ("models lsit", "invalid choice: 'lsit'"),
    ("plugins --jsno", "unrecognized arguments: --jsno"),
    ("serve", "the following arguments are required: rewards"),
    ("serve klip", "unknown reward 'klip'. Did you mean 'clip'?"),
    ("serve 'legibility +'", "legibility +"),
    ("serve dm", "'dm' needs the models of a training run, so it cannot be served"),
    ("serve 'legibility[size=3]'", "legibility"),
    ("serve legibility --port 70000", "at most 65535; got '70000'"),
    ("serve legibility --host 0.0.0.0", "there is no token: set RDM_SERVE_TOKEN"),
    ("serve legibility --host no.such.host.invalid --token x", "cannot listen at no.such.host.invalid, port 8000"),
    ("serve legibility --token 'a b'", "--token must be printable ASCII without spaces"),
    ("serve legibility --token ''", "--token must be printable ASCII without spaces"),
    ("serve legibility --device gpu7", "--device gpu7 cannot be used"),
    ("serve legibility --max-images 0", "must be a whole number, at least 1; got '0'"),
    ("serve legibility --prot 80", "unrecognized arguments: --prot"),
    ("isolate judge", "the following arguments are required: --requirements"),
    ("isolate ../judge --requirements x", "'../judge' cannot be the name of an environment"),
    ("isolate student --requirements x", "exists already; nothing was made"),
    ("isolate judge --requirements '--pre clip'", "'--pre' is an option"),
    ("isolate judge --requirements clip --output file", "file cannot be a folder"),
    ("isolate judge --requirements clip --python no/python", "no environment can be made with no/python"),
    ("new-reward sharpness", "'sharpness' cannot be a reward's name"),
    ("new-reward acme/sharpness --output file", "file"),
]


@pytest.mark.parametrize(("words", "complaint"), MISTAKES, ids=[words or "nothing" for words, _ in MISTAKES])
def test_a_mistake_is_one_line(
    words: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong, on standard error; no traceback, no page of usage, no file, and no model is loaded."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", never)
    before = sorted(tmp_path.rglob("*"))
    assert main(shlex.split(words)) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("rdm-sdk: ")
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert len(printed.err) < 1500
    assert printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before
