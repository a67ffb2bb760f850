"""How a model makes logits of what its head layer gives, measured on the model itself.

What stands behind the head layer is found by putting known values in the place of its output, in double precision, and
reading the logits that come out: exact, whatever the model calls its scale and its cap. What stands before it is found
by comparing the backbone's output with what reaches the head. Then a few rows of the model's own logits must agree.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from trajkern.integrations._adapted_head import has_dropout, head_tensors, is_adapted, is_formed
from trajkern.integrations._agreement import together
from trajkern.integrations._model_run import Route
from trajkern.integrations._model_state import state_of
from trajkern.integrations._own_forward import (
    Parts,
    check_backward_hooks,
    check_loaded,
    explain,
    model_name,
    own_run,
    reads_ahead,
    some_tokens,
    undisturbed,
)
from trajkern.integrations._wrapped import unwrapped

T = TypeVar("T")
_MULTIPLY, _DIVIDE = ("logit_scale", "lm_head_multiplier", "output_multiplier"), ("logits_scaling",)
_CAP = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SPREAD = 512  # columns of the vocabulary that are compared
_TOKENS = 4
_STATES = 64  # of a model that are remembered: one whose hooks come and go has a new one each time
_ADAPTERS = [torch.float32]  # in which some compute a part of themselves, whatever the model has


class Form(NamedTuple):
    """softcap(logit_scale (h w^T + bias)), of the head's first ``vocabulary`` rows."""

    softcap: float | None
    logit_scale: float
    vocabulary: int | None  # None: all of them
    from_head: bool  # h is what the model hands to its head layer; else the backbone's last hidden state
    autocast: torch.dtype | None = None  # in which its forward multiplies by itself


class Trial(NamedTuple):
    """A small layout: its sequences, and by a route their hidden states, ``[n, H]`` each."""

    sequences: list[Tensor]
    hidden: Callable[[Route], list[Tensor]]


_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, Any]] = weakref.WeakKeyDictionary()


def named_form(inner: Any) -> Form:
    """What the names in the model's config say, unconfirmed."""
    check_loaded(inner)
    config = inner.config.get_text_config()
    scale = 1.0
    for name in _MULTIPLY:
        scale *= 1.0 if (value := getattr(config, name, None)) is None else value
    for name in _DIVIDE:
        scale /= 1.0 if (value := getattr(config, name, None)) is None else value
    cap = next((value for name in _CAP if (value := getattr(config, name, None)) is not None), None)
    return Form(cap, scale, None, inner.base_model is inner)


@torch.compiler.disable
def measured_form(parts: Parts) -> Form:
    """The model's form, confirmed by its own logits; measured once for a state of the model.

    Raises:
        ValueError: its logits are not of this form, with the values that disagree and what in the config could say why.
    """
    known, key = _known.setdefault(parts.causal, {}), (*state_of(parts), "form")
    if key not in known:
        check_loaded(parts.causal)
        check_backward_hooks(parts)
        _remember(known, key, parts, "its head", lambda: _form(parts), lambda form: form.from_head)
    return known[key]


def _form(parts: Parts) -> Form:
    training = parts.causal.training  # what it does to logits by itself may depend on it
    with undisturbed(parts.whole):
        parts.head_tensors()  # refused by its own name where it has none, before anything runs
        parts.causal.training, here = training, parts.causal.training
        try:
            form = _measure(parts)
        finally:
            parts.causal.training = here
        _check_causal(parts, form)
    inside = unwrapped(parts.head)
    if is_formed(inside):
        parts.inside_head(lambda: _check_steady(inside))
    if is_adapted(inside) or type(inside).forward is not nn.Linear.forward or "forward" in vars(inside):
        parts.inside_head(lambda: (_check_layer(inside), None))
    return form


@torch.compiler.disable
def measured_route(parts: Parts, kind: str, form: Form, trial: Callable[[], Trial]) -> Route:
    """How a layout of this kind gives each sequence its own logits; found on a small one, once for a model's state.

    Raises as :func:`measured_form` does.
    """
    known, key = _known.setdefault(parts.causal, {}), (*state_of(parts), kind)
    if key not in known:
        _remember(known, key, parts, "a layout", lambda: _route(parts, kind, form, trial()), lambda route: route)
    return known[key]


def _route(parts: Parts, kind: str, form: Form, trial: Trial) -> Route:
    route, training = Route(form.from_head), parts.causal.training
    with undisturbed(parts.whole):
        form = _measure(parts) if training else form  # of logits without dropout, as what stands beside them
        own = [own_run(parts, tokens).logits for tokens in trial.sequences]
        try:
            _compare_layout(parts, kind, form, route, own, trial.hidden)
        except ValueError:
            if kind != "rows":
                raise
            route = route._replace(positions=False)
            _compare_layout(parts, kind, form, route, own, trial.hidden)
    return route


def _remember(
    known: dict[Any, Any], key: Any, parts: Parts, what: str, function: Callable[[], T], outcome: Callable[[T], Any]
) -> None:
    """``function()`` as what is known of a state: at first as its ranks happen to come, then together."""
    while len(known) >= _STATES:
        del known[next(iter(known))]
    known[key] = together(parts.whole, model_name(parts.causal), what, function, outcome) if known else function()


def _compare_layout(
    parts: Parts, kind: str, form: Form, route: Route, own: list[Tensor], hidden: Callable[[Route], list[Tensor]]
) -> None:
    try:
        ours = hidden(route)
    except Exception as error:
        raise ValueError(
            f"model must run {_WORDS[kind]}; {model_name(parts.causal)} raised {type(error).__name__}: {error}"
        ) from error
    for h, logits in zip(ours, own, strict=True):
        _compare(parts, form, h, logits, loose=True, what=f"as part of {_WORDS[kind]}")


_WORDS = {"rows": "padded rows", "pack": "a pack over cu_seqlens", "tree": "a Tree"}


def _measure(parts: Parts) -> Form:
    inner = parts.causal
    tokens = some_tokens(parts, _TOKENS)
    own = own_run(parts, tokens)
    if not own.into:  # a product with the layer's weight, without the layer
        if own.backbone is None:
            raise ValueError(
                f"model must apply its output embeddings to its hidden states; {model_name(inner)} does not"
            )
        form = named_form(inner)._replace(from_head=False)
        _compare(parts, form, own.backbone[0], own.logits)
        return form
    if len(own.into) > 1:
        raise ValueError(f"model must apply its head once; {model_name(inner)} applies it {len(own.into)} times")
    into = own.into[0]
    if into.numel() != _TOKENS * into.shape[-1]:
        raise ValueError(f"model must apply its head to every token; {model_name(inner)} gives it {list(into.shape)}")
    softcap, scale, size = _behind(parts, tokens)
    vocabulary = None if size == own.out[0].shape[-1] else size
    from_head = own.autocast is not None or not _same_memory(own.backbone, into)
    form = Form(softcap, scale, vocabulary, from_head, own.autocast)
    _compare(parts, form, into.reshape(_TOKENS, -1), own.logits)
    return form


def _check_causal(parts: Parts, form: Form) -> None:
    """A token must change no logits before its own: a masked language model or an encoder has read what it predicts."""
    seen, inner = _TOKENS // 2, parts.causal
    tokens = some_tokens(parts, _TOKENS)
    own = own_run(parts, tokens).logits
    others = torch.cat((tokens[:seen], some_tokens(parts, len(tokens) - seen, start=len(tokens))))
    first, again = (x[0, :seen].double() for x in (own, own_run(parts, others).logits))
    encoder = getattr(inner.config, "is_encoder_decoder", False)
    if torch.equal(first, again) and not encoder:
        return
    dtypes = [own.dtype, parts.weight.dtype, form.autocast or own.dtype, *_ADAPTERS]
    worst = (first - again).abs().nan_to_num(nan=torch.inf)
    rounding = _tolerance(dtypes, own.device.type, loose=False) * float(own.abs().max())
    if encoder or float(worst.max()) > rounding or reads_ahead(parts, tokens, seen):
        row, column = divmod(int(worst.argmax()), worst.shape[1])
        said = {name: getattr(inner.config, name, None) for name in ("is_decoder", "is_encoder_decoder")}
        raise ValueError(
            f"model must be causal; {model_name(inner)} gives token {column} at position {row} "
            f"{float(first[row, column]):.6g}, and {float(again[row, column]):.6g} once tokens behind it are others; "
            f"its config has {', '.join(f'{k}={v}' for k, v in said.items())}"
        )


def _same_memory(backbone: Tensor | None, into: Tensor) -> bool:
    """Whether nothing stands between them; that values agree is not enough, for a scale may only begin as 1."""
    return (
        backbone is not None
        and backbone.data_ptr() == into.data_ptr()
        and (backbone.shape, backbone.stride(), backbone.dtype) == (into.shape, into.stride(), into.dtype)
    )


def _behind(parts: Parts, tokens: Tensor) -> tuple[float | None, float, int]:
    """softcap, scale and the number of logits, from known values in the place of what the head layer gives."""
    put: list[Tensor] = []

    def known(output: Tensor) -> Tensor:
        dtype = torch.float32 if output.device.type == "mps" else torch.float64
        steps = [1e-6, 1e-4, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1e4, 1e30]
        ladder = torch.tensor([0.0, *steps, *(-x for x in steps)], dtype=dtype, device=output.device)
        put.append(ladder[torch.arange(output.numel(), device=output.device) % len(ladder)].reshape(output.shape))
        return put[0].clone()

    inner = parts.causal
    with torch.enable_grad():
        logits = own_run(parts, tokens, known).logits
    if logits.requires_grad:
        raise ValueError(f"model must have no trained parameters behind its head; {model_name(inner)} has some")
    values, got = put[0].reshape(_TOKENS, -1), logits.reshape(_TOKENS, -1)
    size = got.shape[1]
    if size > values.shape[1]:
        raise ValueError(
            f"model must give a logit for each row of its head, {values.shape[1]}; {model_name(inner)} gives {size}"
        )
    values, precise = values[:, :size].double(), got.dtype in (torch.float32, torch.float64)
    got = got.double()
    config = inner.config.get_text_config()
    numbers = [
        float(v) for v in (*vars(config).values(), *vars(inner).values()) if isinstance(v, int | float) and v > 0
    ]
    near = 2.0**-20 if precise else torch.finfo(logits.dtype).eps
    top = float(got[values > 1e29].abs().max())
    cap = None if top > 1e20 else _exact(top, numbers, near)
    small = (values > 0) & (values < 1e-5) if cap is not None else values == 1
    scale = _exact(float(got[small][0] / values[small][0]), [y for x in numbers for y in (x, 1 / x)], near)
    expected = values * scale
    if cap is not None:
        expected = cap * (expected / cap).tanh()
    wrong = ~((got - expected).abs() <= max(near, 2.0**-18) * expected.abs())
    if wrong.any():
        row, column = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            f"model must have logits softcap(logit_scale (h w^T + bias)); {model_name(inner)} makes "
            f"{float(got[row, column]):.6g} of {float(values[row, column]):.6g} for token {column} where softcap {cap} "
            f"and logit_scale {scale:.6g} make {float(expected[row, column]):.6g}; its config has {explain(inner)}"
        )
    return cap, scale, size


def _exact(measured: float, numbers: list[float], near: float) -> float:
    """The config's number, or 1, that a measured one is but for rounding; else itself."""
    best = min([1.0, *numbers], key=lambda x: abs(x - measured))
    return best if abs(best - measured) <= near * abs(measured) else measured


def _compare(parts: Parts, form: Form, h: Tensor, logits: Tensor, *, loose: bool = False, what: str = "") -> None:
    """``h`` ``[n, H]`` through the rebuilt head, beside the model's own logits ``[1, n, V]``."""
    inner, layer = parts.causal, parts.head
    weight, bias = parts.head_tensors()
    own = logits[0].double()
    places = min(_SPREAD, own.shape[-1])
    columns = torch.linspace(0, own.shape[-1] - 1, places, dtype=torch.float64, device=own.device).long()
    own = own[:, columns]
    if h.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"model must have hidden states of its head's size {weight.shape[1]}; {model_name(inner)} has {h.shape[-1]}"
        )
    z = h.double() @ weight[columns].double().t()
    if bias is not None:
        z = z + bias[columns].double()
    z = form.logit_scale * z
    if form.softcap is not None:
        z = form.softcap * (z / form.softcap).tanh()
    device = own.device.type
    dtypes = [h.dtype, weight.dtype, logits.dtype, form.autocast or logits.dtype, *_ADAPTERS * is_adapted(layer)]
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    if not own.isfinite().all():
        raise ValueError(f"model must have finite logits; {model_name(inner)} has others for ordinary tokens")
    allowed = _tolerance(dtypes, device, loose) * float(own.abs().max())
    worst = (z - own).abs().nan_to_num(nan=torch.inf)
    if float(worst.max()) > allowed:
        row, column = divmod(int(worst.argmax()), len(columns))
        raise ValueError(
            f"model must have logits softcap(logit_scale (h w^T + bias)); {model_name(inner)} gives token "
            f"{int(columns[column])} {float(own[row, column]):.6g}, rebuilt {float(z[row, column]):.6g} {what}".rstrip()
            + f" with softcap {form.softcap}, logit_scale {form.logit_scale:.6g}; its config has {explain(inner)}"
            + (f", its head an adapter, {type(layer).__module__}.{type(layer).__name__}" if is_adapted(layer) else "")
        )


def _tolerance(dtypes: list[torch.dtype], device: str, loose: bool) -> float:
    """Of the largest logit: what rounding may do to the head's product, or to all of the model where ``loose``."""
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    if eps > 1e-4:
        return eps * (16 if loose else 4)
    shortened = eps > 1e-10 and (device != "cpu" or torch.get_float32_matmul_precision() != "highest")
    return 2.0**-6 if shortened else eps * (1024 if loose else 64)


def _check_layer(layer: Any) -> Tensor:
    """A head that is no plain one, training or not as it is now, beside its weight and bias: values and gradients.

    Returns what it gives for a few random states.
    """
    base = layer.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _TOKENS, base.shape[1], generator=generator, dtype=torch.float32, device="cpu").to(base)
    trained = [p for p in layer.parameters() if p.requires_grad]
    what = f"{type(layer).__module__}.{type(layer).__name__}"
    cuda = [base.device.index] if base.device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.enable_grad(), torch.autocast(base.device.type, enabled=False):
        try:
            before = _random_state(x)
            out = layer(x)[0]
            drawn = not torch.equal(before, _random_state(x)) and has_dropout(layer)
            weight, bias = head_tensors(layer)
        except Exception as error:
            raise ValueError(f"model must have a head layer that runs alone; {what} raised {error!r}") from error
        if drawn:  # by chance two draws may agree
            raise ValueError(
                f"model must have an affine head, in training without dropout; {what} draws random numbers in each call"
            )
        ours = x[0].to(weight.dtype) @ weight.t()
        ours = ours if bias is None else ours + bias
        close = _tolerance([base.dtype, out.dtype, *_ADAPTERS], base.device.type, loose=True)
        _same(f"model must have an affine head, in training without dropout; {what}", "gives", out, ours, close)
        if trained and out.requires_grad:
            g = torch.randn(out.shape, generator=generator, dtype=torch.float32, device="cpu").to(out)
            theirs, mine = (torch.autograd.grad(y, trained, g.to(y.dtype), allow_unused=True) for y in (out, ours))
            names = {id(p): name for name, p in layer.named_parameters()}
            for p, a, b in zip(trained, theirs, mine, strict=True):
                a, b = (torch.zeros_like(p) if y is None else y for y in (a, b))
                _same(
                    f"model must have a head whose gradients are its own; {what}", f"has at {names[id(p)]}", a, b, close
                )
    return out.detach()


def _check_steady(layer: Any) -> tuple[Tensor, Tensor | None]:
    """A weight that is formed anew, training or not as it is now, must be the same each time; returns weight and bias.

    Else the model's own forward and the kernels would have two: power iterations and noise move it at each reading.
    """
    buffers = {name: x.clone() for name, x in layer.named_buffers()}
    device = next(layer.parameters()).device
    with torch.random.fork_rng([device.index] if device.type == "cuda" else []), torch.no_grad():
        (first, bias), (again, _) = head_tensors(layer), head_tensors(layer)
        moved = [name for name, x in layer.named_buffers() if not torch.equal(x, buffers[name])]
        for name in moved:
            layer.get_buffer(name).copy_(buffers[name])
    if moved or not torch.equal(first, again):
        why = f"its buffer {moved[0]} is another" if moved else "two readings differ"
        raise ValueError(
            f"model must have a head whose weight is the same each time that it is read; of its "
            f"{type(layer).__module__}.{type(layer).__name__} {why} after each: call eval() on the head, or take off "
            f"what forms its weight"
        )
    return first, bias


def _random_state(x: Tensor) -> Tensor:
    kind = x.device.type
    return torch.get_rng_state() if kind == "cpu" else torch.get_device_module(kind).get_rng_state(x.device)


def _same(must: str, verb: str, own: Tensor, rebuilt: Tensor, close: float) -> None:
    own, rebuilt = own.detach().double().flatten(), rebuilt.detach().double().flatten()
    worst = (own - rebuilt).abs().nan_to_num(nan=torch.inf)
    if float(worst.max()) > close * max(float(own.abs().max()), float(rebuilt.abs().max())):
        at = int(worst.argmax())
        raise ValueError(f"{must} {verb} {float(own[at]):.6g}, rebuilt {float(rebuilt[at]):.6g}")
