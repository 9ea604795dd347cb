"""Packages import a name when it is first used, so that the command line does not wait for torch."""

from __future__ import annotations

import ast
import gc
import statistics
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

import fastclip
from fastclip.system.lazy import uncollected
from support import needs

PACKAGE = Path(fastclip.__file__).parent
ADVICE = "run pip install '.[models]' in the folder of fastclip's source code"
LAZY = ("fastclip", "fastclip.integrations", "fastclip.data", "fastclip.models", "fastclip.search", "fastclip.training")
SLOW = {"torch", "numpy", "timm", "transformers", "open_clip"}
# Packages that a command may import beside torch; `import torch` itself loads torch's modules alone.
RARE = {"datasets", "matplotlib", "open_clip", "pandas", "pyarrow", "scipy", "sklearn", "tensorboard", "transformers"}
HEAVY = {
    *RARE,
    *("huggingface_hub", "sympy", "timm", "torchvision", "tyro", "wandb"),
    *("torch._dynamo", "torch._inductor"),
    *("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor"),
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_the_standard_library_only() -> None:
    code = "import sys; before = set(sys.modules); "
    code += f"import {', '.join(LAZY)}, fastclip.system.env; print(*(set(sys.modules) - before))"
    new = {name.split(".")[0] for name in python(code).split()}
    assert new - set(sys.stdlib_module_names) == {"fastclip"}


@pytest.mark.parametrize(
    "line", ["--help", "--version", "models", "convert --help", "parity --help", "doctor --help", "bench --help"]
)
def test_command_answers_without_torch(line: str) -> None:
    code = f"import sys; from fastclip.cli import main\ntry:\n    main({line.split()})\nexcept SystemExit as end:\n"
    code += f"    assert not end.code\nprint('loaded:', *({SLOW} & sys.modules.keys()))"
    *answer, loaded = python(code).splitlines()
    assert answer and loaded == "loaded:"


@pytest.mark.alone
def test_help_answers_in_half_a_second() -> None:
    script = Path(sys.executable).with_name("fastclip")
    if not script.exists():
        pytest.skip("the package is not installed in this environment: there is no script `fastclip`")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([script, "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 0.5


@pytest.mark.alone
def test_losses_import_in_a_fifth_of_a_second_beside_torch() -> None:
    code = "import time, torch; start = time.perf_counter(); import fastclip; fastclip.contrastive_loss; "
    code += "print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(3)) < 0.2


IMPORTS = """
import fastclip.training.trainer, fastclip.training.finetune, fastclip.training.planning.memory
import fastclip.evaluation.zero_shot, fastclip.evaluation.caption_retrieval, fastclip.evaluation.robustness
import fastclip.search.engine, fastclip.search.serve, fastclip.models.factory
"""
MODEL = "fastclip.create_model('ViT-tiny', device='meta'); fastclip.get_tokenizer('ViT-tiny')"


@pytest.mark.parametrize(("code", "names"), [(IMPORTS, HEAVY), (MODEL, RARE)], ids=["imports", "model"])
def test_nothing_heavy_is_loaded_before_its_use(code: str, names: set[str]) -> None:
    needs("train")
    code = f"import sys, torch, fastclip; before = set(sys.modules)\n{code}\n"
    assert python(code + f"print(*sorted({names} & (sys.modules.keys() - before)))") == ""


def test_garbage_is_not_searched_for_while_a_model_is_loaded() -> None:
    needs("models")
    code = """
import gc, sys, fastclip
seen = {}
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "timm", "torchvision"):
            seen[name] = gc.isenabled()
sys.meta_path.insert(0, Finder())
fastclip.create_model("ViT-tiny", device="meta")
print(sorted(seen), any(seen.values()), gc.isenabled())
"""
    assert python(code) == "['timm', 'torch', 'torchvision'] False True"


@pytest.mark.parametrize(("words", "frozen"), [("", True), ("['models']", False)], ids=["command", "call"])
def test_garbage_is_not_searched_for_where_a_command_ends(words: str, frozen: bool) -> None:
    """The garbage collector does not search the objects of a command that is about to end,
    unlike those of other processes.
    """
    code = f"import gc, sys; from fastclip.cli import main; sys.argv[1:] = ['models']; main({words}); "
    assert python(code + "print(gc.get_freeze_count() > 0)").splitlines()[-1] == str(frozen)


def test_collector_that_is_off_stays_off() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_see_every_lazy_name(package: str) -> None:
    """The table of lazy names, the imports for type checkers and __all__ agree."""
    module = import_module(package)
    imported = {
        alias.name: node.module
        for block in ast.parse(Path(module.__file__).read_text()).body
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == module._LAZY
    assert {*module._LAZY} == {*module.__all__} - {"__version__"}
    assert {*module.__all__} <= {*dir(module)}


def test_every_lazy_name_is_the_one_of_its_module() -> None:
    needs("models")
    code = f"""
from importlib import import_module
packages = [import_module(name) for name in {LAZY}]
for package in packages:
    assert not package._LAZY.keys() & vars(package), "what is lazy is there already"
from fastclip import *
assert vars().keys() >= set(packages[0].__all__)
for package in packages:
    for name, module in package._LAZY.items():
        value = getattr(package, name)
        assert value is getattr(import_module(module), name), name
        assert vars(package)[name] is value, f"{{name}} is looked up at every use"
print(__version__)
"""
    assert python(code) == fastclip.__version__


@pytest.mark.parametrize("package", LAZY)
def test_unknown_name_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError, match=f"^module '{package}' has no attribute 'contrastive_los'$"):
        _ = import_module(package).contrastive_los
    assert not hasattr(import_module(package), "__wrapped__")


@pytest.mark.parametrize("order", ["fastclip, torch", "torch, fastclip"])
def test_order_of_imports_does_not_matter(order: str) -> None:
    code = f"import {order}; x = torch.eye(4); loss = fastclip.contrastive_loss(x, x, 1.0); "
    code += "print(round(loss.item(), 4), round(fastclip.ClipLoss()(x, x, 1.0).item(), 4), "
    code += "hasattr(torch.ops.fastclip, 'contrastive_fwd'))"
    assert python(code) == "0.7437 0.7437 True"  # log(e + 3) - 1


def test_ops_are_there_where_torch_came_first() -> None:
    """The ops exist once torch and fastclip are imported, because exported programs run without using a name of the
    package.
    """
    code = "import torch, fastclip; print(hasattr(torch.ops.fastclip, 'contrastive_fwd'), 'contrastive_loss' in "
    assert python(code + "vars(fastclip))") == "True True"


def test_first_use_may_be_in_a_compiled_graph() -> None:
    code = """
import sys, fastclip
assert 'torch' not in sys.modules
import torch
def loss(x, y):
    return fastclip.contrastive_loss(x, y, 10.0)
x, y = torch.eye(6, 8, requires_grad=True), torch.ones(6, 8)
assert 'contrastive_loss' not in vars(fastclip)
value = torch.compile(loss, fullgraph=True, backend='aot_eager')(x, y)
value.backward()
print(torch.equal(value, loss(x, y)), torch.equal(x.grad, torch.autograd.grad(loss(x, y), x)[0]))
"""
    assert python(code) == "True True"


def test_missing_package_is_named() -> None:
    """A missing package is named. Only for the names of models does the error name an extra to install."""
    code = """
import sys, fastclip
sys.modules |= {'timm': None, 'torch': None}
print(len(fastclip.list_models()))
for name in ('create_model', 'contrastive_loss'):
    try:
        getattr(fastclip, name)
    except ImportError as error:
        print(error)
"""
    names, models, losses = python(code).splitlines()
    assert int(names) > 10
    assert models == f"fastclip.create_model needs torch, which is not installed: {ADVICE}"
    assert losses == "import of torch halted; None in sys.modules"


@pytest.mark.parametrize("package", ["timm", "torchvision", "transformers"])
def test_package_that_models_import_late_is_missed_early(package: str) -> None:
    needs("models")
    code = f"import sys, fastclip; sys.modules[{package!r}] = None\ntry:\n    fastclip.create_model\n"
    code += "except ImportError as error:\n    print(error)"
    assert python(code) == f"fastclip.create_model needs {package}, which is not installed: {ADVICE}"


@pytest.mark.parametrize(
    ("line", "package", "extra"),
    [
        ("train --data digits --model ViT-tiny --output x", "tyro", "train"),
        ("filter --data digits --checkpoint x --output x", "pyarrow", "search"),
        ("data check hf:x", "datasets", "hf"),
    ],
)
def test_command_says_which_extra_it_needs(line: str, package: str, extra: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from fastclip.cli import main; sys.exit(main({line.split()}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert package in done.stderr and f"pip install '.[{extra}]'" in done.stderr
