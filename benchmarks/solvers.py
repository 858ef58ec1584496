"""The probe's own L-BFGS against SciPy's and scikit-learn's: the same objective, folds and L2 path.

python benchmarks/solvers.py --case digits                        one case, every solver
python benchmarks/solvers.py --case wide --solvers graft scipy    some of the solvers
python benchmarks/solvers.py --report                             write what was measured to docs

graft         the probe's solver: float32, all folds in lockstep, one matrix product for all
scipy         SciPy's L-BFGS-B on the sum of all folds' losses: the same products, one line search
scipy-folds   SciPy's L-BFGS-B, a fold at a time
sklearn       scikit-learn's LogisticRegression (lbfgs, warm_start), a fold at a time

Each chooses L2 by five-fold cross-validation along the probe's path and refits on all images:
SciPy's as the probe does (of 4,000 images and more a part finds the strength), scikit-learn on all.
Cases with real features (digits) run the backbone; the others are drawn: class means in Gaussian
noise whose spectrum falls as that of a backbone's features does, and at the accuracy of the data
that they stand for. Results are kept in --data-dir between calls. A solver that takes --limit times
as long as Graft's did is stopped there.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast
from unittest import mock

# Run as a file, `import finetune` would find benchmarks/finetune.py.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from benchmarks.calibration import extract
from benchmarks.machine import describe_machine
from benchmarks.sections import write_section
from finetune.evaluation.class_metrics import class_log_loss
from finetune.probe import solve
from finetune.probe.lbfgs import TOLERANCE, Objective
from finetune.probe.scaling import Scaling
from finetune.probe.solve import L2_PATH, solve_probe
from finetune.tasks.strata import NUM_FOLDS, assign_class_folds
from models.scores import Floats, Labels

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("numpy", "scipy", "scikit-learn")
_HELD_OUT_FRACTION = 0.2
_MAX_STEPS = 100


@dataclass(frozen=True)
class Case:
    """`separation`: how far class means lie apart, which sets the accuracy of drawn features."""

    title: str
    num_train: int
    num_features: int
    num_classes: int
    separation: float | None


@dataclass(frozen=True)
class Solved:
    """`loss` is the objective's on the training images at `l2`, in float64.

    One that was stopped has the seconds until then, and NaN elsewhere.
    """

    case: str
    solver: str
    seconds: float
    l2: float
    loss: float
    out_of_fold_loss: float
    accuracy: float


CASES = {
    "digits": Case("digits", 1797, 1280, 10, None),
    "fashion": Case("3,000 × 1,280 × 10", 3_000, 1280, 10, 0.10),
    "many": Case("20,000 × 1,280 × 10", 20_000, 1280, 10, 0.085),
    "levels": Case("20,000 × 2,848 × 10", 20_000, 2848, 10, 0.06),
    "wide": Case("5,000 × 1,280 × 500", 5_000, 1280, 500, 0.20),
}
TITLES = {
    "graft": "Graft",
    "scipy": "SciPy, folds together",
    "scipy-folds": "SciPy, fold by fold",
    "sklearn": "scikit-learn",
}


def main() -> int:
    args = parse_arguments()
    args.data_dir.mkdir(parents=True, exist_ok=True)
    journal = args.data_dir / "measured-solvers.jsonl"
    if args.report:
        report(read_journal(journal), args.docs)
        return 0
    train, held_out = load_case(args.case)
    for name in args.solvers:
        graft = read_journal(journal).get((args.case, "graft"))
        limit = 0.0 if graft is None or name == "graft" else args.limit * graft.seconds
        try:
            with stopped_after(limit):
                solved = measure(args.case, name, *train, *held_out)
        except TimeoutError:
            solved = Solved(args.case, name, limit, *[math.nan] * 4)
        print(solved, flush=True)
        with journal.open("a") as file:
            file.write(json.dumps(asdict(solved)) + "\n")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, default="digits")
    parser.add_argument("--solvers", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--limit", type=float, default=100.0, help="times Graft's seconds")
    parser.add_argument("--report", action="store_true", help="write the table, measure nothing")
    default = Path(tempfile.gettempdir()) / "graft-benchmark"
    parser.add_argument("--data-dir", type=Path, default=default, help="what was measured")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    return parser.parse_args()


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what runs longer; 0: never."""

    def stop(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def load_case(name: str) -> tuple[tuple[Floats, Labels], tuple[Floats, Labels]]:
    """Features and labels to train on, and held out."""
    case = CASES[name]
    if case.separation is None:
        features, labels, num_train, _ = extract(name)
    else:
        num_train = case.num_train
        features, labels = draw_features(case, num_train + int(num_train * _HELD_OUT_FRACTION))
    return (
        (features[:num_train], labels[:num_train]),
        (features[num_train:], labels[num_train:]),
    )


def draw_features(case: Case, num_images: int) -> tuple[Floats, Labels]:
    """Class means and noise in a rotated basis whose scales fall as 1 / sqrt(k)."""
    assert case.separation is not None
    generator = np.random.default_rng(0)
    labels = np.arange(num_images) % case.num_classes
    shape = (case.num_features, case.num_features)
    basis = np.linalg.qr(generator.normal(size=shape))[0].astype(np.float32)
    scales = 1 / np.sqrt(1 + np.arange(case.num_features, dtype=np.float32))
    means = generator.normal(size=(case.num_classes, case.num_features)) * case.separation
    noise = generator.normal(size=(num_images, case.num_features))
    features: Floats = (((means[labels] + noise).astype(np.float32) * scales) @ basis).astype(
        np.float32, copy=False
    )
    return features, labels


Solver = Callable[[Floats, Labels, int], tuple[Floats, Floats, float, Floats]]


def measure(
    case: str,
    solver: str,
    features: Floats,
    labels: Labels,
    test_features: Floats,
    test_labels: Labels,
) -> Solved:
    num_classes = CASES[case].num_classes
    started = time.perf_counter()
    weight, bias, l2, out_of_fold = SOLVERS[solver](features, labels, num_classes)
    seconds = time.perf_counter() - started
    predicted = (test_features @ weight.T + bias).argmax(axis=1)
    return Solved(
        case,
        solver,
        seconds,
        l2,
        regularised_loss(features, labels, weight, bias, l2),
        class_log_loss(out_of_fold, labels),
        float((predicted == test_labels).mean()),
    )


def regularised_loss(
    features: Floats, labels: Labels, weight: Floats, bias: Floats, l2: float
) -> float:
    """The mean log loss and the penalty on weights for standardised features, in float64."""
    scale = Scaling.of(features).scale.astype(np.float64)
    standardised = np.where(np.isinf(scale), 0, scale) * weight
    logits = features.astype(np.float64) @ weight.T + bias
    return class_log_loss(cast(Floats, logits), labels) + 0.5 * l2 * float(
        np.square(standardised).sum()
    )


def solve_graft(
    features: Floats, labels: Labels, num_classes: int
) -> tuple[Floats, Floats, float, Floats]:
    probe = solve_probe(features, labels, num_classes, seed=0)
    return probe.weight, probe.bias, probe.l2, probe.out_of_fold_logits


def solve_scipy(
    features: Floats, labels: Labels, num_classes: int
) -> tuple[Floats, Floats, float, Floats]:
    with mock.patch.object(solve, "minimise", minimise_together):
        return solve_graft(features, labels, num_classes)


def solve_scipy_folds(
    features: Floats, labels: Labels, num_classes: int
) -> tuple[Floats, Floats, float, Floats]:
    with mock.patch.object(solve, "minimise", minimise_one_by_one):
        return solve_graft(features, labels, num_classes)


def minimise_together(objective: Objective, start: Floats, tolerance: float = TOLERANCE) -> Floats:
    """In place of solve.minimise: the sum over the problems, which share no unknowns."""

    def evaluate(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        points = flat.astype(np.float32).reshape(len(start), -1)
        losses, gradients = objective.evaluate(points)
        return float(losses.sum()), gradients.ravel().astype(np.float64)

    found = minimize(
        evaluate,
        start.ravel().astype(np.float64),
        method="L-BFGS-B",
        jac=True,
        options={"ftol": tolerance, "gtol": 0.0, "maxiter": _MAX_STEPS, "maxcor": 6},
    )
    return np.asarray(found.x, np.float32).reshape(start.shape)


def minimise_one_by_one(
    objective: Objective, start: Floats, tolerance: float = TOLERANCE
) -> Floats:
    """In place of solve.minimise: each problem by itself, on the images that count in it."""
    solutions = []
    for problem, one in zip(objective.in_training, start, strict=True):
        counts = problem > 0
        alone = Objective(
            np.ascontiguousarray(objective.features[counts]),
            objective.labels[counts],
            problem[None, counts],
            objective.l2,
            objective.scaling,
            objective.num_classes,
        )
        solutions.append(minimise_together(alone, one[None], tolerance)[0])
    return np.stack(solutions)


def solve_sklearn(
    features: Floats, labels: Labels, num_classes: int
) -> tuple[Floats, Floats, float, Floats]:
    scaling = Scaling.of(features)
    standardised = (features - scaling.mean) / scaling.scale
    folds = assign_class_folds(labels, NUM_FOLDS, 0)
    models = [build_sklearn() for _ in range(int(folds.max()) + 1)]
    best_loss, best_l2, num_worse = np.inf, L2_PATH[0], 0
    best_logits = np.zeros((len(labels), num_classes), np.float32)
    for l2 in L2_PATH:
        logits = np.empty((len(labels), num_classes), np.float32)
        for fold, model in enumerate(models):
            rows = folds != fold
            fit(model, standardised[rows], labels[rows], l2)
            logits[~rows] = model.decision_function(standardised[~rows])
        loss = class_log_loss(logits, labels)
        if loss < best_loss:
            best_loss, best_l2, best_logits, num_worse = loss, l2, logits, 0
        else:
            num_worse += 1
            if num_worse == 2:
                break
    final = fit(build_sklearn(), standardised, labels, best_l2)
    weight = np.asarray(final.coef_ / scaling.scale, np.float32)
    bias = np.asarray(final.intercept_ - weight @ scaling.mean, np.float32)
    return weight, bias, best_l2, best_logits


def build_sklearn() -> LogisticRegression:
    return LogisticRegression(solver="lbfgs", warm_start=True, max_iter=_MAX_STEPS)


def fit(
    model: LogisticRegression, features: Floats, labels: Labels, l2: float
) -> LogisticRegression:
    model.C = 1 / (l2 * len(labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that max_iter was reached
        return model.fit(features, labels)


SOLVERS: dict[str, Solver] = {
    "graft": solve_graft,
    "scipy": solve_scipy,
    "scipy-folds": solve_scipy_folds,
    "sklearn": solve_sklearn,
}


def read_journal(path: Path) -> dict[tuple[str, str], Solved]:
    """The newest measurement of each case and solver."""
    lines = path.read_text().splitlines() if path.exists() else []
    solved = [Solved(**json.loads(line)) for line in lines]
    return {(found.case, found.solver): found for found in solved}


def report(measured: dict[tuple[str, str], Solved], docs: Path) -> None:
    machine = describe_machine(sys.executable, _PACKAGES, shlex.join(command_shown()))
    lines = [
        "## Solvers",
        "",
        "The probe's own L-BFGS and others on the same objective, five folds and L2 path: seconds",
        "for the path and the refit, the L2 chosen, the regularised loss that the refit reached,",
        "the out-of-fold log loss, and the accuracy on held-out images. Cases are images ×",
        "features × classes; all but the digits are drawn.",
        "",
        "| | solver | seconds | times Graft's | L2 | loss reached | out-of-fold loss | accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        table_row(measured[case, solver], measured.get((case, "graft")))
        for case in CASES
        for solver in TITLES
        if (case, solver) in measured
    ]
    missing = [
        f"{TITLES[solver]} on {CASES[case].title}"
        for case in CASES
        for solver in TITLES
        if (case, solver) not in measured
    ]
    lines += ["", f"Not measured yet: {'; '.join(missing) or 'none'}."]
    lines += ["", machine.describe(with_peers=False)]
    write_section(docs / "finetune-benchmark.md", "# Fine-tuning, measured\n", "solvers", lines)


def command_shown() -> Sequence[str]:
    return ("python", "benchmarks/solvers.py", "--case", "CASE")


def table_row(solved: Solved, graft: Solved | None) -> str:
    times = "" if graft is None else f"{solved.seconds / graft.seconds:.1f}"
    if math.isnan(solved.loss):
        seconds, over = f"over {solved.seconds:.0f}", f"over {times}"
        return (
            f"| {CASES[solved.case].title} | {TITLES[solved.solver]} | {seconds} | {over} | | | | |"
        )
    cells = (
        CASES[solved.case].title,
        TITLES[solved.solver],
        f"{solved.seconds:.1f}",
        times,
        f"{solved.l2:.0e}",
        f"{solved.loss:.5f}",
        f"{solved.out_of_fold_loss:.4f}",
        f"{solved.accuracy:.4f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
