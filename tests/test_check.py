"""``trajkern.testing.check``: what passes, what is caught, what is left out, and how little it prints."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import trajkern as tk
from trajkern import cli, testing
from trajkern.testing import check, differences, spec_of

F32 = [torch.float32]
SMALL = dict(dtypes=F32, intensity=0)


def mine(logits: Tensor, targets: Tensor) -> Tensor:
    """Right where the reference is, but for options that it does not take."""
    return tk.token_logprobs(logits, targets)


def second_row_off(logits: Tensor, targets: Tensor) -> Tensor:
    found = tk.token_logprobs(logits, targets)
    return found + 1e-3 * (torch.arange(found.numel()).view_as(found) == 1)


def stats(logits: Tensor, targets: Tensor, outputs: tuple[str, ...] = ("entropy",)) -> dict[str, Tensor]:
    return {"entropy": tk.token_stats(logits, targets).entropy}


def whiten(x, *, mask=None, shift_mean=True, ddof=1, **_):
    return tk.reference.whiten(x, mask=mask, shift_mean=shift_mean, ddof=ddof, **_)


def test_an_implementation_of_ones_own() -> None:
    results = check(whiten, like="whiten", intensity=0)
    assert results.passed and all(result.passed for result in results)


def test_one_that_raises() -> None:
    def broken(*_, **__):
        raise KeyError("no such kernel")

    results = check(broken, like="whiten", dtypes=[torch.float64], intensity=0)
    assert not results.passed and "KeyError: 'no such kernel'" in results[0].smallest.why
    assert "KeyError: 'no such kernel'" in str(results)


def test_options_that_are_not_taken_are_skipped_and_said() -> None:
    names = ["typical", "temperature", "mask", "everything"]
    results = check(mine, like="token_logprobs", cases=names, ignore_options=True, **SMALL)
    assert results.passed and results[0].cases == 1
    assert results[0].skipped == {"temperature": ["temperature", "everything"], "mask": ["mask", "everything"]}
    assert "skipped: 3 cases, for an option that is not taken" in str(results)


def test_else_they_fail_by_their_name() -> None:
    results = check(mine, like="token_logprobs", cases=["typical", "temperature"], **SMALL)
    assert not results.passed and len(results[0].failures) == 1
    assert "does not take temperature (ignore_options=True skips such cases)" in str(results)


def test_nothing_left_is_no_pass() -> None:
    results = check(mine, like="token_logprobs", cases="temperature*", ignore_options=True, **SMALL)
    assert results[0].cases == 0 and not results.passed and "no case is left" in str(results)
    assert not check(mine, like="token_logprobs", dtypes=[]).passed


def test_an_option_at_its_default_need_not_be_taken() -> None:
    spec = spec_of("token_logprobs")
    inputs = spec.inputs(spec.case("typical"), torch.float32) | {"temperature": 1.0, "mask": None}
    assert differences(spec, mine, inputs)["logprobs"].share <= 1


def test_what_is_printed_names_the_worst_number_and_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    results = check(second_row_off, like="token_logprobs", cases=["typical", "v7"], **SMALL)
    shown = str(results)
    assert repr(results) == shown and max(map(len, shown.splitlines())) <= cli.WIDTH
    assert len(shown.splitlines()) < 25 and len(repr(results[0])) < 200
    worst = results[0].smallest.worst["logprobs"]
    assert results[0].smallest.case == "v7" and worst.index == (0, 1)
    assert float(worst.got) - float(worst.expected) == pytest.approx(1e-3, rel=1e-3)
    assert "the smallest, v7 (below every vector width, two leading dimensions):" in shown
    assert "also failing: typical" in shown
    code = shown[shown.index("import torch\n") :]
    assert f"from {__name__} import second_row_off" in code
    code = code.replace(f"from {__name__} import second_row_off", "")  # whose module has no name that imports
    exec(compile(code, "what was pasted", "exec"), {"second_row_off": second_row_off})
    printed = capsys.readouterr().out.split()
    assert f"{worst.got}," in printed and worst.expected in printed and "[0," in printed


def test_a_dict_of_some_outputs() -> None:
    assert check(stats, like="token_stats", cases=["typical", "v2"], **SMALL).passed
    wrong = lambda **x: {"entropy": stats(x["logits"], x["targets"])["entropy"] * 1.01}  # noqa: E731
    assert not check(wrong, like="token_stats", cases=["typical"], **SMALL).passed
    loss = lambda **x: {"loss": tk.policy_loss(**x)[0]}  # noqa: E731
    assert check(loss, like="policy_loss", cases=[spec_of("policy_loss").cases[0].name], **SMALL).passed


def test_names_that_the_op_does_not_have_are_refused() -> None:
    with pytest.raises(TypeError, match="function must return outputs of token_logprobs, logprobs; got logprob"):
        check(lambda logits, targets: {"logprob": mine(logits, targets)}, like="token_logprobs", **SMALL)


def test_without_gradients() -> None:
    forward = lambda logits, targets: mine(logits, targets).detach()  # noqa: E731
    options = dict(like="token_logprobs", cases="typical", **SMALL)
    assert "token_logprobs has no gradient of logits" in str(check(forward, **options))
    assert check(forward, backward=False, **options).passed


def test_another_kind_of_result_is_told() -> None:
    results = check(lambda **x: [1.0], like="token_logprobs", cases="typical", **SMALL)
    assert "returned list: return what token_logprobs returns, or a dict" in str(results)
    case = spec_of("policy_loss").cases[0].name
    results = check(lambda **x: torch.zeros(()), like="policy_loss", cases=case, **SMALL)
    assert not results.passed and "returned Tensor: return what policy_loss returns" in results[0].smallest.why


def test_another_shape_is_told() -> None:
    wide = lambda logits, targets: mine(logits, targets)[..., None]  # noqa: E731
    results = check(wide, like="token_logprobs", cases="typical", backward=False, **SMALL)
    told = "logprobs is off by more than any budget: got shape [5, 1], expected shape [5]"
    assert told in " ".join(str(results).split())


def test_what_writes_into_its_arguments_is_caught() -> None:
    """The reference would read what it left there, and agree."""

    def scaled(logits, targets):
        with torch.no_grad():
            logits.mul_(2)
        return mine(logits, targets)

    results = check(scaled, like="token_logprobs", cases="typical", **SMALL)
    assert "ValueError: writes into its argument logits" in str(results)
    spec = spec_of("token_logprobs")
    with pytest.raises(ValueError, match="writes into its argument logits"):
        differences(spec, scaled, spec.inputs(spec.case("typical"), torch.float32))


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda: torch.set_grad_enabled(False), "grad mode at True, and left it at False"),
        (lambda: torch.set_default_dtype(torch.float64), "the default dtype at torch.float32, and left it at"),
        (lambda: torch.set_num_threads(torch.get_num_threads() + 1), "the number of threads at"),
        (lambda: torch.use_deterministic_algorithms(True), "deterministic algorithms at False, and left it at True"),
    ],
)
def test_a_function_must_leave_torchs_settings(change: Callable[[], None], left: str) -> None:
    """The reference would compute by them, and agree: without a graph no gradient is compared."""

    def forgetful(logits, targets):
        change()
        return mine(logits.detach(), targets)

    before = torch.get_num_threads()
    results = check(forgetful, like="token_logprobs", cases="typical", **SMALL)
    assert not results.passed and f"ValueError: must leave {left}" in " ".join(str(results).split())
    spec = spec_of("token_logprobs")
    with pytest.raises(ValueError, match=f"must leave {left}"):
        differences(spec, forgetful, spec.inputs(spec.case("typical"), torch.float32))
    assert torch.is_grad_enabled() and torch.get_default_dtype() is torch.float32 and torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_module_is_asked_for_its_forward() -> None:
    class Mine(torch.nn.Module):
        def forward(self, logits, targets):
            return mine(logits, targets)

    results = check(Mine(), like="token_logprobs", cases=["typical", "mask"], ignore_options=True, **SMALL)
    assert results.passed and results[0].skipped == {"mask": ["mask"]}
    with pytest.raises(TypeError, match="by name"):
        check(torch.nn.Linear(2, 2), like="token_logprobs")


@pytest.mark.parametrize(
    "function, message",
    [
        (3, "function must be a function of the op's arguments, got 3"),
        (lambda logits, labels: None, "by name, logits, targets; it does not take targets but labels, logits"),
        (lambda logits, targets, cache: None, "function needs cache, which token_logprobs does not give"),
    ],
)
def test_what_cannot_be_called_is_refused_before_the_cases(function, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        check(function, like="token_logprobs")


def test_a_bound_argument_is_no_lack() -> None:
    def kernel(logits, targets, tile):
        return mine(logits, targets)

    bound = functools.partial(kernel, tile=8)
    assert check(bound, like="token_logprobs", cases="typical", **SMALL).passed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="device must be one that torch .* has; got 'cuda', and it sees no GPU"):
        check(mine, like="token_logprobs", device="cuda")


def test_one_dtype_is_a_list_of_one() -> None:
    assert len(check(mine, like="token_logprobs", cases="typical", dtypes=torch.float32, intensity=0)) == 1
    with pytest.raises(ValueError, match="dtypes must be one of torch.float32.*; got torch.int32"):
        check(mine, like="token_logprobs", dtypes=[torch.int32])


def test_unknown_names_get_the_list() -> None:
    with pytest.raises(ValueError, match="like must be one of .*'token_logprobs'.*; got 'tokens'"):
        check(tk.whiten, like="tokens")
    with pytest.raises(ValueError, match="intensity must be one of 0, 1, 2, 3; got 4"):
        check(tk.whiten, like="whiten", intensity=4)
    with pytest.raises(ValueError, match="cases must be one of 'typical', .*; got 'typica'"):
        check(mine, like="token_logprobs", cases=["typical", "typica"])


def test_a_spec_of_no_op_is_refused() -> None:
    """Whose result would there be to hold it against?"""
    spec = spec_of("whiten")
    inputs = spec.inputs(spec.cases[0], torch.float32)
    for call in (testing.run, testing.errors, testing.differences):
        with pytest.raises(ValueError, match="spec must have the name of an op, .* got 'my_square'"):
            call(dataclasses.replace(spec, name="my_square"), tk.whiten, inputs)
        with pytest.raises(TypeError, match="spec.outputs must be a function of the op's result, got None"):
            call(dataclasses.replace(spec, outputs=None), tk.whiten, inputs)
        for wrong in (lambda r: None, lambda r: {"y": 1}):
            with pytest.raises(TypeError, match="spec.outputs must name the tensors of a result in a dict"):
                call(dataclasses.replace(spec, outputs=wrong), tk.whiten, inputs)
