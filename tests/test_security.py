"""What docs/security.md says of the code: nothing that is read is run, and whose private names are used."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [path for folder in ("trajkern", "triton_kernels", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
FILES = [
    path for path in FILES if not {"_bench", "_triton"} & set(path.relative_to(ROOT).parts)
]  # of an editable build
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "ruamel"}
BUILT_IN = {"eval", "exec", "compile", "__import__", "input"}
CALLS = {"torch.load", "torch.save", "torch.hub.load", "numpy.load", "np.load", "os.system", "os.popen"}
TRUE = {"trust_remote_code", "allow_pickle", "shell"}  # never given as anything but False
PRIVATE_OF = {"torch"}  # whose names with an underscore are used, and held by the tests of docs/support.md's versions
HOSTS = {"trl", "verl", "transformers", "tyro", "openai", "safetensors", "rich", "reasoning_gym", "gguf", "numpy"}
KNOWN = {"bench/peers.py": "from verl.trainer.distillation.fsdp.losses import _chunked_topk_log_probs"}  # only measured
HOSTS |= {"triton", "matplotlib", "liger_kernel", "peft", "tensordict", "skyrl", "areal"}


def dotted(node: ast.expr) -> str:
    """The name that an expression of names and attributes spells; else empty."""
    if isinstance(node, ast.Attribute):
        above = dotted(node.value)
        return f"{above}.{node.attr}" if above else ""
    return node.id if isinstance(node, ast.Name) else ""


def found(tree: ast.AST) -> Iterator[str]:
    """What must not stand in the package, each with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [x.name for x in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: import {x}" for x in modules if x.split(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            weights_only = any(k.arg == "weights_only" and getattr(k.value, "value", 0) is True for k in node.keywords)
            if name in BUILT_IN or name in CALLS and not (name == "torch.load" and weights_only):
                yield f"{node.lineno}: {name}(...)"
            for keyword in node.keywords:
                if keyword.arg in TRUE and getattr(keyword.value, "value", None) is not False:
                    yield f"{node.lineno}: {keyword.arg}"
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            top = dotted(node).split(".")[0]
            if top in HOSTS - PRIVATE_OF:
                yield f"{node.lineno}: {dotted(node)}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in HOSTS - PRIVATE_OF:
            private = [x.name for x in node.names if x.name.startswith("_")] + re.findall(r"\._\w+", node.module or "")
            yield from (f"{node.lineno}: from {node.module} import {x}" for x in private)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from yaml import safe_load",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(text, shell=asked)",
        "trl._private",
        "from transformers import _secret",
    ],
)
def test_it_would_be_found(code: str) -> None:
    assert list(found(ast.parse(code)))


def test_nothing_that_is_read_is_run() -> None:
    allowed = ast.parse("model.eval(); torch.load(path, weights_only=True); re.compile(x); torch.compile(f)")
    assert list(found(allowed)) == []
    assert len(FILES) > 200
    wrong = [(str(path.relative_to(ROOT)), x) for path in FILES for x in found(ast.parse(path.read_text()))]
    assert [f"{name}:{x}" for name, x in wrong if x.partition(": ")[2] != KNOWN.get(name)] == []
