"""TRL's GRPOTrainer on SmolLM2, with trajkern's head and loss and without: one line more, and the same numbers.

``python examples/trl_smollm2.py`` trains twice from the same weights with the same seed, on capitals, and prints what
TRL logged of each step. On one core of an AMD EPYC, of the third step, and generation included:

    step 3 reward          0.3750000       0.3750000
    step 3 loss            0.0663396       0.0663396
    step 3 grad_norm       9.8232107       9.8232021
    CPU s a step                19.4            15.9
"""

from __future__ import annotations

import copy
import tempfile
import time
from typing import Any

import smollm2

try:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
except ModuleNotFoundError as error:
    raise SystemExit(f"this example needs {error.name}: pip install trl") from None

from trajkern.integrations import trl as adapter

CAPITALS = {"Australia": "Canberra", "Canada": "Ottawa", "Turkey": "Ankara", "Brazil": "Bras"}
SIZES = {"per_device_train_batch_size": 8, "num_generations": 8, "max_completion_length": 12}


def right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """The reward of each completion: whether it names the capital."""
    return [float(expected in said[0]["content"]) for said, expected in zip(completions, answer, strict=True)]


def trainer_of(model: Any, tokenizer: Any, folder: str, steps: int) -> GRPOTrainer:
    questions = [[{"role": "user", "content": f"What is the capital of {country}?"}] for country in CAPITALS]
    return GRPOTrainer(
        model=copy.deepcopy(model),
        reward_funcs=right,
        args=GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            learning_rate=1e-5,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,  # leave these two out where there is a GPU
            seed=0,
            **SIZES,
        ),
        train_dataset=Dataset.from_dict({"prompt": questions, "answer": list(CAPITALS.values())}),
        processing_class=tokenizer,
    )


def run(model: Any, tokenizer: Any, steps: int, with_trajkern: bool) -> tuple[list[dict[str, float]], float]:
    """What was logged of each step, and the CPU seconds of one."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, tokenizer, folder, steps)
        if with_trajkern:
            adapter.enable(trainer)  # the line
        start = time.process_time()
        trainer.train()
        adapter.disable(trainer)
        return [entry for entry in trainer.state.log_history if "loss" in entry], (time.process_time() - start) / steps


def main(model: Any, tokenizer: Any, steps: int = 3) -> list[list[dict[str, float]]]:
    runs = [run(model, tokenizer, steps, with_trajkern) for with_trajkern in (False, True)]
    print(f"\n{'':18}{'TRL':>14}{'with trajkern':>16}")
    for step, entries in enumerate(zip(*(logged for logged, _ in runs), strict=True), 1):
        for name in ("reward", "loss", "grad_norm", "entropy"):
            theirs, ours = (float(entry[name]) for entry in entries)
            print(f"step {step} {name:<10} {theirs:14.7f}  {ours:14.7f}")
    print(f"{'CPU s a step':<18}{runs[0][1]:14.1f}  {runs[1][1]:14.1f}")
    return [logged for logged, _ in runs]


if __name__ == "__main__":
    main(*smollm2.load())
