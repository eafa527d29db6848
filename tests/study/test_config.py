"""A study's file: what it says is what is run, and what is wrong is named with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from study_cases import plain_study

from lightning_plasticity.study import StudyError, load_study
from lightning_plasticity.study.build import Maker, importable
from lightning_plasticity.study.config import Unit, parse_study
from lightning_plasticity.study.run import check
from lightning_plasticity.study.unit import assemble

HERE = str(Path(__file__).parents[1])


def test_methods_override_the_study() -> None:
    study = parse_study(
        plain_study(
            module={"class_path": "study_cases.Net", "init_args": {"width": 8, "lr": 0.1}},
            optimizer="torch.optim.SGD",
            methods={
                "a": None,
                "b": {
                    "module": {"init_args": {"lr": 0.5}},
                    "stream": {"init_args": {"num_tasks": 3}},
                    "trainer": {"gradient_clip_val": 1.0},
                    "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.2}},
                    "transforms": [{"class_path": "study_cases.halve", "init_args": {"factor": 0.0}}],
                },
            },
        ),
        (HERE,),
    )
    with importable(study.search):
        a, b = (assemble(unit, Path("unused")) for unit in study.units()[:2])
    assert (a.module.lr, b.module.lr) == (0.1, 0.5)
    assert a.module.net[0].out_features == b.module.net[0].out_features == 8
    assert (a.num_tasks, b.num_tasks) == (2, 3)
    assert study.methods["b"]["trainer"] == {"accelerator": "cpu", "gradient_clip_val": 1.0}
    assert type(a.module.configure_optimizers()) is torch.optim.SGD
    optimizer = b.module.configure_optimizers()
    assert (type(optimizer), optimizer.param_groups[0]["lr"]) == (torch.optim.Adam, 0.2)
    assert all(bool((parameter == 0).all()) for parameter in b.module.parameters())
    assert not any(bool((parameter == 0).all()) for parameter in a.module.parameters())


def test_the_stream_gets_the_seed_unless_the_file_has_one() -> None:
    fixed = {"class_path": "study_cases.Stream", "init_args": {"seed": 7}}
    study = parse_study(plain_study(methods={"a": None, "b": {"stream": fixed}}), (HERE,))
    with importable(study.search):
        seeds = {unit.name: assemble(unit, Path("unused")).stream.seed for unit in study.units()}
    assert seeds == {"a, seed 0": 0, "b, seed 0": 7, "a, seed 1": 1, "b, seed 1": 7}


def test_monitors_at_the_last_task_only() -> None:
    monitor = "lightning_plasticity.FeatureRankMonitor"
    study = parse_study(
        plain_study(
            stream={"class_path": "study_cases.Stream", "init_args": {"num_tasks": 9}},
            measure=[{"class_path": monitor, "tasks": tasks, "init_args": {}} for tasks in ("all", "last", 3)],
        ),
        (HERE,),
    )
    with importable(study.search):
        parts = assemble(study.units()[0], Path("unused"))
    assert [callback.every_n_tasks for callback in parts.callbacks[1:4]] == [1, 8, 3]


def test_fingerprint_tells_settings_from_layout() -> None:
    plain = plain_study()
    turned = dict(reversed(plain.items()))

    def of(study: dict) -> list[str]:
        return [unit.fingerprint for unit in parse_study(study).units()]

    assert of(plain) == of(turned)
    assert len(set(of(plain))) == 2  # one for each method
    longer = plain_study(stream={"class_path": "study_cases.Stream", "init_args": {"num_tasks": 3}})
    assert not set(of(plain)) & set(of(longer))


def test_yaml_numbers_and_doubled_keys(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    head = "module: study_cases.Net\nstream: study_cases.Stream\n"
    file.write_text(head + "methods: {a: {module: {init_args: {lr: 1e-3, width: 4}}}}\nseeds: [3]\n")
    study = load_study(file)
    assert study.methods["a"]["module"]["init_args"] == {"lr": 0.001, "width": 4}
    assert study.units() == [Unit("a", 3, study.methods["a"], study.search)]
    assert load_study(file, seeds=[1, 2]).seeds == (1, 2)
    file.write_text(head + "methods: {a: , a: }\n")
    with pytest.raises(StudyError, match="'a' is there twice"):
        load_study(file)
    file.write_text("a: [")
    with pytest.raises(StudyError, match="not valid YAML"):
        load_study(file)
    with pytest.raises(StudyError, match="cannot be read"):
        load_study(tmp_path / "none.yaml")


WRONG = {
    "unknown key": ({"modul": 1}, "the study has no key 'modul'. Did you mean 'module'"),
    "no module": ({"module": None}, "The study has no 'module'"),
    "fits": ({"fits": "two"}, "fits is 'two', expected 'per_task'"),
    "metric": ({"online_metric": 3}, "online_metric is 3"),
    "seeds": ({"seeds": 3}, r"seeds is 3, expected a list such as \[0, 1, 2\]"),
    "seed twice": ({"seeds": [1, 1]}, "holds a seed twice"),
    "negative seed": ({"seeds": [-1]}, "seeds holds -1"),
    "threads": ({"threads": 0}, "threads holds 0"),
    "method's key": ({"methods": {"a": {"regularisers": []}}}, "methods.a has no key 'regularisers'. Did you mean"),
    "method's name": ({"methods": {"a/b": None}}, "'a/b' makes no directory"),
    "callbacks": (
        {"methods": {"a": {"callbacks": {"class_path": "x.y"}}}},
        "methods.a.callbacks is a dict, expected a",
    ),
    "class path": ({"module": "Net"}, "module: class_path is 'Net', expected an import path"),
    "no class path": ({"stream": {"init_args": {}}}, "stream: class_path is None"),
    "arguments": (
        {"stream": {"class_path": "study_cases.Stream", "init_args": [1]}},
        r"stream.init_args is a list \(\[1\]\)",
    ),
    "managed": ({"trainer": {"logger": True}}, "the study sets 'logger' itself"),
    "trainer": ({"trainer": {"max_epoch": 1}}, "trainer has no key 'max_epoch'. Did you mean 'max_epochs'"),
    "tasks": (
        {"measure": [{"class_path": "lightning_plasticity.FeatureRankMonitor", "tasks": "first"}]},
        r"measure\[0\]: tasks is 'first', expected all, last",
    ),
    "tasks of a stranger": (
        {"measure": [{"class_path": "study_cases.Fails", "tasks": "last"}]},
        r"measure\[0\]: study_cases.Fails takes no every_n_tasks",
    ),
    "no package": ({"module": "nowhere.Net"}, "methods.plain: module: no module 'nowhere' to import nowhere.Net from"),
    "no class": ({"module": "study_cases.Nett"}, "methods.plain: module: study_cases has no Nett. Did you mean 'Net'"),
    "not a class": ({"module": "study_cases.__doc__"}, "is a str, expected a class or a function"),
    "argument": (
        {"module": {"class_path": "study_cases.Net", "init_args": {"widht": 3}}},
        "study_cases.Net has no argument 'widht'. Did you mean 'width'. It takes: width, lr",
    ),
    "value": (
        {"module": {"class_path": "study_cases.Net", "init_args": {"width": "wide"}}},
        "(?s)study_cases.Net: .*width.*wide",
    ),
    "nested": (
        {
            "methods": {
                "a": {"regularizers": [{"class_path": "lightning_plasticity.L2", "init_args": {"strength": "much"}}]}
            }
        },
        r"(?s)methods.a: regularizers\[0\]: lightning_plasticity.L2.*strength.*much",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str) -> None:
    changes, message = WRONG[case]
    message = message.replace("'. It", r"'\? It") if "It takes" in message else message
    with pytest.raises(StudyError, match=message):
        check(parse_study(plain_study(**changes), (HERE,)))


def test_what_refuses_its_arguments_is_named() -> None:
    with pytest.raises(StudyError, match=r"here: .*RandomLabelDigits refused: num_tasks=0, expected"):
        Maker({"class_path": "lightning_plasticity.streams.RandomLabelDigits", "init_args": {"num_tasks": 0}}, "here")()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": "lightning.pytorch.demos.boring_classes.BoringDataModule"}, "has no attribute 'num_tasks'"),
        ({"fits": "one", "trainer": {"max_epochs": 3}}, "the length follows from the stream"),
        ({"callbacks": ["lightning_plasticity.TaskTracker"]}, "the study brings its own"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict, message: str) -> None:
    study = parse_study(plain_study(**changes), (HERE,))
    with importable(study.search), pytest.raises(StudyError, match=message):
        assemble(study.units()[0], Path("unused"))
