"""What a run prints last: its figures, its files, and the commands that serve and ask the model."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path

from finetune.data.splits import Sample
from finetune.report.result import Result
from finetune.report.side_by_side import command_to_publish

_HOME = Path(__file__).resolve().parents[2]


def write_example(run_dir: Path, sample: Sample) -> Path:
    """The sample's image as a file, for the printed request."""
    if isinstance(sample.image, Path):
        return sample.image
    path = run_dir / "example.png"
    path.write_bytes(sample.read())
    return path


def commands_to_try(repository: Path, model_name: str, example: Path) -> str:
    """What to type to serve the repository, and to ask the model about an image."""
    repository = repository.resolve()
    is_default = repository == _HOME / "checkpoints"
    setting = "" if is_default else f"CHECKPOINTS={shlex.quote(str(repository))} "
    # `;` and `,` end a file's name in curl's -F, unless the name is in double quotes.
    escaped = str(example).replace("\\", "\\\\").replace('"', '\\"')
    image = shlex.quote(
        f'images=@"{escaped}"' if any(char in escaped for char in ';,"\\') else f"images=@{escaped}"
    )
    is_home = Path.cwd() == _HOME
    make = "make serve" if is_home else f"make -C {shlex.quote(str(_HOME))} serve"
    url = f"http://localhost:3000/predict?model={model_name}"
    return f"{setting}{make}\ncurl -F {image} '{url}'"


def print_next_steps(result: Result, run_dir: Path, checkpoint: Path, commands: str) -> None:
    """The run's last words; `commands` are those of `commands_to_try`."""
    val, name = result.metrics["val"], result.metric
    figures = f"val {result.metric_name} {val.with_interval(name)}"
    if "test" in result.metrics:
        figures += f", test {result.metrics['test'].with_interval(name)}"
    lines = [
        "",
        f"{figures}, {val.summary}; {result.seconds['total']:.1f} s",
        *([] if result.verdict is None else [str(result.verdict)]),
        result.describe_calibration(),
        str(result.learning_curve),
        "",
        f"  report       {run_dir / 'report.html'}",
        f"  checkpoint   {checkpoint}",
        f"  metrics      {run_dir / 'metrics.json'}",
        f"  TensorBoard  {run_dir}   (make tensorboard)",
    ]
    publish_other = command_to_publish(run_dir, result.candidates, result.chosen)
    if publish_other is not None:
        lines += ["", "To publish the other candidate:", f"  {publish_other}"]
    lines += [
        "",
        "Start the service in one terminal (a running one loads the new version itself), "
        "then send a request from another:",
        textwrap.indent(commands, "  "),
    ]
    print("\n".join(lines))
