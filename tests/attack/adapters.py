"""The adapters that can be imported here, and what turns them on."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from tests.attack.case import Case, of_function
from tests.attack.values import COUNTS, NUMBERS, of_other_layouts, shown, without_memory
from tests.integrations.held_numbers import CHANGES, KINDS
from trajkern.integrations import areal, art, engines, kernels, liger, openrlhf, prime_rl, sentence_transformers, verl

OPTIONS = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
OPTIONS |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
CHOICE = {"index": 0, "token_ids": [5, 6], "finish_reason": "stop", "logprobs": {"token_logprobs": [-1.0, -2.0]}}
# module, what turns it on, the package that it needs, and arguments besides any_version
SWITCHES = [
    ("areal", "enable", "areal", {"credit": None}),
    ("liger", "enable", "liger_kernel", {}),
    ("nemo_rl", "enable", "nemo_rl", {"credit": None}),
    ("openrlhf", "enable", "openrlhf", {}),
    ("prime_rl", "enable", "prime_rl", {}),
    ("prime_rl", "enable_credit", "prime_rl", {"credit": "trajkern.credit:outcome"}),
    ("skyrl", "register", "skyrl", {"credit": None}),
    ("verl", "register", "ray.exceptions", {"credit": None, "replace": False}),
    ("verl", "enable_head", "ray.exceptions", {}),
]


def cases() -> Iterator[Case]:
    for part in (_of_engines, _of_losses, _of_heads, _of_layouts, _of_switches, _of_transformers, _of_trl):
        yield from part()


def _how() -> engines.Sampling:
    return engines.sampling(OPTIONS, logprobs_mode="processed_logprobs")


@functools.wraps(engines.post)
def _posted(*args: Any, **kwargs: Any) -> Any:
    with contextlib.suppress(ConnectionError):  # nobody listens there
        return engines.post(*args, **kwargs)


def _response(**changed: Any) -> dict[str, Any]:
    return {"prompt_token_ids": [1, 2], "choices": [CHOICE | changed]}


def _of_engines() -> Iterator[Case]:
    yield from of_function("engines.sampling", engines.sampling, {"options": OPTIONS, "logprobs_mode": "raw_logprobs"})
    for name in OPTIONS:
        for x in NUMBERS:
            if x is True or (x is None and name != "temperature"):
                continue  # as if it had not been given
            call = partial(engines.sampling, {**OPTIONS, name: x}, logprobs_mode="raw_logprobs")
            yield Case("engines.sampling", f"options[{name!r}]: {shown(x)}", call, (name,))
    for x in COUNTS:
        if x is not None and not (type(x) is int and x == 2**62):
            call = partial(engines.sampling, {**OPTIONS, "n": x}, logprobs_mode="raw_logprobs")
            yield Case("engines.sampling", f"options['n']: {shown(x)}", call, ("n",))
    yield from of_function("engines.from_openai", engines.from_openai, {"response": _response(), "how": _how()})
    for name, values in {
        "token_ids": [None, 3, "ab", [1.5, 2.5], ["a", "b"], [5], [None, 1]],
        "logprobs": [None, 3, "x", {}, {"token_logprobs": [1.0, 1.0]}, {"token_logprobs": [None, None]}],
        "finish_reason": [None, "abort", "error"],
        "index": ["x", 2],
    }.items():
        for x in values:
            call = partial(engines.from_openai, _response(**{name: x}), _how())
            yield Case("engines.from_openai", f"{name}: {shown(x)}", call, ("choice", "choices", "response"))
    for x in ([], 3, [3], {"a": 1}, "x"):
        call = partial(engines.from_openai, {"prompt_token_ids": [1], "choices": x}, _how())
        yield Case("engines.from_openai", f"choices: {shown(x)}", call, ("choices", "choice", "response"))
    several = {"choices": [CHOICE | {"index": i} for i in range(3)]}
    call = partial(engines.from_openai, several, _how(), prompt=[1, 2])
    yield Case("engines.from_openai", "prompt: one for three prompts' completions", call, ("prompt",))
    rollouts = engines.from_openai(_response(), _how())
    ids = torch.zeros(1, dtype=torch.int64)
    arguments = {"rollouts": rollouts, "how": _how(), "group_ids": ids, "rewards": torch.ones(1)}
    yield from of_function("engines.pack", engines.pack, arguments)
    yield from of_function("engines.continued", engines.continued, {"turns": rollouts})
    for x in ([3], ["x"], [None], [()]):
        yield Case("engines.pack", f"rollouts: {x}", partial(engines.pack, x, _how(), ids), ("rollouts",))
        yield Case("engines.continued", f"turns: {x}", partial(engines.continued, x), ("turns",))
    asking = {"ask": str, "requests": [1, 2], "workers": 2}
    yield from of_function("engines.collect", engines.collect, asking, {"ask": "Callable", "requests": "Sequence"})
    posting = {"url": "http://127.0.0.1:9/", "body": {}, "timeout": 1.0}
    yield from of_function("engines.post", _posted, posting)
    for x in ("x", "ftp://x", "file:///etc/hosts", "http://", ""):
        yield Case("engines.post", f"url: {x!r}", partial(engines.post, x, {}), ("url",))
    yield Case("engines.post", "body: an object", partial(engines.post, posting["url"], {"a": object()}), ("body",))


def _of_losses() -> Iterator[Case]:
    """Of hosts that need not be there."""
    x, mask = -torch.rand(2, 4) - 0.1, torch.ones(2, 4)
    ppo = {"logprobs": x, "proximal_logprobs": x, "old_logprobs": x, "advantages": x, "eps_clip": 0.2}
    yield from of_function("areal.ppo_actor_loss_fn", areal.ppo_actor_loss_fn, {**ppo, "loss_mask": mask})
    sapo = {"logprobs": x, "old_logprobs": x, "advantages": x, "tau_pos": 1.0, "tau_neg": 1.0, "loss_mask": mask}
    yield from of_function("areal.sapo_loss_fn", areal.sapo_loss_fn, sapo)
    yield from of_function("openrlhf.PolicyLoss", openrlhf.PolicyLoss, {})
    of_batch = {"log_probs": x, "old_log_probs": x, "advantages": x, "action_mask": mask}
    yield from of_function("openrlhf.PolicyLoss.forward", openrlhf.PolicyLoss().forward, of_batch)
    logits = {"logits": torch.ones(2, 5), "labels": torch.tensor([1, 2])}
    yield from of_function("openrlhf.log_probs_from_logits", openrlhf.log_probs_from_logits, logits)
    of_sequence = {"trainer_logprobs": x[0], "inference_logprobs": x[0], "ref_logprobs": None, "loss_weights": None}
    of_sequence |= {"advantages": x[0], "loss_mask": mask[0] > 0}
    yield Case("prime_rl.policy_loss", "as it should be", partial(_prime, **of_sequence), (), may_pass=True)
    for name in ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask"):
        for label, y in [*_tensors(of_sequence[name]), ("3", 3), ("x", "x"), ("None", None)]:
            call = partial(_prime, **{**of_sequence, name: y})
            yield Case("prime_rl.policy_loss", f"{name}: {label}", call, (name, "trainer_logprobs"))
    for option in ("dppo_mask_low", "adv_tau", "kl_tau"):
        for y in NUMBERS:
            call = partial(prime_rl.policy_loss, SimpleNamespace(**of_sequence), **{option: y})
            yield Case("prime_rl.policy_loss", f"{option}: {shown(y)}", call, (option,))


def _prime(**fields: Any) -> Any:
    return prime_rl.policy_loss(SimpleNamespace(**fields))


def _tensors(like: Tensor) -> Iterator[tuple[str, Any]]:
    yield from without_memory(like)
    yield from of_other_layouts(like)


def _of_heads() -> Iterator[Case]:
    x, ids = torch.rand(2, 3, 4), torch.ones(2, 3, dtype=torch.int64)
    yield from of_function("liger.LigerFusedLinearGRPOLoss", liger.LigerFusedLinearGRPOLoss, {})
    loss = liger.LigerFusedLinearGRPOLoss(beta=0.1)
    of_batch = {"_input": x, "lin_weight": torch.rand(5, 4), "selected_token_ids": ids, "attention_mask": ids}
    of_batch |= {"advantages": torch.ones(2), "ref_per_token_logps": -torch.rand(2, 3), "bias": torch.zeros(5)}
    yield from of_function("liger.LigerFusedLinearGRPOLoss.forward", loss.forward, of_batch)
    head = {"hidden": x[0], "weight": torch.rand(5, 4), "labels": ids[0]}
    yield from of_function("verl.linear_cross_entropy", verl.linear_cross_entropy, head)


def _of_layouts() -> Iterator[Case]:
    packed = {name: torch.zeros(1, 4, dtype=torch.int64) for name in ("tokens", "parent_ids")}
    packed |= {"group_ids": torch.tensor([[0, 0, 1, 1]]), "assistant_mask": torch.tensor([[False, False, True, True]])}
    packed |= {name: -torch.ones(1, 4) for name in ("logprobs", "advantages")} | {"weights": torch.ones(1, 4)}
    yield from of_function("art.tree_rollouts", art.tree_rollouts, {"packed": packed, "row": 0})
    for name, value in packed.items():
        for label, y in [*_tensors(value), ("3", 3), ("None", None)]:
            call = partial(art.tree_rollouts, {**packed, name: y}, 0)
            yield Case("art.tree_rollouts", f"packed[{name!r}]: {label}", call, (name, "tokens"))
    for x in (1, -2, 2**62):
        yield Case("art.tree_rollouts", f"row: {x}", partial(art.tree_rollouts, packed, x), ("row",))
    for x in (3, None, 1.5, [], b"x"):
        yield Case("kernels.write", f"folder: {x!r}", partial(kernels.write, x), ("folder",))
    with tempfile.NamedTemporaryFile() as file:
        yield Case("kernels.write", "folder: a file", partial(kernels.write, file.name), ("folder",))
    for x in (3, None, [], object()):
        call = partial(sentence_transformers.embeddings, x)
        yield Case("sentence_transformers.embeddings", f"model: {shown(x)}", call, ("model",))


def _of_switches() -> Iterator[Case]:
    for module, name, package, arguments in SWITCHES:
        function = getattr(import_module(f"trajkern.integrations.{module}"), name)
        for case in of_function(
            f"{module}.{name}", _undone(module, function), arguments, _kinds(function), with_odd=False
        ):
            is_there = _is_there(package)
            if case.label == "as it should be":
                continue  # the host's own tests
            if is_there or case.label.startswith("any_version"):
                yield case._replace(heavy=is_there and not case.label.startswith("any_version"))


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # nor what it is in
        return False


def _kinds(function: Callable[..., Any]) -> dict[str, str]:
    return {name: str(kind) for name, kind in function.__annotations__.items() if name != "return"}


def _undone(module: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """What is turned on is turned off again."""

    def call(**arguments: Any) -> None:
        of = import_module(f"trajkern.integrations.{module}")
        try:
            function(**arguments)
        finally:
            for off in ("disable", "unregister", "disable_head", "disable_credit"):
                if hasattr(of, off) and module != "trl":
                    getattr(of, off)()

    return call


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16)
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, **sizes)).eval()


@torch.no_grad()
def _off(batch: tk.PackedBatch, put: Callable[..., None], change: Callable[..., None]) -> float:
    """How far from the model's own log-probs ours are, at the most, while the scale of its logits changes."""
    from transformers import CohereConfig, CohereForCausalLM

    from trajkern.integrations import transformers

    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = CohereForCausalLM(CohereConfig(vocab_size=11, hidden_size=8, initializer_range=1.0, **sizes, **ids)).eval()
    del model.logit_scale
    put(model, "logit_scale", torch.ones(1))
    worst = 0.0
    for scale in (0.5, 2.0, 3.0, 0.25):
        change(model, "logit_scale", torch.tensor([scale]))
        own = model(input_ids=batch.tokens.view(2, 2)).logits[:, 0].log_softmax(-1)
        own = own.gather(-1, batch.tokens.view(2, 2)[:, 1:])[:, 0]
        worst = max(worst, float((transformers.log_probs(model, batch)[batch.loss_mask] - own).abs().max()))
    return worst


def _far(distance: float) -> str:
    return f"the log-probs are off by {distance:.3g}" if not distance < 1e-4 else ""


def _of_transformers() -> Iterator[Case]:
    if find_spec("transformers") is None:
        return
    flags = torch.tensor([False, True, False, True])
    batch = tk.PackedBatch(torch.arange(4), torch.tensor([0, 2, 4]), flags, torch.tensor([0, 0]))
    model: list[Any] = []

    def of_model(name: str) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            from trajkern.integrations import transformers

            if not model:
                model.append(_model())
            return getattr(transformers, name)(**{"model": model[0], **arguments})

        return call

    kinds = {"model": "Module", "layout": "Layout", "check": "bool", "tokens": "Tensor | None"}
    for name, arguments in {
        "log_probs": {"layout": batch},
        "token_stats": {"layout": batch},
        "hidden_states": {"layout": batch},
        "head_arguments": {},
        "causal_model": {},
    }.items():
        own = {k: v for k, v in kinds.items() if k in ("model", *arguments) or k == "check" and name != "causal_model"}
        yield from of_function(f"transformers.{name}", of_model(name), arguments, own, heavy=True)
    for (kind, put), (label, change) in product(KINDS.items(), CHANGES.items()):
        call = partial(_off, batch, put, change or put)
        words = f"logit_scale: {kind} of one number, changed: {label}"
        yield Case("transformers.log_probs", words, call, (), wrong=_far, heavy=True)


def _of_trl() -> Iterator[Case]:
    if find_spec("trl") is None:
        return

    def enable(**arguments: Any) -> None:
        from trl import GRPOTrainer

        from trajkern.integrations import trl

        class Trainer(GRPOTrainer):
            pass

        trl.enable(**{"trainer_or_class": Trainer, **arguments})
        trl.disable(Trainer)

    kinds = {"trainer_or_class": "Trainer", "recipe": "str | None", "credit": "str | None", "any_version": "bool"}
    kinds |= {name: "Mapping | None" for name in ("spans", "span_rewards")} | {"teacher_logprobs": "Callable | None"}
    yield from of_function("trl.enable", enable, {}, kinds, heavy=True)
