"""Write the answers of ``upit predict``."""

import json
from pathlib import Path

from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override


class WriteAnswers(BasePredictionWriter):
    """Append each batch's answers to ``<run>/predictions.jsonl``: the prompt's row and an ``answer``.

    Under several processes each writes its own file, ``predictions.rank1.jsonl`` and so on.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    @override
    def on_predict_start(self, trainer, pl_module) -> None:
        suffix = f".rank{trainer.global_rank}" if trainer.global_rank else ""
        self.file = Path(trainer.default_root_dir) / f"predictions{suffix}.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("")

    @override
    def write_on_batch_end(
        self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx
    ) -> None:
        with self.file.open("a") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in prediction)
