"""What a run ends with on the terminal: its figures, where everything is, and the commands that serve and ask the model."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path

from finetune.config import Options
from finetune.data.splits import Splits
from finetune.report.result import Result


def write_example(run_dir: Path, splits: Splits) -> Path:
    """A validation image as a file, so that the printed request works as it stands."""
    sample = splits.val[0]
    if isinstance(sample.image, Path):
        return sample.image
    path = run_dir / "example.png"
    path.write_bytes(sample.read())
    return path


def commands_to_try(options: Options, example: Path) -> str:
    """What to type to serve the repository, and to ask the model about an image."""
    repository = options.repository.resolve()
    is_default = repository == Path(__file__).resolve().parents[2] / "checkpoints"
    setting = "" if is_default else f"CHECKPOINTS={shlex.quote(str(repository))} "
    # Within double quotes, curl's -F takes `;` and `,` for what they are.
    escaped = str(example).replace("\\", "\\\\").replace('"', '\\"')
    image = shlex.quote(
        f'images=@"{escaped}"' if any(char in escaped for char in ';,"\\') else f"images=@{escaped}"
    )
    home = Path(__file__).resolve().parents[2]
    make = "make serve" if Path.cwd() == home else f"make -C {shlex.quote(str(home))} serve"
    return f"{setting}{make}\ncurl -F {image} 'http://localhost:3000/predict?model={options.model_name}'"


def say_what_next(result: Result, run_dir: Path, checkpoint: Path, commands: str) -> None:
    val = result.metrics["val"]
    verdict = "" if result.verdict is None else f"{result.verdict}\n"
    test = (
        f", test {result.metrics['test'].with_interval(result.metric)}"
        if "test" in result.metrics
        else ""
    )
    print(
        f"""
val {result.metric_name} {val.with_interval(result.metric)}{test}, {val.summary}; {result.seconds["total"]:.1f} s
{verdict}{result.describe_calibration()}
{result.learning_curve}

  report       {run_dir / "report.html"}
  checkpoint   {checkpoint}
  metrics      {run_dir / "metrics.json"}
  TensorBoard  {run_dir}   (make tensorboard)

Next, in one terminal (again, if it serves already) and in another:
{textwrap.indent(commands, "  ")}"""
    )
