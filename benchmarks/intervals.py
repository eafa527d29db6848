"""Do the intervals of an estimated Hessian spectrum hold? Four networks on digits, float64 truth, many Gaussian probes.

Lanczos runs on the diagonal matrix of the true eigenvalues: for Gaussian probes the law is that on the Hessian itself.

Run: python benchmarks/intervals.py > benchmarks/intervals.txt   (about 2 minutes on one core)
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from lightning_plasticity.curvature import Spectrum, hessian_spectrum
from lightning_plasticity.linalg import stochastic_lanczos_quadrature
from lightning_plasticity.streams.digits import load_digits

REPETITIONS = 100
RHO = (1e-1, 1e-2, 1e-3, 1e-4)


def network(activation):
    return nn.Sequential(nn.Linear(64, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 10)).double()


def trained(net, inputs, steps):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (len(inputs),), generator=generator)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(len(inputs), (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(inputs[batch]), labels[batch]).backward()
        optimizer.step()
    return net


def networks(inputs):
    torch.manual_seed(0)
    dead = trained(network(nn.ReLU), inputs, 300)
    for layer in (dead[0], dead[2]):
        layer.bias.data[:20] -= 20
    return {
        "fresh ReLU": network(nn.ReLU),
        "trained ReLU": trained(network(nn.ReLU), inputs, 600),
        "trained tanh": trained(network(nn.Tanh), inputs, 600),
        "60 % dead": dead,
    }


def main():
    torch.set_num_threads(1)
    inputs = load_digits()[:300].double()
    labels = torch.randint(10, (300,), generator=torch.Generator().manual_seed(7))
    print(f"{REPETITIONS} probes each; share of intervals that hold the truth; nominal 95 %")
    print(
        f"{'network':14s}{'steps':>6s}"
        + "".join(f"{f'rho {rho:g}':>11s}" for rho in RHO)
        + f"{'eff. rank':>11s}{'srank':>8s}{'trace':>8s}"
    )
    for name, net in networks(inputs).items():
        truth = hessian_spectrum(net, F.cross_entropy, (inputs, labels), method="exact")
        live = torch.repeat_interleave(truth.eigenvalues, truth.counts.round().long())
        live = live[live != 0]
        for steps in (60, 120):
            held = dict.fromkeys((*RHO, "rank", "srank", "trace"), 0)
            for seed in range(REPETITIONS):
                generator = torch.Generator().manual_seed(seed)
                quadrature = stochastic_lanczos_quadrature(
                    lambda v, d=live: d * v, len(live), steps, generator=generator, dtype=torch.float64
                )
                spectrum = Spectrum.from_quadrature(quadrature, truth.num_params)
                for rho in RHO:
                    true = truth.epsilon_rank(rho, relative=True).value
                    held[rho] += holds(spectrum.epsilon_rank(rho * truth.max_abs), true)
                held["rank"] += holds(spectrum.effective_rank(), truth.effective_rank().value)
                held["srank"] += holds(spectrum.srank(), truth.srank().value)
                held["trace"] += holds(spectrum.trace(), truth.trace().value)
            cells = "".join(f"{held[rho] / REPETITIONS:11.0%}" for rho in RHO)
            print(
                f"{name:14s}{steps:6d}{cells}{held['rank'] / REPETITIONS:11.0%}{held['srank'] / REPETITIONS:8.0%}"
                f"{held['trace'] / REPETITIONS:8.0%}",
                flush=True,
            )


def holds(estimate, truth):
    return math.isfinite(estimate.lower) and estimate.lower <= truth <= estimate.upper


if __name__ == "__main__":
    main()
