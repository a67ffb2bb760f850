"""The built-in transformer: trajectories never mix, and sampling sees what training sees."""

from __future__ import annotations

import pytest
import torch

from trajkern.trainer.models.policy import CharacterModel
from trajkern.trainer.models.tokenizer import ALPHABET, EOS, VOCABULARY, decode, encode
from trajkern.trainer.models.transformer import ModelConfig, Transformer
from trajkern.trainer.packing import pack_rollouts
from trajkern.trainer.sampling import sample

CONFIG = ModelConfig(layers=2, width=32, heads=4, ffn=48)


@pytest.fixture
def model() -> CharacterModel:
    torch.manual_seed(0)
    return CharacterModel(CONFIG)


@pytest.mark.parametrize("lengths", [(5, 1, 7, 2), (3, 0, 4, 0), (6,)], ids=str)
def test_packed_equals_one_at_a_time(model: CharacterModel, lengths: tuple[int, ...]) -> None:
    model.double()
    parts = [torch.randint(VOCABULARY, (n,)) for n in lengths]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    total = sum(lengths)
    packed = model(torch.cat(parts), cu_seqlens, torch.arange(total))
    alone = [model(part, torch.tensor([0, len(part)]), torch.arange(len(part))) for part in parts if len(part)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-12)


def test_a_token_never_sees_another_trajectory_or_the_future(model: CharacterModel) -> None:
    model.double()
    tokens, cu_seqlens = torch.randint(VOCABULARY, (9,)), torch.tensor([0, 4, 9])
    rows = torch.arange(9)
    before = model(tokens, cu_seqlens, rows)
    for changed in range(9):
        other = tokens.clone()
        other[changed] = (other[changed] + 1) % VOCABULARY
        moved = (model(other, cu_seqlens, rows) - before).abs().amax(1) > 0
        end = 4 if changed < 4 else 9
        assert moved.tolist() == [changed <= t < end for t in range(9)]


def test_only_the_rows_asked_for(model: CharacterModel) -> None:
    tokens, cu_seqlens, rows = torch.randint(VOCABULARY, (9,)), torch.tensor([0, 4, 9]), torch.tensor([7, 1])
    everything = model(tokens, cu_seqlens, torch.arange(9))
    torch.testing.assert_close(model(tokens, cu_seqlens, rows), everything[rows])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_a_full_forward(model: CharacterModel, temperature: float) -> None:
    model.double()
    prompts = [encode("4-1="), encode("17+25-3="), encode("1")]
    generator = torch.Generator().manual_seed(1)
    rollouts = sample(model, prompts, copies=3, max_new=6, generator=generator, temperature=temperature)
    batch = pack_rollouts(rollouts, torch.zeros(9), torch.arange(9))
    rows, targets, tokens, _ = batch.head_inputs()
    with torch.no_grad():
        logits = model(batch.tokens, batch.cu_seqlens, rows) / temperature
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1).float()
    torch.testing.assert_close(batch.sampler_logprobs[tokens], expected, rtol=0, atol=2e-6)


def test_rollouts_hold_prompt_and_completion_up_to_its_end(model: CharacterModel) -> None:
    prompts = [encode("12="), encode("3=")]
    with torch.no_grad():
        model.head.weight[EOS] *= 6  # some completions end early
    rollouts = sample(model, prompts, copies=16, max_new=5, generator=torch.Generator().manual_seed(0))
    completions = rollouts.completions()
    assert {len(c) for c in completions} > {5}, "the case needs completions of several lengths"
    for row, completion in enumerate(completions):
        prompt = prompts[row // 16]
        assert rollouts.tokens[row][rollouts.keep[row]].tolist() == prompt + completion
        assert EOS not in completion[:-1]
        assert completion[-1] == EOS or len(completion) == 5


def test_greedy_takes_the_most_likely_token(model: CharacterModel) -> None:
    prompt = encode("4-1=")
    rollouts = sample(model, [prompt], copies=1, max_new=3, generator=torch.Generator(), greedy=True)
    tokens = rollouts.tokens[0]
    logits = model(tokens, torch.tensor([0, len(tokens)]), torch.arange(len(prompt) - 1, len(tokens) - 1))
    assert logits.argmax(-1).tolist() == tokens[len(prompt) :].tolist()


def test_default_size() -> None:
    assert 90_000 < sum(p.numel() for p in Transformer(ModelConfig(), VOCABULARY).parameters()) < 120_000


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="tiny.width must be a multiple of 2 \\* tiny.heads = 8.*got 20"):
        ModelConfig(width=20, heads=4)
    with pytest.raises(ValueError, match="tiny.layers must be at least 1, got 0"):
        ModelConfig(layers=0)


def test_tokenizer_round_trip() -> None:
    assert decode(encode(ALPHABET)) == ALPHABET
    assert sorted(encode(ALPHABET)) == list(range(1, VOCABULARY))
    assert decode([*encode("-12"), EOS, *encode("9")]) == "-12"
    with pytest.raises(ValueError, match="got 'é' in 'café'"):
        encode("café")
