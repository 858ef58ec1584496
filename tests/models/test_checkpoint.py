"""Checkpoints are published whole, never over another, and refused where files were changed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from models.backbone.build import build_backbone, state_arrays, timm_config
from models.checkpoint import (
    CheckpointError,
    Golden,
    check_golden,
    check_name,
    fingerprint,
    hash_file,
    list_names,
    list_versions,
    load_checkpoint,
    logits,
    publish,
)
from models.engine.engine import run
from models.engine.openvino_engine import OpenVINOEngine
from models.errors import GraftError
from models.prepared import PreparedBackbone
from models.preprocess import Preprocess
from tests.support.images import SHAPES, draw_shape
from tests.support.permissions import as_nobody, make_open_folder
from tests.support.shared import HANG_SECONDS

PROJECT_DIR = Path(__file__).resolve().parents[2]
LABELS = ["circle", "cross", "square"]

# A program that publishes a small checkpoint: to be killed, raced, or left without disk space.
PUBLISH = """
import sys, time
from pathlib import Path
import numpy as np
from models.checkpoint import Golden, publish
from models.preprocess import Preprocess
from models.errors import GraftError

def write_engine(path):
    path.write_text("<net/>")
    path.with_suffix(".bin").write_bytes(b"1" * 1000)
    during(path)

def run(repository, num_weights=100):
    graft = {
        "format_version": 1, "fingerprint": "f" * 64, "head": "head", "temperature": 1.0,
        "metrics": {}, "engine": {}, "preprocess": Preprocess().to_dict(),
    }
    config = {
        "architecture": "own:net", "num_features": 2, "label_names": ["a", "b"], "graft": graft
    }
    state = {
        "trunk": np.ones(num_weights, np.float32),
        "head.weight": np.eye(2, dtype=np.float32),
        "head.bias": np.zeros(2, np.float32),
    }
    golden = Golden((b"image",), np.zeros((1, 2), np.float32))
    try:
        folder = publish(
            Path(repository), "small", state=state, config=config, golden=golden,
            write_engine=write_engine, card=lambda version: f"# small {version}\\n",
        )
        print(folder.name, flush=True)
    except GraftError as error:
        print("error", error, flush=True)
        raise SystemExit(2)

during = lambda path: None
"""


@pytest.fixture(scope="module")
def published(
    prepared: PreparedBackbone, engine: OpenVINOEngine, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Version 1 of a model: the embedded backbone in fp32 with a random head of three labels."""
    repository = tmp_path_factory.mktemp("repository")
    generator = np.random.default_rng(3)
    weight = generator.normal(0, 0.1, (3, prepared.num_features)).astype(np.float32)
    bias = generator.normal(0, 1, 3).astype(np.float32)
    images = tuple(draw_shape(shape, 1) for shape in SHAPES)
    features = run(engine, np.stack([prepared.preprocess(image) for image in images]))
    config = {
        **prepared.config,
        "num_classes": 3,
        "label_names": LABELS,
        "pretrained_cfg": {**prepared.config["pretrained_cfg"], "num_classes": 3},
        "graft": {
            "format_version": 1,
            "fingerprint": prepared.fingerprint,
            "freeze": "backbone",
            "head": prepared.classifier,
            "temperature": 1.25,
            "preprocess": prepared.preprocess.to_dict(),
            "metrics": {"val": {"accuracy": 0.5}},
            "engine": engine.info.to_dict(),
        },
    }

    def write_engine(path: Path) -> None:
        for suffix in (".xml", ".bin"):
            shutil.copy(prepared.openvino_path.with_suffix(suffix), path.with_suffix(suffix))

    return publish(
        repository,
        "shapes",
        state={**prepared.read_tensors(), "classifier.weight": weight, "classifier.bias": bias},
        config=config,
        golden=Golden(images, features @ weight.T + bias),
        write_engine=write_engine,
        card=lambda version: f"# shapes, version {version}\n",
    )


@pytest.fixture
def copied(published: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(published, tmp_path / "shapes" / "1"))


def edit_config(path: Path, edit: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    edit(config)
    (path / "config.json").write_text(json.dumps(config))


def replay(path: Path, engine: OpenVINOEngine) -> tuple[Any, np.ndarray]:
    checkpoint = load_checkpoint(path)
    features = run(
        engine, np.stack([checkpoint.preprocess(image) for image in checkpoint.golden.images])
    )
    return checkpoint, logits(checkpoint, features)


def test_what_is_published_is_what_is_loaded(
    published: Path, prepared: PreparedBackbone, engine: OpenVINOEngine
) -> None:
    checkpoint, computed = replay(published, engine)
    assert (checkpoint.name, checkpoint.version, checkpoint.architecture) == (
        "shapes",
        1,
        "tf_efficientnet_lite0",
    )
    assert checkpoint.label_names == tuple(LABELS)
    assert checkpoint.preprocess == prepared.preprocess
    assert (checkpoint.fingerprint, checkpoint.temperature) == (prepared.fingerprint, 1.25)
    assert checkpoint.metrics == {"val": {"accuracy": 0.5}}
    assert checkpoint.golden.images == tuple(draw_shape(shape, 1) for shape in SHAPES)
    assert np.array_equal(computed, checkpoint.golden.logits)
    check_golden(checkpoint, computed)
    assert sorted(path.name for path in published.iterdir()) == [
        "README.md",
        "backbone.bin",
        "backbone.xml",
        "config.json",
        "golden.npz",
        "model.safetensors",
    ]
    assert (published / "README.md").read_text() == "# shapes, version 1\n"
    assert [path.name for path in published.parent.iterdir()] == ["1"]


def test_plain_timm_loads_it_and_gives_the_golden_logits(published: Path) -> None:
    model = timm.create_model(f"local-dir:{published}", pretrained=True).eval()
    checkpoint = load_checkpoint(published)
    data_config = timm.data.resolve_model_data_config(model)
    assert (
        list(data_config["input_size"]),
        data_config["crop_pct"],
        list(data_config["mean"]),
    ) == ([3, 224, 224], 0.875, [0.5] * 3)
    crops = np.stack([checkpoint.preprocess(image) for image in checkpoint.golden.images])
    images = (torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        computed = model(images).numpy()
    assert np.abs(computed - checkpoint.golden.logits).max() < 1e-3


def test_nothing_in_it_is_a_pickle(published: Path) -> None:
    with np.load(published / "golden.npz", allow_pickle=False) as golden:
        assert all(golden[name].dtype != object for name in golden.files)
        arrays = [golden.zip.read(f"{name}.npy") for name in golden.files]
    for content in [*arrays, *(path.read_bytes() for path in published.iterdir())]:
        # A pickle starts with its protocol and ends with a stop; torch.save writes a data.pkl.
        assert not (content[:1] == b"\x80" and content.rstrip().endswith(b"."))
        assert b"data.pkl" not in content


def test_versions_count_up_and_leave_the_older_ones_alone(published: Path, copied: Path) -> None:
    repository = copied.parent.parent
    before = {path.name: hash_file(path) for path in copied.iterdir()}
    (copied.parent / "7").mkdir()
    shutil.copy(copied / "config.json", copied.parent / "7")
    done = publish_small(repository, "")
    assert done.stdout.split() == ["1"]
    assert publish_small(repository, "").stdout.split() == ["2"]
    assert {path.name: hash_file(path) for path in copied.iterdir()} == before
    assert list_versions(repository, "shapes") == [1, 7]
    assert list_versions(repository, "small") == [1, 2]
    assert list_names(repository) == ["shapes", "small"]
    assert load_checkpoint(repository / "small" / "2").version == 2


def publish_small(
    repository: Path, preparation: str, arguments: str = ""
) -> subprocess.CompletedProcess[str]:
    program = f"{PUBLISH}\n{preparation}\nrun({str(repository)!r}{arguments})"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=PROJECT_DIR,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


def test_a_folder_without_a_config_is_no_version_but_keeps_its_number(tmp_path: Path) -> None:
    (tmp_path / "small" / "1").mkdir(parents=True)
    (tmp_path / "small" / "1" / "notes.txt").write_text("mine")
    assert list_versions(tmp_path, "small") == []
    assert publish_small(tmp_path, "").stdout.split() == ["2"]
    assert (tmp_path / "small" / "1" / "notes.txt").read_text() == "mine"


def test_two_processes_that_publish_at_once_make_two_versions(tmp_path: Path) -> None:
    # Each waits, with all but its last files written, until the other is there.
    meet = (
        "import pathlib, os\n"
        "def during(path):\n"
        f"    pathlib.Path({str(tmp_path)!r}, f'ready-{{os.getpid()}}').touch()\n"
        f"    folder = pathlib.Path({str(tmp_path)!r})\n"
        "    while len(list(folder.glob('ready-*'))) < 4: time.sleep(0.001)\n"
    )
    program = f"{PUBLISH}\n{meet}\nrun({str(tmp_path / 'repository')!r})"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=PROJECT_DIR, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    versions = sorted(int(process.communicate(timeout=HANG_SECONDS)[0]) for process in processes)
    assert versions == [1, 2, 3, 4]
    for version in versions:
        assert load_checkpoint(tmp_path / "repository" / "small" / str(version)).version == version
        assert (
            tmp_path / "repository" / "small" / str(version) / "README.md"
        ).read_text() == f"# small {version}\n"
    assert sorted(path.name for path in (tmp_path / "repository" / "small").iterdir()) == [
        "1",
        "2",
        "3",
        "4",
    ]


@pytest.mark.parametrize("num_weights", [100_000, 10])
def test_a_full_disk_leaves_nothing_behind_and_says_so(num_weights: int, tmp_path: Path) -> None:
    # No file may grow beyond 50,000 bytes: the weights do not fit, or the IR does not.
    limit = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "during = lambda path: path.with_suffix('.bin').write_bytes(b'1' * 60_000)"
    )
    done = publish_small(tmp_path, limit, f", num_weights={num_weights}")
    assert done.returncode == 2
    assert f"error the checkpoint could not be written to {tmp_path / 'small'}: " in done.stdout
    assert "File too large" in done.stdout
    assert "nothing was published" in done.stdout
    assert done.stderr == ""
    assert list((tmp_path / "small").iterdir()) == []


def test_a_repository_that_cannot_be_made_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "repository").write_text("a file where a folder should be")
    done = publish_small(tmp_path / "repository", "")
    assert done.returncode == 2
    assert "could not be written" in done.stdout
    assert "nothing was published" in done.stdout


def test_a_killed_run_leaves_no_version(tmp_path: Path) -> None:
    during = "def during(path):\n    print('writing', flush=True)\n    time.sleep(60)\n"
    program = f"{PUBLISH}\n{during}run({str(tmp_path)!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=PROJECT_DIR, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=HANG_SECONDS)
    assert list_versions(tmp_path, "small") == []
    assert list_names(tmp_path) == []
    assert publish_small(tmp_path, "").stdout.split() == ["1"]
    assert load_checkpoint(tmp_path / "small" / "1").version == 1


def test_what_the_caller_raises_while_it_writes_leaves_nothing_behind(tmp_path: Path) -> None:
    done = publish_small(tmp_path, "def during(path): raise KeyboardInterrupt")
    assert done.returncode != 0
    assert list((tmp_path / "small").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["model.safetensors", "golden.npz", "backbone.xml", "backbone.bin"]
)
def test_a_file_with_one_changed_byte_is_refused(copied: Path, name: str) -> None:
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(
        CheckpointError, match=f"{name} is not the file that was published .its hash differs"
    ):
        load_checkpoint(copied)


@pytest.mark.parametrize("name", ["model.safetensors", "golden.npz", "backbone.bin", "config.json"])
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=f"not a checkpoint that can be read: .*{name}"):
        load_checkpoint(copied)


def test_another_format_is_refused_with_both_numbers(copied: Path) -> None:
    edit_config(copied, lambda config: config["graft"].update(format_version=99))
    with pytest.raises(CheckpointError, match="format 99, this Graft reads the formats 1 and 2"):
        load_checkpoint(copied)


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config.pop("graft"),
        lambda config: config.pop("label_names"),
        lambda config: config["graft"].pop("temperature"),
        lambda config: config["graft"].update(temperature="warm"),
        lambda config: config["graft"].update(conformal={"coverage": 0.9}),
        lambda config: config["graft"].update(
            conformal={"coverage": 0.9, "threshold": float("nan")}
        ),
        lambda config: config["graft"].update(head="nothing"),
        lambda config: config["graft"]["preprocess"].update(unknown=1),
        lambda config: config["graft"].update(files=["model.safetensors"]),
    ],
)
def test_a_config_that_lacks_something_is_refused(copied: Path, edit: Any) -> None:
    edit_config(copied, edit)
    with pytest.raises(CheckpointError, match="not a checkpoint that can be read"):
        load_checkpoint(copied)


def in_graft(**fields: Any) -> Any:
    return lambda config: config["graft"].update(fields)


def in_preprocess(**fields: Any) -> Any:
    return lambda config: config["graft"]["preprocess"].update(fields)


def with_labels(*names: Any) -> Any:
    return lambda config: config.update(label_names=list(names))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_labels("cat", 5, None), "label_names has 5; a name must be printable text"),
        (with_labels("cat", None, "dog"), "label_names has None; a name must be printable"),
        (with_labels("cat", "\ud800", "dog"), r"label_names has '\\ud800'; a name must be"),
        (with_labels("cat", "a\nb", "dog"), r"label_names has 'a\\nb'; a name must be"),
        (with_labels("cat", "  ", "dog"), "label_names has '  '; a name must be printable"),
        (with_labels("cat", "dog", "cat"), "label_names has 'cat' more than once"),
        (lambda config: config.update(label_names="abc"), "label_names is 'abc'; it must be a li"),
        (lambda config: config.update(architecture=7), "architecture is 7; it must be printable"),
        (lambda config: config.update(architecture="\udfff"), r"architecture is '\\udfff'"),
        (lambda config: config.pop("num_features"), "num_features"),
        (lambda config: config.update(levels=[1]), "values"),
        (in_graft(metrics=[1]), r"metrics is \[1\]; it must be a JSON object"),
        (in_graft(metrics={"val": "\ud800"}), "metrics has half of a surrogate pair"),
        (in_graft(engine="fast"), "engine is 'fast'; it must be a JSON object"),
        (in_graft(temperature=0), "temperature is 0.0; it must be a number above 0"),
        (in_graft(temperature=-1), "temperature is -1.0"),
        (in_graft(temperature=float("nan")), "temperature is nan"),
        (in_graft(temperature=float("inf")), "temperature is inf"),
        (in_graft(temperature=10**400), "OverflowError"),
        (in_graft(fingerprint=None), "fingerprint is None; it must be 64 of 0-9 a-f"),
        (in_graft(fingerprint="A" * 64), "fingerprint is 'AAA"),
        (in_graft(fingerprint="../" * 20), "fingerprint is '../"),
        (in_preprocess(height=0), "height is 0; height and width are whole numbers from 1"),
        (in_preprocess(width=-224), "width is -224"),
        (in_preprocess(width=224.0), "width is 224.0"),
        (in_preprocess(width=True), "width is True"),
        (in_preprocess(crop_fraction=0), "crop_fraction is 0"),
        (in_preprocess(crop_mode="middle"), "crop_mode is 'middle'"),
        (in_preprocess(interpolation="best"), "interpolation is 'best'"),
        (in_preprocess(mean=[0.5]), r"mean is \(0.5,\)"),
        (in_preprocess(std=[0.5, 0.5, 0]), r"std is \(0.5, 0.5, 0\)"),
    ],
)
def test_a_value_in_the_config_that_cannot_be_is_refused(
    copied: Path, edit: Any, message: str
) -> None:
    edit_config(copied, edit)
    with pytest.raises(CheckpointError, match=f"not a checkpoint that can be read: .*{message}"):
        load_checkpoint(copied)


def test_a_config_nested_too_deep_is_refused(copied: Path) -> None:
    (copied / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="RecursionError"):
        load_checkpoint(copied)


def test_names_of_all_scripts_and_emoji_of_several_parts_are_labels(copied: Path) -> None:
    names = ("\u5927\u3000\u72ac", "\U0001f468\u200d\U0001f33e", "non\u00a0breaking")
    edit_config(copied, with_labels(*names))
    assert load_checkpoint(copied).label_names == names


def test_a_conformal_threshold_is_read_where_there_is_one(copied: Path, published: Path) -> None:
    assert (load_checkpoint(published).coverage, load_checkpoint(published).threshold) == (
        None,
        None,
    )
    edit_config(
        copied,
        lambda config: config["graft"].update(conformal={"coverage": 0.9, "threshold": 0.25}),
    )
    assert (load_checkpoint(copied).coverage, load_checkpoint(copied).threshold) == (0.9, 0.25)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"'])
def test_a_config_that_is_no_object_is_refused(copied: Path, content: str) -> None:
    (copied / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a checkpoint that can be read"):
        load_checkpoint(copied)


def test_a_file_list_cannot_point_outside_the_folder(copied: Path, published: Path) -> None:
    outside = f"../../../{published.parent.parent.name}/shapes/1/golden.npz"
    edit_config(
        copied,
        lambda config: config["graft"]["files"].update(
            {outside: hash_file(published / "golden.npz")}
        ),
    )
    with pytest.raises(CheckpointError, match="is not the file that was published"):
        load_checkpoint(copied)


def test_labels_that_do_not_fit_the_head_are_refused(copied: Path) -> None:
    edit_config(copied, lambda config: config["label_names"].append("triangle"))
    with pytest.raises(CheckpointError, match=r"the head is \(3, 1280\), its labels are 4"):
        load_checkpoint(copied)


def test_a_head_whose_rows_were_swapped_is_refused_by_its_golden_images(
    published: Path, engine: OpenVINOEngine
) -> None:
    checkpoint, computed = replay(published, engine)
    with pytest.raises(
        CheckpointError,
        match=r"golden images give other logits here than when it was saved \(\d+% of their spread",
    ):
        check_golden(checkpoint, computed[:, [1, 2, 0]])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda computed: computed * np.nan,
        lambda computed: computed + 0.1 * np.ptp(computed) * np.eye(3),
    ],
)
def test_logits_that_drifted_are_refused_and_rounding_is_not(
    published: Path, engine: OpenVINOEngine, spoil: Any
) -> None:
    checkpoint, computed = replay(published, engine)
    with pytest.raises(CheckpointError, match="golden images"):
        check_golden(checkpoint, spoil(computed))
    check_golden(checkpoint, computed * np.float32(1 + 2**-8))


def test_another_preprocess_is_seen_by_the_golden_images(
    published: Path, copied: Path, engine: OpenVINOEngine
) -> None:
    edit_config(
        copied,
        lambda config: config["graft"]["preprocess"].update(crop_mode="squash", crop_fraction=0.4),
    )
    checkpoint, computed = replay(copied, engine)
    with pytest.raises(CheckpointError, match="golden images"):
        check_golden(checkpoint, computed)


def test_the_fingerprint_changes_with_everything_that_shapes_features() -> None:
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.zeros((), np.int64),
    }
    base = fingerprint("net", tensors, Preprocess())
    assert base == fingerprint("net", dict(reversed(tensors.items())), Preprocess())
    assert base == fingerprint(
        "net", {**tensors, "a": np.asfortranarray(tensors["a"])}, Preprocess()
    )
    others = [
        fingerprint("net2", tensors, Preprocess()),
        fingerprint("net", {**tensors, "a": tensors["a"] + 1}, Preprocess()),
        fingerprint("net", {**tensors, "a": tensors["a"].reshape(3, 2)}, Preprocess()),
        fingerprint("net", {**tensors, "b": tensors["b"] + 1}, Preprocess()),
        fingerprint("net", {"a": tensors["a"], "c": tensors["b"]}, Preprocess()),
        fingerprint("net", {"a": tensors["a"]}, Preprocess()),
        fingerprint("net", tensors, Preprocess(height=225)),
        fingerprint("net", tensors, Preprocess(interpolation="bilinear")),
        fingerprint("net", tensors, Preprocess(), "0123"),
    ]
    assert len({base, *others}) == len(others) + 1


@pytest.mark.parametrize("name", ["digits", "a", "0", "cats-and-dogs_v1.2", "x" * 63])
def test_names_that_fit_a_folder_and_a_url_are_taken(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "..", ".hidden", "a/b", "A", "with space", "ä", "x" * 64, "-x", "a\n"]
)
def test_other_names_are_refused_with_the_rule(name: str) -> None:
    with pytest.raises(GraftError, match=r"--name .*: a model's name is 1 to 63 of"):
        check_name(name)


def test_the_name_that_asks_every_model_is_reserved() -> None:
    with pytest.raises(GraftError, match="--name 'all': model=all asks every model"):
        check_name("all")


def test_an_empty_or_missing_repository_has_no_models(tmp_path: Path) -> None:
    assert list_names(tmp_path / "nowhere") == []
    assert list_versions(tmp_path, "nothing") == []
    (tmp_path / "litter").mkdir()
    (tmp_path / "file").touch()
    assert list_names(tmp_path) == []


def test_what_may_not_be_read_hides_nothing_else() -> None:
    with make_open_folder() as root:
        for version in ("good/1", "good/2", "private/1", "lost+found"):
            (root / version).mkdir(parents=True)
            (root / version / "config.json").write_text("{}")
        for closed in ("good/2", "private", "lost+found"):
            (root / closed).chmod(0)
        with as_nobody():
            # The closed ones are there, for their reader to say that they are.
            assert list_names(root) == ["good", "private"]
            assert list_versions(root, "good") == [1, 2]
            with pytest.raises(PermissionError):
                list_versions(root, "private")


def test_a_whole_network_with_batch_norm_survives_timm(tmp_path: Path) -> None:
    """Counters of BatchNorm are scalars; every tensor comes back in its shape, and strictly."""
    backbone = build_backbone("test_resnet", num_classes=2, pretrained=False)
    config = {**timm_config(backbone), "num_classes": 2, "label_names": ["a", "b"], "graft": {}}
    path = publish(
        tmp_path,
        "net",
        state=state_arrays(backbone.model),
        config=config,
        golden=Golden((b"",), np.zeros((1, 2), np.float32)),
        write_engine=lambda path: path.touch(),
        card=str,
    )
    loaded = timm.create_model(f"local-dir:{path}", pretrained=True).state_dict()
    own = backbone.model.state_dict()
    assert {name: tensor.shape for name, tensor in loaded.items()} == {
        name: tensor.shape for name, tensor in own.items()
    }
    assert all(torch.equal(loaded[name], own[name]) for name in own)
