"""A study's YAML file: its keys, what they may hold, and the units of work (method, seed) that it asks for."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer

Settings = dict[str, Any]

STUDY_KEYS = (
    *("module", "stream", "methods", "seeds", "fits", "online_metric"),
    *("trainer", "optimizer", "callbacks", "measure", "threads"),
)
METHOD_KEYS = ("module", "stream", "optimizer", "transforms", "regularizers", "callbacks", "trainer")
ENTRY_KEYS = ("class_path", "init_args")
FITS = ("per_task", "one")
# What the study decides itself, and how to say it instead.
MANAGED = {
    "callbacks": "list them under callbacks, of the study or of a method",
    "logger": "numbers go to the study's table, spectra and records to each unit's directory",
    "reload_dataloaders_every_n_epochs": "it follows from the stream's epochs_per_task",
    "enable_checkpointing": "the study saves its own state after each task",
    "default_root_dir": "use --out",
    "fast_dev_run": "give the stream fewer tasks instead",
    "max_time": "tasks have a length of their own",
}

# No bound on seconds: what is measured must not depend on how busy the machine is.
DEFAULT_MEASURE: tuple[Settings, ...] = (
    {
        "class_path": "lightning_plasticity.HessianSpectrumMonitor",
        "init_args": {"quantities": ["ggn"], "probe_samples": 150, "when": "start", "max_seconds": None},
    },
    {"class_path": "lightning_plasticity.FeatureRankMonitor", "init_args": {"when": "start"}},
    {"class_path": "lightning_plasticity.TrainabilityProbe", "init_args": {"max_seconds": None}},
)


class StudyError(ValueError):
    """A study that cannot be run as it is written."""


@dataclass(frozen=True)
class Unit:
    """One method on one seed.

    Attributes:
        method: its name in the file.
        seed: of initial weights and, unless the file fixes it, of the stream.
        settings: all that decides the result, merged: the study's keys with the method's own over them.
        search: directories to import the user's classes from.
    """

    method: str
    seed: int
    settings: Settings
    search: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.method}, seed {self.seed}"

    @property
    def fingerprint(self) -> str:
        """Hash of the settings; the same for files that differ in order and layout only."""
        text = json.dumps(self.settings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def directory(self, out: Path) -> Path:
        """Where its state and results are kept."""
        return out / "units" / self.method / f"seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """What a YAML file asks for."""

    methods: dict[str, Settings]  # merged settings by name
    seeds: tuple[int, ...]
    search: tuple[str, ...] = ()
    others: dict[str, Settings] = field(default_factory=dict)  # left out by ``only``; checked all the same

    def units(self) -> list[Unit]:
        """Seed by seed, so that all methods can be compared early."""
        return [
            Unit(method, seed, settings, self.search)
            for seed in self.seeds
            for method, settings in self.methods.items()
        ]

    @property
    def metric(self) -> str:
        """Name of the online metric in the columns ``online_<metric>`` and ``end_<metric>``."""
        return column_name(next(iter(self.methods.values()))["online_metric"])


def column_name(metric: str) -> str:
    """A logged key as the end of a column's name."""
    return re.sub(r"\W+", "_", metric)


def load_study(path: Path, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> Study:
    """Read and check a study.

    Args:
        path: the YAML file.
        only: names of methods to keep; all when empty.
        seeds: instead of the file's.

    Raises:
        StudyError: for what cannot be read, is unknown, missing or of the wrong kind.
    """
    try:
        plain = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"{path} is not text; expected a YAML file in UTF-8.") from error
    except yaml.YAMLError as error:
        raise StudyError(f"{path} is not valid YAML: {error}") from error
    study = parse_study(plain, search=(str(Path.cwd()), str(path.resolve().parent)))
    if unknown := [name for name in only if name not in study.methods]:
        raise StudyError(f"--only names {', '.join(unknown)}; the study has: {', '.join(study.methods)}.")
    methods = {name: settings for name, settings in study.methods.items() if not only or name in only}
    others = {name: settings for name, settings in study.methods.items() if name not in methods}
    return Study(methods, tuple(seeds) or study.seeds, study.search, others)


def parse_study(plain: Any, search: tuple[str, ...] = ()) -> Study:
    """The same from plain Python."""
    plain = _mapping(plain, "the file")
    _only_known(plain, STUDY_KEYS, "the study")
    for key in ("module", "stream", "methods"):
        if not plain.get(key):
            raise StudyError(f"The study has no {key!r}; expected {', '.join(STUDY_KEYS[:3])} at least.")
    fits = plain.get("fits", "per_task")
    if fits not in FITS:
        raise StudyError(
            f"fits is {fits!r}, expected 'per_task' (new Trainer and optimizer for each task) or 'one' (one fit)."
        )
    metric = plain.get("online_metric", "accuracy")
    if not isinstance(metric, str) or not metric:
        raise StudyError(f"online_metric is {metric!r}, expected a key, e.g. accuracy.")
    measure = plain.get("measure")
    shared: Settings = {
        "module": _entry(plain["module"], "module"),
        "stream": _entry(plain["stream"], "stream"),
        "optimizer": _entry(plain["optimizer"], "optimizer") if plain.get("optimizer") else None,
        "callbacks": _entries(plain.get("callbacks"), "callbacks"),
        "trainer": _trainer(plain.get("trainer"), "trainer"),
        "measure": list(DEFAULT_MEASURE) if measure is None else _entries(measure, "measure", extra=("tasks",)),
        "threads": _whole(plain.get("threads", 1), "threads", 1),
        "fits": fits,
        "online_metric": metric,
        "regularizers": [],
        "transforms": [],
    }
    methods = {
        _name(name): _merged(shared, own, f"methods.{name}")
        for name, own in _mapping(plain["methods"], "methods").items()
    }
    seeds = plain.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds:
        raise StudyError(f"seeds is {seeds!r}, expected a list such as [0, 1, 2].")
    seeds = [_whole(seed, "seeds", 0) for seed in seeds]
    if len(set(seeds)) < len(seeds):
        raise StudyError(f"seeds {seeds} holds a seed twice.")
    return Study(methods, tuple(seeds), search)


def _merged(shared: Settings, own: Any, where: str) -> Settings:
    own = _mapping({} if own is None else own, where)
    _only_known(own, METHOD_KEYS, where)
    settings = dict(shared)
    for key in ("module", "stream"):
        if own.get(key):
            settings[key] = _over(shared[key], own[key], f"{where}.{key}")
    if own.get("optimizer"):
        settings["optimizer"] = _entry(own["optimizer"], f"{where}.optimizer")
    settings["trainer"] = shared["trainer"] | _trainer(own.get("trainer"), f"{where}.trainer")
    settings["callbacks"] = shared["callbacks"] + _entries(own.get("callbacks"), f"{where}.callbacks")
    for key in ("regularizers", "transforms"):
        settings[key] = _entries(own.get(key), f"{where}.{key}")
    return settings


def _over(base: Settings, own: Any, where: str) -> Settings:
    """A method's class or arguments over the study's: arguments are merged one by one, lists are replaced."""
    entry = _entry({"class_path": base["class_path"], **own} if isinstance(own, Mapping) else own, where)
    return {"class_path": entry["class_path"], "init_args": {**base["init_args"], **entry["init_args"]}}


def _entries(value: Any, where: str, extra: tuple[str, ...] = ()) -> list[Settings]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise StudyError(f"{where} is a {type(value).__name__}, expected a list of class_path / init_args.")
    return [_entry(item, f"{where}[{k}]", extra) for k, item in enumerate(value)]


def _entry(value: Any, where: str, extra: tuple[str, ...] = ()) -> Settings:
    if isinstance(value, str):
        value = {"class_path": value}
    value = _mapping(value, where)
    _only_known(value, (*ENTRY_KEYS, *extra), where)
    class_path = value.get("class_path")
    if not isinstance(class_path, str) or "." not in class_path:
        raise StudyError(f"{where}: class_path is {class_path!r}, expected an import path, e.g. package.module.Class.")
    arguments = _mapping(value.get("init_args") or {}, f"{where}.init_args")
    entry: Settings = {"class_path": class_path, "init_args": arguments}
    return entry | {k: value[k] for k in extra if k in value}


def _trainer(value: Any, where: str) -> Settings:
    arguments = _mapping(value or {}, where)
    for key in arguments.keys() & MANAGED.keys():
        raise StudyError(f"{where}: the study sets {key!r} itself; {MANAGED[key]}.")
    _only_known(arguments, [name for name in inspect.signature(Trainer.__init__).parameters if name != "self"], where)
    return arguments


def _mapping(value: Any, where: str) -> Settings:
    if not isinstance(value, Mapping):
        raise StudyError(f"{where} is {_kind(value)}, expected keys with values.")
    odd = [key for key in value if not isinstance(key, str)]
    if odd:
        raise StudyError(f"{where} has the key {odd[0]!r}, expected text; put it in quotes.")
    return dict(value)


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__} ({value!r})"


def _only_known(value: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in value:
        if key not in (names := tuple(known)):
            raise StudyError(f"{where} has no key {key!r}.{did_you_mean(key, names)} Known: {', '.join(names)}.")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint with a space before it, or nothing."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
        raise StudyError(f"The method's name {name!r} makes no directory; use letters, digits and _ . + -")
    return name


def _whole(value: Any, where: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise StudyError(f"{where} holds {value!r}, expected a whole number of at least {least}.")
    return value


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 reads ``1e-3`` as text; here it is a number, as in YAML 1.2. A key twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1 and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
