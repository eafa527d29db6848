"""A spectrum of a plain nn.Module in a notebook: no Trainer, no LightningModule.

Expect an exact GGN and an estimated Hessian of the same network: their largest eigenvalues are close, and the exact
trace of the GGN lies in the interval of the Hessian's (for ReLU networks the two traces are equal).
"""

import torch

from lightning_plasticity.curvature import ggn_spectrum, hessian_spectrum
from lightning_plasticity.loggers import spectra_figure


def main(path: str = "spectrum.png") -> None:
    """Measure, print, plot."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5))
    data = torch.randn(200, 20), torch.randint(5, (200,))
    ggn = ggn_spectrum(net, torch.nn.functional.cross_entropy, data)
    hessian = hessian_spectrum(net, torch.nn.functional.cross_entropy, data)
    print(f"GGN:     lambda_max {ggn.lambda_max().value:.4f}, trace {ggn.trace().value:.3f} (exact)")
    trace = hessian.trace()
    print(f"Hessian: lambda_max {hessian.lambda_max().value:.4f}, trace {trace.lower:.3f} .. {trace.upper:.3f} (95 %)")
    spectra_figure({0: ggn, 1: hessian}, "GGN and Hessian").savefig(path)


if __name__ == "__main__":
    main()
