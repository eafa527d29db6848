"""Every public callback, schedule and regulariser from a file and the command line: found by walking, not listed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

import lightning_plasticity
from lightning_plasticity import TaskSchedule, callbacks, regularization
from lightning_plasticity.regularization import Regularizer

# jsonargparse 4.49 and later call instantiate_classes deprecated; earlier ones have nothing else.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

BASES = (Callback, TaskSchedule, Regularizer)
# For arguments whose check asks for more than their type hint says, by class and argument.
REDO, SHRINK = (
    {"class_path": f"lightning_plasticity.{name}", "init_args": {}} for name in ("ReDo", "ShrinkAndPerturb")
)
EXAMPLES: dict[tuple[str, str], list[Any]] = {
    ("ContinualBackprop", "decay"): [0.25, 0],
    ("ContinualBackprop", "intervene_fraction"): [0.25, 1],
    ("ContinualBackprop", "replacement_rate"): [0.25, 1],
    ("PlasticityAlert", "fraction"): [0.25, 1],
    ("PlasticityAlert", "on_alert"): [None, REDO, [REDO, SHRINK]],
    ("ShrinkAndPerturb", "shrink"): [0.25, 1],
    ("SparseTopology", "density"): [0.25, 1],
    ("SparseTopology", "drop_fraction"): [0.25, 1],
    ("SpectralNorm", "bias_exponent"): [2.5, 3],
    ("SpectralNorm", "k"): [2.5, 3],
}
# What to give along with an argument, whose values do not go with a default.
ALONG: dict[tuple[str, str], dict[str, Any]] = {
    ("PlasticityAlert", "bad"): {"fraction": 1},
    ("ShrinkAndPerturb", "when"): {"shrink": 0.999999},
    ("TrainabilityProbe", "fresh"): {"target": "relative"},
}


def public(*namespaces: ModuleType) -> dict[type, str]:
    """Classes that a file may name, each with its shortest class path."""
    found: dict[type, str] = {}
    for namespace in namespaces:
        for name in namespace.__all__:
            value = getattr(namespace, name)
            if isinstance(value, type) and issubclass(value, BASES) and value not in BASES:
                found.setdefault(value, f"{namespace.__name__}.{name}")
    return found


PATHS = public(lightning_plasticity, callbacks, regularization)


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(cls).parameters)


def hints(cls: type) -> dict[str, Any]:
    """Type hints of all arguments; Python 3.10 makes Any with a default of None an Optional[Any]."""
    found = {name: get_type_hints(cls.__init__).get(name, Any) for name in parameters(cls)}
    return {name: Any if Any in get_args(hint) else hint for name, hint in found.items()}


def examples(hint: Any) -> list[Any]:
    """Plain values as a file has them, at least one for each arm of a type hint."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return [value for arm in arguments for value in examples(arm)]
    if origin is Literal:
        return list(arguments)
    if origin is Callable or hint is Callable:
        return ["torch.nn.functional.mse_loss"]
    if origin in (list, Sequence):
        items = examples(arguments[0])
        return [items, items[:1]] if len(items) > 1 else [items]
    if origin in (dict, Mapping):
        return [{examples(arguments[0])[0]: value} for value in examples(arguments[1])]
    if origin is tuple:
        items = [examples(argument)[0] for argument in arguments if argument is not Ellipsis]
        return [items]
    simple: dict[Any, list[Any]] = {NoneType: [None], bool: [True, False], int: [3], float: [0.25, 2], str: ["some"]}
    if hint in simple:
        return simple[hint]
    found = [{"class_path": path, "init_args": required(cls)} for cls, path in PATHS.items() if issubclass(cls, hint)]
    assert found, f"no example of {hint}; add one to examples"
    return found


def values_of(cls: type, argument: str) -> list[Any]:
    return EXAMPLES.get((cls.__name__, argument)) or examples(hints(cls)[argument])


def required(cls: type) -> dict[str, Any]:
    """What must be given."""
    missing = [name for name, parameter in parameters(cls).items() if parameter.default is inspect.Parameter.empty]
    return {name: values_of(cls, name)[0] for name in missing}


def each_value() -> Iterator[Any]:
    for cls, path in PATHS.items():
        for argument, hint in hints(cls).items():
            for value in [] if hint is Any else values_of(cls, argument):
                given = (
                    value["class_path"].rpartition(".")[2]
                    if isinstance(value, dict) and "class_path" in value
                    else json.dumps(value)
                )
                yield pytest.param(cls, argument, value, id=f"{path.rpartition('.')[2]}-{argument}-{given[:40]}")


def each_argument() -> list[Any]:
    return [
        pytest.param(cls, argument, id=f"{cls.__name__}-{argument}")
        for cls in PATHS
        for argument, hint in hints(cls).items()
        if hint is not Any
    ]


def parser_for(cls: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=next(base for base in BASES if issubclass(cls, base)))
    return parser


def refusal(cls: type, settings: dict[str, Any]) -> str:
    parser = parser_for(cls)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the classes of jsonargparse's errors changed)
        parser.instantiate_classes(parser.parse_object({"it": {"class_path": PATHS[cls], "init_args": settings}}))
    return str(caught.value)


def stored(built: Any, argument: str) -> Any:
    """Where a class keeps an argument: under its own name, or in its budget."""
    return getattr(built, argument) if hasattr(built, argument) else getattr(built.budget, argument)


def shows(kept: Any, given: Any) -> bool:
    """Whether what is kept is what was given; one value may be kept as a sequence of one."""
    if given is None:
        return True  # "the default", which a class may resolve
    if isinstance(given, dict) and "class_path" in given:
        return bool(type(kept) is next(cls for cls, path in PATHS.items() if path == given["class_path"]))
    if isinstance(given, list):
        return len(kept) == len(given) and all(map(shows, kept, given))
    if callable(kept):
        return str(given).endswith(f".{kept.__name__}")
    return bool(kept == given or (isinstance(kept, list | tuple) and list(kept) == [given]))


def squeezed(text: str) -> str:
    """Text without white space and the last full stop, which a help page may set anew."""
    return "".join(text.split()).rstrip(".")


def test_the_walk_finds_what_is_there() -> None:
    names = {cls.__name__ for cls in PATHS}
    assert names >= {
        "HessianSpectrumMonitor", "FeatureRankMonitor", "TaskTracker", "Regularization", "EveryFit", "EveryNEpochs",
        "EveryNSteps", "TaskAttribute", "EffectiveRank", "L2",
    }  # fmt: skip


@pytest.mark.parametrize("cls", PATHS, ids=lambda cls: cls.__name__)
def test_defaults(cls: type) -> None:
    """The class path alone gives what calling the class gives; arguments that take any object may be left out."""
    for argument, hint in hints(cls).items():
        assert hint is not Any or parameters(cls)[argument].default is None, argument
    parser = parser_for(cls)
    config = parser.parse_object({"it": {"class_path": PATHS[cls], "init_args": required(cls)}})
    built = parser.instantiate_classes(config).it
    assert type(built) is cls
    for argument, parameter in parameters(cls).items():
        if parameter.default is not inspect.Parameter.empty:
            plain = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            assert shows(stored(built, argument), plain), argument


@pytest.mark.parametrize(("cls", "argument", "value"), list(each_value()))
def test_every_argument(cls: type, argument: str, value: Any) -> None:
    """From a file, from the command line, and from the file that is saved of it."""
    parser = parser_for(cls)
    settings = required(cls) | ALONG.get((cls.__name__, argument), {}) | {argument: value}
    # A copy, for the parser changes what it is given.
    from_file = parser.parse_object({"it": {"class_path": PATHS[cls], "init_args": deepcopy(settings)}})
    words = [f"--it={PATHS[cls]}"]
    for name, given in settings.items():
        words.append(f"--it.{name}={given if isinstance(given, str) else json.dumps(given)}")
    from_words = parser.parse_args(words)
    saved = parser.parse_string(parser.dump(from_file, skip_none=False))  # as SaveConfigCallback
    for config in (from_file, from_words, saved):
        built = parser.instantiate_classes(config).it
        assert type(built) is cls
        for name, given in settings.items():
            assert shows(stored(built, name), given), (name, stored(built, name))
    assert parser.dump(saved, skip_none=False) == parser.dump(from_file, skip_none=False)


@pytest.mark.parametrize(("cls", "argument"), each_argument())
def test_wrong_values_are_refused(cls: type, argument: str) -> None:
    message = refusal(cls, required(cls) | {argument: {"no": "such"}})
    assert argument in message
    assert "no" in message
    assert "such" in message


@pytest.mark.parametrize(("cls", "argument"), each_argument())
def test_unknown_words_are_refused_with_those_that_exist(cls: type, argument: str) -> None:
    hint = hints(cls)[argument]
    arms = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    words = [word for arm in arms if get_origin(arm) is Literal for word in get_args(arm)]
    if not words or str in arms:
        return
    message = refusal(cls, required(cls) | {argument: "nosuch"})
    assert {word for word in (argument, "nosuch", *words) if word not in message} == set()


@pytest.mark.parametrize("cls", PATHS, ids=lambda cls: cls.__name__)
def test_misspelt_arguments_are_refused(cls: type) -> None:
    message = refusal(cls, required(cls) | {"nosuch": 1})
    assert "nosuch" in message


@pytest.mark.parametrize("cls", PATHS, ids=lambda cls: cls.__name__)
def test_help_shows_the_docstring(
    cls: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--trainer.callbacks.help=lightning_plasticity.X`` has the first line and every argument's description."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parser_for(cls).parse_args([f"--it.help={PATHS[cls]}"])
    shown = squeezed(capsys.readouterr().out)
    docstring = docstring_parser.parse(cls.__doc__ or "")
    described = {param.arg_name: param.description or "" for param in docstring.params}
    first_line = squeezed(docstring.short_description or "")
    assert first_line
    assert first_line in shown or not parameters(cls)  # a class without arguments has an empty page
    for argument in parameters(cls):
        assert described.get(argument), f"{cls.__name__} does not describe {argument} under Args"
        assert squeezed(described[argument]) in shown, argument


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "yaml.md"


def test_the_page_builds_its_callbacks() -> None:
    text = PAGE.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--trainer.callbacks", type=list[Callback])
    parser.add_argument("--trainer.max_epochs", type=int)
    parser.add_argument("--trainer.reload_dataloaders_every_n_epochs", type=int)
    built = parser.instantiate_classes(parser.parse_string(text)).trainer.callbacks
    names = [type(callback).__name__ for callback in built]
    assert names == ["TaskTracker", "HessianSpectrumMonitor", "FeatureRankMonitor", "Regularization"]
    assert built[0].schedule.n == 10
    assert [type(regularizer).__name__ for regularizer in built[3].regularizers] == ["EffectiveRank", "L2"]
