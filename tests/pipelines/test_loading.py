from __future__ import annotations

import json
import shutil
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from dit_accel.pipelines import catalog, loading
from dit_accel.pipelines.loading import LoadError, load, pick_device, pick_dtype, understand


def test_load_gives_the_pipeline_of_the_folder(flux_path, pixart_path, tiny_flux):
    pipe = load(str(flux_path))
    assert type(pipe).__name__ == "FluxPipeline" and type(load(str(pixart_path))).__name__ == "PixArtSigmaPipeline"
    for loaded, saved in zip(pipe.transformer.parameters(), tiny_flux().transformer.parameters(), strict=True):
        assert torch.equal(loaded, saved)


def test_dtype_is_float32_on_the_cpu_unless_asked(flux_path):
    assert load(str(flux_path), device="cpu").transformer.dtype == torch.float32
    assert load(str(flux_path), device="cpu", dtype="bfloat16").transformer.dtype == torch.bfloat16


def test_dtype_on_a_gpu(monkeypatch):
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, answer=supported: answer)
        assert pick_dtype("auto", torch.device("cuda")) == dtype
        assert pick_dtype("float32", torch.device("cuda")) == torch.float32


def test_device_auto(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("float8", "cpu", "none"), "dtype is 'float8'"),
        (("auto", "gpu", "none"), "device is 'gpu'"),
        (("auto", "cuda:99", "none"), "cuda:99 does not exist here"),
        (("auto", "cpu", "disk"), "offload is 'disk'"),
        (("auto", "cpu", "model"), "needs a GPU"),
    ],
)
def test_options_that_cannot_be_had(options, message):
    with pytest.raises(ValueError, match=message):
        understand(*options)


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text
    return text


def test_names_that_are_nothing(tmp_path):
    with pytest.raises(LoadError) as error:
        load("emoji-fluxx")
    assert "emoji-flux," in one_sentence(error)
    with pytest.raises(LoadError) as error:
        load(str(tmp_path))
    assert "model_index.json" in one_sentence(error)


def test_an_embedded_pipeline_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(catalog, "samples_folder", lambda: tmp_path)
    with pytest.raises(LoadError, match="embedded pipeline emoji-flux is missing"):
        load("emoji-flux")


def test_other_pipelines_are_refused_by_name(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(LoadError) as error:
        load(str(tmp_path))
    assert "StableDiffusionPipeline" in one_sentence(error) and "FluxPipeline" in one_sentence(error)


@pytest.mark.parametrize("lost", ["transformer/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"])
def test_missing_weights(flux_path, tmp_path, lost):
    copy = tmp_path / "copy"
    shutil.copytree(flux_path, copy)
    (copy / lost).unlink()
    with pytest.raises(LoadError) as error:
        load(str(copy))
    assert "incomplete" in one_sentence(error)


response = Mock(headers={}, status_code=403)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (GatedRepoError("no", response=response), "is gated: accept its terms"),
        (RepositoryNotFoundError("no", response=response), "has no repository owner/name"),
        (LocalEntryNotFoundError("no"), "the hub cannot be reached"),
        (OfflineModeIsEnabled("no"), "the hub cannot be reached"),
        (EntryNotFoundError("no model_index.json"), "lacks a file"),
        (HfHubHTTPError("500 Server Error", response=response), "refused owner/name: 500 Server Error"),
    ],
)
def test_what_can_go_wrong_on_the_hub(monkeypatch, problem, message):
    def fail(*_, **__):
        raise problem

    monkeypatch.setattr(loading, "hf_hub_download", fail)
    with pytest.raises(LoadError, match=message) as error:
        load("owner/name")
    one_sentence(error)
    assert error.value.__cause__ is problem


def test_other_errors_are_not_swallowed(monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(loading, "hf_hub_download", fail)
    with pytest.raises(ZeroDivisionError):
        load("owner/name")


def test_catalog_finds_names_and_folders():
    for name, entry in catalog.CATALOG.items():
        assert entry.name == name and entry.pipeline_class in catalog.SUPPORTED
        assert catalog.find(name) is entry
        if entry.embedded:
            assert catalog.find(entry.source) is entry
        else:
            assert entry.source == name
    assert catalog.find("owner/name") is None


def test_aliases_and_near_misses():
    assert catalog.find("flux-dev") is catalog.CATALOG["black-forest-labs/FLUX.1-dev"]
    assert catalog.find("flux-schnell").steps == 4 and catalog.find("pixart-sigma").pipeline_class == "PixArtSigmaPipeline"
    assert catalog.find("") is None
    for typed, meant in (("emoji-flx", "emoji-flux"), ("Emoji-Flux", "emoji-flux"), ("flux-def", "flux-dev")):
        assert catalog.suggestion(typed) == f" Did you mean {meant}?"
    assert catalog.suggestion("black-forest-labs/FLUX.1-dv") == " Did you mean black-forest-labs/FLUX.1-dev?"
    assert catalog.suggestion("nothing") == catalog.suggestion("owner/name") == ""
    with pytest.raises(loading.NoSuchPipeline, match="Did you mean emoji-pixart"):
        load("emoji-pixar")
