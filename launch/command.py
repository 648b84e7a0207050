"""The console script `anymal`: a command for each program, all in one grammar.

    anymal COMMAND [RECIPE or SOURCE] name=value …        anymal COMMAND --help lists every setting

``deepspeed`` and ``torchrun`` start the same programs as files: launch/pretrain.py is ``anymal pretrain``.
"""

import ast
import importlib
import importlib.util
import sys
import textwrap
from pathlib import Path

from anymal import __version__
from anymal.errors import nearest

COMMANDS = {
    "pretrain": "anymal.launch.pretrain",
    "finetune": "anymal.launch.finetune",
    "evaluate": "anymal.launch.evaluate",
    "report": "anymal.launch.report",
    "chat": "anymal.launch.chat",
    "estimate": "anymal.launch.estimate",
    "encode": "anymal.launch.encode",
    "mix": "anymal.launch.mix",
    "llava": "anymal.data_prep.sources.llava",
    "negatives": "anymal.data_prep.negatives",
    "pretrain-imu-encoder": "anymal.launch.pretrain_imu_encoder",
    "demo": "anymal.launch.demo",
    "doctor": "anymal.launch.doctor",
}
"""The module of each command; it has a function `start`."""


def start() -> None:
    """Run the command that is named on the command line, as if its program had been started."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(f"anymal {__version__}")
    elif name in COMMANDS:
        sys.argv = [f"anymal {name}", *rest]
        try:
            importlib.import_module(COMMANDS[name]).start()
        except KeyboardInterrupt:  # while its imports last, which take seconds
            print("error: interrupted", file=sys.stderr)
            sys.exit(130)
    else:
        print(f"error: {name!r} is no command; {nearest(name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)


def overview() -> str:
    """What ``anymal --help`` prints: a line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {_summary(module)}" for name, module in COMMANDS.items()]
    usage = "anymal COMMAND [RECIPE or SOURCE] name=value …     COMMAND --help lists every setting"
    recipes = ", ".join(sorted(path.stem for path in Path(__file__).with_name("recipes").glob("*.yaml")))
    recipes = textwrap.wrap(f"Recipes that come with it: {recipes}", 100, break_on_hyphens=False)
    return "\n".join([usage, "", *lines, "", *recipes])


def _summary(module: str) -> str:
    """The first line of a module's docstring. Read, not imported: an import of all would take seconds."""
    spec = importlib.util.find_spec(module)
    source = Path(spec.origin).read_text() if spec and spec.origin else ""
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    start()
