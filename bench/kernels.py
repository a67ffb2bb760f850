"""Every Triton kernel's specialisations, and how to compile them on a machine without a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trajkern._tiles.tiles import COLUMNS
from trajkern._triton import configs, divergence, head, logprob, policy_loss, reflection
from trajkern._triton.policy_loss_options import BY_TRAJECTORY, bits, computed_metrics

Arch = int | str  # a compute capability, or one of AMD's targets
TYPES = {
    "*fp32": "logprobs norm entropy sum_sq_probs temperatures grad_logprobs grad_entropy old_logprobs advantages"
    " ref_logprobs sampler_logprobs normalizer supervised_weights supervised_normalizer kl_weights kl_normalizer"
    " mean_slopes loss metrics x scale"
    " z grad state student teacher state_s state_t divergence saved upstream picked residual common power mean_logit"
    " factors",
    "*fp64": "columns totals sums partials",
    "*i64": "targets cu_seqlens offsets order rank bounds peaks pair key",
    "*i1": "mask is_top1 selected shares idle",
    "fp32": "temperature kl_coef entropy_coef sampler_low sampler_high divisor c0 c1 c2 c3 softcap gain of_s of_t"
    " logit_scale",
    "i32": "inner stride_outer stride_inner out_outer out_inner vectors stride_grad_logprobs stride_grad_entropy tokens"
    " trajectories rollouts ddof steps programs pieces share size second_size stride grad_stride first stride_s"
    " stride_t width rows last vocabulary",
}
ARGUMENTS = {name: kind for kind, names in TYPES.items() for name in names.split()}
NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Variant(NamedTuple):
    """A specialisation of a kernel: the optional arguments that are absent, and the launch options."""

    kernel: Any
    name: str
    absent: tuple[str, ...]
    options: dict[str, Any]
    types: dict[str, str] = {}
    wide_loads: bool = False


def _stats(dtype: torch.dtype, length: int, *absent: str) -> Variant:
    rows = torch.empty(2, length, dtype=dtype)
    options = logprob._launch(configs.row_warps(length), rows)
    name = f"{NAMES[dtype]}-{length}-{len(absent)}"
    types = {"logits": f"*{NAMES[dtype]}"}
    return Variant(logprob.stats_kernel, name, absent, options, types, options["VECTOR"] > 1)


def _backward(dtype: torch.dtype, length: int, *absent: str) -> Variant:
    options = logprob._map_launch(torch.empty(2, length, dtype=dtype)) | {"STEPS": configs.MAP_STEPS}
    name = f"{NAMES[dtype]}-{length}-{len(absent)}"
    types = {"logits": f"*{NAMES[dtype]}", "grad_logits": f"*{NAMES[dtype]}"}
    return Variant(logprob.backward_kernel, name, absent, options, types, options["VECTOR"] > 1)


def _fold(dtype: torch.dtype, length: int, moments: bool) -> Variant:
    options = logprob._launch(configs.row_warps(length), torch.empty(2, length, dtype=dtype))
    options |= {"MOMENTS": moments, "FIRST": length > COLUMNS[False]}  # whole rows, or a slice of them
    name = f"{NAMES[dtype]}-{length}-{moments}"
    return Variant(head.fold_kernel, name, (), options, {"z": f"*{NAMES[dtype]}"}, options["VECTOR"] > 1)


def _gradient(dtype: torch.dtype, length: int, softcap: bool, *absent: str) -> Variant:
    narrow = dtype != torch.float32
    options = logprob._map_launch(torch.empty(2, length)) | {"SOFTCAP": softcap, "NARROW": narrow, "FIRST": narrow}
    types = {"grad": f"*{NAMES[dtype]}", "z": "*fp32"}
    return Variant(head.gradient_kernel, f"{NAMES[dtype]}-{length}-{softcap}", absent, options, types, True)


def _divergence(length: int, kind: str) -> Variant:
    options = logprob._launch(configs.row_warps(length), torch.empty(2, length)) | {"KIND": kind}
    return Variant(divergence.divergence_kernel, f"{length}-{kind}", (), options, {}, options["VECTOR"] > 1)


def _states(name: str, dtype: torch.dtype, *absent: str) -> Variant:
    types = {"hidden": f"*{NAMES[dtype]}", "states": f"*{NAMES[dtype]}", "row": "*i64"}
    return Variant(getattr(head, name), f"{NAMES[dtype]}-{len(absent)}", absent, configs.STATES, types)


def _write(*absent: str) -> Variant:
    types = {"total": "*fp32", "offsets": "*i64"}
    return Variant(head.write_kernel, str(len(absent)), absent, configs.WRITING, types)


def _slope(dtype: torch.dtype, length: int, kind: str, *absent: str, softcap: bool = False) -> Variant:
    narrow = dtype != torch.float32
    options = logprob._map_launch(torch.empty(2, length)) | {"KIND": kind, "NARROW": narrow, "FIRST": narrow}
    options["SOFTCAP"] = softcap
    types = {"grad": f"*{NAMES[dtype]}"}
    return Variant(divergence.slope_kernel, f"{NAMES[dtype]}-{length}-{kind}", absent, options, types, True)


def _tokens(
    form: str,
    sequence: bool,
    kl: str,
    correction: str,
    aggregate: str,
    *absent: str,
    branch: bool = False,
    streams: bool = False,
) -> Variant:
    """``absent`` has mean_slopes where no derivative in a mean is spread; ``streams``: terms have own weights."""
    options = {"FORM": form, "SEQUENCE": sequence, "KL": kl, "CORRECTION": correction, "PER_TOKEN": sequence}
    options |= {"AGGREGATE": aggregate, "MEANS": sequence or form in BY_TRAJECTORY, "BRANCH": branch}
    name = f"{form}-{sequence}-{kl}-{correction}-{branch}-{streams}"
    absent = absent if streams else (*absent, "supervised_weights", "kl_weights")
    return Variant(policy_loss.tokens_kernel, name, absent, options | configs.PIECES)


def _finish(aggregate: str, *absent: str, kl: str | None = None) -> Variant:
    """``kl``: with terms that have weights of their own, that estimator."""
    metrics = bits(computed_metrics(*(not absent,) * 3))
    options = {"AGGREGATE": aggregate, "COMPUTED": metrics, "ROWS": configs.MOST_PROGRAMS} | configs.PIECES
    options["KL"] = kl or "none"
    name = f"{aggregate}-{len(absent)}-{kl}"
    return Variant(policy_loss.finish_kernel, name, absent if kl else (*absent, *STREAMS), options)


def _reflection(name: str, dtype: torch.dtype, *absent: str, normalize: bool | None = None) -> Variant:
    options = configs.ROLLOUTS if normalize is None else configs.TOKENS | {"NORMALIZE": normalize}
    floats = "logprobs baseline rewards weights std scores grad_rewards grad_weights grad_std grad_scores grad_baseline"
    types = dict.fromkeys([*floats.split(), "grad_logprobs"], f"*{NAMES[dtype]}")
    return Variant(getattr(reflection, name), f"{NAMES[dtype]}-{normalize}-{len(absent)}", absent, options, types)


PLAIN = ("temperatures", "mask", "entropy", "sum_sq_probs", "is_top1")
NO_ENTROPY = ("temperatures", "mask", "grad_entropy", "entropy")
BY_TOKEN = ("mean_slopes", "shares")
STREAMS = ("logprobs", "ref_logprobs")  # of the second launch
STREAMS += ("supervised_weights", "supervised_normalizer", "kl_weights", "kl_normalizer")
BARE = (*BY_TOKEN, "mask", "ref_logprobs", "sampler_logprobs", "entropy", "selected", "grad_entropy", "grad_logprobs")
VARIANTS = (
    _stats(torch.bfloat16, 151936, *PLAIN),
    _stats(torch.bfloat16, 151936),
    _stats(torch.bfloat16, 50257),
    _stats(torch.float16, 4096, "mask"),
    _stats(torch.float32, 32000, "temperatures"),
    _stats(torch.float32, 151936),
    _stats(torch.float32, 101, *PLAIN),
    _backward(torch.bfloat16, 151936, *NO_ENTROPY),
    _backward(torch.bfloat16, 151936),
    _backward(torch.bfloat16, 50257),
    _backward(torch.float16, 1000, *NO_ENTROPY),
    _backward(torch.float32, 151936),
    _backward(torch.float32, 50257),
    _fold(torch.float32, 151936, True),
    _fold(torch.float32, 32768, False),
    _fold(torch.bfloat16, 131072, False),
    _gradient(torch.bfloat16, 151936, False, "factors", "grad_entropy", "entropy", "power"),
    _gradient(torch.bfloat16, 131072, True, "factors", "power"),
    _gradient(torch.float16, 32768, False),
    _gradient(torch.float32, 32768, False, "factors", "residual", "power"),
    _states("gather_kernel", torch.bfloat16),
    _states("scatter_kernel", torch.bfloat16, "power"),
    _states("scatter_kernel", torch.float32),
    _states("scatter_kernel", torch.float32, "residual", "common", "power"),
    Variant(head.pick_kernel, "", (), configs.WRITING, {"columns": "i32"}),
    _write("total", "entropy", "sum_sq_probs", "is_top1", "mean_logit"),
    _write(),
    _divergence(151936, "forward"),
    _divergence(151936, "reverse"),
    _divergence(50257, "mixture"),
    _divergence(131072, "mixture"),
    _slope(torch.bfloat16, 32768, "forward", "power"),
    _slope(torch.float32, 32768, "reverse", "residual", "power"),
    _slope(torch.float16, 32768, "mixture", softcap=True),
    _finish("token_mean", "normalizer", *BY_TOKEN),
    _finish("token_sum", "normalizer", "grad_logprobs", "grad_entropy", *BY_TOKEN),
    _finish("seq_mean_token_sum"),
    _finish("seq_mean_token_sum_norm", *BY_TOKEN),
    _finish("seq_mean_token_mean", "normalizer"),
    _finish("seq_mean_token_mean", kl="k3"),
    _finish("token_mean", "supervised_normalizer", "kl_normalizer", *BY_TOKEN, kl="k2"),
    _tokens("reinforce", False, "none", "none", "token_sum", *BARE),
    _tokens("clip", False, "k3", "none", "seq_mean_token_mean", *BY_TOKEN, "selected"),
    _tokens("clip", True, "k3_corrected", "sequence_mask", "seq_mean_token_sum", "selected"),
    _tokens("cispo", False, "k1", "tis", "token_mean", *BY_TOKEN, "selected"),
    _tokens("clip", False, "k3", "tis", "token_sum", *BY_TOKEN, "selected", branch=True),
    _tokens("dppo_kl", False, "k3_corrected", "icepop", "token_mean", *BY_TOKEN, "selected", branch=True),
    _tokens("sapo", True, "k2", "icepop", "seq_mean_token_mean", "selected"),
    _tokens("dppo_tv", False, "k3", "none", "token_mean", *BY_TOKEN, "selected"),
    _tokens("dppo_kl", True, "k3_corrected", "icepop", "token_mean", "selected"),
    _tokens("kl_cov", False, "k3", "none", "token_mean", *BY_TOKEN),
    _tokens("gmpo", False, "k3_corrected", "tis", "seq_mean_token_mean", "selected"),
    _tokens("gmpo", True, "k3_corrected", "tis", "seq_mean_token_mean", "selected"),
    _tokens("vespo", False, "k3_corrected", "tis", "seq_mean_token_mean", "mean_slopes", "shares", "selected"),
    _tokens("clip", False, "k3", "none", "token_mean", *BY_TOKEN, "selected", streams=True),
    _tokens("clip", True, "k1", "sequence_mask", "seq_mean_token_mean", "selected", streams=True),
    _reflection("deviation_kernel", torch.float32),
    _reflection("deviation_kernel", torch.float64, "scores"),
    _reflection("reward_kernel", torch.float32, normalize=True),
    _reflection("reward_kernel", torch.float32, "rewards", "std", "baseline", normalize=True),
    _reflection("reward_kernel", torch.float64, "baseline", normalize=False),
    _reflection("slope_kernel", torch.float32),
    _reflection("slope_kernel", torch.float32, "baseline", "grad_weights", "grad_std"),
    _reflection("slope_kernel", torch.float64),
    _reflection("gradient_kernel", torch.float32, normalize=True),
    _reflection("gradient_kernel", torch.float64, "grad_scores", "grad_baseline", normalize=False),
    Variant(policy_loss.scale_kernel, "", (), configs.FLAT, {"first": "*fp32", "second": "*fp32"}),
)


def compiled(variant: Variant, arch: Arch) -> Any:
    """Triton's result: ``.asm`` holds the cubin and the PTX, or the hsaco and the amdgcn; ``.metadata`` its needs."""
    names = variant.kernel.arg_names
    constants = {k: v for k, v in variant.options.items() if k in names and k not in ARGUMENTS}
    constants |= dict.fromkeys(variant.absent)
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    warps = variant.options["num_warps"]
    if "THREADS" in constants:
        warps, constants["THREADS"] = configs.fitted(warps, target.warp_size)
    types = ARGUMENTS | variant.types
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    pointers = [i for i, name in enumerate(names) if signature[name].startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(variant.kernel, signature, constants, aligned)
    return triton.compile(source, target=target, options={"num_warps": warps})
