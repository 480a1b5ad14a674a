"""Models are loaded and removed one by one: one that cannot load has a reason, and the others go on serving."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import pytest
import transformers as hf

from service.config import ModelConfig
from service.errors import FarsightError, Kind
from service.models.files import directory_of, task_of
from service.models.loading.load import load
from service.models.registry import Registry
from tests.models import zoo
from tests.models.common import SETTINGS, asked, loaded, run


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert")
    zoo.save("bert", hf.AutoModel, directory)
    return directory


def config(directory: Path, name: str = "m", **fields: object) -> ModelConfig:
    return ModelConfig(name=name, path=str(directory), **fields)  # type: ignore[arg-type]


def test_a_model_that_cannot_load_says_why_and_others_serve(bert: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(bert, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    models = Registry(SETTINGS)
    models.set([config(bert), config(broken, "broken"), config(broken, "extra", required=False)])
    assert [info.name for info in models.infos()] == ["m"]
    assert list(models.missing) == ["broken"]
    assert "Safetensor" in models.missing["broken"]
    with pytest.raises(FarsightError, match="model 'broken' is not ready: ") as caught:
        models.model("broken")
    assert caught.value.kind is Kind.UNAVAILABLE
    with pytest.raises(FarsightError, match="known: m, broken, extra"):
        models.model("nope")


def test_a_failed_reload_leaves_the_model_that_serves(bert: Path, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(bert, directory)
    models = Registry(SETTINGS)
    models.load(config(directory))
    first = models.model("m")
    (directory / "model.safetensors").write_bytes(b"not weights")
    entry = models.load(config(directory))
    assert entry.state == "READY"
    assert "reload failed" in entry.reason
    assert models.model("m") is first
    assert not models.missing


def test_while_a_model_reloads_the_one_before_answers(bert: Path) -> None:
    seen = []

    def loader(wanted: ModelConfig, settings: object) -> object:
        if "m" in models.entries() and models.entries()["m"].model is not None:
            seen.append((models.entries()["m"].state, models.model("m")))
        return load(wanted, SETTINGS)

    models = Registry(SETTINGS, loader)  # type: ignore[arg-type]
    models.load(config(bert))
    first = models.model("m")
    models.load(config(bert))
    assert seen == [("LOADING", first)]
    assert models.model("m") is not first


def test_unloaded_models_are_refused_and_not_missed(bert: Path) -> None:
    models = Registry(SETTINGS)
    models.load(config(bert))
    kept = models.model("m")
    models.unload("m")
    with pytest.raises(FarsightError, match="unloaded"):
        models.model("m")
    assert not models.missing
    assert run(kept, asked("embed", "tired"))  # what has begun ends


def test_only_what_is_new_or_changed_is_loaded(bert: Path) -> None:
    names: list[str] = []

    def loader(wanted: ModelConfig, settings: object) -> object:
        names.append(wanted.name)
        return load(wanted, SETTINGS)

    models = Registry(SETTINGS, loader)  # type: ignore[arg-type]
    models.set([config(bert, "a"), config(bert, "b")])
    models.set([config(bert, "a"), config(bert, "b", max_length=64), config(bert, "c")])
    assert names == ["a", "b", "b", "c"]
    models.set([config(bert, "c")])
    assert [info.name for info in models.infos()] == ["c"]


def test_missing_files_and_packages_are_named(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        directory_of(config(tmp_path))
    with pytest.raises(FileNotFoundError, match="'no_such_package' is not installed"):
        directory_of(ModelConfig(name="m", package="no_such_package"))
    for file in ("model.safetensors", "tokenizer.json"):
        copy = tmp_path / file
        shutil.copytree(bert, copy)
        (copy / file).unlink()
        with pytest.raises(FileNotFoundError, match=f"{file} is missing"):
            directory_of(config(copy))


def test_pickled_weights_are_not_read(bert: Path, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(bert, directory)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        directory_of(config(directory))


def test_weights_that_the_files_lack_are_not_made_up(bert: Path) -> None:
    with pytest.raises(ValueError, match="lack 2 weights for classify: classifier"):
        loaded(bert, task="classify")


@pytest.mark.parametrize(
    ("head", "labels", "task"),
    [
        (hf.AutoModelForSequenceClassification, {0: "relevant"}, "rerank"),
        (hf.AutoModelForSequenceClassification, {0: "no", 1: "yes"}, "classify"),
        (hf.AutoModelForMaskedLM, None, "embed"),
        (hf.AutoModel, None, "embed"),
    ],
)
def test_tasks_are_found_from_the_files(head: type, labels: dict[int, str] | None, task: str, tmp_path: Path) -> None:
    zoo.save("bert", head, tmp_path, **({"id2label": labels} if labels else {}))
    assert task_of(tmp_path) == task
    (tmp_path / "modules.json").write_text("[]")
    assert task_of(tmp_path) == "embed"


def test_ranks_need_one_label(tmp_path: Path) -> None:
    zoo.save("bert", hf.AutoModelForSequenceClassification, tmp_path, id2label={0: "no", 1: "yes"})
    with pytest.raises(ValueError, match="rerank needs one label, this model has 2"):
        loaded(tmp_path, task="rerank")


def test_rope_scaling_needs_its_type(tmp_path: Path) -> None:
    zoo.save("llama", hf.AutoModel, tmp_path, max_position_embeddings=32)
    with pytest.raises(ValueError, match="needs a rope_type"):
        loaded(tmp_path, rope_scaling={"factor": 4.0})
    assert loaded(tmp_path, rope_scaling={"type": "linear", "factor": 4.0}).info.max_length == 128


def test_reasons_contain_no_paths(tmp_path: Path) -> None:
    models = Registry(SETTINGS)
    (tmp_path / "config.json").write_text("{")
    entry = models.load(config(tmp_path))
    assert entry.state == "UNAVAILABLE"
    assert str(tmp_path) not in entry.reason
    assert "/tmp" not in entry.reason


def test_architectures_without_attention_of_ours_are_refused(tmp_path: Path) -> None:
    module = hf.AutoModel.from_config(hf.MPNetConfig(vocab_size=128, hidden_size=32, num_attention_heads=4))
    module.save_pretrained(tmp_path)
    zoo.tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RuntimeError, match="mpnet does not compute attention through the AttentionInterface"):
        loaded(tmp_path)


def test_a_replaced_or_unloaded_model_is_freed_at_once(bert: Path) -> None:
    models = Registry(SETTINGS)
    models.load(config(bert))
    first = weakref.ref(models.model("m").module)
    gc.disable()  # only what the registry collects itself
    try:
        models.load(config(bert))
        assert first() is None
        second = weakref.ref(models.model("m").module)
        models.unload("m")
        assert second() is None
    finally:
        gc.enable()
