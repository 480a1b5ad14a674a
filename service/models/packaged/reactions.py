"""Models of chemical reactions written as SMILES, as Hugging Face directories.

Their packages bring `pytorch_model.bin` and a tokenizer in Python. The weights are read once, as tensors only; the
tokenizer's rule, one regular expression, becomes a tokenizer.json. Ref: Schwaller et al. 2018, 2021 (the expression).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

SMILES = (
    r"(\%\([0-9]{3}\)|\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\||\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|"
    r"\%[0-9]{2}|[0-9])"
)
ROUNDING = 1e-5  # of a result's largest number
SPECIAL = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
REACTIONS = (
    "CC(=O)O.OCC>>CC(=O)OCC",
    "c1ccccc1Br.OB(O)c1ccncc1>>c1ccccc1-c1ccncc1",
    "CCBr.N>>CCN",
    "O=C(Cl)c1ccccc1.NCC[N+](C)(C)C.[Cl-]>>O=C(NCC[N+](C)(C)C)c1ccccc1.[Cl-]",
)


def convert(source: Path, target: Path) -> None:
    """config.json, vocab.txt and pytorch_model.bin in `source` into `target`."""
    module = _original(source)
    module.save_pretrained(target)
    vocabulary = _vocabulary(source)
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(SMILES), behavior="removed", invert=True)
    ends = [(SPECIAL[f"{name}_token"], vocabulary[SPECIAL[f"{name}_token"]]) for name in ("sep", "cls")]
    made.post_processor = processors.BertProcessing(*ends)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    length = module.config.max_position_embeddings
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=made, model_input_names=names, model_max_length=length, **SPECIAL).save_pretrained(target)


@torch.inference_mode()
def prove(source: Path, target: Path) -> str:
    """Compares logits or states of REACTIONS with those of the package's own weights. Raises RuntimeError."""
    original, tokenizer = _original(source), AutoTokenizer.from_pretrained(target, local_files_only=True)
    converted = type(original).from_pretrained(target, local_files_only=True).eval()
    vocabulary = _vocabulary(source)
    for reaction in REACTIONS:
        tokens = ["[CLS]", *re.findall(SMILES, reaction), "[SEP]"]
        ids = [vocabulary[token] for token in tokens]
        if tokenizer(reaction)["input_ids"] != ids:
            raise RuntimeError(f"the converted tokenizer reads {reaction} in another way than the package's rule")
        ours, theirs = (next(iter(model(torch.tensor([ids])).values())) for model in (converted, original))
        if (ours - theirs).abs().max() > ROUNDING * theirs.abs().max():
            raise RuntimeError(f"the converted model answers {reaction} in another way than the package's weights")
    return f"equal to the package's weights on {len(REACTIONS)} reactions"


def _vocabulary(source: Path) -> dict[str, int]:
    """Ids by token: the lines of vocab.txt."""
    return {word: at for at, word in enumerate((source / "vocab.txt").read_text().split("\n")) if word}


def _original(source: Path) -> Any:
    """The package's model, with its classifier if it has one."""
    weights = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    head = weights.get("classifier.weight")
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    if head is not None:  # the configuration's own labels are of another number
        config.num_labels = len(head)
    kind: Any = AutoModel if head is None else AutoModelForSequenceClassification
    module = kind.from_config(config)
    prefix = f"{module.base_model_prefix}."
    named = weights if head is not None else {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    missing, unused = module.load_state_dict(named, strict=False)
    expected = [name for name in unused if not name.startswith(("predictions.", "cls.")) and "position_ids" not in name]
    if missing or expected:
        raise RuntimeError(f"{source.name}: weights do not fit: missing {missing[:3]}, not used {expected[:3]}")
    return module.eval()
