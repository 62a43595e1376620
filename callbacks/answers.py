"""Write the answers of ``upit predict``."""

import itertools
import json
from pathlib import Path

from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override

from upit.core.distributed import gathered, rank


class WriteAnswers(BasePredictionWriter):
    """Write ``<run>/predictions.jsonl`` batch by batch: each prompt's row and its answer, in the prompts' order.

    An earlier file is kept: the next is ``predictions-2.jsonl``, and so on. Under several processes rank 0 writes the
    answers of all of them.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    @override
    def on_predict_start(self, trainer, pl_module) -> None:
        self.written = 0
        if rank() == 0:
            run = Path(trainer.default_root_dir)
            run.mkdir(parents=True, exist_ok=True)
            names = itertools.chain(["predictions.jsonl"], (f"predictions-{i}.jsonl" for i in itertools.count(2)))
            self.file = next(run / name for name in names if not (run / name).exists())
            self.file.touch(exist_ok=False)

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

    @override
    def on_predict_end(self, trainer, pl_module) -> None:
        if rank() == 0:
            print(f"Wrote {self.written} answers to {self.file}, column {pl_module.answer_column!r}")
