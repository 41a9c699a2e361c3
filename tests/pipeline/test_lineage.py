"""From a registered model to its pictures and back, over a real dataset and a real registry."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datagen.dataset import read_dataset_json, read_samples, read_shards
from infra.storage import open_store
from infra.tracking import TrackingConfig, connect, experiment_id
from pipeline.lineage import trace_model, trace_picture
from pipeline.registry.pushing import push
from training.checkpoint import save_checkpoint
from training.export import save_export
from training.models import EDSRConfig, build_model

Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def traced(settings: TrackingConfig, small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``models:/traced/1``: fine-tuned on ``small_dataset`` from an export of a run before; the folder of both runs."""
    root = tmp_path_factory.mktemp("runs")
    client = connect(settings)
    identity = read_dataset_json(open_store(small_dataset))["id"]
    config = EDSRConfig(blocks=1, features=8)
    torch.manual_seed(0)
    for stage in ("pretrain", "finetune"):
        run_id = client.create_run(experiment_id(client, settings), run_name=stage).info.run_id
        client.log_param(run_id, "out", str(root / stage))
        client.log_param(run_id, "data.dataset", str(small_dataset))
        if stage == "finetune":
            client.log_param(run_id, "init_from", str(root / "pretrain" / "export"))
        save_checkpoint(open_store(root / stage / "checkpoints"), 9, {"a": 1}, {"run_id": run_id})
        origin = {"stage": stage, "code": "c1", "run_id": run_id, "dataset_id": identity}
        save_export(build_model(config), config, root / stage / "export", origin)
    push(root / "finetune" / "export", "traced", alias="champion", settings=settings)
    return root


def test_a_model_leads_to_its_pictures(
    traced: Path, settings: TrackingConfig, small_dataset: Path, command: Command
) -> None:
    code, said = command("trace", "models:/traced@champion", "--json")
    assert code == 0
    found = json.loads(said)
    store = open_store(small_dataset)
    assert found["gaps"] == []
    assert found["run"]["name"] == "finetune"
    assert found["checkpoint"]["name"] == "step-00000009"
    assert (Path(found["checkpoint"]["folder"]) / "step-00000009").is_dir()
    assert [stage["stage"] for stage in found["stages"]] == ["pretrain"]
    assert found["dataset"]["id"] == read_dataset_json(store)["id"]
    assert found["dataset"]["shards"] == read_shards(store).to_pylist()
    samples = read_samples(store).to_pylist()
    assert {s["source"]: s["sha256"] for s in found["dataset"]["sources"]} == {
        row["source"]: row["source_sha256"] for row in samples
    }
    assert sum(s["samples"] for s in found["dataset"]["sources"]) == len(samples)

    code, said = command("trace", "models:/traced/1")
    assert code == 0
    for words in ("step-00000009", f"{found['dataset']['id']}", f"{len(found['dataset']['sources'])} pictures"):
        assert words in said
    assert str(traced / "pretrain" / "export") in said


def test_a_picture_leads_to_its_models(
    traced: Path, settings: TrackingConfig, small_dataset: Path, command: Command
) -> None:
    sample = read_samples(open_store(small_dataset)).to_pylist()[0]
    found = trace_picture(sample["source_sha256"], str(small_dataset), settings)
    assert sample["key"] in [row["key"] for row in found["samples"]]
    assert [row["uri"] for row in found["models"]] == ["models:/traced/1"]
    code, said = command("trace", sample["source"], "--dataset", small_dataset)
    assert code == 0
    assert sample["shard"] in said and "models:/traced/1" in said and "champion" in said
    rejected = command("trace", "0" * 64, "--dataset", small_dataset)
    assert rejected[0] == 1 and "not in this corpus" in rejected[1] and "models: none" in rejected[1]


def test_links_that_cannot_be_followed_are_named(
    traced: Path, settings: TrackingConfig, small_dataset: Path, command: Command, tmp_path: Path
) -> None:
    code, said = command("trace", "models:/traced/1", "--dataset", tmp_path)
    assert code == 1
    assert "gap" in said and "no dataset.json" in said
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "dataset.json").write_text(json.dumps({"id": "f" * 64}))
    (gap,) = trace_model("models:/traced/1", settings, str(changed))["gaps"]
    assert "now has the id ffffffffffffffff" in gap
    gaps = trace_model("models:/tiny@demo", settings)["gaps"]
    assert [gap.partition(":")[0] for gap in gaps] == ["checkpoint", "dataset d1"]
    assert command("trace", "a.jpg")[0] == 2
