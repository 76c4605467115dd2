"""python -m fastres.export: writes a trained model to a file that PyTorch loads without fastres."""

import io
import sys
from collections.abc import Sequence

import torch
from rich.console import Console

from fastres.config import WEIGHTS
from fastres.errors import RunError, UserError, first_line
from fastres.fields import path
from fastres.files import write_atomically
from fastres.flags import Parser, open_console, run_command
from fastres.trained import TrainedModel, load_model
from fastres.training import distributed
from fastres.training.run import Run
from fastres.training.start import open_run

TOLERANCE = 1e-3  # of the largest logit


def main(arguments: Sequence[str] | None = None, prog: str = "python -m fastres.export") -> int:
    """Runs the command line and returns its exit code, which ``run_command`` describes."""
    parser = Parser(
        prog,
        description="Writes a trained model by torch.export, with its normalisation and in plain PyTorch operators: "
        "images float32 [N, 3, S, S], RGB in [0, 1], to logits. It is first compared with the run's model on the test "
        "images.",
    )
    parser.add_argument("run", metavar="RUN", type=path, help="folder of a finished run")
    parser.add_argument("file", metavar="FILE.pt2", type=path, help="the file to write")
    parser.add_argument("--weights", choices=WEIGHTS, help="of which epoch; default: the run's --select")
    parser.add_argument("--model", help="the run's --model if that is a function of your own")
    parser.add_argument("--data-dir", type=path, help="where the run's dataset is now; default: where it was")
    distributed.refuse(parser)

    def command() -> None:
        flags = parser.parse_flags(arguments)
        folder, file, weights, model = (flags[name] for name in ("run", "file", "weights", "model"))
        if file.exists():
            raise UserError(f"{file}: exists already; choose another name")
        if not file.parent.is_dir():
            raise UserError(f"{file}: there is no folder {file.parent}; make it, or choose another")
        console = open_console()
        fast, plain = load_model(folder, weights, model), load_model(folder, weights, model, fused=False)
        content = exported(plain)
        given = {name: flags[name] for name in ("model", "data_dir") if flags[name] is not None}
        check(content, fast, open_run(given, finished=folder, say=console.print), console)
        write_atomically(file, lambda temporary: temporary.write_bytes(content), then="export it again")
        console.print(f"written: {file}, for torch.export.load({str(file)!r}).module()")

    return run_command(parser.prog, command)


def exported(model: TrainedModel) -> bytes:
    """The content of the file of ``model``, for batches of any size."""
    images = torch.zeros(2, 3, model.image_size, model.image_size)
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        file = io.BytesIO()
        torch.export.save(program, file)
    except Exception as error:  # of any kind, from a network of the user's own
        raise RunError(f"torch.export cannot trace this network ({first_line(error)})") from error
    return file.getvalue()


@torch.no_grad()
def check(content: bytes, model: TrainedModel, run: Run, console: Console) -> None:
    """Raises RunError unless the exported ``content`` gives the logits of ``model`` for the test images of ``run``."""
    loaded = torch.export.load(io.BytesIO(content)).module()
    correct = images = 0
    for normalised, labels in run.test_loader.epoch(0):
        batch = normalised.cpu() * model.std + model.mean
        logits, expected = loaded(batch), model(batch)
        difference = (logits - expected).abs().max() / expected.abs().max()
        if not difference <= TOLERANCE:
            raise RunError(f"the exported model differs by {difference:.2g} of the largest logit; nothing was written")
        correct += (logits.argmax(1) == labels.cpu()).sum().item()
        images += len(labels)
    console.print(f"checked on {images:,} test images: accuracy {100 * correct / images:.2f} %")


if __name__ == "__main__":
    sys.exit(main())
