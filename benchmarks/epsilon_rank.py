"""The eps-rank two ways on the Hessians of the demo's plain network: by counting, and from a smoothed density.

Run: lightning-plasticity demo --out demo_out, then python -m benchmarks.epsilon_rank demo_out   (seconds)
Writes docs/images/epsilon_rank.png and benchmarks/results/epsilon_rank.md.
"""

import argparse
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from lightning_plasticity import Spectrum

ROOT = Path(__file__).parents[1]
THRESHOLDS = (1e-3, 1e-2, 1e-1)
COMMAND = "lightning-plasticity demo --out demo_out, then python -m benchmarks.epsilon_rank demo_out"


def published(spectrum, eps):
    """As the paper's code does; the warnings that this makes are the point of the page."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return spectrum.density_epsilon_rank(eps)


def spectra_of(demo):
    files = sorted(demo.glob("tensorboard/plain/*/spectra/hessian_task*_start.npz"))
    if not files:
        raise SystemExit(f"No spectra in {demo}: run lightning-plasticity demo --out {demo} first.")
    return [Spectrum.load(file) for file in files]


def table(spectra):
    yield f"# The eps-rank two ways\n\nBy `{COMMAND}`. Share of all {spectra[0].num_params:,} eigenvalues at"
    yield "the start of a task, with 95 % interval, and what smoothing the same spectrum into a density gives.\n"
    yield "| task | range | " + " | ".join(f"eps {eps:g}: counted | density" for eps in THRESHOLDS) + " |"
    yield "|---" * (2 + 2 * len(THRESHOLDS)) + "|"
    for task, spectrum in enumerate(spectra):
        cells = []
        for eps in THRESHOLDS:
            share = [x / spectrum.num_params for x in vars(spectrum.epsilon_rank(eps)).values()]
            value = "not resolved" if np.isnan(share[0]) else f"{share[0]:.4f}"
            cells += [f"{value} ({share[1]:.4f}-{share[2]:.4f})", f"{published(spectrum, eps):.3f}"]
        width = float(spectrum.eigenvalues.max() - spectrum.eigenvalues.min())
        yield f"| {task} | {width:.3g} | " + " | ".join(cells) + " |"


def draw(spectra, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    tasks = np.arange(len(spectra))
    counted = np.array([list(vars(one.epsilon_rank(1e-2)).values()) for one in spectra]) / spectra[0].num_params
    left.plot(tasks, [published(one, 1e-2) for one in spectra], "o--", color="tab:red", label="from the density")
    left.plot(tasks, counted[:, 0], "o-", color="tab:blue", label="counted")
    left.fill_between(tasks, counted[:, 1], counted[:, 2], color="tab:blue", alpha=0.25, label="its 95 % interval")
    left.set(
        xlabel="task", ylabel="share of eigenvalues", yscale="log", title=r"$|\lambda| > 0.01$, every task's start"
    )
    spectrum, thresholds = spectra[-1], np.geomspace(1e-4, 1e2, 60)
    counted = np.array([list(vars(spectrum.epsilon_rank(eps)).values()) for eps in thresholds]) / spectrum.num_params
    right.plot(thresholds, [published(spectrum, eps) for eps in thresholds], "--", color="tab:red")
    right.plot(thresholds, counted[:, 0], color="tab:blue")
    right.fill_between(thresholds, counted[:, 1], counted[:, 2], color="tab:blue", alpha=0.25)
    right.set(xlabel=r"$\epsilon$", xscale="log", yscale="log", title="the last task, every threshold")
    left.legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="what `lightning-plasticity demo --out` wrote")
    spectra = spectra_of(parser.parse_args().demo)
    lines = list(table(spectra))
    print("\n".join(lines))
    (ROOT / "benchmarks/results/epsilon_rank.md").write_text("\n".join(lines) + "\n")
    draw(spectra, ROOT / "docs/images/epsilon_rank.png")


if __name__ == "__main__":
    main()
