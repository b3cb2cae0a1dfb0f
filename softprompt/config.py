"""Gin: search paths, bindings from the command line, required macros, the operative config.

The only module that imports gin. Gin files name our functions through gin's dynamic registration
(`from softprompt import launch`), so no other module knows that it is configurable.
"""

import ast
import contextlib
import difflib
import inspect
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gin

_HERE = pathlib.Path(__file__).parent
# In a wheel the gin files lie inside the package, in a checkout beside it.
GIN_FOLDER = next(
    (p for p in (_HERE / "gin", _HERE.parent / "gin") if (p / "runs").is_dir()), _HERE / "gin"
)


def parse(
    files: Sequence[str],
    bindings: Sequence[tuple[str, str]] = (),
    search_paths: Sequence[str] = (),
    complete: bool = True,
    optional: Sequence[str] = (),
) -> None:
    """Parses gin files, then `(NAME, value)` bindings over them.

    Unless `complete`, required macros may still lack their values; those that are `optional`
    become None.

    Files resolve from the working directory, then `search_paths`, then the shipped `gin/` folder.

    Raises:
      ValueError: a file that is not found, a name that no file knows, a value that does not parse,
        or macros without a value, required ones or such as files refer to (all of them listed).
    """
    gin.clear_config()
    # gin also searches the paths added before; start from the working directory alone.
    gin.config._LOCATION_PREFIXES[:] = [""]
    # It looks into Python's packages too, and takes any folder of the working directory for one.
    readers = gin.config._FILE_READERS
    readers[:] = [pair for pair in readers if pair[0].__module__ != "gin.resource_reader"]
    folders = [*search_paths, str(GIN_FOLDER)]
    for folder in folders:
        gin.add_config_file_search_path(folder)
    if not files:
        raise ValueError(f"no --gin_file given; shipped ones: {', '.join(shipped())}")
    for file in files:
        _parse_file(file, folders)
    known = macros() | dict.fromkeys(_unset())
    for name, value in bindings:
        if "." not in name and name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"--gin.{name}: no gin file given knows the name {name!r}; {hint}")
        with _one_sentence(f"--gin.{name}={value}"):
            gin.parse_config(f"{name} = {literal(value, isinstance(known.get(name), str))}")
        # A text counts as true, whatever it says.
        if isinstance(known.get(name), bool) and isinstance(macros()[name], str):
            raise ValueError(f"--gin.{name} is {value!r}, expected True or False")
    # Gin keeps a reference to its constant, which is resolved only when a function is called.
    unset = _unset()
    missing = [name for name, value in macros().items() if str(value) == "%gin.REQUIRED"] + unset
    for name in set(missing) & set(optional):
        gin.parse_config(f"{name} = None")
    missing = [name for name in missing if name not in optional]
    if missing and complete:
        flags = " ".join(f"--gin.{name}=…" for name in missing)
        if "ARCHITECTURE" in unset:
            flags = f"a backbone's file, such as --gin_file=models/t5_1_1_embedded.gin, or {flags}"
        raise ValueError(f"required gin macros have no value: {', '.join(missing)}; give {flags}")


def set_in(file: str, search_paths: Sequence[str] = ()) -> list[str]:
    """The macros that a gin file of one's own, none of the shipped ones, sets without includes."""
    for path in _candidates(file, search_paths):
        if path.is_file() and GIN_FOLDER.resolve() not in path.resolve().parents:
            return re.findall(r"^([A-Z][A-Z0-9_]*) *=", path.read_text(encoding="utf-8"), re.M)
    return []


def _candidates(file: str, folders: Sequence[str]) -> list[pathlib.Path]:
    return [pathlib.Path(file), *(pathlib.Path(folder) / file for folder in folders)]


def _parse_file(file: str, folders: Sequence[str]) -> None:
    if not any(path.is_file() for path in _candidates(file, folders)):
        near = difflib.get_close_matches(file, shipped(), n=3, cutoff=0.4)
        raise ValueError(
            f"no gin file {file!r} in the working directory, {', '.join(map(repr, folders))}"
            + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    with _one_sentence(file):
        gin.parse_config_file(file)


@contextlib.contextmanager
def _one_sentence(where: str) -> Iterator[None]:
    """Turns gin's many-line errors into one sentence that says where they arose."""
    try:
        yield
    except (ValueError, SyntaxError, ImportError, AttributeError, OSError, TypeError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{where}: {message}") from None


def literal(value: str, text: bool = False) -> str:
    """A flag's value as gin source: a bare text or path becomes a string, the rest stays.

    `text` is for names whose value is a text, which may begin with a bracket: `{text} or not`.

    >>> literal("/tmp/run"), literal("'/tmp/run'"), literal("300"), literal("@optim.adamw()")
    ("'/tmp/run'", "'/tmp/run'", '300', '@optim.adamw()')
    """
    if value.startswith(("@", "%")):
        return value
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        # What opens like a container or a string is gin's to judge.
        if not value.startswith(("'", '"') if text else ("(", "[", "{", "'", '"')):
            return repr(value)
    return value


def macros() -> dict[str, Any]:
    """All gin macros and their values, by name."""
    # gin offers no listing; a macro NAME is stored as the binding NAME/gin.macro.value.
    found = {}
    for (scope, selector), values in gin.config._CONFIG.items():
        if selector == "gin.macro":
            found[scope] = values.get("value")
    return dict(sorted(found.items()))


def _unset() -> list[str]:
    """Names of the macros that the files refer to and none of them sets."""
    references = gin.config.iterate_references(
        gin.config._CONFIG, to=gin.get_configurable(gin.config.macro)
    )
    return sorted({repr(reference).removeprefix("%") for reference in references} - {*macros()})


def configured(function: Callable) -> Callable:
    """The function with its gin bindings applied."""
    return gin.get_configurable(function)


def arguments(function: Callable) -> dict[str, Any]:
    """The keyword arguments that gin would call the function with, its defaults among them."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty
    }
    name = f"launch.{function.__name__}"
    try:
        bound = gin.get_bindings(function)
    except ValueError:  # gin has never heard of it.
        bound = {}
    if not bound:
        raise ValueError(
            f"no gin file given sets {name}; add one such as --gin_file=runs/prompt_finetune.gin"
        )
    found = defaults | bound
    if missing := [k for k in inspect.signature(function).parameters if k not in found]:
        raise ValueError(f"no gin file given sets {name}.{missing[0]}, which it needs")
    return found


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Within it, a ValueError that gin decorated with where it arose is raised as it was meant.

    Of subclasses those that are raised with a message alone stay what they are.
    """
    try:
        yield
    except Exception as error:
        message = str(error)
        # gin appends "\n  In call to configurable …" to the messages it passes on.
        cut = message.find("\n  In call to configurable")
        if cut < 0:
            raise
        required = isinstance(error, TypeError) and "required" in message[:cut].lower()
        if not required and not isinstance(error, ValueError):
            raise
        # gin raises subclasses of the error's own class, under the same name.
        name = type(error).__module__, type(error).__qualname__
        kind = [k for k in type(error).__mro__ if (k.__module__, k.__qualname__) == name][-1]
        if not issubclass(kind, ValueError) or kind.__init__ is not ValueError.__init__:
            kind = ValueError
        raise kind(" ".join(message[:cut].split())) from None


def bindings(module: str) -> dict[str, Any]:
    """What is bound to the functions of one of this package's modules, by `function.argument`.

    Macros are taken by their values, and what is no JSON by how gin writes it.
    """
    known = macros()

    def plain(value: Any) -> Any:
        text = repr(value)
        while text.startswith("%") and text[1:] in known:
            value = known[text[1:]]
            text = repr(value)
        return value if isinstance(value, str | int | float | None) else text

    return {
        f"{selector.split('.')[-1]}.{name}": plain(value)
        for (_, selector), values in gin.config._CONFIG.items()
        if selector.split(".")[-2] == module
        for name, value in sorted(values.items())
    }


def operative() -> str:
    """The bindings in force, as a gin file that would give the same run."""
    return gin.config_str()


def settings_in(text: str) -> dict[str, str]:
    """The bindings of such a file, by name; values that take several lines are joined."""
    joined = re.sub(r"(?: \\)?\n +", " ", text)
    pairs = (line.partition(" = ") for line in joined.splitlines())
    return {name: value.strip() for name, equals, value in pairs if equals}


def shipped() -> list[str]:
    """Relative names of the gin files that the package carries."""
    return sorted(str(p.relative_to(GIN_FOLDER)) for p in GIN_FOLDER.rglob("*.gin"))
