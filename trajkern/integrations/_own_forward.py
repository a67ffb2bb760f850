"""A causal model's own forward on a few tokens, with what its head layer is given and gives, leaving nothing behind."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

from trajkern.integrations._adapted_head import embedding_count, head_tensors
from trajkern.integrations._model_run import Layout, Route, accepted, first, run_layout, run_model
from trajkern.integrations._wrapped import apart, body_inside, head_inside, is_wrapped

_EXPLAINS = re.compile(r"logit|soft_?cap|scal(e|ing)|multiplier|(^|_)cap($|_)|dim_model_base|unpadded|tie_word")
_NUMBERS = (int, float, bool)


class Parts(NamedTuple):
    """A user's model, taken apart."""

    whole: Any  # with its parallel wrappers
    owner: Any  # in them: peft's model, or the causal model
    causal: Any

    @property
    def head(self) -> Any:
        """The layer."""
        return self.causal.get_output_embeddings()

    @property
    def weight(self) -> Tensor:
        """The head's, as it lies there: its dtype and its device are right, and what forms it is not asked."""
        formed = getattr(self.head, "parametrizations", None)
        weight = next(formed.parameters()) if formed is not None else getattr(self.head, "weight", None)
        return weight if isinstance(weight, Tensor) else self.head_tensors()[0]

    def head_tensors(self) -> tuple[Tensor, Tensor | None]:
        """The head's weight and bias, whole."""
        return self.inside_head(lambda: head_tensors(self.head))

    def inside_head(self, function: Callable[[], tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
        """``function()`` where the head's parameters are whole."""
        return head_inside(self.whole, self.causal, self.head, function)

    def states(self, layout: Layout, tokens: Tensor, route: Route) -> Tensor:
        """What the head is applied to for every token, ``[T, H]``."""
        call = self.causal.forward if is_wrapped(self.whole, self.causal) else self.causal
        some = tokens if tokens.numel() else tokens.new_zeros(1)

        def run() -> Tensor:
            if tokens.numel():
                return run_layout(self.causal, call, layout, tokens, route)
            # a rank that has nothing takes part all the same in what wrappers exchange
            return run_model(self.causal, call, route, some, some)[0, :0]

        return body_inside(self.whole, self.causal, self.head, run)


class OwnRun(NamedTuple):
    logits: Tensor  # [1, n, V]
    into: list[Tensor]  # what reached the head layer, a tensor a call
    out: list[Tensor]  # what it gave
    backbone: Tensor | None  # [1, n, H]
    autocast: torch.dtype | None  # what its forward enters by itself, as accelerate's does


def autocast_of(parts: Parts) -> torch.dtype | None:
    """In which products on the head's device are, from outside."""
    device = parts.weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def check_loaded(inner: Any) -> None:
    """Refuses a model of which some lies elsewhere, or nowhere: what is read of it here is no part of its forward."""
    name = next((name for name, x in inner.named_parameters() if x.is_meta), None)
    if name is not None:
        held = any(hasattr(module, "_hf_hook") for module in inner.modules())
        raise ValueError(
            f"model must have its parameters in memory; {name} of {type(inner).__name__} is on meta"
            + (
                ", offloaded by accelerate: load it without offloading, by a device_map of devices alone"
                if held
                else ", which holds no values: load its weights first"
            )
        )


def check_backward_hooks(parts: Parts) -> None:
    """Refuses hooks that would be handed gradients which are never formed: those of logits and of the head layer."""
    for module in around_head(parts):
        if module._backward_hooks or module._backward_pre_hooks:
            raise ValueError(
                f"model must have no backward hooks around its head, where no gradient of logits passes; "
                f"{type(module).__name__} has some"
            )


def around_head(parts: Parts) -> list[nn.Module]:
    """The modules whose own calls could change what becomes of the head's input."""
    outside = parts.owner, getattr(parts.owner, "base_model", None)  # peft's two, or the causal model and its body
    callers = [x for x in outside if parts.owner is not parts.causal and isinstance(x, nn.Module)]
    return [*parts.head.modules(), *callers, parts.causal]


@functools.cache
def _says(name: str) -> bool:
    """Whether a config's entry of this name could say what a model does to its logits."""
    return _EXPLAINS.search(name) is not None


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout, and leaving modes, random states and autocast's cache as they were."""
    modules = list(model.modules())
    changes = [(module, {"training": False}) for module in modules] + apart(modules)
    # two sequences are not worth their graphs
    changes += [(x, {"_compiled_call_impl": None}) for x in modules if x._compiled_call_impl is not None]
    before = [(module, {name: getattr(module, name) for name in put}) for module, put in changes]
    devices = {x.device for x in model.parameters()}
    cuda = sorted({x.index or 0 for x in devices if x.type == "cuda"})
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(cuda))
        stack.enter_context(torch.no_grad())
        for kind in {x.type for x in devices}:
            if torch.is_autocast_enabled(kind):  # a weight cast without gradients must not be found by the next forward
                stack.enter_context(torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False))
        try:
            _set(changes)
            yield
        finally:
            _set(before)


def _set(changes: Iterable[tuple[Any, dict[str, Any]]]) -> None:
    for module, put in changes:
        for name, value in put.items():
            setattr(module, name, value)


def some_tokens(parts: Parts, count: int, start: int = 0) -> Tensor:
    """Ids that stand for text: none that the config gives a meaning to."""
    inner = parts.causal
    size = embedding_count(inner) or inner.get_output_embeddings().weight.shape[0]
    special = {v for k, v in vars(inner.config.get_text_config()).items() if "token" in k and isinstance(v, int)}
    special |= {v for k, v in vars(inner.config).items() if "token" in k and isinstance(v, int)}
    ordinary = [x for x in range(min(size, 4096)) if x not in special] or list(range(size))
    ids = [ordinary[(3 + 7 * (start + i)) % len(ordinary)] for i in range(count)]
    return torch.tensor(ids, device=parts.weight.device)


def own_run(parts: Parts, tokens: Tensor, instead: Callable[[Tensor], Tensor] | None = None) -> OwnRun:
    """The model's own forward of one sequence, with what its head layer is given; ``instead`` changes what it gives."""
    inner = parts.causal
    into: list[Tensor] = []
    out: list[Tensor] = []
    backbone: list[Any] = []
    within: list[torch.dtype | None] = []

    def at_head(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        into.append(inputs[0])
        out.append(output)
        within.append(autocast_of(parts))
        return None if instead is None else instead(output)

    handles = [parts.head.register_forward_hook(at_head)]
    if inner.base_model is not inner:
        handles.append(inner.base_model.register_forward_hook(lambda m, i, output: backbone.append(output)))
    try:
        result = parts.whole(input_ids=tokens[None], **accepted(inner.forward, {"use_cache": False}))
    except Exception as error:
        raise ValueError(
            f"model must run on token ids alone; {type(inner).__name__} raised {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    logits = first(result, "logits")
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != (1, len(tokens)):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"model must give logits of shape [1, {len(tokens)}, V] for one sequence; {model_name(inner)} gives {shape}"
        )
    last = first(backbone[-1], "last_hidden_state") if backbone else None
    autocast = next((x for x in within if x != autocast_of(parts)), None)
    return OwnRun(logits, into, out, last if isinstance(last, Tensor) else None, autocast)


def reads_ahead(parts: Parts, tokens: Tensor, seen: int) -> bool:
    """Whether the logits of the first ``seen`` tokens have a derivative in the embeddings of later ones.

    It tells a little of another token from rounding. False also where there is no such derivative to ask for.
    """
    try:
        if is_wrapped(parts.whole, parts.causal):
            return _tangents_ahead(parts, tokens, seen)
        return _gradients_ahead(parts, tokens, seen)
    except (NotImplementedError, RuntimeError, ValueError):
        return False


def _gradients_ahead(parts: Parts, tokens: Tensor, seen: int) -> bool:
    embedded: list[Tensor] = []

    def as_leaf(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    with _embedding_hook(parts, as_leaf), torch.enable_grad():
        logits = own_run(parts, tokens).logits[0, :seen].float()
        g = _normal(logits.shape).to(logits.device)
        found = torch.autograd.grad(logits, embedded, g, allow_unused=True)
    sizes = [x.double().abs().amax(-1).flatten() for x in found if x is not None]
    sizes = [x for x in sizes if len(x) == len(tokens)]
    return any(float(x[seen:].max()) > 1e-6 * float(x.max()) for x in sizes)


def _tangents_ahead(parts: Parts, tokens: Tensor, seen: int) -> bool:
    """Forward, as a wrapper would take a backward for a step of training."""

    def moved(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        tangent = _normal(output.shape).to(output)
        if output[..., 0].numel() != len(tokens):  # of positions, say
            return output
        later = torch.arange(len(tokens), device=output.device) >= seen
        return make_dual(output, tangent * later.reshape(output.shape[:-1])[..., None])

    # the math of attention alone has derivatives forward
    with dual_level(), sdpa_kernel(SDPBackend.MATH), _embedding_hook(parts, moved):
        found = unpack_dual(own_run(parts, tokens).logits[0]).tangent
    if found is None:
        return False
    sizes = found.double().abs().amax(-1)
    return float(sizes[:seen].max()) > 1e-6 * float(sizes.max())


def _normal(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")


@contextlib.contextmanager
def _embedding_hook(parts: Parts, hook: Callable[..., Tensor]) -> Iterator[None]:
    handle = parts.causal.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def model_name(inner: Any) -> str:
    return type(inner).__name__


def explain(inner: Any) -> str:
    """The config's entries that could say what a model does to its logits."""
    config = inner.config.get_text_config()
    found = {k: v for k, v in vars(config).items() if _says(k) and type(v) in (*_NUMBERS, str)}
    return ", ".join(f"{name}={value!r}" for name, value in sorted(found.items())) or "nothing that says why"
