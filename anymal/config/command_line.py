"""The command line of every program: ``[RECIPE or SOURCE] a.b=value …``, and a ``--help`` that lists every setting."""

import ast
import atexit
import dataclasses
import inspect
import itertools
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from anymal.config.renamed import OldName
from anymal.config.settings import load
from anymal.errors import UserError, alternatives

OTHERS_FUTURE_WARNINGS = (
    "`is_gradient_checkpointing` is deprecated",  # PEFT 0.21, of transformers
    "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",  # DeepSpeed 0.19, of torch
)
"""Python shows these to everybody, and no user of a program can mend them. Any others are errors in the tests."""


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, inherited ones too, read from the source."""
    docs: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, cls.__bases__):
        docs |= field_docs(base)
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    for statement, following in itertools.pairwise(getattr(definition, "body", [])):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = inspect.cleandoc(text)
    return docs


def describe(cls: type, prefix: str = "") -> list[str]:
    """Lines of ``--help``: each setting with its type, default and meaning, nested ones after their parent."""
    lines = []
    docs, hints = field_docs(cls), get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        inner = next((a for a in getattr(hint, "__args__", ()) if dataclasses.is_dataclass(a)), None)
        if dataclasses.is_dataclass(hint):
            lines += ["", f"{docs.get(f.name, '')}", *describe(hint, f"{prefix}{f.name}.")]
            continue
        default = f.default if f.default is not dataclasses.MISSING else None
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        shown = "required" if default == MISSING else f"default {default!r}"
        if inner is None:
            lines.append(f"  {prefix}{f.name}  ({_kind(hint)}, {shown})")
            lines += textwrap.wrap(docs.get(f.name, ""), 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
        else:
            lines += ["", *textwrap.wrap(docs.get(f.name, ""), 106), *describe(inner, f"{prefix}{f.name}.NAME."), ""]
    return lines


def _kind(hint: Any) -> str:
    """A setting's type, or what it can be, as ``--help`` has it."""
    if get_origin(hint) is Literal:
        return alternatives(get_args(hint))
    if get_origin(hint) is list:
        return f"list[{_kind(get_args(hint)[0])}]"
    return str(hint).replace("typing.", "") if get_args(hint) else getattr(hint, "__name__", str(hint))


def parse_args(
    schema: type,
    usage: str,
    argv: Sequence[str] | None = None,
    *,
    defaults: Sequence[str] = (),
    more_help: Sequence[str] = (),
    source: str = "",
    read: Callable[..., Any] = load,
) -> Any:
    """Read ``[RECIPE] a.b=value …`` or ``[SOURCE] name=value …`` from the command line.

    The ``--local_rank=N`` that the DeepSpeed launcher passes is ignored: the rank comes from the environment.

    Args:
        schema: The dataclass of the settings.
        usage: Printed by ``--help``, followed by every setting of `schema`.
        argv: The arguments; those of the process by default.
        defaults: Overrides that the recipe beats.
        more_help: Lines that ``--help`` prints at the end.
        source: Of a program that takes no recipe: the setting that a first argument without ``=`` stands for.
        read: Makes the settings; takes what `anymal.config.settings.load` takes.

    Returns:
        What `read` returns.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print("\n".join([inspect.cleandoc(usage), "", "Settings:", *describe(schema), *more_help]))
        raise SystemExit(0)
    if "--local_rank" in arguments:
        at = arguments.index("--local_rank")
        del arguments[at : at + 2]
    arguments = [a for a in arguments if not a.startswith("--local_rank=")]
    recipe = None
    if arguments and "=" not in arguments[0]:
        if source:
            arguments[0] = f"{source}={arguments[0]}"
        else:
            recipe = arguments.pop(0)
    return read(schema, recipe, [a.removeprefix("--") for a in arguments], defaults)


def run_program(main: Callable[[], int | None]) -> None:
    """Run a program's `main`; what the user can mend is one line on stderr, without a traceback."""
    try:
        with warnings.catch_warnings():
            for theirs in OTHERS_FUTURE_WARNINGS:
                warnings.filterwarnings("ignore", message=theirs, category=FutureWarning)
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


def _show_warning(
    as_python_does: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any, **also: Any
) -> None:
    """What is said of a recipe concerns whoever wrote it: one line, without the line of our code that says it."""
    if issubclass(category, OldName):
        print(f"warning: {message}", file=sys.stderr)
    else:
        as_python_does(message, category, *where, **also)


@atexit.register
def _leave_processes() -> None:
    """End gloo's threads. Left to the interpreter's end, they now and then abort the process, its exit code lost.

    NCCL's are left alone: where another rank is gone, to end them could wait for ever.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
