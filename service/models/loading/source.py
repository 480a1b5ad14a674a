"""What the service's configuration and a model's files say, before its weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from service.config import ModelConfig
from service.core.options import ModelTask
from service.models.files import directory_of, takes_audio, takes_images, takes_text, task_of
from service.models.loading.labels import count_labels
from service.models.loading.rope import scale_rope
from service.models.loading.sentence_files import SentenceFiles, read_sentence_files


@dataclass(frozen=True, slots=True)
class Source:
    """One model's settings and files."""

    config: ModelConfig
    directory: Path
    hf_config: PretrainedConfig
    task: ModelTask
    files: SentenceFiles

    @property
    def takes_images(self) -> bool:
        return takes_images(self.hf_config.to_dict())

    @property
    def takes_audio(self) -> bool:
        return takes_audio(self.hf_config.to_dict())

    @property
    def takes_text(self) -> bool:
        return takes_text(self.hf_config.to_dict())


def read_source(config: ModelConfig) -> Source:
    """Raises FileNotFoundError for missing files, ValueError for files or settings that do not fit together."""
    directory = directory_of(config)
    hf_config: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if config.rope_scaling is not None:
        scale_rope(config.name, hf_config, config.rope_scaling)
    task = config.task or task_of(directory)
    if takes_audio(hf_config.to_dict()) and task != "embed":
        kind = hf_config.model_type
        raise ValueError(f"model {config.name!r}: the encoder of {kind} is served, for embed, not for {task}")
    count = count_labels(directory) if task in ("classify", "rerank") else None
    if count is not None and count != hf_config.num_labels:  # as many as the head has, whatever the names say
        hf_config.num_labels = count
    return Source(config, directory, hf_config, task, read_sentence_files(directory, task))
