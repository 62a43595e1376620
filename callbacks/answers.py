"""Write the answers of ``upit predict``."""

import json
from pathlib import Path

from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override

from upit.distributed import gathered, rank


class WriteAnswers(BasePredictionWriter):
    """Write ``<run>/predictions.jsonl`` batch by batch: each prompt's row and an ``answer``, in the prompts' order.

    Under several processes rank 0 writes what all of them answered.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    @override
    def on_predict_start(self, trainer, pl_module) -> None:
        self.file = Path(trainer.default_root_dir) / "predictions.jsonl"
        self.written = 0
        if rank() == 0:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text("")

    @override
    def write_on_batch_end(
        self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx
    ) -> None:
        own = dict(zip(batch["index"].tolist(), prediction, strict=True))
        answers = {index: row for part in gathered(own) for index, row in part.items()}
        # the sampler deals prompts out in turn, and the first ones again at the end so that the ranks keep step
        rows = [row for index, row in sorted(answers.items()) if index >= self.written]
        self.written += len(rows)
        if rank() == 0:
            with self.file.open("a") as stream:
                stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
