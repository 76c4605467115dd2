"""make results: renders the tables of README and docs from the measured files, so that no figure is typed by hand.

    python benchmarks/render.py [RESULTS [DOCUMENT...]]

Without a DOCUMENT it also draws docs/recipes.png.
A table NAME of a document replaces what stands between ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``. Of
several files that measured the same thing on the same machine, the newest counts.
"""

import ast
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from recipes import Content, Steps, draw, reached

from fastres.errors import UserError
from fastres.files import read_json
from fastres.report.page import as_markdown, table, table_of
from fastres.report.results import Estimate, read_results
from fastres.report.statistics import difference
from fastres.report.study import claims, scale_line, tricks_table

PICTURE = "docs/recipes.png"
DOCUMENTS = ("README.md", "docs/measurements.md")


def main(arguments: list[str]) -> int:
    """Returns 0, or 2 with one line if a file is missing or damaged, or a document has no place for a table."""
    results = Path(arguments[0] if arguments else "benchmarks/results")
    documents = {Path(name): "" for name in arguments[1:] or DOCUMENTS}
    try:
        for path in documents:
            documents[path] = path.read_text(encoding="utf-8")
            if not re.search(r"<!-- results:\w+ -->", documents[path]):
                raise UserError(f"{path} has no <!-- results:NAME --> to fill")
        contents = [
            {**read_json(path), "folder": path.parent, "file": path.stem} for path in sorted(results.rglob("*.json"))
        ]
        contents += [read_benchmarks(path) for path in sorted(results.rglob("bench-*.csv"))]
        contents += [read_kernels(path) for path in sorted(results.rglob("kernels-*.log"))]
        for path, text in documents.items():
            path.write_text(render(text, contents), encoding="utf-8")
        if not arguments[1:]:
            draw(reached(by_date(contents), recipe_steps(contents)), recipes_measured(contents), Path(PICTURE))
    except (OSError, UserError) as error:
        print(f"render: error: {error}", file=sys.stderr)
        return 2
    return 0


def read_benchmarks(path: Path) -> Content:
    """A file of --benchmark-csv: the provenance, as JSON in the first line, and the table's `rows`."""
    try:
        provenance, table = path.read_text(encoding="utf-8").split("\n", 1)
        return {**json.loads(provenance.removeprefix("#")), "rows": pd.read_csv(StringIO(table)).to_dict("records")}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as a table of benchmarks ({error})") from error


def read_kernels(path: Path) -> Content:
    """What kernel_table.py printed: its command, device and step, and the table by kind."""
    try:
        text = path.read_text(encoding="utf-8")
        (command,) = re.findall(r"^# (kernel_table.py .*)$", text, re.MULTILINE)
        ((device, versions, commit, date),) = re.findall(r"^# (.*), (\{.*\}), commit (\S+), (.*)$", text, re.MULTILINE)
        step, idle = re.search(r"# step: (\S+) ms", text)[1], re.search(r", (\S+) ms idle", text)
        kinds = re.findall(r"^(\S.*?) +([\d,.]+) +([\d.]+) +([\d,.]+) +[\d,.]+$", text.split("\nby ")[1], re.MULTILINE)
        versions = ast.literal_eval(versions)
    except (OSError, ValueError, AttributeError, TypeError, IndexError, SyntaxError) as error:
        raise UserError(f"{path}: not readable as what kernel_table.py prints ({error})") from error
    return {
        "command": f"python benchmarks/{command}", "device": device, "versions": versions, "commit": commit,
        "date": date, "step_ms": step, "idle_ms": idle and idle[1], "kinds": kinds,
    }  # fmt: skip


def render(text: str, contents: Iterable[Content]) -> str:
    """``text`` with its tables filled from ``contents``. Raises KeyError for a table that is not in ``TABLES``."""
    contents = by_date(contents)

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- results:{name} -->\n{TABLES[name](contents)}\n<!-- /results:{name} -->"

    return re.sub(r"<!-- results:(?P<name>\w+) -->.*?<!-- /results:(?P=name) -->", fill, text, flags=re.DOTALL)


def by_date(contents: Iterable[Content]) -> list[Content]:
    """The newest last."""
    return sorted(contents, key=lambda content: content.get("date", ""))


def profile_tables(contents: list[Content]) -> str:
    """A table for each model, batch size and device that was profiled."""
    newest = {}
    for profile in (content for content in contents if {"candidates", "command"} <= content.keys()):
        newest[profile["device"], profile["model"], profile["batch_size"]] = profile
    return "\n\n".join(profile_table(newest[key]) for key in sorted(newest))


def profile_table(profile: Content) -> str:
    rows = [
        [
            row["name"],
            f"{row['epoch_seconds']['median']:,.2f}",
            f"{row['epoch_seconds']['p20']:,.2f} to {row['epoch_seconds']['p80']:,.2f}",
            f"{row['images_per_second']:,.0f}",
            f"{row['times_eager']:.2f}",
            f"{100 * row['data_wait_fraction']:.1f} %",
            f"{row['peak_memory_mb']:,.0f}",
            f"{100 * row['limit_share']:.0f} %",
        ]
        for row in profile["candidates"]
    ]
    head = ["", "s/epoch", "p20 to p80", "images/s", "x eager", "data wait", "peak MiB", "of the limit"]
    caption = (
        f"`{profile['command']}`: {profile['images_per_epoch']:,} {profile['dataset']} images "
        f"an epoch, batch {profile['batch_size']}, {profile['augmentation']}; {profile['device']}; {profile['rounds']} "
        f"rounds of {profile['steps_per_round']} of {profile['steps_per_epoch']} steps; torch "
        f"{profile['versions']['torch']}, commit {_short(profile['commit'])}, {profile['date']}. Limit "
        f"{profile['limit_epoch_seconds']:,.2f} s."
    )
    return f"{caption}\n\n{table(head, rows)}"


def training_table(contents: list[Content]) -> str:
    """Whole runs, and then the command of each; best is best on the test set."""
    runs = sorted((content for content in contents if "data" in content), key=lambda run: run["file"])
    rows = [
        [
            _name(run),
            run["data"],
            f"{run['best_accuracy']:.2f} / {run['last_accuracy']:.2f} %",
            f"{run['epoch_seconds']:,.1f}",
            f"{run['images_per_second']:,.0f}",
            f"{100 * run['data_wait_fraction']:.1f} %",
            f"{run['device']}, {_provenance(run)}",
        ]
        for run in runs
    ]
    head = ["run", "data", "best / last test accuracy", "s/epoch", "images/s", "data wait", "measured"]
    commands = "\n".join(f"* {_name(run)}: `{run['command']}`" for run in runs)
    return f"{table(head, rows)}\n\n{commands}"


def front_table(contents: list[Content]) -> str:
    """What each recipe reaches with each network, and the seconds of its steps."""
    rows = [
        [
            f"`{row.model}`, {row.data} ({row.images})",
            row.recipe,
            f"{row.epochs}",
            f"{row.work:.2f}",
            Estimate.of(row.accuracy).text(),
            f"{len(row.accuracy)}",
            f"{row.seconds:,.0f}",
        ]
        for row in reached(contents, recipe_steps(contents))
    ]
    head = ["network, data", "recipe", "epochs", "epochs' work", "test accuracy, %", "n", "seconds"]
    measured = recipes_measured(contents)
    return f"{table(head, rows)}\n\n*Seconds: the steps times the seconds of one, {measured}, without evaluation.*"


def recipe_steps(contents: list[Content]) -> dict[str, Steps]:
    """The measured steps of each network, as ``reached`` takes them."""
    names = "sgd", "muon, 16x16", "muon, 24x24", "muon, 32x32"
    return {rows[0]["case"]: dict(zip(names, rows, strict=True)) for rows in _newest(contents, "optimizer", *names)}


def recipes_measured(contents: list[Content]) -> str:
    """Where and when the steps were measured."""
    measured = [steps["sgd"] for steps in recipe_steps(contents).values()]
    return "; ".join(sorted({f"at the rates of {step['device']}, {_provenance(step)}" for step in measured}))


def loader_table(contents: list[Content]) -> str:
    """Images a second of both loaders, for each kind of image and device."""
    rows = [
        [row["device"], row["case"], _rate(eager), _rate(row), _times(eager, 1), _provenance(row)]
        for row, eager in _newest(contents, "loader", "dali", "eager")
    ]
    return table(["device", "images", "eager, images/s", "DALI, images/s", "x eager", "measured"], rows)


def forward_table(contents: list[Content]) -> str:
    """The forward pass of each model, fastres' defaults against plain PyTorch."""
    rows = [
        [*_model(row), *map(_rate, (eager, row, compiled)), _times(eager), _provenance(row)]
        for row, eager, compiled in _newest(contents, "forward", "fastres", "eager", "compiled")
    ]
    rates = [f"{name}, images/s" for name in ("eager", "fastres", "compiled")]
    return table(["device", "model", "batch", *rates, "x eager", "measured"], rows)


def step_table(contents: list[Content]) -> str:
    """A training step of each model, fastres' defaults against plain PyTorch."""
    rows = _steps(contents, "step", "eager", "fastres", slower="eager")
    return table(["device", "model", "batch", "eager, ms", "fastres, ms", "x eager", "measured"], rows)


def optimizer_table(contents: list[Content]) -> str:
    """A training step of each model with SGD and with Muon."""
    rows = _steps(contents, "optimizer", "sgd", "muon, 32x32", slower="muon, 32x32")
    return table(["device", "model", "batch", "SGD, ms", "Muon, ms", "Muon / SGD", "measured"], rows)


def operator_table(contents: list[Content]) -> str:
    """The fused operator against its rivals: the median over shapes of how many times as long each takes."""
    groups: dict[tuple[str, ...], list[tuple[Content, ...]]] = {}
    for rivals in _newest(contents, "operator", "eager", "compile", "copy"):
        _, direction, residual = rivals[0]["case"].split()
        groups.setdefault((rivals[0]["device"], direction, residual), []).append(rivals)
    rows = [
        [
            *key,
            *(f"{median(row['times_as_long'] for row in shapes):.2f}" for shapes in zip(*measured, strict=True)),
            _provenance(measured[0][0]),
        ]
        for key, measured in sorted(groups.items())
    ]
    return table(["device", "direction", "", "eager", "compile", "copy", "measured"], rows)


def convolution_tables(contents: list[Content]) -> str:
    """A table for each network and device: the share of the limit of every convolution in each direction."""
    shares: dict[str, dict[str, dict[str, str]]] = {}  # by caption, layer and direction
    for (row,) in _newest(contents, "convolution", "convolution"):
        model, direction, layer = re.fullmatch(r"(\S+) (\S+): (.*)", row["case"]).groups()
        caption = f"`{model}`, {row['device']}, batch {row['images']:.0f}; {_provenance(row)}."
        shares.setdefault(caption, {}).setdefault(layer, {})[direction] = f"{100 / row['times_as_long']:.0f} %"
    head = ["convolutions", "forward", "input gradient", "weight gradient"]
    tables = []
    for caption, layers in shares.items():
        rows = [[name, *(row.get(key, "") for key in ("forward", "input", "weight"))] for name, row in layers.items()]
        tables.append(f"{caption}\n\n{table(head, rows)}")
    return "\n\n".join(tables)


def kernel_tables(contents: list[Content]) -> str:
    """What each kind of kernel takes of a step."""
    newest = {(step["command"], step["device"]): step for step in contents if "kinds" in step}
    tables = []
    for step in newest.values():
        idle = f", {step['idle_ms']} ms of a profiled one between kernels" if step["idle_ms"] else ""
        caption = f"`{step['command']}`: {step['step_ms']} ms a step{idle}; {step['device']}, {_provenance(step)}."
        rows = [[kind, us, f"{share} %", calls.removesuffix(".0")] for kind, us, share, calls in step["kinds"]]
        tables.append(f"{caption}\n\n{table(['kind of kernel', 'us a step', 'of all', 'kernels'], rows)}")
    return "\n\n".join(tables)


def study_table(contents: list[Content]) -> str:
    """The runs of all studies beside the published figures."""
    rows, captions = [], []
    for study in sorted((content for content in contents if "study" in content), key=lambda study: study["study"]):
        results = read_results(study["folder"], study)
        for result in results:
            published = result.published.get("best_accuracy")
            rows.append(
                [
                    f"`{study['study']}`: {as_markdown(result.label)}",
                    f"{published:.2f}" if published else "",
                    *(result.estimate(metric).text() for metric in ("best_accuracy", "last_accuracy")),
                    f"{result.means.get('epochs_work', result.means['epochs']):.2f}",
                ]
            )
        summary, runs = results[0].summaries[0], [run for result in results for run in result.summaries]
        measured = {f"{run['device']}, {_provenance(run)}": None for run in runs}
        seeds = {", ".join(str(run["seed"]) for run in result.summaries): None for result in results}
        captions.append(
            f"`{study['study']}`: {as_markdown(scale_line(study))}; {summary['train_images']:,} training images"
            f"{f' as {images}' if (images := study.get('images')) else ''}; seeds "
            f"{' or '.join(seeds)}; {'; '.join(measured)}."
        )
    head = ["run", "published best, %", "best, %", "last, %", "epochs' work"]
    return "\n\n".join([table(head, rows), "\n".join(f"* {caption}" for caption in captions)])


def trick_table(contents: list[Content]) -> str:
    """What each trick of the fast recipe is worth to VGG-16."""
    study = newest_study(contents, "tricks")
    return tricks_table(study, read_results(study["folder"], study))


def newest_study(contents: list[Content], name: str) -> Content:
    study = next((content for content in reversed(contents) if content.get("study") == name), None)
    if not study:
        raise UserError(f"results:{name}: no such study is kept")
    return study


def parity_table(contents: list[Content]) -> str:
    """The study of parity.toml beside plain_pytorch.csv in its folder: losses and accuracies after each epoch. A seed
    draws other numbers there, so runs are not paired."""
    study = newest_study(contents, "parity")
    plain, rows = pd.read_csv(study["folder"] / "plain_pytorch.csv"), []
    results = read_results(study["folder"], study)
    for result in results:
        theirs = plain[plain.model == result.model].pivot(index="epoch", columns="seed")
        for epoch, ours in enumerate(result.history.to_dict("records"), 1):
            rows.append([f"`{result.model}`", str(epoch)])
            for name, digits in (("train_loss", 3), ("test_accuracy", 2)):
                one = pd.Series({seed: value for (column, seed), value in ours.items() if column == name})
                other = theirs[name].loc[epoch].add_prefix("plain ")
                rows[-1] += [
                    Estimate.of(other).text(digits), Estimate.of(one).text(digits), difference(one, other).text(digits)
                ]  # fmt: skip
    first = results[0].summaries[0]
    caption = (
        f"fastres: {len(results[0].summaries)} seeds, {first['device']}, amp {first['amp']}, {_provenance(first)}; "
        f"plain PyTorch: {plain.seed.nunique()} seeds, {plain.device[0]}, float32, torch {plain.torch[0]}."
    )
    sides = ["plain PyTorch", "fastres", "difference"]
    head = ["model", "epoch", *(f"loss: {side}" for side in sides), *(f"accuracy, %: {side}" for side in sides)]
    return f"{table(head, rows)}\n\n{caption}"


def claims_table(contents: list[Content]) -> str:
    """Every published figure that the kept studies can be compared with, and whether they agree; those of runs that a
    larger study shares are in the smaller one's rows."""
    rows: list[dict[str, str]] = []
    judged: set[tuple[Any, ...]] = set()
    for study in sorted((content for content in contents if "study" in content), key=lambda one: len(one["runs"])):
        for claim in claims(study, read_results(study["folder"], study)):
            summaries = [summary for run in claim.runs for summary in run.summaries]
            figure = claim.metric, claim.row["published"], len(claim.runs)
            keys = {(*figure, one["model"], one["seed"], one["date"]) for one in summaries}
            if not keys <= judged:
                rows.append({"study": f"`{study['study']}`", **claim.row})
            judged |= keys
    return table_of(sorted(rows, key=lambda row: row["study"]))


TABLES: dict[str, Callable[[list[Content]], str]] = {
    "profile": profile_tables,
    "front": front_table,
    "training": training_table,
    "loaders": loader_table,
    "forward": forward_table,
    "steps": step_table,
    "operator": operator_table,
    "optimizers": optimizer_table,
    "convolutions": convolution_tables,
    "kernels": kernel_tables,
    "studies": study_table,
    "tricks": trick_table,
    "parity": parity_table,
    "claims": claims_table,
}


def _newest(contents: list[Content], benchmark: str, *candidates: str) -> Iterator[tuple[Content, ...]]:
    """The rows of the candidates, with provenance, for each device and case: those that were measured last."""
    found: dict[tuple[str, str], dict[str, Content]] = {}
    for content in (content for content in contents if "rows" in content):
        measured: dict[tuple[str, str], dict[str, Content]] = {}
        for row in content["rows"]:
            if row["benchmark"] == benchmark:
                measured.setdefault((row["device"], row["case"]), {})[row["candidate"]] = content | row
        found = {key: rows for key, rows in found.items() if key not in measured} | measured  # the newest last
    for rows in found.values():
        yield tuple(rows.get(name, {}) for name in candidates)


def _steps(contents: list[Content], benchmark: str, *candidates: str, slower: str) -> list[list[str]]:
    """For each device and model: milliseconds a step of the candidates, and how many times as long ``slower`` takes."""
    rows = []
    for steps in _newest(contents, benchmark, *candidates):
        milliseconds = (f"{1000 * step['seconds']:,.1f}" for step in steps)
        times = _times(steps[candidates.index(slower)])
        rows.append([*_model(steps[0]), *milliseconds, times, _provenance(steps[0])])
    return rows


def _model(row: Content) -> list[str]:
    return [row["device"], f"`{row['case']}`", f"{row['images']:.0f}"]


def _name(run: Content) -> str:
    """A run's name: its file's, without the date."""
    return f"`{re.sub(r'-[0-9-]{10}$', '', run['file']).removeprefix('train-')}`"


def _rate(row: Content) -> str:
    return f"{row['images'] / row['seconds']:,.0f}" if row else ""


def _times(row: Content, digits: int = 2) -> str:
    """The ratio of the medians, and its spread: the rounds' 20th to 80th percentile."""
    low, ratio, high = (f"{row[name]:.{digits}f}" for name in ("times_p20", "times_as_long", "times_p80"))
    return f"{ratio} ({low} to {high})"


def _provenance(where: Content) -> str:
    return f"{where['date'][:10]}, torch {where['versions']['torch']}, {_short(where['commit'])}"


def _short(commit: str | None) -> str:
    if commit is None:
        return "unknown"
    return commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
