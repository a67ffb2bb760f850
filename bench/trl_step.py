"""A training step of TRL's GRPOTrainer as it is and with ``trajkern.integrations.trl.enable``, in turns in one process.

``python -m trajkern._bench.trl_step`` prints the medians and their ratio: loss, gradients and optimiser step, without
the sampling, which is the model's own either way. ``--layers`` says how much model there is in front of the head.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch

import trajkern as tk
from trajkern.cli import cpu_name

SMOLLM2 = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536, "num_attention_heads": 9}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trajkern._bench.trl_step", description=__doc__)
    parser.add_argument("--layers", type=int, default=30, help="of a Llama of SmolLM2-135M's sizes")
    parser.add_argument("--rows", type=int, default=4, help="completions of a step")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=128, help="tokens of a completion")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(folder, options.layers)
        inputs = _inputs(options)
        times: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(2 * (options.rounds + 1)):
            enabled = turn % 2 == 1
            seconds = _with_trajkern(trainer, inputs) if enabled else _step(trainer, inputs)
            if turn > 1:  # the first of each warms up
                times[enabled].append(seconds)
    theirs, ours = (statistics.median(times[x]) for x in (False, True))
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"TRL {theirs:.2f} s, with trajkern {ours:.2f} s of CPU time a step: {theirs / ours:.2f} times as fast")
    return 0


def _with_trajkern(trainer: Any, inputs: dict[str, Any]) -> float:
    with tk.integrations.trl.enable(trainer):
        return _step(trainer, inputs)


def _step(trainer: Any, inputs: dict[str, Any]) -> float:
    begin = time.process_time()
    trainer.compute_loss(trainer.model, dict(inputs)).backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.process_time() - begin


def _trainer(folder: str, layers: int) -> Any:
    import tokenizers
    import transformers
    import trl
    from datasets import Dataset

    torch.manual_seed(0)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    sizes = SMOLLM2 | {"num_hidden_layers": layers, "num_key_value_heads": 3, "tie_word_embeddings": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    args = trl.GRPOConfig(
        output_dir=folder, report_to=[], use_cpu=True, per_device_train_batch_size=4, num_generations=4
    )
    data = Dataset.from_dict({"prompt": ["a"] * 4})
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=lambda **x: [0.0], args=args, train_dataset=data, processing_class=tokenizer
    )
    trainer.create_optimizer()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _inputs(options: argparse.Namespace) -> dict[str, Any]:
    """As TRL hands them to its loss; the last completions end early."""
    rows, begin, length = options.rows, options.prompt, options.completion
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row in range(rows):
        mask[row, length - row * length // (2 * rows) :] = 0
    return {
        "prompt_ids": torch.randint(2, SMOLLM2["vocab_size"], (rows, begin)),
        "prompt_mask": torch.ones(rows, begin, dtype=torch.int64),
        "completion_ids": torch.randint(2, SMOLLM2["vocab_size"], (rows, length)),
        "completion_mask": mask,
        "advantages": torch.randn(rows),
        "num_items_in_batch": mask.sum(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
