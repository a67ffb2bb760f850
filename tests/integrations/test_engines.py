"""Engines' outputs to the packed layout: of a server that speaks the OpenAI protocol around the built-in model, of the
forms of vLLM and SGLang, and of servers that fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import trajkern as tk
from tests.integrations.engine_outputs import (
    CHOICE,
    CUT,
    PLAIN,
    PROCESSED,
    PROMPT,
    SamplingParams,
    StandIns,
    sglang_response,
    vllm_output,
)
from tests.test_examples import EXAMPLES, example
from trajkern.integrations import engines


@pytest.fixture(scope="module")
def local() -> ModuleType:
    return example("engine")


@pytest.fixture
def server(local: ModuleType) -> Iterator[Any]:
    """The example's, around the very model that is trained."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = local.CharacterModel(local.ModelConfig())
        engine = local.Engine(model)
    engine.model, engine.trained = model, model
    yield engine
    engine.shutdown()
    engine.server_close()


def asked(server: Any, how: engines.Sampling, options: dict[str, Any], prompts: tuple[str, ...]) -> list[Any]:
    requests = [{**options, "prompt": server.trained.encode(x)} for x in prompts]
    return engines.collect(lambda x: engines.from_openai(engines.post(server.url, x, timeout=60), how), requests)


def openai(choice: dict[str, Any], how: engines.Sampling, **others: Any) -> list[engines.Rollout]:
    return engines.from_openai({"choices": [{**CHOICE, **choice}], **others}, how)


def test_the_example_replays_what_was_cut(local: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        without, replayed = local.main()
    printed = capsys.readouterr().out
    assert printed.strip().replace("\n", "\n    ") in (EXAMPLES / "engine.py").read_text()
    outside = ((without < 0.9) | (without > 1.1)).float().mean()
    assert outside > 0.4 and (replayed - 1).abs().max() < 0.1
    assert len((EXAMPLES / "engine.py").read_text().splitlines()) <= 120


def test_log_probs_are_the_servers(server: Any, local: ModuleType) -> None:
    options = {**local.SAMPLING, "max_tokens": 12, "n": 3}
    how = engines.sampling(options, **PROCESSED)
    rollouts = [x for group in asked(server, how, options, ("2+3=", "77-")) for x in group]
    batch, head = engines.pack(rollouts, how, torch.tensor([0, 0, 0, 1, 1, 1]))
    rows, targets, tokens, _ = batch.head_inputs()
    model = server.trained
    found = tk.linear_logprobs(
        model.hidden(batch.tokens, batch.cu_seqlens, rows), targets=targets, **model.head_arguments(), **head
    )
    assert batch.sampler_logprobs is not None and head["temperature"] == local.SAMPLING["temperature"]
    torch.testing.assert_close(found.detach(), batch.sampler_logprobs[tokens], atol=2e-5, rtol=0)
    assert max(len(ids) for x in rollouts for ids in x.support or ()) <= local.SAMPLING["top_k"]


def failing(handler: type, answer: Any) -> type:
    def do_post(self: Any) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        request = json.loads(content)
        found = {"choices": self.server.complete(request)}
        status, body, length = (
            answer(found)
            if request["prompt"][0] == self.server.trained.encode("9")[0]
            else (
                *(200, json.dumps(found).encode()),
                None,
            )
        )
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    return type("Failing", (handler,), {"do_POST": do_post})


def short(found: dict[str, Any]) -> tuple[int, bytes, int | None]:
    found["choices"][1]["logprobs"]["token_logprobs"].pop()
    return 200, json.dumps(found).encode(), None


def missing(found: dict[str, Any]) -> tuple[int, bytes, int | None]:
    found["choices"][1]["logprobs"]["token_logprobs"][2] = None
    return 200, json.dumps(found).encode(), None


def dying(found: dict[str, Any]) -> tuple[int, bytes, int | None]:
    content = json.dumps(found).encode()
    return 200, content[:100], len(content)


def too_few(found: dict[str, Any]) -> tuple[int, bytes, int | None]:
    return 200, json.dumps({"choices": found["choices"][:1]}).encode(), None


def broken(_: dict[str, Any]) -> tuple[int, bytes, int | None]:
    return 500, b'{"error": "EngineDeadError"}', None


def partial_content(found: dict[str, Any]) -> tuple[int, bytes, int | None]:
    return 206, json.dumps(found).encode(), None


def no_json(_: dict[str, Any]) -> tuple[int, bytes, int | None]:
    return 200, b"<html>", None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (short, r"choice 1 must have a log-prob a token; it has 5 for 6 tokens"),
        (missing, r"choice 1 must have finite log-probs; that of token 2 of 6 is None"),
        (dying, r"ConnectionError: http://.*gave no whole answer: IncompleteRead.*100 bytes read"),
        (too_few, r"must have 2 completions a prompt, as n asks; 1 came"),
        (broken, r"answered 500 .*EngineDeadError"),
        (partial_content, "its status must be 200, got 206 Partial Content"),
        (no_json, r"must answer in JSON; got b'<html>'"),
    ],
)
def test_what_came_is_kept_where_a_server_fails(server: Any, local: ModuleType, answer: Any, message: str) -> None:
    server.RequestHandlerClass = failing(local.Completions, answer)
    server.model.eos = -1  # every completion has its 6 tokens
    options = {**local.SAMPLING, "max_tokens": 6, "n": 2}
    how = engines.sampling(options, **PROCESSED)
    with pytest.raises(engines.EngineFailure, match=message) as caught:
        asked(server, how, options, ("2+3=", "9-4=", "7*6="))
    assert "1 of 3 requests failed, 2 are in .finished; request 1: " in str(caught.value)
    assert sorted(caught.value.finished) == [0, 2] and list(caught.value.failures) == [1]
    kept = [x for _, group in sorted(caught.value.finished.items()) for x in group]
    assert engines.pack(kept, how, torch.tensor([0, 0, 2, 2])).batch.loss_mask.sum() == 24


def test_a_server_that_is_gone(server: Any, local: ModuleType) -> None:
    server.shutdown()
    server.server_close()
    how = engines.sampling(local.SAMPLING, **PROCESSED)
    with pytest.raises(engines.EngineFailure, match=r"4 of 4 requests failed, 0 are.*and 1 more in \.failures"):
        asked(server, how, local.SAMPLING, ("1", "2", "3", "4"))


@pytest.mark.parametrize("form", ["vllm", "vllm flat", "sglang", "sglang support", "chat"])
def test_every_form_is_the_same_rollout(form: str) -> None:
    how = engines.sampling(CUT, **PROCESSED)
    if form.startswith("vllm"):
        found = engines.from_vllm([vllm_output([CHOICE], flat="flat" in form)], how)
    elif form.startswith("sglang"):
        found = engines.from_sglang(sglang_response(CHOICE, whole="support" in form), how)
    else:
        content = [{"logprob": x} for x in CHOICE["logprobs"]["token_logprobs"]]
        asked_for = {"prompt_token_ids": None, "logprobs": {"content": content}}
        found = openai(asked_for, how, prompt_token_ids=PROMPT)
    support = CHOICE["sampling_mask"]
    sampled = [False, False, True, True, True]
    assert found == [engines.Rollout([5, 6, 7, 8, 9], sampled, [-0.5, -0.25, 0.0], support, "stop")]


@pytest.mark.parametrize("source", ["the call", "the response"])
@pytest.mark.parametrize("form", ["openai", "sglang"])
def test_one_prompt_is_not_that_of_others(form: str, source: str) -> None:
    """Of three prompts with two completions each, at least one completion does not say which is its own."""
    how, count = engines.sampling({**PLAIN, "n": 2}, **PROCESSED), 6

    def read(own: int, completions: int = count) -> list[engines.Rollout]:
        given = {"prompt": PROMPT} if source == "the call" else {}
        made = [{**CHOICE, "index": i, "prompt_token_ids": [i // 2] if i < own else None} for i in range(completions)]
        if form == "sglang":
            return engines.from_sglang([sglang_response(x, whole=False) for x in made], how, **given)
        response = {"choices": made} | ({} if given else {"prompt_token_ids": PROMPT})
        return engines.from_openai(response, how, **given)

    if form == "sglang" and source == "the response":
        with pytest.raises(ValueError, match="response 5 must have prompt_token_ids, or the call its prompt"):
            read(5)
        return
    assert [x.tokens[:-3] for x in read(0, completions=2)] == [PROMPT] * 2
    assert [x.tokens[:-3] for x in read(count)] == [[0], [0], [1], [1], [2], [2]]
    for own in range(count):
        with pytest.raises(
            ValueError, match="prompt(_token_ids of response)? must be the one .*; 6 came, of 3 prompts"
        ):
            read(own)


def test_without_replay_no_mask_is_read() -> None:
    how = engines.sampling(CUT, **PROCESSED, replay=False)
    (found,) = engines.from_sglang(sglang_response(CHOICE, whole=False), how)
    assert found.support is None and found.logprobs == pytest.approx([-0.6, -0.35, -0.1])
    assert engines.pack([found], how, torch.tensor([0])).head == {"temperature": 1.0}


def test_pack_by_hand() -> None:
    how = engines.sampling({**CUT, "temperature": 0.5}, **PROCESSED)
    first = openai({}, how)[0]
    second = openai({"token_ids": [4], "logprobs": {"token_logprobs": [-1.0]}, "sampling_mask": [[4, 2]]}, how)[0]
    packed = engines.pack([first, second], how, torch.tensor([3, 3]), torch.tensor([1.0, 0.0]))
    batch, head = packed
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 5, 6, 4] and batch.cu_seqlens.tolist() == [0, 5, 8]
    assert batch.sampler_logprobs is not None
    assert batch.sampler_logprobs[batch.loss_mask].tolist() == [-0.5, -0.25, 0.0, -1.0]
    assert batch.head_inputs().targets.tolist() == [7, 8, 9, 4]
    ids, offsets = head["sampling_support"]
    assert ids.tolist() == [7, 3, 1, 8, 2, 9, 4, 2] and offsets.tolist() == [0, 2, 5, 6, 8]
    assert head["temperature"] == 0.5
    moved = packed.to("meta")
    assert moved.batch.device.type == moved.head["sampling_support"][0].device.type == "meta"


def test_turns_become_one_rollout() -> None:
    how = engines.sampling(CUT, **PROCESSED)
    first = openai({}, how)[0]
    next_turn = {"token_ids": [4], "logprobs": {"token_logprobs": [-1.0]}, "sampling_mask": [[4]]}
    second = openai({**next_turn, "prompt_token_ids": [5, 6, 7, 8, 9, 1, 2], "finish_reason": "length"}, how)[0]
    whole = engines.continued([first, second])
    assert whole.tokens == [5, 6, 7, 8, 9, 1, 2, 4] and whole.finish == "length"
    assert [t for t, s in zip(whole.tokens, whole.sampled, strict=True) if s] == [7, 8, 9, 4]
    assert whole.logprobs == [-0.5, -0.25, 0.0, -1.0] and whole.support == [*CHOICE["sampling_mask"], [4]]
    again = openai({**next_turn, "prompt_token_ids": [5, 6, 7, 80, 9, 1]}, how)[0]
    with pytest.raises(
        ValueError, match=r"turn 1 must begin with the 5 tokens.*differs at 3: \[80, 9, 1\] for \[8, 9\]"
    ):
        engines.continued([first, again])
    with pytest.raises(ValueError, match="turn 1 is not as those before"):
        engines.continued([first, second._replace(support=None)])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"finish_reason": "abort"}, "finish reason is 'abort'"),
        ({"finish_reason": None}, "finish reason is None"),
        ({"prompt_token_ids": []}, "a prompt of at least one token|prompt_token_ids"),
        ({"token_ids": None}, "choice 0 must have token_ids, which return_token_ids asks for"),
        ({"logprobs": None}, "choice 0 must have log-probs, which logprobs asks for"),
        ({"logprobs": {"token_logprobs": [-0.5, float("nan"), 0.0]}}, "token 1 of 3 is nan"),
        ({"logprobs": {"token_logprobs": [-0.5, -9999.0, 0.0]}}, "token 1 of 3 is -9999.0"),
        ({"logprobs": {"token_logprobs": [-0.5, 4.5, 0.0]}}, r"token 1 of 3 is 4\.5: are they logits\?"),
        ({"sampling_mask": None}, "must have a sampling mask, as top_k cut the distribution"),
        ({"sampling_mask": [[7], [8]]}, "sampling mask a token; it has 2 for 3"),
        ({"sampling_mask": [[7], [1, 2], [9]]}, r"token 1 is 8, not in \[1, 2\]"),
    ],
)
def test_what_came_must_agree_with_itself(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        openai(choice, engines.sampling(CUT, **PROCESSED))


def test_more_that_is_refused() -> None:
    how = engines.sampling(CUT, **PROCESSED)
    with pytest.raises(ValueError, match="response must have choices; got {'error': 'overloaded'}"):
        engines.from_openai({"error": "overloaded"}, how)
    with pytest.raises(ValueError, match="request r7, completion 0 must have finite log-probs; that of token 1"):
        output = vllm_output([CHOICE])
        output.outputs[0].logprobs[1] = {1: SimpleNamespace(logprob=-1.0)}
        engines.from_vllm(output, how)
    with pytest.raises(ValueError, match="response 0 must have output_token_logprobs, which return_logprob asks for"):
        engines.from_sglang({"output_ids": [1], "meta_info": {}}, how)
    with pytest.raises(ValueError, match=r"log-probs of its output_ids \[7, 8, 1\]"):
        engines.from_sglang({**sglang_response(CHOICE, whole=False), "output_ids": [7, 8, 1]}, how)
    rollout = openai({}, how)[0]
    with pytest.raises(ValueError, match="rollouts must all have a support or none; 0 has one and 1 has none"):
        engines.pack([rollout, rollout._replace(support=None)], how, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="sampled token 1 holds 8 more often"):
        engines.pack([rollout._replace(support=[[7], [8, 8], [9]])], how, torch.tensor([0]))


RAW = {"logprobs_mode": "raw_logprobs"}


@pytest.mark.parametrize(
    ("options", "mode", "message"),
    [
        ({"temperature": 0.0}, PROCESSED, r"temperature must be at least 0\.01"),
        ({"temperature": 0.7}, RAW, r"must be 'processed_logprobs' with a temperature of 0\.7"),
        ({"top_p": 0.9, "min_p": 0.1}, RAW, "must be 'processed_logprobs' with top_p, min_p"),
        ({"repetition_penalty": 1.1}, PROCESSED, r"repetition_penalty must be left .* got 1\.1"),
        ({"presence_penalty": 0.5}, {**RAW, "replay": False}, "presence_penalty must be left"),
        ({"logit_bias": {"5": 1.0}}, PROCESSED, "logit_bias must be left"),
        ({"use_beam_search": True}, PROCESSED, "use_beam_search must be left out"),
        ({"custom_logit_processor": "x"}, {**PROCESSED, "replay": False}, "custom_logit_processor must be left out"),
        ({"min_q": 0.1}, PROCESSED, r"known sampling options.*\['min_q'\]"),
        ({"top_k": None}, PROCESSED, "missing: top_k"),
        ({}, {"logprobs_mode": "processed"}, "logprobs_mode must be one of"),
    ],
)
def test_sampling_that_no_op_computes(options: dict[str, Any], mode: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engines.sampling({**PLAIN, **options}, **mode)


def test_sampling_that_is_exact() -> None:
    assert engines.sampling(PLAIN, **RAW) == engines.Sampling(1.0, 1, True, ())
    constrained = {**PLAIN, "temperature": 0.7, "top_p": 0.9, "regex": "[ab]", "n": 4, "seed": 3, "stop": ["x"]}
    assert engines.sampling(constrained, **PROCESSED) == engines.Sampling(0.7, 4, True, ("top_p", "regex"))
    penalised = engines.sampling({**PLAIN, "frequency_penalty": 0.2}, **PROCESSED, replay=False)
    assert penalised == engines.Sampling(1.0, 1, False, ())
    with pytest.raises(TypeError, match=r"mapping or a vllm\.SamplingParams, got list"):
        engines.sampling([], **PROCESSED)


def test_vllms_parameters() -> None:
    given = SamplingParams(temperature=0.8, n=2, logprobs=0, bad_words=["x"], _bad_words_token_ids=[[3]])
    assert engines.sampling(given, **PROCESSED) == engines.Sampling(0.8, 2, True, ("bad_words",))
    with pytest.raises(ValueError, match=r"known sampling options.*\['novelty'\]"):
        engines.sampling(SamplingParams(novelty=0.1), **PROCESSED)


@pytest.mark.parametrize("page", ["vllm", "sglang"])
def test_the_pages_blocks_run(page: str, local: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With stand-ins for the engines; what the blocks compute is compared with the engine's own log-probs."""
    stand_ins = StandIns(local)
    model = stand_ins.model
    monkeypatch.setitem(sys.modules, page, getattr(stand_ins, page)())
    names: dict[str, Any] = {
        "prompts": [model.encode("2+3="), model.encode("9-4=")],
        "reward_of": lambda tokens: float(tokens[-1] % 2),
        "hidden_states": lambda batch: model.hidden(batch.tokens, batch.cu_seqlens, torch.arange(batch.num_tokens)),
        "lm_head": model.head,
        "model": SimpleNamespace(save_pretrained=lambda folder: None, named_parameters=model.named_parameters),
        "folder": str(tmp_path),
    }
    text = (EXAMPLES.parent / "docs" / f"{page}.md").read_text()
    blocks = [x.split("```")[0] for x in text.split("```python\n")[1:]]
    exec(compile("\n".join(blocks), page, "exec"), names)
    logprobs, batch = names["logprobs"], names["batch"]
    torch.testing.assert_close(logprobs.detach(), batch.sampler_logprobs[batch.head_inputs().tokens], atol=2e-5, rtol=0)
    assert model.head.weight.grad is not None and bool((model.head.weight.grad != 0).any())
    assert stand_ins.calls[0][0] in ("reload_weights", "update_weights_from_tensor")


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        (engines.Rollout([1, 2, 3], [False, True, True], [0.0, -0.5, -0.2], None, "stop"), "3 tokens, 3 flags, 2 of"),
        (engines.Rollout([1, 2], [False, True, True], [-0.5, -0.2], None, "stop"), "2 tokens, 3 flags"),
        (engines.Rollout([1], [True], None, None, "stop"), r"rollouts\[0\].logprobs must be a list, got None"),
    ],
)
def test_a_rollout_that_disagrees_with_itself(rollout: engines.Rollout, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        engines.pack([rollout], engines.sampling(CUT, **PROCESSED), torch.tensor([0]))
