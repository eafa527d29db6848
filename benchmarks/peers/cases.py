"""What is measured: tasks, and the problems and libraries of each."""

from __future__ import annotations

from dataclasses import dataclass

EPS = 1e-2  # relative threshold of the counts
HESSIAN_PEERS = ("ours", "pyhessian", "curvlinops", "eigenthings")


@dataclass(frozen=True)
class Case:
    """One table: a problem, and who runs it."""

    task: str
    problem: str
    peers: tuple[str, ...]
    steps: int = 0

    @property
    def name(self) -> str:
        return f"{self.problem}, m={self.steps}" if self.steps else self.problem

    @property
    def key(self) -> str:
        return f"{self.task}: {self.name}"


TITLES = {
    "ggn": "Exact GGN spectrum",
    "counts": f"Density of the GGN, read as the eigenvalues above {EPS:g} of the largest",
    "hessian": "Hessian, one Lanczos run of m steps from one probe",
    "product": "One Hessian-vector product, set up before",
    "penalty": "Effective-rank penalty, forward and backward",
    "streaming": "Effective rank of features in batches of 250",
    "boundary": "Both default measurements of one task, next to training on its 60,000 samples",
}


def _of(task: str, peers: tuple[str, ...], *problems: str, steps: int = 0) -> list[Case]:
    return [Case(task, problem, peers, steps) for problem in problems]


EXACT = ("ours", "vivit", "backpack")
COUNTS = ("ours", "ours-dual", "vivit")

FULL = [
    *_of("ggn", EXACT, "mlp-20", "mlp-500", "cnn-50", "resnet18-64", "transformer-32"),
    *_of("ggn", ("ours", "vivit"), "mlp-100", "mlp-250", "small-500"),
    *_of("counts", COUNTS, "mlp-100", "mlp-250"),
    *_of("counts", (*COUNTS, "pyhessian", "curvlinops", "eigenthings"), "mlp-500"),
    *_of("hessian", HESSIAN_PEERS, "mlp-500", "mlp-100", "small-500", "tiny-40", steps=100),
    *_of("hessian", HESSIAN_PEERS, "cnn-50", "transformer-32", steps=100),
    *_of("hessian", HESSIAN_PEERS, "resnet18-64", steps=10),
    *_of("product", ("gemm", *HESSIAN_PEERS, "pyhessian-loader"), "mlp-500"),
    *_of("product", ("gemm", *HESSIAN_PEERS), "mlp-100", "small-500"),
    *_of("product", HESSIAN_PEERS, "resnet18-64"),
    *_of("penalty", (), "100x256", "100x1000", "500x1000", "1200x512"),
    *_of("streaming", (), "10000x512", "2000x1000"),
    *_of("boundary", (), "mlp"),
]

QUICK = [
    *_of("ggn", EXACT, "tiny-8", "small-10"),
    *_of("counts", (*COUNTS, "pyhessian", "curvlinops", "eigenthings"), "tiny-40"),
    *_of("hessian", (*HESSIAN_PEERS, "pyhessian-loader"), "small-20", steps=10),
    *_of("hessian", HESSIAN_PEERS, "transformer-4", steps=5),
    *_of("product", ("gemm", *HESSIAN_PEERS, "pyhessian-loader"), "small-20"),
    *_of("penalty", (), "20x30"),
    *_of("streaming", (), "500x20"),
    *_of("boundary", (), "tiny"),
]
