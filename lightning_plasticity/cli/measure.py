"""``lightning-plasticity measure``: one spectrum of a network, without training."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_plasticity.cli.common import (
    OK,
    Found,
    UsageError,
    add_command,
    add_json,
    completes,
    new_directory,
    positive,
    seconds,
    seed,
    threshold,
    to_json,
)

if TYPE_CHECKING:
    from lightning_plasticity.linalg import Estimate

MATRICES = ("ggn", "hessian", "ntk", "kronecker")
EPS = (1e-3, 1e-2, 1e-1)
SUMMARY = "measure the curvature spectrum of a network on some data, without training"
EXAMPLE = """
Example:
  lightning-plasticity measure --module lightning_plasticity.demo.network.Plain \\
    --data lightning_plasticity.streams.RandomLabelDigits --task 1 --samples 128 --matrix ggn --eps 1e-2 --features

  lightning-plasticity measure --module my_code.Net --checkpoint last.ckpt --data held_out.npz --json

The loss is found by watching the LightningModule's training_step; for another one, and for a plain module, give --loss.
Classes are imported from installed packages and from the current directory.
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "measure", SUMMARY, EXAMPLE)
    parser.add_argument("--module", required=True, metavar="CLASS", help="import path of a module")
    parser.add_argument(
        "--init", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="its arguments, or a JSON object"
    )
    checkpoint = parser.add_argument("--checkpoint", type=Path, metavar="FILE.ckpt", help="weights and hyperparameters")
    completes(checkpoint, "FILE")
    data = parser.add_argument(
        "--data",
        required=True,
        metavar="CLASS|FILE",
        help="import path of a datamodule, stream, dataset or loader; or a .pt or .npz file of inputs and targets",
    )
    completes(data, "FILE")
    parser.add_argument(
        "--data-init", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="arguments of the data's class"
    )
    parser.add_argument("--task", type=int, metavar="K", help="of a stream, from 0 (default the first)")
    parser.add_argument("--samples", type=positive, default=256, help="the first so many (default 256)")
    parser.add_argument("--matrix", choices=MATRICES, default="ggn", help="which matrix (default ggn)")
    parser.add_argument(
        "--eps",
        type=threshold,
        nargs="+",
        default=list(EPS),
        help="thresholds of the eps-rank (default 1e-3 1e-2 1e-1)",
    )
    parser.add_argument("--loss", metavar="FUNCTION", help="import path of loss(outputs, targets)")
    parser.add_argument("--params", nargs="+", metavar="NAME", help="names or wildcards of parameters (default all)")
    parser.add_argument("--mode", choices=("frozen", "as_is", "eval"), default="frozen", help="default frozen")
    parser.add_argument("--max-seconds", type=seconds, help="for the spectrum (default any; not for kronecker)")
    parser.add_argument("--seed", type=seed, default=0, help="of new weights, data order and probes (default 0)")
    parser.add_argument("--features", action="store_true", help="feature ranks and dead units too")
    out = parser.add_argument("--out", type=Path, metavar="DIR", help="also write measure.json and the spectrum there")
    completes(out, "DIRECTORY")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Found:
    """Measure, show the numbers, write the files."""
    if arguments.matrix == "kronecker" and arguments.max_seconds is not None:
        raise UsageError("--max-seconds: kronecker takes no bound; give fewer --samples.")
    out = None if arguments.out is None else new_directory(arguments.out)
    from lightning.pytorch import LightningModule, seed_everything

    from lightning_plasticity.cli.objects import importing, init_args, make_batches, make_module
    from lightning_plasticity.cli.trainerless import without_a_trainer
    from lightning_plasticity.study.build import find

    seed_everything(arguments.seed, verbose=False)
    with importing():
        module = make_module(arguments.module, init_args(arguments.init, "--init"), arguments.checkpoint)
        loss = None if arguments.loss is None else find(arguments.loss, "--loss")
        if loss is None and not isinstance(module, LightningModule):
            raise UsageError(f"--module {arguments.module} is no LightningModule: its loss has to be given by --loss.")
        if isinstance(loss, type):
            loss = loss()  # a module such as torch.nn.MSELoss
        data_init = init_args(arguments.data_init, "--data-init")
        batches = make_batches(arguments.data, data_init, arguments.task, arguments.samples, module)
        _check_params(module, batches, arguments.params)
        with _progress(arguments.json), without_a_trainer():
            spectrum = _spectrum(arguments, module, loss, batches)
            features = _features(module, loss, batches, arguments.mode) if arguments.features else {}
    found = _found(arguments, spectrum, features)
    _show(found)
    if out is not None:
        (spectrum.spectrum() if arguments.matrix == "kronecker" else spectrum).save(out / "spectrum.npz")
        (out / "measure.json").write_text(to_json(found) + "\n", encoding="utf-8")
        print(f"\nWritten: {out / 'measure.json'}, {out / 'spectrum.npz'}")
    return OK, found


@contextmanager
def _progress(json: bool) -> Iterator[None]:
    """How far it is, in one line of standard error that is taken away again: where somebody sees it."""
    if json or not sys.stderr.isatty():
        yield
        return
    from lightning_plasticity.linalg import watching

    def show(text: object) -> None:
        print(f"\r\x1b[K{str(text)[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)

    try:
        with watching(show):
            yield
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _check_params(module: Any, batches: list[Any], params: list[str] | None) -> None:
    from lightning_plasticity.curvature.measured import Measured

    try:
        Measured(module, batches, params=params).parameters()
    except ValueError as error:
        raise UsageError(f"--params: {str(error).removeprefix('params=')}") from error


def _spectrum(arguments: argparse.Namespace, module: Any, loss: Any, batches: list[Any]) -> Any:
    from lightning_plasticity import curvature

    options: dict[str, Any] = {"params": arguments.params, "mode": arguments.mode, "seed": arguments.seed}
    if arguments.matrix == "kronecker":
        return curvature.kronecker_spectrum(module, loss, batches, **options)
    function = getattr(curvature, f"{arguments.matrix}_spectrum")
    return function(module, loss, batches, max_seconds=arguments.max_seconds, **options)


def _features(module: Any, loss: Any, batches: list[Any], mode: Any) -> dict[str, Estimate]:
    """What ``FeatureRankMonitor`` records of these batches."""
    from lightning_plasticity.callbacks import FeatureRankMonitor

    trainer: Any = None  # it measures without one
    measurement = FeatureRankMonitor(loss_fn=loss, mode=mode).measure(trainer, module, batches, "start")
    if measurement.failures:
        raise RuntimeError("--features: " + "; ".join(f"{part}: {why}" for part, why in measurement.failures.items()))
    return {key.removeprefix("plasticity/"): value for key, value in measurement.values.items()}


def _found(arguments: argparse.Namespace, spectrum: Any, features: dict[str, Estimate]) -> dict[str, Any]:
    values = {f"eps_rank_{eps:g}": spectrum.epsilon_rank(eps) for eps in arguments.eps}
    for name in ("effective_rank", "trace", "lambda_max", "lambda_min"):
        values[name] = getattr(spectrum, name)()
    if arguments.matrix == "hessian":
        values["negative_fraction"] = spectrum.negative_fraction()
    kronecker = arguments.matrix == "kronecker"
    about: dict[str, Any] = {
        "module": arguments.module,
        "checkpoint": arguments.checkpoint,
        "data": arguments.data,
        "matrix": arguments.matrix,
        "num_params": spectrum.num_params,
        "num_samples": spectrum.num_samples,
        "exact": not kronecker and spectrum.exact,
        "method": "kronecker" if kronecker else spectrum.method,
        "seconds": spectrum.seconds,
        "settings": dict(spectrum.settings) | ({"skipped": dict(spectrum.skipped)} if kronecker else {}),
    }
    return about | {
        "values": {key: _plain(value) for key, value in values.items()},
        "features": {key: _plain(value) for key, value in features.items()},
    }


def _plain(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "lower": estimate.lower, "upper": estimate.upper, "exact": estimate.exact}


def _show(found: dict[str, Any]) -> None:
    kinds = {True: "exact", False: "an estimate with 95 % intervals"}
    kind = "an approximation of the GGN, layer by layer" if found["matrix"] == "kronecker" else kinds[found["exact"]]
    print(f"{found['matrix']} of {found['num_params']} parameters on {found['num_samples']} samples: {kind}")
    print(f"({found['method']}, {found['seconds']:.2f} s)\n")
    if why := found["settings"].get("budget"):
        print(f"With less than asked for: {why}\n")
    for layer, reason in found["settings"].get("skipped", {}).items():
        print(f"Without {layer}: {reason}")
    rows = {**found["values"], **found["features"]}
    width = max(map(len, rows))
    for key, value in rows.items():
        inside = "exact" if value["exact"] else f"{value['lower']:.6g} to {value['upper']:.6g}"
        inside = "of the approximation" if found["matrix"] == "kronecker" and key in found["values"] else inside
        note = " (residual bound)" if key.startswith("lambda_") and not value["exact"] else ""
        print(f"{key:<{width}}  {value['value']:>12.6g}  {inside}{note}")
