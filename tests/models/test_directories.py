"""A sweep over small directories, kinds x settings: every answer equals that of the library that defines its meaning.

Embedders and rankers are compared with sentence-transformers, the others with Transformers: both read the same files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.models import zoo
from tests.models.common import asked, loaded, run

TEXTS = (
    *(
        "it was tired",
        "The ANIMAL did",
        "attention",
        "compares  every token ",
        "[PAD] pays",
        "it [PAD] was",
        "it was [PAD]",
    ),
    *("long documents are read by machines " * 3, "because", "a <ent> b", "naïve CAFÉ", "the street [SEP] the animal"),
)
PAIRS = tuple(zip(TEXTS, TEXTS[::-1], strict=True))
SPECIAL = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
Make = Callable[[Path], None]


# -- embedders --------------------------------------------------------------------------------------------------


def plain(kind: str, head: Any = hf.AutoModel, *, settings: dict[str, Any] | None = None, **more: Any) -> Make:
    """Transformers' own files alone."""

    def make(directory: Path) -> None:
        zoo.save(kind, head, directory, **more)
        has_types = kind == "bert"
        made = zoo.tokenizer(with_pair_types=has_types)
        zoo.save_tokenizer(made, directory, gives_types=has_types, **SPECIAL, **(settings or {}))

    return make


def embedder(
    base: Make, modes: Any, *steps: Any, prompts: Any = None, default: str | None = None, **pooling: Any
) -> Make:
    """As sentence-transformers writes it now."""

    def make(directory: Path) -> None:
        base(directory / "base")
        transformer = Transformer(str(directory / "base"))
        torch.manual_seed(1)
        size = transformer.get_embedding_dimension()
        modules = [transformer, Pooling(size, modes, **pooling), *(step(size) for step in steps)]
        model = SentenceTransformer(modules=modules, prompts=prompts, default_prompt_name=default, device="cpu")
        model.save_pretrained(str(directory))

    return make


def old_layout(base: Make, mode: str, general: dict[str, Any] | None = None, **transformer: Any) -> Make:
    """As sentence-transformers wrote it before version 5.4."""

    def make(directory: Path) -> None:
        base(directory)
        names = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        modules = [
            {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{name}"}
            for at, (path, name) in enumerate(names.items())
        ]
        pooling = {"word_embedding_dimension": 32, f"pooling_mode_{mode}": True, "pooling_mode_max_tokens": False}
        write(directory / "modules.json", modules)
        write(directory / "1_Pooling" / "config.json", pooling)
        write(directory / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False, **transformer})
        write(directory / "config_sentence_transformers.json", general or {})

    return make


def write(file: Path, document: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document))


def changed(base: Make, file: str, **changes: Any) -> Make:
    """The same with other entries in one of its files."""

    def make(directory: Path) -> None:
        base(directory)
        path = directory / file
        before = json.loads(path.read_text()) if path.is_file() else {}
        write(path, {**before, **changes})

    return make


def with_tokenizer(base: Make, tokenizer: Callable[[], Tokenizer], **settings: Any) -> Make:
    def make(directory: Path) -> None:
        base(directory)
        zoo.save_tokenizer(tokenizer(), directory, **settings)

    return make


def dna() -> Tokenizer:
    """An alphabet of four letters, without a token for unknown ones."""
    made = Tokenizer(models.BPE({"<pad>": 0, "[CLS]": 1, "[SEP]": 2, "A": 3, "C": 4, "G": 5, "T": 6}, []))
    special = [("[CLS]", 1), ("[SEP]", 2)]
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=special)
    made.add_special_tokens(["<pad>", "[CLS]", "[SEP]"])
    return made


def word_piece(*, lowercase: bool) -> Tokenizer:
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *zoo.WORDS, *"abcdefghijklmnopqrstuvwxyz", "The", "ANIMAL"]
    made = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    made.add_special_tokens(words[:4])
    return made


def cased() -> Tokenizer:
    """Words in lower case only, and nothing makes a text lower case."""
    made = zoo.tokenizer()
    made.normalizer = normalizers.NFC()
    return made


def roberta() -> Tokenizer:
    """RoBERTa's ids: its padding token stands inside texts, too."""
    words = ["<s>", "[PAD]", "</s>", "[UNK]", *zoo.WORDS]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    made.add_special_tokens(words[:4])
    return made


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: at for at, token in enumerate([*alphabet, "<|endoftext|>"])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return made


def saved(model: Any, tokenizer: Callable[[], Tokenizer] = zoo.tokenizer) -> Make:
    """A module that the zoo does not have."""

    def make(directory: Path) -> None:
        torch.manual_seed(0)
        module = model().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(2.0) if parameter.ndim > 1 else parameter.add_(0.05 * torch.randn_like(parameter))
        module.save_pretrained(directory)
        zoo.save_tokenizer(tokenizer(), directory, **SPECIAL)

    return make


T5 = {"vocab_size": 128, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64}
T5_ENCODER = saved(lambda: hf.T5EncoderModel(hf.T5Config(**T5, decoder_start_token_id=0)))
OPT = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
OPT |= {"max_position_embeddings": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
GEMMA = {**zoo.DECODER, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 6}
BERT, LLAMA = plain("bert"), plain("llama", head=hf.AutoModel)
TYPED = ["input_ids", "token_type_ids", "attention_mask"]
PROMPTS = {"query": "the animal ", "passage": "the long street ", "document": ""}

EMBEDDERS: dict[str, Make] = {
    "mean": embedder(BERT, "mean"),
    "mean, normalized": embedder(BERT, "mean", lambda _: Normalize()),
    "cls": embedder(plain("xlm-roberta"), "cls"),
    "max": embedder(plain("distilbert"), "max"),
    "mean by the root of the length": embedder(BERT, "mean_sqrt_len_tokens"),
    "weighted mean": embedder(plain("gpt2"), "weightedmean"),
    "types looked up as tokens": embedder(plain("gpt2", settings={"model_input_names": TYPED}), "mean"),
    "last token": embedder(LLAMA, "lasttoken", lambda _: Normalize()),
    "several modes": embedder(plain("modernbert"), ("cls", "max", "mean")),
    "dense": embedder(BERT, "mean", lambda size: Dense(size, 48), lambda _: Normalize()),
    "dense, narrow, without activation": embedder(
        BERT, "mean", lambda size: Dense(size, 8, bias=False, activation_function=torch.nn.Identity())
    ),
    "dense with a residual": embedder(BERT, "mean", lambda size: Dense(size, 16, use_residual=True)),
    "normalized before dense": embedder(BERT, "mean", lambda _: Normalize(), lambda size: Dense(size, 8)),
    "layer norm": embedder(BERT, "cls", LayerNorm),
    "default prompt": embedder(BERT, "mean", prompts=PROMPTS, default="query"),
    **{
        f"prompt left out, {mode}": embedder(BERT, mode, prompts=PROMPTS, default="passage", include_prompt=False)
        for mode in ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
    },
    "an empty prompt left out": embedder(BERT, "mean", prompts=PROMPTS, default="document", include_prompt=False),
    "before 5.4, mean": old_layout(BERT, "mean_tokens"),
    "before 5.4, last": old_layout(plain("mistral"), "lasttoken"),
    "before 5.4, prompt": old_layout(BERT, "cls_token", {"prompts": PROMPTS, "default_prompt_name": "query"}),
    "before 5.4, lower case": old_layout(with_tokenizer(BERT, cased, **SPECIAL), "mean_tokens", do_lower_case=True),
    "cut at the left": old_layout(plain("bert", settings={"truncation_side": "left"}), "mean_tokens", max_seq_length=8),
    "before 5.4, length of 8": old_layout(BERT, "mean_tokens", max_seq_length=8),
    "letters of DNA": old_layout(with_tokenizer(BERT, dna, pad_token="<pad>"), "mean_tokens"),
    "padding tokens inside texts": old_layout(
        with_tokenizer(plain("roberta", pad_token_id=1), roberta, pad_token="[PAD]", unk_token="[UNK]"), "mean_tokens"
    ),
    "T5's encoder": embedder(T5_ENCODER, "mean"),
    "a projection to fewer numbers": old_layout(saved(lambda: hf.OPTModel(hf.OPTConfig(**OPT))), "mean_tokens"),
    "windows to both sides": embedder(
        saved(lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**GEMMA, use_bidirectional_attention=True))), "mean"
    ),
}


def test_embedders(directory: Path, name: str) -> None:
    EMBEDDERS[name](directory)
    ours = loaded(directory)
    theirs = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    texts = ["ACGT", "TTTTG", "C"] if "DNA" in name else list(TEXTS)
    answer = run(ours, asked("embed", *texts, truncate="end"))[0].tensors["embedding"]
    expected = torch.tensor(theirs.encode(texts))
    assert answer.shape == expected.shape == (len(texts), ours.info.dimensions)
    assert distance(answer, expected) < 1e-5


@pytest.mark.parametrize("name", list(PROMPTS))
def test_prompts_by_name_and_by_kind(tmp_path: Path, name: str) -> None:
    EMBEDDERS["default prompt"](tmp_path)
    ours, theirs = loaded(tmp_path), SentenceTransformer(str(tmp_path), device="cpu", local_files_only=True)
    answer = run(ours, asked("embed", *TEXTS, prompt_name=name))[0].tensors["embedding"]
    assert distance(answer, torch.tensor(theirs.encode(list(TEXTS), prompt_name=name))) < 1e-5
    for kind, encode in (("query", theirs.encode_query), ("document", theirs.encode_document)):
        answer = run(ours, asked("embed", *TEXTS, input_type=kind))[0].tensors["embedding"]
        assert distance(answer, torch.tensor(encode(list(TEXTS)))) < 1e-5
    assert (set(ours.info.prompts), ours.info.default_prompt) == (set(PROMPTS), "query")


# -- rankers ----------------------------------------------------------------------------------------------------


def ranker(base: Make) -> Make:
    """As sentence-transformers writes a CrossEncoder since version 5.4."""

    def make(directory: Path) -> None:
        base(directory / "base")
        CrossEncoder(str(directory / "base"), device="cpu").save_pretrained(str(directory))

    return make


ONE = plain("bert", hf.AutoModelForSequenceClassification, num_labels=1)
IDENTITY = "torch.nn.modules.linear.Identity"
RANKERS: dict[str, Make] = {
    "no activation stored": ONE,
    "activation by version 4": changed(ONE, "config.json", sentence_transformers={"activation_fn": IDENTITY}),
    "activation by version 3": changed(ONE, "config.json", sbert_ce_default_activation_function=IDENTITY),
    "since 5.4": ranker(ONE),
    "since 5.4, identity": changed(ranker(ONE), "config_sentence_transformers.json", activation_fn=IDENTITY),
    "since 5.4, RoBERTa": ranker(plain("roberta", hf.AutoModelForSequenceClassification, num_labels=1)),
    "a decoder": plain("llama", hf.AutoModelForSequenceClassification, num_labels=1),
}


def test_rankers(directory: Path, name: str) -> None:
    RANKERS[name](directory)
    ours = loaded(directory)
    theirs = CrossEncoder(str(directory), device="cpu", local_files_only=True)
    assert ours.info.task == "rerank"
    answer = run(ours, asked("rerank", pairs=PAIRS))[0].tensors["scores"][:, 0]
    assert distance(answer, torch.tensor(theirs.predict(list(PAIRS)))) < 1e-5
    raw = run(ours, asked("rerank", pairs=PAIRS, raw_scores=True))[0].tensors["scores"][:, 0]
    identity = torch.nn.Identity()
    assert distance(raw, torch.tensor(theirs.predict(list(PAIRS), activation_fn=identity))) < 1e-5


# -- classifiers and decoders: Transformers ---------------------------------------------------------------------


def classifier(kind: str, **more: Any) -> Make:
    return plain(kind, hf.AutoModelForSequenceClassification, **{"num_labels": 3, **more})


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
FEWER = ("negative", "LABEL_1", "LABEL_2")
FROM_ONE = {"1": "negative", "2": "neutral", "3": "positive"}
CLASSIFIERS: dict[str, Make] = {
    "bert": classifier("bert"),
    "ends in its padding token": classifier("llama", pad_token_id=2),
    "padding token inside": classifier("mistral"),
    "no padding token": classifier("gpt2"),
    "no padding token, unpacked": classifier("llama", pad_token_id=None, rope_parameters=DYNAMIC),
    "labels from 1": changed(classifier("bert"), "config.json", id2label=FROM_ONE, label2id={}),
    "fewer labels than outputs": changed(classifier("bert"), "config.json", id2label={"0": "negative"}, num_labels=3),
    "fewer labels, and no number": changed(classifier("bert"), "config.json", id2label={"0": "negative", "1": "x"}),
    "lower case by the tokenizer": with_tokenizer(
        classifier("bert"),
        lambda: word_piece(lowercase=False),
        **{**SPECIAL, "tokenizer_class": "BertTokenizer", "do_lower_case": True},
    ),
    "case kept by the tokenizer": with_tokenizer(
        classifier("bert"),
        lambda: word_piece(lowercase=True),
        **{**SPECIAL, "tokenizer_class": "BertTokenizer", "do_lower_case": False},
    ),
    "an added token": changed(
        classifier("bert"),
        "tokenizer_config.json",
        added_tokens_decoder={"100": AddedToken("<ent>").__getstate__()},
    ),
    "an added token in a file of its own": changed(classifier("bert"), "added_tokens.json", **{"<ent>": 100}),
    "special tokens split": changed(classifier("bert"), "tokenizer_config.json", split_special_tokens=True),
    "albert": saved(
        lambda: hf.AlbertForSequenceClassification(
            hf.AlbertConfig(**zoo.SMALL, embedding_size=16, num_labels=3, max_position_embeddings=64)
        )
    ),
    "electra": saved(
        lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**zoo.SMALL, embedding_size=16, num_labels=3))
    ),
}


@torch.inference_mode()
def test_classifiers(directory: Path, name: str) -> None:
    CLASSIFIERS[name](directory)
    ours, tokenizer = loaded(directory), hf.AutoTokenizer.from_pretrained(directory)
    more = {"num_labels": 3} if "no number" in name else {}  # Transformers itself must be told
    eager = "eager"
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(directory, attn_implementation=eager, **more)
    output = run(ours, asked("classify", *TEXTS, *TEXTS[:2]))[0]
    for text, scores in zip((*TEXTS, *TEXTS[:2]), output.tensors["scores"], strict=True):
        expected = theirs(**tokenizer(text, return_tensors="pt")).logits.softmax(1)[0]
        assert distance(scores, expected) < 1e-5, text
    labels = {"labels from 1": ("LABEL_0", "negative", "neutral"), "fewer labels than outputs": FEWER}
    assert name not in labels or output.details == labels[name]


def decoder(kind: Any, config: Any, **more: Any) -> Make:
    return saved(lambda: kind(config(**{**zoo.DECODER, **more})))


DECODERS: dict[str, Make] = {
    "gpt2": plain("gpt2", hf.AutoModelForCausalLM),
    "gpt2 with a space before": with_tokenizer(
        plain("gpt2", hf.AutoModelForCausalLM, vocab_size=300),
        byte_level,
        tokenizer_class="GPT2Tokenizer",
        add_prefix_space=True,
        unk_token="<|endoftext|>",
    ),
    "granite": decoder(hf.GraniteForCausalLM, hf.GraniteConfig, logits_scaling=8.0),
    "cohere": decoder(hf.CohereForCausalLM, hf.CohereConfig, logit_scale=0.0625),
    "gemma 2": plain("gemma2", hf.AutoModelForCausalLM),
    "yarn": changed(
        plain("llama", hf.AutoModelForCausalLM, max_position_embeddings=32),
        "config.json",
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
    ),
}


@torch.inference_mode()
def test_decoders(directory: Path, name: str) -> None:
    DECODERS[name](directory)
    ours, tokenizer = loaded(directory), hf.AutoTokenizer.from_pretrained(directory)
    theirs = hf.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    long = "the animal did not cross the street because it was tired " * 4
    output = run(ours, asked("score", *TEXTS, long))[0]
    for text, scored in zip((*TEXTS, long), output.details, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        logprobs = theirs(ids).logits[0, :-1].log_softmax(1)
        expected = logprobs.gather(1, ids[0, 1:, None]).sum().item()
        assert scored["logprob_sum"] == pytest.approx(expected, rel=1e-4, abs=1e-4), text
    if name == "yarn":
        assert ours.info.max_length == 128


# -- images -----------------------------------------------------------------------------------------------------

VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
IMAGES: dict[str, tuple[Callable[[], Any], int]] = {  # and the tokens of one image
    "ViT": (lambda: hf.ViTModel(hf.ViTConfig(**VISION)), 17),
    "DINOv2 with registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**VISION, num_register_tokens=4)),
        21,
    ),
    "DeiT, with a token for distillation": (lambda: hf.DeiTModel(hf.DeiTConfig(**VISION)), 18),
    "CLIP's vision": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION)), 17),
    "SigLIP's vision": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)), 16),
}


@torch.inference_mode()
def test_images(directory: Path, name: str) -> None:
    make, tokens = IMAGES[name]
    torch.manual_seed(0)
    module = make().eval()
    module.save_pretrained(directory)
    pixels = torch.randn(3, 3, 32, 32)
    request = asked("embed", features=pixels)
    ours = loaded(directory)
    expected = module(pixels).last_hidden_state
    assert [len(row) for row in ours.tokenize(request).rows] == [expected.shape[1]] * 3 == [tokens] * 3
    answer = run(ours, request)[0].tensors["embedding"]
    assert distance(answer, torch.nn.functional.normalize(expected[:, 0], dim=1)) < 1e-5


# -- what is refused, and in which words ------------------------------------------------------------------------

POOLING, GENERAL = "1_Pooling/config.json", "config_sentence_transformers.json"
OLD = old_layout(BERT, "mean_tokens")
SPARSE, FOREIGN = {"model_type": "SparseEncoder"}, [{"type": "custom_st.Transformer", "path": ""}]
OUTSIDE = [{"type": "sentence_transformers.models.Transformer", "path": "../x"}]
LAYERS = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
LAYERS += [{"type": f"sentence_transformers.models.{name}", "path": "1_Pooling"} for name in ("Pooling", "LSTM")]
CLIP = {"vocab_size": 128, **{name: VISION[name] for name in list(VISION)[:3]}}


def replaced(base: Make, file: str, text: str) -> Make:
    def make(directory: Path) -> None:
        base(directory)
        (directory / file).write_text(text)

    return make


def without(base: Make, file: str) -> Make:
    def make(directory: Path) -> None:
        base(directory)
        (directory / file).unlink()

    return make


def damaged(base: Make) -> Make:
    """One weight is NaN."""

    def make(directory: Path) -> None:
        base(directory)
        weights = load_file(directory / "model.safetensors")
        weights["encoder.layer.1.attention.self.query.weight"][0, 0] = torch.nan
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    return make


MESSAGE = {kind: {"method": "forward", "method_output_name": "last_hidden_state"} for kind in ("text", "message")}
REFUSED: dict[str, tuple[Make, str]] = {
    "another pooling": (changed(OLD, POOLING, pooling_mode="attention"), "Pooling: mode .'attention'. is not one of"),
    "a setting of pooling": (changed(OLD, POOLING, temperature=2), "Pooling: .'temperature'. are not supported"),
    "another module": (replaced(OLD, "modules.json", json.dumps(LAYERS)), "modules.json asks for .'LSTM'."),
    "a module of its own": (
        replaced(OLD, "modules.json", json.dumps(FOREIGN)),
        "'custom_st.Transformer' is not a module",
    ),
    "messages": (changed(OLD, "sentence_bert_config.json", modality_config=MESSAGE), "texts as messages of a chat"),
    "no settings of pooling": (without(OLD, POOLING), "config.json of Pooling is missing"),
    "an adapter": (changed(OLD, "adapter_config.json", r=8), "adapter_config.json. is not supported"),
    "a decoder that is pooled": (old_layout(plain("bart"), "mean_tokens"), "pools the decoder of bart"),
    "weights that are not numbers": (damaged(BERT), "numbers that are not finite"),
    "a folder outside": (replaced(OLD, "modules.json", json.dumps(OUTSIDE)), "modules.json: '../x' is outside"),
    "many vectors": (
        changed(OLD, "sentence_bert_config.json", query_length=32),
        "query_length is for models with many",
    ),
    "a sparse encoder": (changed(OLD, GENERAL, **SPARSE), "a SparseEncoder is not served"),
    "an unknown prompt": (changed(OLD, GENERAL, default_prompt_name="x"), "default_prompt_name 'x' is not one of"),
    "another activation": (
        changed(ONE, "config.json", sentence_transformers={"activation_fn": "my.code.Activation"}),
        "the stored activation 'my.code.Activation' is not supported",
    ),
    "attention of its own": (
        saved(lambda: hf.FalconForCausalLM(hf.FalconConfig(vocab_size=128, hidden_size=32, num_attention_heads=4))),
        "falcon does not compute attention through the AttentionInterface",
    ),
    "no attention": (
        saved(lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1))),
        "mamba has no attention heads",
    ),
    "text and images": (
        saved(lambda: hf.CLIPModel(hf.CLIPConfig(text_config=CLIP, vision_config=VISION, projection_dim=16))),
        "clip does not run on text alone",
    ),
    "RoBERTa without a padding token": (
        changed(plain("roberta"), "config.json", pad_token_id=None),
        "config.json has no pad_token_id; the positions of roberta begin after it",
    ),
    "a broken configuration": (replaced(BERT, "config.json", "{"), "config.json is not JSON"),
    "a broken tokenizer": (replaced(BERT, "tokenizer.json", "{"), "its tokenizer cannot be read"),
    "broken weights": (replaced(BERT, "model.safetensors", "x" * 50), "its weights cannot be read"),
}


def test_refusals_say_what_is_missing(directory: Path, name: str) -> None:
    make, says = REFUSED[name]
    make(directory)
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=says):
        loaded(directory)


def test_two_files_that_disagree_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As e5-mistral's: Transformers follows tokenizer.json, and so do we."""
    settings = {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True, "eos_token": "</s>", "bos_token": "<s>"}
    with_tokenizer(plain("mistral"), bos_only, **settings)(tmp_path)
    ours, theirs = loaded(tmp_path), hf.AutoTokenizer.from_pretrained(tmp_path)
    for text, row in zip(TEXTS, ours.tokenize(asked("embed", *TEXTS)).rows, strict=True):
        assert row.ids == tuple(theirs(text)["input_ids"])
    assert ("add_eos_token" in caplog.text) == (theirs(TEXTS[0])["input_ids"][-1] != theirs.eos_token_id)


def bos_only() -> Tokenizer:
    made = zoo.tokenizer()
    made.add_special_tokens(["<s>", "</s>"])
    start = made.token_to_id("<s>")
    pair = "<s> $A $B"
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair=pair, special_tokens=[("<s>", start)])
    return made


# -- -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = {
        "test_embedders": EMBEDDERS,
        "test_rankers": RANKERS,
        "test_classifiers": CLASSIFIERS,
        "test_decoders": DECODERS,
        "test_images": IMAGES,
        "test_refusals_say_what_is_missing": REFUSED,
    }.get(metafunc.function.__name__)
    if cases is not None:
        metafunc.parametrize("name", list(cases))


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, as a share of the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9))
